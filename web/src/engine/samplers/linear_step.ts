/**
 * What all samplers have in common (docs/samplers.md): a step mixes x_0, epsilon, fresh noise and the step before's x_0.
 *
 * The latents are in every sampler the UNet's own, x = alpha x_0 + sigma epsilon with alpha^2 + sigma^2 = 1, but for the
 * last ones, which are the decoder's. Tables are doubles.
 */

import type { Scheduler } from "../manifest";
import { linspace } from "./rounding";

export type Level = [alpha: number, sigma: number];

/** The levels that a schedule was trained on, by timestep. */
export class NoiseLevels {
  readonly alphasCumprod: Float64Array;
  /** sigma / alpha, the levels of latents with x_0 at weight 1 (Karras et al., arXiv 2206.00364). */
  readonly sigmas: Float64Array;

  constructor(spec: Scheduler) {
    const n = spec.num_train_timesteps;
    const linear = spec.beta_schedule === "linear";
    const betas = linear
      ? linspace(spec.beta_start, spec.beta_end, n)
      : linspace(Math.sqrt(spec.beta_start), Math.sqrt(spec.beta_end), n).map((root) => root * root);
    let product = 1;
    this.alphasCumprod = Float64Array.from(betas, (beta) => (product *= 1 - beta));
    this.sigmas = this.alphasCumprod.map((a) => Math.sqrt((1 - a) / a));
  }

  at(timestep: number): Level {
    return ofAlphaBar(this.alphasCumprod[timestep]);
  }
}

export function ofAlphaBar(alphaBar: number): Level {
  return [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
}

/** Of the ratio sigma / alpha. */
export function ofSigma(sigma: number): Level {
  const alpha = 1 / Math.sqrt(sigma * sigma + 1);
  return [alpha, sigma * alpha];
}

/** The UNet is asked of x = alpha x_0 + sigma epsilon; the others are weights, whose sum is the next latents. */
export interface Step {
  alpha: number;
  sigma: number;
  x0: number;
  epsilon: number;
  noise: number;
  previousX0: number;
}

export function step([alpha, sigma]: Level, x0: number, epsilon: number, noise = 0, previousX0 = 0): Step {
  return { alpha, sigma, x0, epsilon, noise, previousX0 };
}

/** A sampler's steps: the timesteps that the UNet is given, falling, and the scale of the starting noise. */
export interface Schedule {
  timesteps: number[];
  steps: Step[];
  initialScale: number;
}

/** (a, b) of the next latents' part a x + b model_output, which is all of them but noise and previous x_0. */
export function coefficients({ alpha, sigma, x0, epsilon }: Step, prediction: Scheduler["prediction_type"]): Level {
  if (prediction === "epsilon") return [x0 / alpha, epsilon - (x0 * sigma) / alpha];
  return [x0 * alpha + epsilon * sigma, epsilon * alpha - x0 * sigma];
}
