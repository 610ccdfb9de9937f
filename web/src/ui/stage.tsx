import { useEffect, useRef } from "preact/hooks";
import type { Pixels } from "../engine/api";
import { Icon } from "./icon";
import type { Kept } from "./pictures";
import { addressOf, canShare, share } from "./share";
import type { State, Work } from "./studio";
import { duration, fileName, megabytes } from "./words";

/** What may be drawn by somebody who has no wish yet. */
export const EXAMPLES = ["a red heart", "a smiling face", "a cat face", "a green tree"];

interface Props {
  state: State;
  prompt: string;
  onExample: (prompt: string) => void;
  onView: (kept: Kept) => void;
}

/** Where pictures come into being: one large, or several in a square. */
export function Stage({ state, prompt, onExample, onView }: Props) {
  const { work, places, bundle } = state;
  const image = bundle?.manifest.image;
  const columns = Math.ceil(Math.sqrt(Math.max(places.length, 1)));
  return (
    <section
      class="stage"
      aria-label="Pictures being drawn"
      aria-busy={work.kind === "drawing"}
      style={{ "--columns": columns, "--shape": image ? image.width / image.height : 1 }}
    >
      <div class={`places ${places.length ? "" : "none"}`}>
        {places.length === 0 ? (
          <div class="empty">
            {work.kind === "loading" || work.kind === "opening" ? (
              <p>{work.kind === "opening" ? "Opening the model" : headline(work)}</p>
            ) : (
              <>
                <p>What shall it draw?</p>
                <ul>
                  {EXAMPLES.map((example) => (
                    <li key={example}>
                      <button type="button" class="example" aria-pressed={prompt === example} onClick={() => onExample(example)}>
                        {example}
                      </button>
                    </li>
                  ))}
                </ul>
              </>
            )}
          </div>
        ) : (
          places.map(({ pixels, kept }, index) => (
            <button
              type="button"
              key={index}
              class={`place ${kept ? "" : "unfinished"}`}
              disabled={!kept}
              aria-label={kept ? `Picture ${index + 1}: ${kept.settings.prompt || "no prompt"}. Open it` : `Picture ${index + 1}, not finished`}
              onClick={() => kept && onView(kept)}
            >
              {pixels && <Canvas pixels={pixels} />}
            </button>
          ))
        )}
      </div>
      <Under state={state} />
      <p class="unseen" role="status">
        {told(work, places.filter(({ kept }) => kept).length)}
      </p>
    </section>
  );
}

function Canvas({ pixels }: { pixels: Pixels }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    canvas.current?.getContext("2d")?.putImageData(new ImageData(pixels.data, pixels.width, pixels.height), 0, 0);
  }, [pixels]);
  return <canvas ref={canvas} width={pixels.width} height={pixels.height} />;
}

/** The line below the stage: how far it is, then what came out. */
function Under({ state }: { state: State }) {
  const { work, places, facts } = state;
  if (work.kind !== "idle") {
    const part = done(work);
    return (
      <div class="under">
        <div
          class={`progress ${part === null ? "unknown" : ""}`}
          role="progressbar"
          aria-label={words(work)}
          aria-valuemin={0}
          aria-valuemax={100}
          {...(part === null ? {} : { "aria-valuenow": Math.round(100 * part) })}
        >
          <span style={{ inlineSize: part === null ? undefined : `${100 * part}%` }} />
        </div>
        <p>{words(work)}</p>
      </div>
    );
  }
  const [first] = places;
  if (!first?.kept) {
    return (
      <div class="under">
        <p>Drawn on this device. Nothing leaves it.</p>
      </div>
    );
  }
  const took = facts?.milliseconds ? ` · ${duration(facts.milliseconds.total)}` : "";
  const seeds = places.length > 1 ? `from seed ${first.kept.settings.seed}` : `seed ${first.kept.settings.seed}`;
  return (
    <div class="under">
      <p class="first">
        {seeds}
        {took}
        {places.length > 1 && took ? " the last" : ""}
      </p>
      {places.length === 1 && <Out kept={first.kept} />}
    </div>
  );
}

/** The shortest ways out of the page. */
function Out({ kept }: { kept: Kept }) {
  return (
    <>
      {canShare(kept) && (
        <button type="button" class="quiet square" aria-label="Share the picture" onClick={() => void share(kept).catch(() => undefined)}>
          <Icon name="share" />
        </button>
      )}
      <a class="button quiet square" aria-label="Save the picture" href={addressOf(kept)} download={fileName(kept.settings)}>
        <Icon name="save" />
      </a>
    </>
  );
}

/** How much of the work is done, 0 to 1; null where nobody knows. */
function done(work: Work): number | null {
  if (work.kind === "drawing") {
    return work.of ? (work.picture + work.step / (work.of + 1)) / work.count : 0;
  }
  if (work.kind === "loading" && work.progress?.stage === "read") return work.progress.bytes / work.progress.of;
  return null;
}

/** What the empty stage says while a model is loaded. */
function headline(work: Work): string {
  const stage = work.kind === "loading" ? work.progress?.stage : undefined;
  if (stage === "compile") return "Preparing the model";
  return stage === "self-check" ? "Checking this device’s arithmetic" : "Fetching the model";
}

function words(work: Work): string {
  if (work.kind === "opening") return "Opening the model";
  if (work.kind === "drawing") {
    const picture = work.count > 1 ? `Picture ${work.picture + 1} of ${work.count}, step` : "Step";
    return work.of ? `${picture} ${work.step} of ${work.of}` : "Reading the prompt";
  }
  if (work.kind === "loading" && work.progress) {
    const { stage, bytes, of, what } = work.progress;
    if (stage === "read") return `${megabytes(bytes)} of ${megabytes(of)}`;
    return stage === "compile" ? what.replaceAll("_", " ") : "self-check";
  }
  return work.kind === "loading" ? "Starting" : "";
}

/** What a screen reader is told: beginnings and ends, not every step. */
function told(work: Work, finished: number): string {
  if (work.kind === "drawing") return work.count > 1 ? `Drawing picture ${work.picture + 1} of ${work.count}` : "Drawing";
  if (work.kind === "loading") return "Loading the model";
  if (work.kind === "opening") return "Opening the model";
  return finished ? (finished === 1 ? "The picture is ready" : `${finished} pictures are ready`) : "";
}
