/** The page with an engine that paints blots: for what a real one does only now and then, and for its looks. */
import { render } from "preact";
import { type Device, EngineError, type GenerateOptions, type GenerateRequest, type LoadOptions, type LoadReport, type Picture } from "../../src/engine/api";
import { App } from "../../src/ui/app";
import type { EngineLike } from "../../src/ui/studio";
import "../../src/ui/style.css";

/** Set by a test: what fails, once and how; milliseconds of a step. */
export interface Plan {
  loadFails?: string;
  drawFails?: { fault: "memory" | "unsound" | "device-lost"; message: string };
  stepMilliseconds?: number;
  webgpu?: boolean;
  losesDevice?: boolean;
}

const plan: Plan = JSON.parse(new URLSearchParams(location.search).get("plan") ?? "{}");
const wait = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function report(backend: "webgpu" | "wasm", notes: string[]): LoadReport {
  return {
    backend,
    threads: 2,
    notes,
    fullyAccelerated: { text_encoder: false, unet: false, decoder: false },
    precision: "fp32",
    milliseconds: { runtime: 310, read: 412, compile: { text_encoder: 88, unet: 204, decoder: 61 }, selfCheck: 0, total: 1075 },
  };
}

function blot(side: number, seed: number, sharpness: number): Uint8ClampedArray<ArrayBuffer> {
  const data = new Uint8ClampedArray(4 * side * side);
  for (let i = 0; i < side * side; i++) {
    const [x, y] = [(i % side) / side - 0.5, Math.floor(i / side) / side - 0.5];
    const inside = 1 / (1 + Math.exp(sharpness * (Math.hypot(x, y) - 0.3 - 0.04 * Math.sin(seed + 5 * Math.atan2(y, x)))));
    data.set([255 - 40 * inside, 255 - 190 * inside + 60 * x, 255 - (200 + (seed % 40)) * inside, 255], 4 * i);
  }
  return data;
}

async function probe(): Promise<Device> {
  return {
    webgpuMissing: plan.webgpu ? null : "This browser has no WebGPU.",
    software: false,
    adapter: plan.webgpu ? "a made-up GPU" : "",
    shaderF16: false,
    threads: 2,
    threadsMissing: null,
  };
}

class FakeEngine implements EngineLike {
  onFallback: EngineLike["onFallback"] = null;

  async load(_bundle: unknown, { onProgress, signal }: LoadOptions = {}): Promise<LoadReport> {
    for (let i = 0; i <= 10; i++) {
      onProgress?.({ stage: "read", what: "unet", bytes: i * 3.95e6, of: 39.5e6 });
      await wait(30);
      if (signal?.aborted) throw new EngineError("cancelled", "cancelled");
    }
    onProgress?.({ stage: "compile", what: "text_encoder", bytes: 39.5e6, of: 39.5e6 });
    await wait(100);
    if (plan.loadFails) throw new EngineError("unsupported", plan.loadFails);
    return report(plan.webgpu ? "webgpu" : "wasm", plan.webgpu ? [] : ["This browser has no WebGPU: the CPU draws."]);
  }

  async generate(request: GenerateRequest, options: GenerateOptions = {}): Promise<Picture[]> {
    const [count, of] = [request.count ?? 1, request.steps ?? 8];
    const first = request.seed ?? Math.floor(Math.random() * 2 ** 31);
    const pictures: Picture[] = [];
    for (let picture = 0; picture < count; picture++) {
      const seed = first + picture;
      for (let step = 1; step <= of; step++) {
        await wait(plan.stepMilliseconds ?? 20);
        if (options.signal?.aborted) throw new EngineError("cancelled", "cancelled");
        if (plan.drawFails) throw new EngineError(plan.drawFails.fault, plan.drawFails.message);
        if (plan.losesDevice && step === 2) {
          plan.losesDevice = false;
          this.onFallback?.(report("wasm", ["The GPU went away: the CPU draws on."]));
        }
        const preview = { data: blot(8, seed, 2 + step), width: 8, height: 8 };
        options.onStep?.({ picture, count, step, of, millisecondsPerStep: 20, preview });
      }
      const drawn: Picture = {
        data: blot(64, seed, 60),
        width: 64,
        height: 64,
        settings: {
          prompt: request.prompt,
          negative_prompt: request.negativePrompt ?? "",
          seed,
          num_inference_steps: of,
          guidance_scale: request.guidance ?? 6,
          sampler: request.sampler ?? "ddim",
          bundle: `emoji64 ${"0".repeat(64)}`,
          Software: "pocketfusion 0.1.0",
        },
        milliseconds: { text: 41, steps: Array(of).fill(62), decode: 33, total: 74 + 62 * of },
      };
      pictures.push(drawn);
      options.onPicture?.(drawn, picture);
    }
    if (request.prompt.includes("too long")) options.onWarning?.("The prompt was cut at ‘long’.");
    return pictures;
  }

  async memory() {
    return { heapBytes: 318e6 };
  }
}

render(<App engine={new FakeEngine()} probe={probe} />, document.getElementById("app") as HTMLElement);
