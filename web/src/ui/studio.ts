/** What the page does, without what it looks like: models, the engine's life, drawing, the gallery. */

import {
  type Bundle,
  BundleError,
  cacheStorage,
  type Device,
  encodePng,
  type Engine,
  EngineError,
  type GenerateRequest,
  type LoadProgress,
  type LoadReport,
  type Picture,
  type Pixels,
  readPngSettings,
  type Settings,
} from "../engine/api";
import { allowedSamplers, mostSteps } from "../engine/manifest";
import { bestForm, diskModel, isKept, type Model, open, siteModels, stylesOf } from "./library";
import { type Given } from "./files";
import { type Kept, Pictures } from "./pictures";
import { sentence } from "./words";

/** What the studio needs of an engine. */
export type EngineLike = Pick<Engine, "load" | "generate" | "memory" | "onFallback">;

/** What people set; null is the bundle's own value, and a random seed. */
export interface Wish {
  prompt: string;
  negativePrompt: string;
  guidance: number | null;
  steps: number | null;
  sampler: string | null;
  seed: number | null;
  count: number;
}

export const EMPTY_WISH: Wish = {
  prompt: "",
  negativePrompt: "",
  guidance: null,
  steps: null,
  sampler: null,
  seed: null,
  count: 1,
};

/** One place on the stage: a preview, then the picture. */
export interface Place {
  pixels: Pixels | null;
  kept: Kept | null;
}

export type Work =
  | { kind: "idle" }
  | { kind: "opening" }
  | { kind: "loading"; progress: LoadProgress | null }
  | { kind: "drawing"; picture: number; count: number; step: number; of: number };

/** How the last pictures came about. */
export interface Facts {
  report: LoadReport;
  milliseconds: Picture["milliseconds"] | null;
  heapBytes: number | null;
}

export interface State {
  models: Model[];
  model: Model | null;
  bundle: Bundle | null;
  styles: string[];
  device: Device | null;
  /** If drawing fetches nothing any more. */
  kept: boolean;
  work: Work;
  places: Place[];
  /** The newest pictures, and how many there are. */
  gallery: Kept[];
  total: number;
  facts: Facts | null;
  /** The sentence of what went wrong last; null where nothing did, or it was put away. */
  error: string | null;
  /** Sentences that nothing depends on. */
  notes: string[];
  /** Why pictures are not kept. */
  refused: string | null;
}

/** Pictures that the gallery shows at first, and more at a time. */
const PAGE = 60;

export class Studio {
  state: State = {
    models: [],
    model: null,
    bundle: null,
    styles: [],
    device: null,
    kept: false,
    work: { kind: "opening" },
    places: [],
    gallery: [],
    total: 0,
    facts: null,
    error: null,
    notes: [],
    refused: null,
  };
  private readonly pictures = new Pictures(() => void this.refresh());
  private shown = PAGE;
  private loaded: Bundle | null = null;
  private report: LoadReport | null = null;
  private stopping = new AbortController();

  constructor(
    private readonly engine: EngineLike,
    private readonly probe: () => Promise<Device>,
    private readonly onChange: (state: State) => void,
    /** Resolves when what is fetched from then on is kept for offline use. */
    private readonly ready: Promise<void> = Promise.resolve(),
  ) {
    engine.onFallback = (report) => this.took(report);
  }

  private set(change: Partial<State>): void {
    this.state = { ...this.state, ...change };
    this.onChange(this.state);
  }

  /** Looks for models and opens the one of the last visit, or the first. */
  async start(): Promise<void> {
    await this.refresh();
    const [models, device] = await Promise.all([siteModels(), this.probe()]);
    this.set({ models, device });
    const last = remembered("model");
    const model = models.find(({ id }) => id === last) ?? models[0];
    if (model) await this.choose(model);
    else this.set({ work: { kind: "idle" }, error: "This site offers no model: open a bundle's folder from this device." });
  }

  /** Opens a model; its networks are fetched when they are needed, or now if they were kept. */
  async choose(model: Model): Promise<void> {
    this.set({ work: { kind: "opening" }, error: null, notes: [] });
    this.stopping = new AbortController();
    try {
      const form = bestForm(model, this.state.device?.webgpuMissing === null);
      const bundle = await open(form);
      const [styles, kept] = await Promise.all([stylesOf(bundle).catch(() => []), isKept(bundle)]);
      this.set({ model, bundle, styles, kept: kept || !form.kept, facts: null, places: [], work: { kind: "idle" } });
      remember("model", model.id);
      if (kept) await this.load().catch(() => undefined);
    } catch (error) {
      this.fail(error);
    }
  }

  /** A picture's settings, to draw it again; opens a folder. Null where it was a folder or has no settings. */
  async take(given: Given): Promise<Settings | null> {
    if (this.state.work.kind !== "idle") {
      this.set({ error: "A picture is being drawn: stop it, or wait for it, and try again." });
      return null;
    }
    try {
      if ("picture" in given) {
        const settings = await readPngSettings(new Uint8Array(await given.picture.arrayBuffer()));
        if (!settings) this.set({ error: "That picture has no settings inside: only pictures drawn here or by generate have." });
        else await this.follow(settings);
        return settings;
      }
      const model = await diskModel(given.folder);
      const models = [...this.state.models.filter(({ id }) => id !== model.id), model];
      this.set({ models });
      await this.choose(model);
    } catch (error) {
      this.fail(error);
    }
    return null;
  }

  /** Opens the model that a picture was drawn with if it is here, and says so if it is not. */
  private async follow({ bundle: drawnWith }: Settings): Promise<void> {
    const hash = drawnWith.split(" ").at(-1);
    if (!hash || hash === this.state.bundle?.hash) return;
    const forms = (model: Model) => [model.forms.wasm, model.forms.webgpu];
    const model = this.state.models.find((one) => forms(one).some((form) => form?.sha256 === hash));
    if (model && model !== this.state.model) await this.choose(model);
    else if (!model) {
      this.set({ notes: [`The picture was drawn with ${drawnWith.split(" ")[0]}, which is not here: this model draws it otherwise.`] });
    }
  }

  async draw(wish: Wish): Promise<void> {
    if (this.state.work.kind !== "idle" || !this.state.bundle) return;
    this.stopping = new AbortController();
    this.set({ error: null, notes: [] });
    try {
      if (this.loaded !== this.state.bundle) await this.load();
      const places = Array.from({ length: wish.count }, (): Place => ({ pixels: null, kept: null }));
      const place = (index: number, change: Partial<Place>) =>
        this.set({ places: this.state.places.map((old, i) => (i === index ? { ...old, ...change } : old)) });
      this.set({ places, work: { kind: "drawing", picture: 0, count: wish.count, step: 0, of: wish.steps ?? 0 } });
      const keeping: Promise<void>[] = [];
      const pictures = await this.engine.generate(requestOf(wish), {
        signal: this.stopping.signal,
        onStep: ({ picture, count, step, of, preview }) => {
          if (preview) place(picture, { pixels: preview });
          this.set({ work: { kind: "drawing", picture, count, step, of } });
        },
        onPicture: (picture, index) => {
          place(index, { pixels: picture });
          keeping.push(this.keep(picture).then((kept) => place(index, { kept })));
        },
        onWarning: (warning) => this.set({ notes: [...this.state.notes, sentence(warning)] }),
      });
      await Promise.all(keeping);
      const { heapBytes } = await this.engine.memory();
      const last = pictures.at(-1)?.milliseconds;
      const milliseconds = last ? { ...last, text: pictures[0].milliseconds.text } : null; // encoded once for all
      if (this.report) this.set({ facts: { report: this.report, milliseconds, heapBytes } });
      this.set({ work: { kind: "idle" } });
    } catch (error) {
      this.set({ places: this.state.places.filter(({ kept }) => kept) });
      this.fail(error);
    }
  }

  cancel(): void {
    this.stopping.abort();
  }

  async delete(kept: Kept): Promise<void> {
    await this.pictures.delete(kept.id);
    this.set({ places: this.state.places.filter((place) => place.kept?.id !== kept.id) });
    await this.refresh();
  }

  /** Gives back what models take of this device's storage; the gallery stays. */
  async freeStorage(): Promise<void> {
    await cacheStorage()?.clear().catch(() => undefined);
    const onDisk = Object.values(this.state.model?.forms ?? {}).some((form) => !form.kept);
    this.set({ kept: onDisk });
  }

  async showMore(): Promise<void> {
    this.shown += PAGE;
    await this.refresh();
  }

  dismiss(): void {
    this.set({ error: null });
  }

  complain(error: unknown): void {
    this.fail(error);
  }

  private async load(): Promise<void> {
    const bundle = this.state.bundle as Bundle;
    this.loaded = null;
    this.set({ work: { kind: "loading", progress: null } });
    await this.ready;
    try {
      const signal = this.stopping.signal;
      this.took(
        await this.engine.load(bundle, {
          signal,
          onProgress: (progress) => this.set({ work: { kind: "loading", progress } }),
        }),
      );
    } catch (error) {
      this.fail(error);
      throw error;
    }
    this.loaded = bundle;
    this.set({ kept: this.state.kept || (await isKept(bundle)), work: { kind: "idle" } });
  }

  private took(report: LoadReport): void {
    this.report = report;
    this.set({ facts: { report, milliseconds: null, heapBytes: null } });
  }

  private async keep(picture: Picture): Promise<Kept> {
    const { settings, width, height } = picture;
    const kept = await this.pictures.add({ png: await encodePng(picture, settings), settings, width, height });
    await this.refresh();
    return kept;
  }

  private async refresh(): Promise<void> {
    const [gallery, total] = await Promise.all([this.pictures.newest(this.shown), this.pictures.count()]);
    this.set({ gallery, total, refused: this.pictures.refused });
  }

  private fail(error: unknown): void {
    const cancelled = (error instanceof EngineError && error.fault === "cancelled") || (error as Error).name === "AbortError";
    const told = error instanceof BundleError || error instanceof EngineError || error instanceof Error;
    this.set({ work: { kind: "idle" }, error: cancelled ? null : sentence(told ? (error as Error).message : String(error)) });
  }

  /** What the bundle allows, for the form. */
  get limits(): { samplers: string[]; steps: number; negative: boolean } {
    const manifest = this.state.bundle?.manifest;
    if (!manifest) return { samplers: [], steps: 50, negative: true };
    return {
      samplers: allowedSamplers(manifest),
      steps: Math.min(50, mostSteps(manifest.sampler, manifest.scheduler)),
      negative: manifest.guidance === "classifier-free",
    };
  }
}

function requestOf(wish: Wish): GenerateRequest {
  return { ...wish, prompt: wish.prompt.trim(), previewEvery: 1 };
}

function remembered(key: string): string | null {
  try {
    return localStorage.getItem(`pocketfusion-${key}`);
  } catch {
    return null; // storage refused
  }
}

function remember(key: string, value: string): void {
  try {
    localStorage.setItem(`pocketfusion-${key}`, value);
  } catch {
    // storage refused: the next visit begins with the first model
  }
}
