/** The denoising loop: a sampler's guided steps on a UNet, as `pocketfusion.runtime.denoise` has it. */

import { guidanceEmbedding, timestepEmbedding } from "./guidance";
import { batchOf, input, type Manifest } from "./manifest";
import type { Network } from "./network";
import type { NoiseStream } from "./noise";
import type { Latents, Sampler } from "./samplers/sampler";

const { fround } = Math;

/** Draws latents of one prompt at one guidance scale, as many pictures as wanted. */
export class Denoiser {
  private readonly scale: number; // at and below 1 there is no guidance, as in diffusers
  private readonly batch: number;
  private readonly folded: boolean;
  /** The text inputs of one step's calls: both rows in one, or a call for each where the UNet takes one row. */
  private readonly texts: Latents[];
  private latents: Latents = new Float32Array();
  private noise: () => Latents = () => this.latents;

  /** `states` are rows of prompt_embeds: negative and prompt, or the prompt's alone. */
  constructor(
    private readonly unet: Network,
    private readonly manifest: Manifest,
    private readonly sampler: Sampler,
    states: Latents[],
    scale: number,
  ) {
    this.scale = Math.max(scale, 1);
    this.batch = batchOf(unet.spec);
    this.folded = input(unet.spec, "step_coefficients") !== undefined;
    const rows = this.scale > 1 || this.batch === 2 ? states : states.slice(-1);
    this.texts = this.batch === 2 ? [join(rows)] : rows;
    unet.write("encoder_hidden_states", this.texts[0]);
    const condition = input(unet.spec, "timestep_cond");
    if (condition) unet.write("timestep_cond", guidanceEmbedding(scale, condition.shape[1]));
  }

  /** Begins a picture at standard normal latents; what noise its steps add is the stream's next. */
  start(latents: Latents, stream: NoiseStream): void {
    this.latents = this.sampler.start(latents);
    this.noise = () => stream.draw(latents.length);
  }

  /** Step k, from 0: the new latents [H, W, C]. NaN and infinity pass through. */
  async step(k: number): Promise<Latents> {
    const timestep = this.sampler.timesteps[k];
    const { time_embedding: embedding } = this.manifest;
    if (embedding) this.unet.write("timestep_embedding", repeat(timestepEmbedding(timestep, embedding), this.batch));
    else this.unet.write("timestep", new Float32Array(this.batch).fill(timestep));
    if (this.folded) {
      this.unet.write("sample", this.latents);
      this.unet.write("step_coefficients", Float32Array.of(this.scale, ...this.sampler.coefficients(k)));
      this.latents = this.sampler.addNoise(k, await this.unet.run(), this.noise);
    } else {
      this.unet.write("sample", repeat(this.latents, this.batch));
      this.latents = this.sampler.step(await this.guided(), k, this.latents, this.noise);
    }
    return this.latents;
  }

  /** uncond + scale * (cond - uncond), or the one prediction there is, in float32. */
  private async guided(): Promise<Latents> {
    const parts: Latents[] = [];
    for (const text of this.texts) {
      if (this.texts.length > 1) this.unet.write("encoder_hidden_states", text);
      parts.push(await this.unet.run());
    }
    const size = this.latents.length;
    const rows = parts.flatMap((part) => (part.length > size ? [part.subarray(0, size), part.subarray(size)] : [part]));
    const conditional = rows[rows.length - 1];
    if (rows.length === 1 || this.scale === 1) return conditional;
    const [unconditional] = rows;
    const scale = fround(this.scale);
    return conditional.map((c, i) => fround(fround(c - unconditional[i]) * scale) + unconditional[i]);
  }
}

function repeat(values: Latents, times: number): Latents {
  return times === 1 ? values : join(Array.from({ length: times }, () => values));
}

function join(rows: Latents[]): Latents {
  const all = new Float32Array(rows.reduce((sum, row) => sum + row.length, 0));
  let at = 0;
  for (const row of rows) {
    all.set(row, at);
    at += row.length;
  }
  return all;
}
