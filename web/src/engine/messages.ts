/** What the page and the engine's worker say to each other. */

import type { Backend, GenerateRequest, LoadProgress, LoadReport, Picture, StepEvent } from "./api";
import type { BundleDescriptor } from "./bundle";
import { BundleError, type BundleFault, EngineError, type EngineFault } from "./errors";

/** The page's requests; each is answered under its `id` by "done" or "failed", after any number of events. */
export type ToWorker =
  | { type: "load"; id: number; bundle: BundleDescriptor; wasm: string; backend: Backend; threads: number }
  | { type: "generate"; id: number; request: Required<GenerateRequest> & { seed: number } }
  | { type: "memory"; id: number }
  | { type: "cancel" };

export type FromWorker =
  | { type: "done"; id: number; value: LoadReport | number | null }
  | { type: "failed"; id: number; error: SentError }
  | { type: "progress"; id: number; progress: LoadProgress }
  | { type: "step"; id: number; event: StepEvent }
  | { type: "picture"; id: number; picture: Picture; index: number }
  | { type: "warning"; id: number; sentence: string }
  | { type: "lost"; reason: string };

/** An error as it travels between threads. */
export interface SentError {
  kind: "bundle" | "engine";
  fault: BundleFault | EngineFault;
  message: string;
}

export function pack(error: BundleError | EngineError): SentError {
  return { kind: error instanceof BundleError ? "bundle" : "engine", fault: error.fault, message: error.message };
}

export function unpack({ kind, fault, message }: SentError): BundleError | EngineError {
  if (kind === "bundle") return new BundleError(fault as BundleFault, message);
  return new EngineError(fault as EngineFault, message);
}
