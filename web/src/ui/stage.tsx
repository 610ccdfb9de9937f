import { useEffect, useRef } from "preact/hooks";
import type { Pixels } from "../engine/api";
import type { Kept } from "./pictures";
import type { State, Work } from "./studio";
import { megabytes } from "./words";

const EXAMPLES = ["a red apple", "a smiling face", "a sailing boat", "a yellow flower"];

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
    <section class="stage" aria-label="Pictures being drawn" aria-busy={work.kind === "drawing"}>
      <div
        class={`places ${places.length ? "" : "none"}`}
        style={{ "--columns": columns, "--shape": image ? image.width / image.height : 1 }}
      >
        {places.length === 0 ? (
          <div class="empty">
            {work.kind === "loading" || work.kind === "opening" ? (
              <p>{words(work)}</p>
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
      <Progress work={work} />
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

function Progress({ work }: { work: Work }) {
  if (work.kind === "idle") return <div class="progress" />;
  const part = share(work);
  return (
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
  );
}

/** How much of the work is done, 0 to 1; null where nobody knows. */
function share(work: Work): number | null {
  if (work.kind === "drawing") {
    return work.of ? (work.picture + work.step / (work.of + 1)) / work.count : 0;
  }
  if (work.kind === "loading" && work.progress?.stage === "read") return work.progress.bytes / work.progress.of;
  return null;
}

export function words(work: Work): string {
  if (work.kind === "opening") return "Opening the model";
  if (work.kind === "drawing") {
    const picture = work.count > 1 ? `Picture ${work.picture + 1} of ${work.count}, step` : "Step";
    return work.of ? `${picture} ${work.step} of ${work.of}` : "Reading the prompt";
  }
  if (work.kind === "loading" && work.progress) {
    const { stage, bytes, of, what } = work.progress;
    if (stage === "read") return `Fetching ${megabytes(bytes)} of ${megabytes(of)}`;
    const name = what.replaceAll("_", " ");
    return stage === "compile" ? `Preparing the ${name}` : "Checking this device’s arithmetic";
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
