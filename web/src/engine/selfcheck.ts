/**
 * If a GPU computes what the bundle says: a UNet's step and a decoding of fixed noise against their stored results.
 *
 * A driver's faults raise no exception: fp16 that is not there, a shader that is compiled wrong. The results are the
 * exporter's (`pocketfusion.mobile.selfcheck`), computed on a CPU in floating point as a GPU does.
 */

import { guidanceEmbedding, timestepEmbedding } from "./guidance";
import { elements, type Manifest, type Network as Spec } from "./manifest";
import type { Network } from "./network";
import { NoiseStream } from "./noise";
import type { Latents } from "./samplers/sampler";

/** Signal to noise in dB that a result must have: a sound GPU's fp32 has about 100, its fp16 30 to 50. */
const LEAST_DB = { fp32: 40, fp16: 20 };

export interface CheckResult {
  /** dB of the UNet and of the decoder. */
  decibels: { unet: number; decoder: number };
  /** What is wrong, in a clause; null if nothing is. */
  fault: string | null;
}

/** Runs both networks; `stored` is the content of the bundle's file `selfcheck`. */
export async function selfCheck(
  networks: { unet: Network; decoder: Network },
  manifest: Manifest,
  stored: Float32Array,
  precisionOf: (spec: Spec) => "fp16" | "fp32",
): Promise<CheckResult> {
  const decibels = { unet: 0, decoder: 0 };
  let at = 0;
  for (const name of ["unet", "decoder"] as const) {
    const network = networks[name];
    writeKnown(network, manifest);
    const output = await network.run();
    const result = name === "unet" ? output : blockMeans(output, network.spec);
    decibels[name] = signalToNoise(stored.subarray(at, at + result.length), result);
    at += result.length;
    const least = LEAST_DB[precisionOf(network.spec)];
    if (!(decibels[name] >= least)) {
      const words = { unet: "UNet", decoder: "decoder" }[name];
      return { decibels, fault: `its ${words} is ${decibels[name].toFixed(0)} dB from the bundle's, not ${least}` };
    }
  }
  return { decibels, fault: null };
}

/** Fixed inputs: noise by the input's place, the same in every row; the middle timestep; the default guidance. */
function writeKnown(network: Network, manifest: Manifest): void {
  const timestep = Math.floor(manifest.scheduler.num_train_timesteps / 2);
  for (const { name, shape } of network.spec.inputs) {
    const row = elements(shape.slice(1));
    let values: Latents;
    if (name === "timestep") values = Float32Array.of(timestep);
    else if (name === "timestep_embedding") values = timestepEmbedding(timestep, manifest.time_embedding!);
    else if (name === "timestep_cond") values = guidanceEmbedding(manifest.defaults.guidance_scale, row);
    else if (name === "step_coefficients") values = Float32Array.of(1, 0, 1); // the prediction itself
    else values = new NoiseStream(name === "encoder_hidden_states" ? 1 : 0).draw(row);
    const all = new Float32Array(elements(shape));
    for (let i = 0; i < shape[0]; i++) all.set(values, i * values.length);
    network.write(name, all);
  }
}

/** The means of a decoder's image over each latent's pixels, [h, w, 3]. */
function blockMeans(image: Latents, spec: Spec): Latents {
  const [, height, width] = spec.inputs[0].shape;
  const factor = spec.outputs[0].shape[1] / height;
  const means = new Float64Array(height * width * 3);
  image.forEach((value, i) => {
    const [y, x] = [Math.floor(i / 3 / (factor * width)), Math.floor(i / 3) % (factor * width)];
    means[3 * (Math.floor(y / factor) * width + Math.floor(x / factor)) + (i % 3)] += value / factor ** 2;
  });
  return Float32Array.from(means);
}

/** 10 log10 of the sum of squares of `wanted` over that of its difference to `got`; NaN if that is not finite. */
function signalToNoise(wanted: ArrayLike<number>, got: ArrayLike<number>): number {
  let [signal, noise] = [0, 0];
  for (let i = 0; i < wanted.length; i++) {
    signal += wanted[i] ** 2;
    noise += (wanted[i] - got[i]) ** 2;
  }
  return noise === 0 ? 200 : 10 * Math.log10(signal / noise);
}
