/** LiteRT.js in this worker: which of its builds, on how many threads, and a bundle's networks compiled by it. */

import { type CompiledModel, getWebGpuDevice, loadAndCompile, loadLiteRt } from "@litertjs/core";
import type { Backend } from "./api";
import { EngineError } from "./errors";
import type { Network as Spec } from "./manifest";
import { LiteRtNetwork } from "./network";

/** LiteRT, loaded; one a worker. */
export class LiteRt {
  private constructor(
    private readonly module: { HEAPU8: Uint8Array },
    readonly backend: Backend,
    readonly threads: number,
    /** Why fewer threads than asked for; null if not. */
    readonly note: string | null,
    readonly device: GPUDevice | null,
    private readonly faults: string[],
  ) {}

  /** Loads the build for `backend` from the folder `wasm` (an address that ends in /). */
  static async load(wasm: string, backend: Backend, threads: number): Promise<LiteRt> {
    // without a GPU device of its own, which it would make whatever it is used for
    if (backend === "wasm") Object.defineProperty(navigator, "gpu", { value: undefined, configurable: true });
    let note: string | null = null;
    if (threads > 1) {
      try {
        return await LiteRt.loadBuild(wasm, backend, threads, null);
      } catch (error) {
        if (!/relaxed SIMD|SharedArrayBuffer|thread|memory/i.test(String(error))) throw error;
        note = `one thread: this browser cannot run LiteRT's threads (${reason(error)})`;
      }
    }
    return await LiteRt.loadBuild(wasm, backend, 1, note);
  }

  private static async loadBuild(wasm: string, backend: Backend, threads: number, note: string | null): Promise<LiteRt> {
    const faults: string[] = [];
    // emscripten would look beside this worker's file
    Object.assign(globalThis, {
      Module: {
        locateFile: (file: string) => wasm + file,
        mainScriptUrlOrBlob: `${wasm}litert_wasm_threaded_internal.js`,
        print: () => undefined,
        printErr: (line: string) => void (/^ERROR|error:/.test(line) && faults.push(line)),
      },
    });
    const { liteRtWasm } = (await loadLiteRt(wasm, { threads: threads > 1 })) as unknown as {
      liteRtWasm: { HEAPU8: Uint8Array };
    };
    const device = backend === "webgpu" ? getWebGpuDevice() : null;
    if (backend === "webgpu" && !device) throw new EngineError("unsupported", "the GPU gave no device");
    device?.addEventListener("uncapturederror", ({ error }) => faults.push(error.message));
    return new LiteRt(liteRtWasm, backend, threads, note, device, faults);
  }

  /** Bytes of the Wasm heap, which never shrinks. */
  get heapBytes(): number {
    return this.module.HEAPU8.length;
  }

  get shaderF16(): boolean {
    return this.device?.features.has("shader-f16") ?? false;
  }

  /** What went wrong on the GPU without an exception, since it was last asked; null if nothing. */
  takeFault(): string | null {
    const [first] = this.faults.splice(0);
    return first ? first.slice(0, 200) : null;
  }

  /** Compiles a network; throws EngineError "unsupported" where LiteRT refuses it or takes only a part of it. */
  async compile(content: Uint8Array, spec: Spec): Promise<{ network: LiteRtNetwork; fullyAccelerated: boolean }> {
    let model: CompiledModel;
    this.takeFault();
    try {
      model = await loadAndCompile(content, {
        accelerator: this.backend,
        cpuOptions: { numThreads: this.threads },
        gpuOptions: { precision: this.precisionOf(spec) },
      });
    } catch (error) {
      throw asEngineError(error, this.takeFault());
    }
    // where the delegate takes only a part, LiteRT.js may hand out a model on WASM that says it is accelerated
    const fullyAccelerated = model.isFullyAccelerated && model.options.accelerator === this.backend;
    return { network: new LiteRtNetwork(model, spec), fullyAccelerated };
  }

  /** What a network computes in: fp16 only where the GPU has it and the bundle does not ask for fp32. */
  precisionOf(spec: Spec): "fp16" | "fp32" {
    return this.shaderF16 && spec.gpu_precision !== "fp32" ? "fp16" : "fp32";
  }
}

/** What LiteRT threw, in a sentence: memory, or a network that it does not run here. `fault` is its own log's. */
export function asEngineError(error: unknown, fault: string | null = null): EngineError {
  if (error instanceof EngineError) return error;
  const why = fault ?? reason(error);
  if (error instanceof RangeError || /memory|alloc|OOM|grow|Aborted/i.test(`${reason(error)} ${fault ?? ""}`)) {
    const cure = "close other tabs or use a smaller bundle";
    return new EngineError("memory", `the browser seems to have run out of memory (${why}): ${cure}`);
  }
  return new EngineError("unsupported", `LiteRT cannot run this bundle here (${why})`);
}

function reason(error: unknown): string {
  return String((error as Error)?.message ?? error).split("\n")[0].slice(0, 200) || "unknown";
}
