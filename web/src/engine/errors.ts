/** What can go wrong, each with one sentence for people: what, where, what to do. */

/** What is wrong with a bundle. */
export type BundleFault =
  | "missing" // no such folder or file, or it cannot be read
  | "not-a-bundle" // no bundle.json, or not one of pocketfusion's
  | "newer-version" // made by a newer pocketfusion
  | "invalid" // a manifest that no exporter writes
  | "corrupted" // a file is cut short or altered
  | "too-large"; // needs more memory than a browser gives

export class BundleError extends Error {
  override readonly name = "BundleError";

  constructor(
    readonly fault: BundleFault,
    message: string,
  ) {
    super(message);
  }
}

/** What stops a generation. */
export type EngineFault =
  | "cancelled"
  | "setting" // a value out of range, or one that this bundle cannot follow
  | "unsound" // NaN or infinity out of a network
  | "unsupported" // this browser cannot run it
  | "memory" // out of memory
  | "device-lost" // the GPU went away and WASM failed as well
  | "busy"; // a generation is at work already

export class EngineError extends Error {
  override readonly name = "EngineError";

  constructor(
    readonly fault: EngineFault,
    message: string,
  ) {
    super(message);
  }
}
