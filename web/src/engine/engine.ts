/** The page's side of the engine: a worker that draws, replaced when it must be. */

import type { Device, GenerateOptions, GenerateRequest, LoadOptions, LoadReport, MemoryReport, Picture } from "./api";
import type { Bundle } from "./bundle";
import { EngineError } from "./errors";

export interface EngineOptions {
  /** Address of the folder with LiteRT's WebAssembly, relative to the page. */
  wasm: string;
}

const soon = () => new EngineError("unsupported", "the engine is not built yet");

export class Engine {
  constructor(readonly options: EngineOptions) {}

  /** Called when the engine itself changes the back end (the GPU was lost), with the new report. */
  onFallback: ((report: LoadReport) => void) | null = null;

  /** What this device offers. */
  async probe(): Promise<Device> {
    throw soon();
  }

  /** Loads the bundle in a fresh worker; rejects with BundleError or EngineError. */
  async load(_bundle: Bundle, _options: LoadOptions = {}): Promise<LoadReport> {
    throw soon();
  }

  /** Draws; one call at a time. Rejects with EngineError. */
  async generate(_request: GenerateRequest, _options: GenerateOptions = {}): Promise<Picture[]> {
    throw soon();
  }

  async memory(): Promise<MemoryReport> {
    throw soon();
  }

  /** Ends the worker at once and gives its memory back; the next `generate` loads again. */
  stop(): void {}
}
