/** From a prompt to pictures: text encoder, a sampler's guided steps, decoder; as `pocketfusion.runtime.pipeline`. */

import type { GenerateRequest, Picture, Settings, StepEvent } from "./api";
import { Denoiser } from "./denoise";
import { EngineError } from "./errors";
import { resolveGuidance } from "./guidance";
import { input, type Manifest } from "./manifest";
import type { Network } from "./network";
import { NoiseStream } from "./noise";
import { toPixels } from "./pixels";
import { previewOf } from "./preview";
import type { Residency } from "./residency";
import { type Latents, resolveSampler, type Sampler } from "./samplers/sampler";
import { decodeTiled } from "./tiles";
import { cleanText, type PromptTokenizer } from "./tokenizer/prompt_tokenizer";
import { VERSION } from "./version";

/** What is drawn with. */
export interface Loaded {
  manifest: Manifest;
  hash: string;
  tokenizer: PromptTokenizer;
  networks: Residency;
  /** The text encoder's output for the empty prompt, where the bundle keeps it. */
  emptyStates: Latents | null;
}

export interface Events {
  onStep(event: StepEvent): void;
  onPicture(picture: Picture, index: number): void;
  onWarning(sentence: string): void;
  /** Awaited after each step: if the page wants no more. */
  cancelled(): Promise<boolean>;
}

/** Draws `request.count` pictures; throws EngineError. */
export async function draw(
  loaded: Loaded,
  request: Required<GenerateRequest> & { seed: number },
  events: Events,
): Promise<void> {
  const { manifest, networks } = loaded;
  const [prompt, negative] = [cleanText(request.prompt), cleanText(request.negativePrompt)];
  const steps = request.steps ?? manifest.defaults.num_inference_steps;
  const scale = resolveGuidance(manifest, request.guidance, negative, events.onWarning);
  const sampler = resolveSampler(manifest, request.sampler, steps, request.eta);
  let began = performance.now();
  const texts = manifest.guidance === "classifier-free" ? [negative, prompt] : [prompt];
  const states = await networks.use("text_encoder", async (encoder) => {
    const rows: Latents[] = [];
    for (const text of texts) rows.push(await encode(loaded, encoder, text, events.onWarning));
    return rows;
  });
  let text = performance.now() - began;
  // each picture as soon as it can be; in turns all are denoised before the first is decoded
  const group = networks.inTurns ? request.count : 1;
  for (let first = 0; first < request.count; first += group) {
    const drawn = await networks.use("unet", async (unet) => {
      const denoiser = new Denoiser(unet, manifest, sampler, states, scale);
      const results: Denoised[] = [];
      for (let k = 0; k < group; k++) {
        results.push(await denoise(loaded, denoiser, sampler, first + k, request, events));
      }
      return results;
    });
    await networks.use("decoder", async (decoder) => {
      for (const [k, { latents, times }] of drawn.entries()) {
        const decoding = performance.now();
        const pixels = await decode(loaded, decoder, latents);
        const now = performance.now();
        const settings: Settings = {
          prompt,
          negative_prompt: negative,
          seed: request.seed + first + k,
          num_inference_steps: steps,
          guidance_scale: scale,
          sampler: sampler.name,
          ...(sampler.eta === null ? {} : { eta: sampler.eta }),
          bundle: `${manifest.name} ${loaded.hash}`,
          Software: `pocketfusion ${VERSION}`,
        };
        const milliseconds = { text, steps: times, decode: now - decoding, total: now - began };
        events.onPicture({ ...pixels, settings, milliseconds }, first + k);
        [began, text] = [now, 0];
      }
    });
  }
}

interface Denoised {
  latents: Latents;
  /** Milliseconds of each step. */
  times: number[];
}

async function denoise(
  loaded: Loaded,
  denoiser: Denoiser,
  sampler: Sampler,
  picture: number,
  request: Required<GenerateRequest> & { seed: number },
  events: Events,
): Promise<Denoised> {
  const { height, width, channels } = loaded.manifest.latents;
  const stream = new NoiseStream(request.seed + picture);
  let latents = stream.draw(height * width * channels);
  denoiser.start(latents, stream);
  const { preview } = loaded.manifest;
  const times: number[] = [];
  const of = sampler.timesteps.length;
  for (let k = 0; k < of; k++) {
    const began = performance.now();
    latents = await denoiser.step(k);
    checkFinite(latents, `the UNet at step ${k + 1} of ${of}`, ", or the guidance is too high");
    times.push(performance.now() - began);
    events.onStep({
      picture,
      count: request.count,
      step: k + 1,
      of,
      millisecondsPerStep: times.reduce((sum, time) => sum + time, 0) / times.length,
      preview:
        preview && request.previewEvery && (k + 1) % request.previewEvery === 0
          ? previewOf(latents, loaded.manifest.latents, preview)
          : null,
    });
    if (await events.cancelled()) throw new EngineError("cancelled", `cancelled at step ${k + 1} of ${of}`);
  }
  return { latents, times };
}

/** `prompt_embeds` of `text`; those of the empty prompt are the bundle's where it keeps them. */
async function encode(
  loaded: Loaded,
  encoder: Network,
  text: string,
  warn: (sentence: string) => void,
): Promise<Latents> {
  const { inputIds, attentionMask, warning } = loaded.tokenizer.encode(text);
  const empty = loaded.tokenizer.encode("").inputIds;
  if (loaded.emptyStates && inputIds.every((id, i) => id === empty[i])) return loaded.emptyStates;
  if (warning) warn(warning);
  encoder.write("input_ids", inputIds);
  encoder.write("attention_mask", attentionMask);
  const states = await encoder.run();
  checkFinite(states, "the text encoder");
  return states;
}

async function decode(loaded: Loaded, decoder: Network, latents: Latents): Promise<ReturnType<typeof toPixels>> {
  const { manifest } = loaded;
  const [, height, width] = input(decoder.spec, "latents")!.shape;
  const one = (part: Latents) => {
    decoder.write("latents", part);
    return decoder.run();
  };
  const image = await decodeTiled(one, latents, manifest.latents, { height, width });
  checkFinite(image, "the decoder");
  return toPixels(image, manifest.image.width, manifest.image.height);
}

function checkFinite(values: Latents, where: string, more = ""): void {
  if (values.every(Number.isFinite)) return;
  const what = values.some(Number.isNaN) ? "NaN" : "infinity";
  throw new EngineError("unsound", `${where} produced ${what}: the bundle is unsound${more}`);
}
