import { useEffect, useId, useRef } from "preact/hooks";
import { Facts } from "./facts";
import { Icon } from "./icon";
import type { State, Wish } from "./studio";
import { megabytes, styleOf, withStyle } from "./words";

const MOST_SEED = 2 ** 32 - 1;
const MOST_PICTURES = 9;

interface Props {
  state: State;
  limits: { samplers: string[]; steps: number; negative: boolean };
  wish: Wish;
  onWish: (wish: Wish) => void;
  onDraw: () => void;
  onStop: () => void;
}

/** What is asked for: prompt, style, settings, and the button. */
export function Desk({ state, limits, wish, onWish, onDraw, onStop }: Props) {
  const { bundle, styles, work } = state;
  const change = (part: Partial<Wish>) => onWish({ ...wish, ...part });
  const style = styleOf(wish.prompt, styles);
  const chips = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const row = chips.current;
    const chosen = row?.querySelector<HTMLElement>("[aria-pressed=true]");
    if (row && chosen) row.scrollLeft = chosen.offsetLeft - (row.clientWidth - chosen.offsetWidth) / 2;
  }, [style]);
  const busy = work.kind === "drawing" || work.kind === "loading";
  const size = bundle ? Object.values(bundle.manifest.files).reduce((sum, file) => sum + file.size, 0) : 0;
  return (
    <form
      class="desk"
      aria-label="What to draw"
      onSubmit={(event) => {
        event.preventDefault();
        if (!busy && bundle) onDraw();
      }}
    >
      <label class="prompt">
        <span class="unseen">Prompt</span>
        <textarea
          rows={2}
          value={wish.prompt}
          placeholder="Describe a picture"
          autocapitalize="none"
          enterkeyhint="go"
          onInput={({ currentTarget }) => change({ prompt: currentTarget.value })}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            event.currentTarget.form?.requestSubmit();
          }}
        />
      </label>
      {styles.length > 0 && (
        <div ref={chips} class="chips" role="group" aria-label="Style">
          {styles.map((each) => (
            <button
              type="button"
              key={each}
              class="chip"
              aria-pressed={each === style}
              onClick={() => change({ prompt: withStyle(wish.prompt, each === style ? null : each, styles) })}
            >
              {each.replace(/ style$/, "")}
            </button>
          ))}
        </div>
      )}
      <div class="go">
        {busy ? (
          <button type="button" class="stop" onClick={onStop}>
            Stop
          </button>
        ) : (
          <button type="submit" class="draw" disabled={!bundle || work.kind !== "idle"}>
            <span>Draw</span>
            {bundle && !state.kept && <small>fetches {megabytes(size)} once</small>}
          </button>
        )}
      </div>
      <Details state={state} limits={limits} wish={wish} change={change} />
      {state.facts && <Facts facts={state.facts} device={state.device} />}
    </form>
  );
}

type Part = (part: Partial<Wish>) => void;

function Details({ state, limits, wish, change }: Pick<Props, "state" | "limits" | "wish"> & { change: Part }) {
  const id = useId();
  const manifest = state.bundle?.manifest;
  if (!manifest) return null;
  const steps = wish.steps ?? manifest.defaults.num_inference_steps;
  const guidance = wish.guidance ?? manifest.defaults.guidance_scale;
  const [least, most] = manifest.guidance_range ?? [1, 15];
  return (
    <details class="settings">
      <summary>
        <span>Settings</span>
        <small>
          {steps} steps · guidance {guidance}
          {wish.seed !== null && ` · seed ${wish.seed}`}
        </small>
      </summary>
      <div class="fields">
        <Slider label="Steps" value={steps} min={1} max={Math.max(limits.steps, steps)} step={1} onValue={(value) => change({ steps: value })} />
        {manifest.guidance !== "folded" && (
          <Slider label="Guidance" value={guidance} min={Math.min(least, guidance)} max={Math.max(most, guidance)} step={0.5} onValue={(value) => change({ guidance: value })} />
        )}
        <Slider label="Pictures" value={wish.count} min={1} max={MOST_PICTURES} step={1} onValue={(value) => change({ count: value })} />
        {limits.samplers.length > 1 && (
          <label class="field">
            <span>Sampler</span>
            <select
              value={wish.sampler ?? manifest.sampler}
              onChange={({ currentTarget }) => change({ sampler: currentTarget.value })}
            >
              {limits.samplers.map((name) => (
                <option key={name}>{name}</option>
              ))}
            </select>
          </label>
        )}
        <div class="field seed">
          <label for={id}>Seed</label>
          <input
            id={id}
            type="number"
            inputMode="numeric"
            min={0}
            max={MOST_SEED - wish.count + 1}
            placeholder="random"
            value={wish.seed ?? ""}
            onInput={({ currentTarget }) => change({ seed: seedOf(currentTarget.value, wish.count) })}
          />
          <button
            type="button"
            class="quiet square"
            aria-label="A random seed for each picture"
            aria-pressed={wish.seed === null}
            onClick={() => change({ seed: null })}
          >
            <Icon name="dice" />
          </button>
        </div>
        {limits.negative && (
          <label class="field tall">
            <span>Not in the picture</span>
            <input
              type="text"
              autocapitalize="none"
              value={wish.negativePrompt}
              onInput={({ currentTarget }) => change({ negativePrompt: currentTarget.value })}
            />
          </label>
        )}
        <button
          type="button"
          class="quiet"
          onClick={() => change({ steps: null, guidance: null, sampler: null, seed: null, count: 1, negativePrompt: "" })}
        >
          Back to the model’s own
        </button>
      </div>
    </details>
  );
}

interface SliderProps {
  label: string;
  value: number;
  min: number;
  max: number;
  step: number;
  onValue: (value: number) => void;
}

function Slider({ label, value, onValue, ...range }: SliderProps) {
  return (
    <label class="field">
      <span>{label}</span>
      <input type="range" {...range} aria-label={label} value={value} onInput={({ currentTarget }) => onValue(currentTarget.valueAsNumber)} />
      <output>{value}</output>
    </label>
  );
}

function seedOf(text: string, count: number): number | null {
  const digits = text.replace(/\D/g, "");
  return digits ? Math.min(Number(digits), MOST_SEED - count + 1) : null;
}
