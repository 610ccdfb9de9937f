/** Runs a sampler: `start`, then a `step` for every timestep. Latents are float32, computed as numpy does. */

import { EngineError } from "../errors";
import { allowedSamplers, type Manifest, mostSteps, type SamplerName, SAMPLERS, type Scheduler } from "../manifest";
import { coefficients, type Schedule } from "./linear_step";
import { SCHEDULES } from "./schedules";

export type Latents = Float32Array<ArrayBuffer>;

const { fround } = Math;

export class Sampler {
  readonly schedule: Schedule;
  private previous: Latents | null = null; // x_0 of the step before, where the next one asks for it

  /** Throws EngineError "setting" for a number of steps that the sampler does not have. */
  constructor(
    readonly name: SamplerName,
    private readonly spec: Scheduler,
    steps: number,
  ) {
    const most = mostSteps(name, spec);
    if (!Number.isInteger(steps) || steps < 1 || steps > most) {
      const by = name === "ddim" ? "" : ` with ${name}`;
      throw new EngineError("setting", `the number of steps is ${steps}: choose 1 to ${most}${by}`);
    }
    this.schedule = SCHEDULES[name](spec, steps);
  }

  /** TCD's share of fresh noise; null for the others. */
  get eta(): number | null {
    return this.name === "tcd" ? this.spec.eta : null;
  }

  get timesteps(): number[] {
    return this.schedule.timesteps;
  }

  /** The latents of the first step from standard normal ones. */
  start(latents: Latents): Latents {
    this.previous = null;
    const scale = fround(this.schedule.initialScale);
    return latents.map((x) => x * scale);
  }

  /** (a, b) of step k (from 0): the next latents are a x + b model_output, and what `addNoise` adds. */
  coefficients(k: number): [number, number] {
    return coefficients(this.schedule.steps[k], this.spec.prediction_type);
  }

  /** The latents of step k with its share of fresh noise, which is asked for only if it has one. */
  addNoise(k: number, latents: Latents, noise: () => Latents): Latents {
    const share = fround(this.schedule.steps[k].noise);
    if (!share) return latents;
    const fresh = noise();
    return latents.map((x, i) => x + fround(share * fresh[i]));
  }

  /** Step k (from 0) from the latents `sample`. Steps must follow each other. */
  step(output: Latents, k: number, sample: Latents, noise: () => Latents): Latents {
    const { alpha, sigma, previousX0 } = this.schedule.steps[k];
    const [a, b] = this.coefficients(k).map(fround);
    let latents = sample.map((x, i) => fround(a * x) + fround(b * output[i]));
    const before = this.previous;
    if (previousX0 && before) {
      const share = fround(previousX0);
      latents = latents.map((x, i) => x + fround(share * before[i]));
    }
    if (this.schedule.steps[k + 1]?.previousX0) {
      const [alpha32, sigma32] = [fround(alpha), fround(sigma)];
      this.previous =
        this.spec.prediction_type === "epsilon"
          ? sample.map((x, i) => fround(x - fround(sigma32 * output[i])) / alpha32)
          : sample.map((x, i) => fround(alpha32 * x) - fround(sigma32 * output[i]));
    }
    return this.addNoise(k, latents, noise);
  }
}

/**
 * The bundle's own sampler, or the one called `name`, with TCD's `eta` if not the bundle's. Throws EngineError "setting"
 * for a sampler that the bundle does not allow, and an eta that is none or has no sampler.
 */
export function resolveSampler(manifest: Manifest, name: string | null, steps: number, eta: number | null): Sampler {
  const allowed = allowedSamplers(manifest);
  const found = name === null ? manifest.sampler : allowed.find((sampler) => sampler === name);
  if (found) return new Sampler(found, withEta(manifest.scheduler, found, eta), steps);
  let why = "needs the UNet's own prediction, which this bundle's UNet with the step in its graph does not give";
  if (!SAMPLERS.some((sampler) => sampler === name)) why = "is not known";
  else if (manifest.samplers && !manifest.samplers.some((sampler) => sampler === name)) {
    why = "has timesteps that this bundle's UNet was not taught";
  }
  throw new EngineError("setting", `the sampler ${JSON.stringify(name)} ${why}: choose ${allowed.join(" or ")}`);
}

function withEta(spec: Scheduler, sampler: SamplerName, eta: number | null): Scheduler {
  if (eta === null) return spec;
  if (sampler !== "tcd") {
    throw new EngineError("setting", `eta is ${eta}, but the sampler is ${sampler}: it is of tcd, leave it out`);
  }
  if (!(eta >= 0 && eta <= 1)) {
    throw new EngineError("setting", `eta is ${eta}: choose 0 (no noise between the steps) to 1 (all of it)`);
  }
  return { ...spec, eta };
}
