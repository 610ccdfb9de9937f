/**
 * `bundle.json`, version 1, read as `pocketfusion.runtime.manifest` reads it: unknown keys are refused, numbers are
 * bounded, paths stay inside the bundle, and the parts agree with each other.
 */

import * as v from "valibot";
import { checkAgreement } from "./agreement";
import { BundleError } from "./errors";

const FORMAT = "pocketfusion-bundle";
const VERSION = 1;
export const LEAST = 1e-9; // of a beta and of the schedule's last alpha^2: samplers divide by both
const MAX_ELEMENTS = 2 ** 28;

export const SAMPLERS = ["ddim", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-karras", "lcm", "tcd"] as const;
export type SamplerName = (typeof SAMPLERS)[number];
/** Samplers that look at the UNet's own prediction again one step later. */
const MULTISTEP: readonly SamplerName[] = ["dpmpp-2m", "dpmpp-2m-karras"];
export const ORIGINAL_STEPS = 50; // of the grid that LCM and TCD draw from

const integer = (least: number, most: number) =>
  v.pipe(v.number(), v.safeInteger(), v.minValue(least), v.maxValue(most));
const real = (least: number, most: number) => v.pipe(v.number(), v.finite(), v.minValue(least), v.maxValue(most));
const text = (most: number) => v.pipe(v.string(), v.maxLength(most));
const positive = integer(1, 2 ** 14);
const count = integer(0, 1e16);

const bundleFile = v.strictObject({
  path: v.pipe(text(1000), v.check(isInside, (issue) => `the path ${JSON.stringify(issue.input)} leaves the bundle`)),
  sha256: v.pipe(v.string(), v.regex(/^[0-9a-f]{64}$/)),
  size: count,
});

const tensor = v.pipe(
  v.strictObject({
    name: text(2000),
    shape: v.pipe(v.array(positive), v.minLength(1), v.maxLength(4)),
    dtype: v.picklist(["float32", "int32"]),
  }),
  v.check(({ shape }) => elements(shape) <= MAX_ELEMENTS, "a tensor is too large"),
);

const network = v.strictObject({
  inputs: v.pipe(v.array(tensor), v.minLength(1), v.maxLength(8)),
  outputs: v.pipe(v.array(tensor), v.length(1)),
  parameters: count,
  macs: count,
  weights: v.picklist(["float32", "float16", "int8", "int8-dynamic", "int4-dynamic", "mixed"]),
  sqnr_db: v.nullish(v.pipe(v.number(), v.finite())),
  guidance_delta: v.nullish(v.pipe(v.number(), v.finite())),
  gpu_precision: v.nullish(v.literal("fp32")),
});

const scheduler = v.strictObject({
  num_train_timesteps: integer(1, 100_000),
  beta_start: v.pipe(real(LEAST, 1), v.ltValue(1)),
  beta_end: v.pipe(real(LEAST, 1), v.ltValue(1)),
  beta_schedule: v.picklist(["linear", "scaled_linear"]),
  prediction_type: v.picklist(["epsilon", "v_prediction"]),
  timestep_spacing: v.picklist(["leading", "trailing", "linspace"]),
  steps_offset: v.optional(integer(0, 100_000), 0),
  set_alpha_to_one: v.optional(v.boolean(), true),
  final_sigmas_type: v.optional(v.picklist(["zero", "sigma_min"]), "zero"),
  eta: v.optional(real(0, 1), 0.3), // of TCD
});

const timeEmbedding = v.strictObject({
  dim: integer(4, 2 ** 14),
  flip_sin_to_cos: v.optional(v.boolean(), true),
  downscale_freq_shift: v.optional(real(0, 1), 0),
});

const coefficient = real(-1e4, 1e4);
const colour = v.pipe(v.array(coefficient), v.length(3));

/** Latents times `matrix` [C, 3], plus `bias` [3], clipped: red, green and blue in [-1, 1]. */
const preview = v.strictObject({
  matrix: v.pipe(v.array(colour), v.minLength(1), v.maxLength(2 ** 14)),
  bias: colour,
  psnr_db: v.pipe(v.number(), v.finite()),
  r2: v.pipe(v.number(), v.finite(), v.maxValue(1)),
});

const manifest = v.strictObject({
  format: v.literal(FORMAT),
  version: v.literal(VERSION),
  name: text(2000),
  created_by: text(2000),
  files: v.record(v.string(), bundleFile),
  networks: v.strictObject({ text_encoder: network, unet: network, decoder: network }),
  tokenizer: v.strictObject({ max_length: positive, pad_token: text(2000), pad_token_id: integer(0, 2 ** 31 - 1) }),
  latents: v.strictObject({ channels: positive, height: positive, width: positive }),
  image: v.strictObject({ height: positive, width: positive }),
  scheduler,
  sampler: v.optional(v.picklist(SAMPLERS), "ddim"),
  samplers: v.nullish(v.array(v.picklist(SAMPLERS))),
  defaults: v.strictObject({ num_inference_steps: integer(1, 100_000), guidance_scale: real(-1e4, 1e4) }),
  guidance: v.optional(v.picklist(["classifier-free", "embedded", "folded"]), "classifier-free"),
  guidance_range: v.nullish(v.tuple([v.pipe(v.number(), v.finite()), v.pipe(v.number(), v.finite())])),
  target: v.optional(v.picklist(["litert-cpu", "litert-gpu"]), "litert-cpu"),
  time_embedding: v.nullish(timeEmbedding),
  preview: v.nullish(preview),
  licences: v.optional(
    v.array(v.strictObject({ what: text(2000), spdx: text(2000), attribution: v.optional(text(100_000), "") })),
    [],
  ),
  provenance: v.optional(v.record(v.string(), v.unknown()), {}),
});

export type Manifest = v.InferOutput<typeof manifest>;
export type Network = v.InferOutput<typeof network>;
export type TensorSpec = v.InferOutput<typeof tensor>;
export type Scheduler = v.InferOutput<typeof scheduler>;
export type Preview = v.InferOutput<typeof preview>;
export type TimeEmbedding = v.InferOutput<typeof timeEmbedding>;

/** The file that keeps the text encoder's output for the empty prompt. */
export const EMPTY_PROMPT = "empty_prompt_embeds";
/** The file that keeps a UNet's step and a decoding of fixed noise, for a GPU to be compared with. */
export const SELF_CHECK = "selfcheck";

/** The manifest of `content`, the bytes of `where`/bundle.json; throws BundleError. */
export function parseManifest(content: Uint8Array, where: string): Manifest {
  const file = `${where.replace(/\/$/, "")}/bundle.json`;
  let raw: unknown;
  try {
    raw = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch {
    throw new BundleError("not-a-bundle", `${where} is not a bundle: its bundle.json is not valid JSON`);
  }
  const about = raw as { format?: unknown; version?: unknown } | null;
  if (typeof raw !== "object" || about?.format !== FORMAT) {
    throw new BundleError("not-a-bundle", `${file} is not a bundle's manifest: its "format" is not "${FORMAT}"`);
  }
  if (typeof about.version === "number" && about.version > VERSION) {
    throw new BundleError(
      "newer-version",
      `${file} is of version ${about.version}, made by a newer pocketfusion (this page reads ${VERSION}): ` +
        "reload the page or take it from a newer pocketfusion",
    );
  }
  const result = v.safeParse(manifest, raw, { abortEarly: true });
  const fault = result.success ? checkAgreement(result.output) : describe(result.issues[0]);
  if (!result.success || fault) {
    throw new BundleError("invalid", `${file} is not a valid manifest (${fault}): restore the bundle from its source`);
  }
  return result.output;
}

/** The samplers that the bundle can be drawn with. */
export function allowedSamplers(manifest: Manifest): SamplerName[] {
  const folded = input(manifest.networks.unet, "step_coefficients") !== undefined;
  return (manifest.samplers ?? SAMPLERS).filter((name) => !(folded && MULTISTEP.includes(name)));
}

/** The largest number of steps that a sampler has timesteps for. */
export function mostSteps(sampler: SamplerName, spec: Scheduler): number {
  if (sampler === "lcm" || sampler === "tcd") return Math.min(ORIGINAL_STEPS, spec.num_train_timesteps);
  return spec.num_train_timesteps - (sampler === "dpmpp-2m" ? 1 : 0);
}

/** The input of a network by its name. */
export function input(network: Network, name: string): TensorSpec | undefined {
  return network.inputs.find((tensor) => tensor.name === name);
}

/** Predictions of one call: the UNet's rows of text, else the first input's first extent. */
export function batchOf(network: Network): number {
  return (input(network, "encoder_hidden_states") ?? network.inputs[0]).shape[0];
}

export function elements(shape: readonly number[]): number {
  return shape.reduce((product, extent) => product * extent, 1);
}

function isInside(path: string): boolean {
  const parts = path.split("/");
  if (!path || path.startsWith("/") || /[\\:]/.test(path) || /\p{C}/u.test(path)) return false;
  return parts.every((part) => part !== "" && part !== "." && part !== "..");
}

function describe(issue: v.BaseIssue<unknown>): string {
  const where = v.getDotPath(issue)?.slice(0, 200);
  return (where ? `${where}: ` : "") + issue.message.slice(0, 200);
}
