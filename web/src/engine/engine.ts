/** The page's side of the engine: a worker that draws, replaced when it was ended or its GPU went away. */

import type {
  Backend,
  GenerateOptions,
  GenerateRequest,
  LoadOptions,
  LoadReport,
  MemoryReport,
  Picture,
} from "./api";
import type { Bundle } from "./bundle";
import { probe } from "./device";
import { BundleError, EngineError } from "./errors";
import { SELF_CHECK } from "./manifest";
import { type FromWorker, type ToWorker, unpack } from "./messages";

export interface EngineOptions {
  /** Address of the folder with LiteRT's WebAssembly, relative to the page. */
  wasm: string;
}

const MAX_SEED = 2 ** 32 - 1;
const MAX_COUNT = 1000;
/** How long a step at work may take after it was cancelled, before its worker is ended. */
const PATIENCE = 3000;

type Event = Exclude<FromWorker, { type: "done" | "failed" | "lost" }>;
type Unsent<Message> = Message extends { id: number } ? Omit<Message, "id"> : never;

interface Waiting {
  resolve: (value: unknown) => void;
  reject: (error: Error) => void;
  onEvent: (event: Event) => void;
}

class DeviceLost extends Error {}

export class Engine {
  private worker: Worker | null = null;
  private readonly waiting = new Map<number, Waiting>();
  private nextId = 0;
  private busy = false;
  private lastLoad: { bundle: Bundle; options: LoadOptions } | null = null;
  private distrusted: string | null = null; // why the GPU is not used for this bundle any more

  constructor(readonly options: EngineOptions) {}

  /** Called when the engine itself changes the back end (the GPU was lost), with the new report. */
  onFallback: ((report: LoadReport) => void) | null = null;

  /** Loads the bundle in a fresh worker; rejects with BundleError or EngineError. */
  async load(bundle: Bundle, options: LoadOptions = {}): Promise<LoadReport> {
    this.stop();
    this.lastLoad = { bundle, options };
    this.distrusted = null;
    return await this.loadAgain(options);
  }

  /** Draws; one call at a time. Rejects with EngineError. */
  async generate(request: GenerateRequest, options: GenerateOptions = {}): Promise<Picture[]> {
    const whole = complete(request);
    if (!this.lastLoad) throw new EngineError("setting", "no bundle is loaded: load one first");
    if (this.busy) throw new EngineError("busy", "a picture is being drawn: cancel it, or wait for it");
    this.busy = true;
    const pictures: Picture[] = [];
    try {
      for (;;) {
        try {
          if (!this.worker) await this.loadAgain({ ...this.lastLoad.options, ...signalOf(options) });
          await this.draw(rest(whole, pictures.length), pictures, options);
          return pictures;
        } catch (error) {
          if (!(error instanceof DeviceLost)) throw error;
          // the same request again, from the picture that was at work
          this.distrusted = `the GPU was lost (${error.message})`;
          this.onFallback?.(await this.loadAgain({ ...this.lastLoad.options, ...signalOf(options) }));
        }
      }
    } finally {
      this.busy = false;
    }
  }

  async memory(): Promise<MemoryReport> {
    if (!this.worker) return { heapBytes: 0 };
    return { heapBytes: (await this.ask({ type: "memory" })) as number };
  }

  /** Ends the worker at once and gives its memory back; the next `generate` loads again. */
  stop(): void {
    this.end(new EngineError("cancelled", "the engine was stopped"));
  }

  private end(error: Error): void {
    this.worker?.terminate();
    this.worker = null;
    const all = [...this.waiting.values()];
    this.waiting.clear();
    for (const { reject } of all) reject(error);
  }

  /** Loads the last bundle: on the GPU if it may be used, and on WASM where that fails. */
  private async loadAgain(options: LoadOptions): Promise<LoadReport> {
    const { bundle } = this.lastLoad as { bundle: Bundle };
    const device = await probe();
    const threads = Math.min(options.threads ?? device.threads, device.threads);
    const asked = options.backend === "webgpu" && device.software;
    let missing = this.distrusted ?? (asked ? null : device.webgpuMissing);
    if (options.backend === "wasm") missing = null;
    else if (bundle.manifest.target !== "litert-gpu") missing ??= "the bundle was exported for CPUs";
    else if (!bundle.manifest.files[SELF_CHECK]) missing ??= "the bundle has no self-check: export it again";
    const notes: string[] = [];
    if (options.backend !== "wasm" && !missing) {
      try {
        return await this.loadOn("webgpu", 1, bundle, options);
      } catch (error) {
        if (error instanceof BundleError || (error as EngineError).fault === "cancelled") throw error;
        missing = (error as Error).message;
        this.distrusted = missing;
      }
    }
    if (missing) notes.push(`WebGPU is not used: ${missing}`);
    const report = await this.loadOn("wasm", threads, bundle, options);
    if (device.threadsMissing) notes.push(device.threadsMissing);
    return { ...report, notes: [...notes, ...report.notes] };
  }

  private async loadOn(backend: Backend, threads: number, bundle: Bundle, options: LoadOptions): Promise<LoadReport> {
    options.signal?.throwIfAborted();
    this.end(new EngineError("cancelled", "the bundle is loaded again"));
    const wasm = new URL(this.options.wasm, document.baseURI).href;
    const message: Unsent<ToWorker> = {
      type: "load",
      bundle: bundle.descriptor,
      wasm: wasm.endsWith("/") ? wasm : `${wasm}/`,
      backend,
      threads,
    };
    const abort = () => this.end(new EngineError("cancelled", "loading was cancelled"));
    options.signal?.addEventListener("abort", abort);
    try {
      const report = await this.ask(message, (event) => {
        if (event.type === "progress") options.onProgress?.(event.progress);
      });
      return report as LoadReport;
    } catch (error) {
      this.end(error as Error);
      throw error instanceof DeviceLost ? new EngineError("device-lost", `the GPU was lost (${error.message})`) : error;
    } finally {
      options.signal?.removeEventListener("abort", abort);
    }
  }

  private async draw(
    request: Required<GenerateRequest> & { seed: number },
    pictures: Picture[],
    options: GenerateOptions,
  ): Promise<void> {
    const first = pictures.length;
    const count = first + request.count;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const abort = () => {
      this.worker?.postMessage({ type: "cancel" } satisfies ToWorker);
      timer = setTimeout(() => this.end(new EngineError("cancelled", "cancelled within a step")), PATIENCE);
    };
    if (options.signal?.aborted) throw new EngineError("cancelled", "cancelled before the first step");
    options.signal?.addEventListener("abort", abort);
    try {
      await this.ask({ type: "generate", request }, (event) => {
        if (event.type === "step") options.onStep?.({ ...event.event, picture: first + event.event.picture, count });
        if (event.type === "warning" && first === 0) options.onWarning?.(event.sentence);
        if (event.type === "picture") {
          pictures.push(event.picture);
          options.onPicture?.(event.picture, first + event.index);
        }
      });
    } catch (error) {
      // after running out of memory, Wasm is in no state to go on
      if ((error as EngineError).fault === "memory") this.end(error as Error);
      throw error;
    } finally {
      clearTimeout(timer);
      options.signal?.removeEventListener("abort", abort);
    }
  }

  private ask(message: Unsent<ToWorker>, onEvent: (event: Event) => void = () => undefined): Promise<unknown> {
    const worker = (this.worker ??= this.start());
    const id = this.nextId++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onEvent });
      worker.postMessage({ ...message, id });
    });
  }

  private start(): Worker {
    const worker = new Worker(new URL("./worker.ts", import.meta.url), { name: "pocketfusion" });
    worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
      if (this.worker === worker) this.receive(data);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      if (this.worker !== worker) return;
      this.end(new EngineError("unsupported", `the engine's worker failed (${event.message || "it cannot be loaded"})`));
    };
    return worker;
  }

  private receive(message: FromWorker): void {
    if (message.type === "lost") {
      this.end(new DeviceLost(message.reason));
      return;
    }
    const waiting = this.waiting.get(message.id);
    if (message.type === "done") waiting?.resolve(message.value);
    else if (message.type === "failed") waiting?.reject(unpack(message.error));
    else {
      waiting?.onEvent(message);
      return;
    }
    this.waiting.delete(message.id);
  }
}

/** The request with nothing left out; throws EngineError "setting" for a number out of range. */
function complete(request: GenerateRequest): Required<GenerateRequest> & { seed: number } {
  const { count = 1, negativePrompt = "", previewEvery = 0, guidance = null, steps = null, sampler = null } = request;
  if (!Number.isInteger(count) || count < 1 || count > MAX_COUNT) {
    throw new EngineError("setting", `the number of pictures is ${count}: choose 1 to ${MAX_COUNT}`);
  }
  const most = MAX_SEED - count + 1;
  const seed = request.seed ?? Math.floor(Math.random() * (most + 1));
  if (!Number.isInteger(seed) || seed < 0 || seed > most) {
    throw new EngineError("setting", `the seed is ${seed}: choose 0 to ${most}, as picture i takes seed + i`);
  }
  const { prompt, eta = null } = request;
  return { prompt, negativePrompt, guidance, steps, sampler, eta, seed, count, previewEvery };
}

/** What of a request is left after `done` pictures. */
function rest<Request extends { seed: number; count: number }>(request: Request, done: number): Request {
  return { ...request, seed: request.seed + done, count: request.count - done };
}

function signalOf({ signal }: GenerateOptions): { signal?: AbortSignal } {
  return signal ? { signal } : {};
}
