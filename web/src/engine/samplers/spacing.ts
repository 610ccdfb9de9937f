/** Which timesteps a number of steps visits (spacings: arXiv 2305.08891, table 2), each sampler with diffusers' own. */

import { ORIGINAL_STEPS, type Scheduler } from "../manifest";
import { linspace, roundHalfEven } from "./rounding";

/** `steps` whole timesteps, falling, as DDIM takes them. */
export function spaced(spec: Scheduler, steps: number): number[] {
  const n = spec.num_train_timesteps;
  if (spec.timestep_spacing === "leading") return leading(falling(steps, 0, Math.floor(n / steps)), spec);
  if (spec.timestep_spacing === "linspace") return linspace(0, n - 1, steps).map(roundHalfEven).reverse();
  return trailing(steps, n);
}

/** The same as DPM-Solver takes them: of one step more, without the last, which would be at (or near) 0. */
export function spacedAboveZero(spec: Scheduler, steps: number): number[] {
  const n = spec.num_train_timesteps;
  if (spec.timestep_spacing === "leading") return leading(falling(steps, 1, Math.floor(n / (steps + 1))), spec);
  if (spec.timestep_spacing === "linspace") return linspace(0, n - 1, steps + 1).map(roundHalfEven).slice(1).reverse();
  return trailing(steps, n);
}

/** The same as LCM and TCD take them, whatever the spacing: of the original steps that they were taught. */
export function distilledGrid(spec: Scheduler, steps: number): number[] {
  const original = Math.min(ORIGINAL_STEPS, spec.num_train_timesteps);
  const apart = Math.floor(spec.num_train_timesteps / original);
  return Array.from({ length: steps }, (_, k) => (original - Math.floor(k * (original / steps))) * apart - 1);
}

/** (first + count - 1) apart, …, (first) apart. */
function falling(count: number, first: number, apart: number): number[] {
  return Array.from({ length: count }, (_, k) => (first + count - 1 - k) * apart);
}

function leading(timesteps: number[], spec: Scheduler): number[] {
  const offset = Math.min(spec.steps_offset, spec.num_train_timesteps - 1 - timesteps[0]);
  return timesteps.map((t) => t + offset);
}

/** T − k T/N − 1, rounded as numpy's `arange` has them: its rounding decides where one falls halfway. */
function trailing(steps: number, n: number): number[] {
  const apart = n - n / steps - n;
  return Array.from({ length: steps }, (_, k) => roundHalfEven(n + k * apart) - 1);
}
