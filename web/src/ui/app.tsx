import { useEffect, useMemo, useState } from "preact/hooks";
import type { Device, Settings } from "../engine/api";
import { About } from "./about";
import { Desk } from "./desk";
import { dropped, type Given, picked } from "./files";
import { Gallery } from "./gallery";
import { Icon } from "./icon";
import type { Kept } from "./pictures";
import { forget } from "./share";
import { EXAMPLES, Stage } from "./stage";
import { EMPTY_WISH, type EngineLike, type State, Studio, type Wish } from "./studio";
import { Viewer } from "./viewer";

interface Props {
  engine: EngineLike;
  /** What this device offers. */
  probe: () => Promise<Device>;
  /** Resolves when what is fetched from then on is kept for offline use. */
  ready?: Promise<void>;
}

/** The whole page. */
export function App({ engine, probe, ready }: Props) {
  const [state, setState] = useState<State | null>(null);
  const [wish, setWish] = useState<Wish>(EMPTY_WISH);
  const [viewed, setViewed] = useState<Kept | null>(null);
  const [about, setAbout] = useState(false);
  const [over, setOver] = useState(false);
  const studio = useMemo(() => new Studio(engine, probe, setState, ready), []);
  useEffect(() => void studio.start().catch((error) => studio.complain(error)), []);

  const draw = (which: Wish) => {
    document.querySelector(".stage")?.scrollIntoView({ block: "nearest" }); // from settings far below it
    void studio.draw(which);
  };
  const again = (settings: Settings) => {
    const same = wishOf(settings);
    setWish(same);
    setViewed(null);
    draw(same);
  };
  const asked = () => {
    const wanted = wish.prompt.trim() ? wish : { ...wish, prompt: EXAMPLES[0] }; // no words give no picture of anything
    setWish(wanted);
    draw(wanted);
  };
  const take = async (given: Promise<Given> | Given) => {
    try {
      const settings = await studio.take(await given);
      if (settings) again(settings);
    } catch (error) {
      studio.complain(error);
    }
  };
  useDrop(take, setOver);

  if (!state) return null;
  const { work, models, model, error, notes, refused, bundle } = state;
  return (
    <div class="page">
      <header>
        <h1>pocketfusion</h1>
        {models.length > 1 && (
          <select
            aria-label="Model"
            disabled={work.kind !== "idle"}
            value={model?.id}
            onChange={({ currentTarget }) => {
              const chosen = models.find(({ id }) => id === currentTarget.value);
              setWish({ ...wish, steps: null, guidance: null, sampler: null }); // another model has its own
              if (chosen) void studio.choose(chosen);
            }}
          >
            {models.map(({ id, name }) => (
              <option key={id} value={id}>
                {name}
              </option>
            ))}
          </select>
        )}
        <button type="button" class="quiet square" aria-label="About, models and storage" onClick={() => setAbout(true)}>
          <Icon name="more" />
        </button>
      </header>
      <main>
        <div class="table">
          <Stage
            state={state}
            prompt={wish.prompt}
            onExample={(prompt) => setWish({ ...wish, prompt })}
            onView={setViewed}
          />
          {error && (
            <div class="notice error" role="alert">
              <p>{error}</p>
              <button type="button" class="quiet square" aria-label="Put this message away" onClick={() => studio.dismiss()}>
                <Icon name="close" />
              </button>
            </div>
          )}
          {[...notes, ...(refused ? [refused] : [])].map((note) => (
            <p key={note} class="notice">
              {note}
            </p>
          ))}
        </div>
        <Desk
          state={state}
          limits={studio.limits}
          wish={wish}
          onWish={setWish}
          onDraw={asked}
          onStop={() => studio.cancel()}
        />
        <Gallery pictures={state.gallery} total={state.total} onView={setViewed} onMore={() => void studio.showMore()} />
      </main>
      {viewed && (
        <Viewer
          kept={viewed}
          busy={work.kind !== "idle" || !bundle}
          onAgain={() => again(viewed.settings)}
          onDelete={() => {
            void studio.delete(viewed).then(() => forget(viewed));
            setViewed(null);
          }}
          onClose={() => setViewed(null)}
        />
      )}
      {about && (
        <About
          state={state}
          onPick={(files) => {
            setAbout(false);
            void take(Promise.resolve().then(() => picked(files)));
          }}
          onFree={() => void studio.freeStorage()}
          onClose={() => setAbout(false)}
        />
      )}
      {over && <div class="drop">Drop a picture to draw it again, or a bundle’s folder</div>}
    </div>
  );
}

function wishOf(settings: Settings): Wish {
  return {
    prompt: settings.prompt,
    negativePrompt: settings.negative_prompt,
    guidance: settings.guidance_scale,
    steps: settings.num_inference_steps,
    sampler: settings.sampler,
    seed: settings.seed,
    count: 1,
  };
}

/** Anything may be dropped anywhere. */
function useDrop(take: (given: Promise<Given>) => void, setOver: (over: boolean) => void): void {
  useEffect(() => {
    const files = (event: DragEvent) => event.dataTransfer?.types.includes("Files");
    const onOver = (event: DragEvent) => {
      if (!files(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const onLeave = (event: DragEvent) => {
      if (!event.relatedTarget) setOver(false);
    };
    const onDrop = (event: DragEvent) => {
      setOver(false);
      if (!files(event) || !event.dataTransfer) return;
      event.preventDefault();
      take(dropped(event.dataTransfer));
    };
    addEventListener("dragover", onOver);
    addEventListener("dragleave", onLeave);
    addEventListener("drop", onDrop);
    return () => {
      removeEventListener("dragover", onOver);
      removeEventListener("dragleave", onLeave);
      removeEventListener("drop", onDrop);
    };
  }, []);
}
