/** Guidance and time as the UNet takes them, computed as `pocketfusion.runtime` does. */

import { EngineError } from "./errors";
import type { Manifest, TimeEmbedding } from "./manifest";

const { fround } = Math;

/** `timestep_cond` [1, dim] of a guidance scale: sin then cos of 1000 (w - 1) / 10000^(i / (dim/2 - 1)), in doubles. */
export function guidanceEmbedding(scale: number, dim: number): Float32Array<ArrayBuffer> {
  const half = Math.floor(dim / 2);
  const values = new Float32Array(dim);
  for (let i = 0; i < half; i++) {
    const angle = 1000 * (scale - 1) * 10000 ** -(i / Math.max(half - 1, 1));
    values[i] = Math.sin(angle);
    values[half + i] = Math.cos(angle);
  }
  return values;
}

/**
 * `timestep_embedding` [1, dim] as diffusers' `get_timestep_embedding` gives it: sin then cos (or flipped) of
 * t / 10000^(i / (dim/2 - shift)), the angles in float32, as there.
 */
export function timestepEmbedding(timestep: number, spec: TimeEmbedding): Float32Array<ArrayBuffer> {
  const half = Math.floor(spec.dim / 2);
  const values = new Float32Array(spec.dim);
  const [exponent, width] = [fround(-Math.log(10000)), fround(half - spec.downscale_freq_shift)];
  for (let i = 0; i < half; i++) {
    const angle = fround(fround(timestep) * fround(Math.exp(fround(fround(exponent * i) / width))));
    const [first, second] = spec.flip_sin_to_cos ? [Math.cos, Math.sin] : [Math.sin, Math.cos];
    values[i] = first(angle);
    values[half + i] = second(angle);
  }
  return values;
}

/**
 * The scale to draw with: the one asked for or the bundle's default. Warns of one that the UNet was not taught; throws
 * EngineError "setting" for what the bundle's guidance cannot follow.
 */
export function resolveGuidance(
  manifest: Manifest,
  asked: number | null | undefined,
  negativePrompt: string,
  warn: (sentence: string) => void,
): number {
  const usual = manifest.defaults.guidance_scale;
  const scale = asked ?? usual;
  if (!Number.isFinite(scale)) {
    throw new EngineError("setting", `the guidance scale is ${scale}: choose a finite number, 1 for no guidance`);
  }
  if (manifest.guidance === "classifier-free") return scale;
  if (negativePrompt.trim()) {
    throw new EngineError(
      "setting",
      `this bundle's guidance is ${manifest.guidance}, so a negative prompt has no effect: leave it out`,
    );
  }
  if (manifest.guidance === "folded" && scale !== usual) {
    throw new EngineError(
      "setting",
      `the guidance scale is ${scale}, but this bundle has ${usual} folded in and draws with no other: leave it out`,
    );
  }
  const range = manifest.guidance_range;
  if (range && !(range[0] <= scale && scale <= range[1])) {
    warn(`the guidance scale ${scale} is outside ${range[0]} to ${range[1]}, which the UNet was taught`);
  }
  return scale;
}
