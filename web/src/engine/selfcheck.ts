/**
 * If a GPU computes what the bundle says: the empty prompt's states, a UNet's step and a decoding of fixed noise
 * against their stored results.
 *
 * A driver's faults raise no exception: fp16 that is not there, a shader that is compiled wrong. The results are the
 * exporter's (`pocketfusion.mobile.bundle_extras`), computed on a CPU in floating point as a GPU does.
 */

import type { NetworkName } from "./api";
import type { Loaded } from "./drawing";
import { guidanceEmbedding, timestepEmbedding } from "./guidance";
import { elements, type Manifest, type Network as Spec } from "./manifest";
import type { Network } from "./network";
import { NoiseStream } from "./noise";
import type { Latents } from "./samplers/sampler";

const WORDS = { text_encoder: "text encoder", unet: "UNet", decoder: "decoder" };

/** Signal to noise in dB that a result must have: a sound GPU's fp32 has about 100, its fp16 30 to 50. */
const LEAST_DB = { fp32: 40, fp16: 20 };

export interface CheckResult {
  /** dB of each network that was compared. */
  decibels: Partial<Record<NetworkName, number>>;
  /** What is wrong, in a clause; null if nothing is. */
  fault: string | null;
}

/**
 * Runs the networks. `stored` is the content of the bundle's file `selfcheck`, `states` the text encoder's output for
 * the empty prompt, where the bundle keeps it.
 */
export async function selfCheck(
  networks: Record<NetworkName, Network>,
  { manifest, tokenizer, emptyStates: states }: Omit<Loaded, "networks">,
  stored: Float32Array,
  precisionOf: (spec: Spec) => "fp16" | "fp32",
): Promise<CheckResult> {
  const decibels: CheckResult["decibels"] = {};
  const wanted = { text_encoder: states, unet: stored, decoder: stored.subarray(unetFloats(manifest)) };
  for (const name of ["text_encoder", "unet", "decoder"] as const) {
    const [network, right] = [networks[name], wanted[name]];
    if (!right) continue;
    if (name === "text_encoder") {
      const { inputIds, attentionMask } = tokenizer.encode("");
      network.write("input_ids", inputIds);
      network.write("attention_mask", attentionMask);
    } else writeKnown(network, manifest);
    const output = await network.run();
    const found = signalToNoise(right, name === "decoder" ? blockMeans(output, network.spec) : output);
    const least = LEAST_DB[precisionOf(network.spec)];
    decibels[name] = found;
    if (!(found >= least)) {
      return { decibels, fault: `its ${WORDS[name]} is ${found.toFixed(0)} dB from the bundle's, not ${least}` };
    }
  }
  return { decibels, fault: null };
}

function unetFloats(manifest: Manifest): number {
  return elements(manifest.networks.unet.outputs[0].shape);
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
  for (let i = 0; i < got.length; i++) {
    signal += wanted[i] ** 2;
    noise += (wanted[i] - got[i]) ** 2;
  }
  return noise === 0 ? 200 : 10 * Math.log10(signal / noise);
}
