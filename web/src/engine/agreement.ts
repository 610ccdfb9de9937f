/** What a manifest says in several places, checked against each other: what one network gives, the next one takes. */

import { allowedSamplers, batchOf, elements, EMPTY_PROMPT, input, LEAST, type Manifest, mostSteps, type Network, SELF_CHECK } from "./manifest";
import { NoiseLevels } from "./samplers/linear_step";

type Shape = (number | null)[]; // null: any extent

/** The first two of the manifest's values that do not go together, in a clause; null if all do. */
export function checkAgreement(manifest: Manifest): string | null {
  try {
    check(manifest);
    return null;
  } catch (error) {
    if (error instanceof Disagreement) return error.message;
    throw error;
  }
}

class Disagreement extends Error {}

function demand(holds: boolean, otherwise: string): asserts holds {
  if (!holds) throw new Disagreement(otherwise);
}

function check(manifest: Manifest): void {
  const { networks, latents, image, scheduler } = manifest;
  for (const name of ["text_encoder", "unet", "decoder", "tokenizer"]) {
    demand(Object.hasOwn(manifest.files, name), `no file is given for ${name}`);
  }
  const tokens = manifest.tokenizer.max_length;
  takes("text_encoder", networks.text_encoder, { input_ids: [1, tokens], attention_mask: [1, tokens] });
  gives("text_encoder", networks.text_encoder, [1, tokens, null]);
  const empty = manifest.files[EMPTY_PROMPT];
  const states = networks.text_encoder.outputs[0].shape;
  const known = manifest.files[SELF_CHECK];
  const [, down, across] = networks.decoder.inputs[0].shape;
  const floats = elements(networks.unet.outputs[0].shape) + 3 * down * across;
  demand(!known || known.size === 4 * floats, `files.${SELF_CHECK} is not of the size of its results`);
  demand(!empty || empty.size === 4 * elements(states), `files.${EMPTY_PROMPT} is not of the size of the states`);
  checkUnet(manifest);
  takes("decoder", networks.decoder, { latents: [1, null, null, latents.channels] });
  const [, height, width] = input(networks.decoder, "latents")!.shape;
  demand(height <= latents.height && width <= latents.width, "the decoder takes tiles larger than the latents");
  const factor = image.height / latents.height;
  demand(
    Number.isInteger(factor) && image.width === factor * latents.width,
    `the image is ${image.height}x${image.width}, no whole multiple of the latents' ${latents.height}x${latents.width}`,
  );
  gives("decoder", networks.decoder, [1, factor * height, factor * width, 3]);
  const rows = manifest.preview?.matrix.length ?? latents.channels;
  demand(rows === latents.channels, `preview.matrix has ${rows} rows for ${latents.channels} channels`);
  demand(scheduler.steps_offset < scheduler.num_train_timesteps, "scheduler.steps_offset is beyond the timesteps");
  demand(
    new NoiseLevels(scheduler).alphasCumprod.at(-1)! >= LEAST,
    "the betas leave next to nothing of the picture at the last timestep",
  );
  const range = manifest.guidance_range;
  demand(!range || range[0] <= range[1], "guidance_range does not ascend");
  demand(allowedSamplers(manifest).includes(manifest.sampler), `sampler is ${manifest.sampler}, which is ruled out`);
  const steps = manifest.defaults.num_inference_steps;
  const most = mostSteps(manifest.sampler, scheduler);
  demand(steps <= most, `defaults.num_inference_steps is ${steps}, but ${manifest.sampler} has ${most} at most`);
}

function checkUnet(manifest: Manifest): void {
  const { unet } = manifest.networks;
  const { height, width, channels } = manifest.latents;
  const rows = batchOf(unet);
  demand(rows === 1 || rows === 2, `the UNet takes ${rows} rows of text: one, or two for guidance`);
  const folded = input(unet, "step_coefficients") !== undefined;
  const one = folded && input(unet, "sample")?.shape[0] === 1; // both rows are made of it in the graph
  const sample = [one ? 1 : rows, height, width, channels];
  const shapes: Record<string, Shape> = {
    sample,
    encoder_hidden_states: [rows, ...manifest.networks.text_encoder.outputs[0].shape.slice(1)],
  };
  if (manifest.time_embedding) shapes.timestep_embedding = [rows, manifest.time_embedding.dim];
  else shapes.timestep = [rows];
  if (manifest.guidance === "embedded") shapes.timestep_cond = [1, null];
  if (folded) shapes.step_coefficients = [1, 3];
  takes("unet", unet, shapes);
  gives("unet", unet, sample);
  demand(
    manifest.guidance === "classifier-free" || unet.inputs.every((tensor) => tensor.shape[0] === 1),
    `the guidance is ${manifest.guidance} but the UNet takes more than one sample`,
  );
  demand(
    !folded || manifest.guidance !== "classifier-free" || rows === 2,
    "the UNet takes step_coefficients but lacks the second row that guidance needs",
  );
}

/** The network's inputs are those of `shapes`, and no others. */
function takes(name: string, network: Network, shapes: Record<string, Shape>): void {
  const given = network.inputs.map((tensor) => tensor.name);
  const wanted = Object.keys(shapes);
  demand(
    given.length === wanted.length && wanted.every((key) => given.includes(key)),
    `networks.${name} takes ${given.join(", ")}, not ${wanted.join(", ")}`,
  );
  for (const tensor of network.inputs) {
    const kind = ["input_ids", "attention_mask"].includes(tensor.name) ? "int32" : "float32";
    demand(
      fits(tensor.shape, shapes[tensor.name]) && tensor.dtype === kind,
      `networks.${name} takes ${tensor.name} [${tensor.shape}] ${tensor.dtype}, where the rest makes it another`,
    );
  }
}

function gives(name: string, network: Network, shape: Shape): void {
  const [tensor] = network.outputs;
  demand(
    fits(tensor.shape, shape) && tensor.dtype === "float32",
    `networks.${name} gives ${tensor.name} [${tensor.shape}] ${tensor.dtype}, where the rest makes it another`,
  );
}

function fits(shape: readonly number[], wanted: Shape): boolean {
  return shape.length === wanted.length && wanted.every((extent, i) => extent === null || extent === shape[i]);
}
