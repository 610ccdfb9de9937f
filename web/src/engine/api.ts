/**
 * The engine's interface: what a page needs to open a bundle and draw with it in a worker.
 *
 * ```ts
 * const bundle = await openBundle(urlSource("bundles/emoji/"));
 * const engine = new Engine({ wasm: "wasm/" });
 * await engine.load(bundle, { backend: "auto" });
 * const pictures = await engine.generate({ prompt: "a red apple" }, { onStep: ({ step, of }) => … });
 * ```
 */
export { type Bundle, type BundleCache, cacheStorage, openBundle } from "./bundle";
export { probe } from "./device";
export { Engine } from "./engine";
export { BundleError, type BundleFault, EngineError, type EngineFault } from "./errors";
export type { Manifest, SamplerName } from "./manifest";
export { encodePng, readPngSettings } from "./png";
export { type BundleSource, filesSource, urlSource } from "./source";

/** Where networks run. */
export type Backend = "webgpu" | "wasm";

/** What this device offers, found out before anything is loaded. */
export interface Device {
  /** Null where WebGPU is there to be used; else a clause that says why not. */
  webgpuMissing: string | null;
  /** If there is WebGPU, but computed by the CPU: slower than WASM, so that only `backend: "webgpu"` takes it. */
  software: boolean;
  /** The adapter in words, such as "google swiftshader"; empty where there is none. */
  adapter: string;
  /** If shaders may compute in fp16. */
  shaderF16: boolean;
  /** Threads that WASM would use here: 1 unless the page is cross-origin isolated. */
  threads: number;
  /** Why it is one thread; null where there are several. */
  threadsMissing: string | null;
}

export interface LoadOptions {
  /**
   * "auto" (default): WebGPU if a GPU takes every network whole and passes the self-check, else WASM. "webgpu" is the
   * same, but content with WebGPU in software.
   */
  backend?: Backend | "auto";
  /** WASM threads; default and at most those of `Device.threads`. */
  threads?: number;
  onProgress?: (progress: LoadProgress) => void;
  signal?: AbortSignal;
}

export interface LoadProgress {
  stage: "read" | "compile" | "self-check";
  /** The network or file at work. */
  what: string;
  /** Bytes read so far and in all, of all files that the engine reads; in the other stages both stay as they are. */
  bytes: number;
  of: number;
}

export type NetworkName = "text_encoder" | "unet" | "decoder";

export interface LoadReport {
  backend: Backend;
  threads: number;
  /** Sentences for people: why not WebGPU, why one thread, what the self-check said. May be empty. */
  notes: string[];
  /** What LiteRT says; on WASM false is usual and harmless. */
  fullyAccelerated: Record<NetworkName, boolean>;
  /** "fp32" or "fp16" on WebGPU. */
  precision: "fp32" | "fp16";
  milliseconds: { runtime: number; read: number; compile: Record<NetworkName, number>; selfCheck: number; total: number };
}

export interface GenerateRequest {
  prompt: string;
  negativePrompt?: string;
  /** Null or missing: the bundle's default. */
  guidance?: number | null;
  steps?: number | null;
  /** Null or missing: the bundle's own sampler. */
  sampler?: string | null;
  /** TCD's share of fresh noise, 0 to 1; null or missing: the bundle's. */
  eta?: number | null;
  /** 0 to 2^32 - count; null or missing: a random one. Picture i is of seed + i. */
  seed?: number | null;
  count?: number;
  /** A preview with every n-th step's event; 0 or missing: none. Bundles without a preview map give none. */
  previewEvery?: number;
}

/** RGBA pixels, rows from the top: `new ImageData(data, width, height)`. */
export interface Pixels {
  data: Uint8ClampedArray<ArrayBuffer>;
  width: number;
  height: number;
}

export interface StepEvent {
  /** Of the pictures of this call, from 0. */
  picture: number;
  count: number;
  /** Finished steps of this picture, from 1. */
  step: number;
  of: number;
  millisecondsPerStep: number;
  preview: Pixels | null;
}

/** All that is needed to draw the picture again; the text chunks of a PNG, named as `pocketfusion generate` does. */
export interface Settings {
  prompt: string;
  negative_prompt: string;
  seed: number;
  num_inference_steps: number;
  guidance_scale: number;
  sampler: string;
  /** Of TCD alone. */
  eta?: number;
  /** Name and SHA-256 of bundle.json, with a space between. */
  bundle: string;
  Software: string;
}

export interface Picture extends Pixels {
  settings: Settings;
  milliseconds: { text: number; steps: number[]; decode: number; total: number };
}

export interface GenerateOptions {
  onStep?: (event: StepEvent) => void;
  /** Each picture as soon as it is decoded. */
  onPicture?: (picture: Picture, index: number) => void;
  /** A warning for people: a prompt that was cut, a guidance scale that the UNet was not taught. */
  onWarning?: (sentence: string) => void;
  /** Stops after the step at work; `generate` then rejects with EngineError of fault "cancelled". */
  signal?: AbortSignal;
}

export interface MemoryReport {
  /** Size of the worker's Wasm heap; it never shrinks while the worker lives. */
  heapBytes: number;
}
