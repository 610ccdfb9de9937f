/** The samplers' steps; sources and departures are those of `pocketfusion.runtime.samplers` (docs/samplers.md). */

import type { SamplerName, Scheduler } from "../manifest";
import { NoiseLevels, ofAlphaBar, ofSigma, type Schedule, type Step, step } from "./linear_step";
import { interpolate, linspace, roundHalfEven } from "./rounding";
import { distilledGrid, spaced, spacedAboveZero } from "./spacing";

export const SCHEDULES: Record<SamplerName, (spec: Scheduler, steps: number) => Schedule> = {
  ddim,
  euler: (spec, steps) => euler(spec, steps, false),
  "euler-ancestral": (spec, steps) => euler(spec, steps, true),
  "dpmpp-2m": dpmpp2m,
  "dpmpp-2m-karras": dpmpp2mKarras,
  lcm,
  tcd,
};

/** DDIM with eta = 0 (Song et al., arXiv 2010.02502): from t to t - N/steps, whatever the next one visited is. */
function ddim(spec: Scheduler, count: number): Schedule {
  const levels = new NoiseLevels(spec);
  const timesteps = spaced(spec, count);
  const last = ofAlphaBar(spec.set_alpha_to_one ? 1 : levels.alphasCumprod[0]);
  const steps = timesteps.map((t) => {
    const previous = t - Math.floor(spec.num_train_timesteps / count);
    return step(levels.at(t), ...(previous >= 0 ? levels.at(previous) : last));
  });
  return { timesteps, steps, initialScale: 1 };
}

/** Euler's method on the probability flow (Karras et al., arXiv 2206.00364, algorithm 1), plain and ancestral. */
function euler(spec: Scheduler, count: number, ancestral: boolean): Schedule {
  const levels = new NoiseLevels(spec);
  const n = spec.num_train_timesteps;
  const timesteps =
    spec.timestep_spacing === "linspace"
      ? linspace(0, n - 1, count).map(Math.fround).reverse() // between whole timesteps, in float32
      : spaced(spec, count);
  const final = spec.final_sigmas_type === "sigma_min" && !ancestral ? levels.sigmas[0] : 0;
  const whole = Float64Array.from({ length: n }, (_, i) => i);
  const sigmas = [...timesteps.map((t) => interpolate(t, whole, levels.sigmas)), final];
  const steps = timesteps.map((_, k) => {
    const [now, later] = [sigmas[k], sigmas[k + 1]];
    const up = ancestral ? Math.sqrt(later ** 2 * (now ** 2 - later ** 2)) / now : 0;
    const down = Math.sqrt(later ** 2 - up ** 2);
    const scale = k < count - 1 ? ofSigma(later)[0] : 1; // the last latents are the decoder's
    return step(ofSigma(now), scale, scale * down, scale * up);
  });
  return { timesteps, steps, initialScale: spec.timestep_spacing === "leading" ? 1 : ofSigma(sigmas[0])[1] };
}

const RHO = 7; // Karras et al., eq. 5
const FEW = 15; // steps, below which DPM-Solver's last is of first order whatever the final sigma

/** DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) with sigmas by the spacing's timesteps. */
function dpmpp2m(spec: Scheduler, count: number): Schedule {
  const timesteps = spacedAboveZero(spec, count);
  const { sigmas } = new NoiseLevels(spec);
  return secondOrder(spec, timesteps, timesteps.map((t) => sigmas[t]));
}

/** The same with Karras' sigmas from the table's last to its first, whatever the spacing. */
function dpmpp2mKarras(spec: Scheduler, count: number): Schedule {
  const table = new NoiseLevels(spec).sigmas;
  const [least, most] = [table[0], table[table.length - 1]].map((sigma) => sigma ** (1 / RHO));
  const sigmas = linspace(0, 1, count).map((ramp) => (most + ramp * (least - most)) ** RHO);
  const [logs, whole] = [table.map(Math.log), table.map((_, i) => i)];
  const timesteps = sigmas.map((sigma) => roundHalfEven(interpolate(Math.log(sigma), logs, whole)));
  return secondOrder(spec, timesteps, sigmas);
}

/** First-order steps are DDIM's; a second-order one adds to x_0 a share of what it changed by since the step before. */
function secondOrder(spec: Scheduler, timesteps: number[], levels: number[]): Schedule {
  const final = spec.final_sigmas_type === "sigma_min" ? new NoiseLevels(spec).sigmas[0] : 0;
  const sigmas = [...levels, final];
  const last = timesteps.length - 1;
  const steps: Step[] = timesteps.map((_, k) => {
    const [now, later] = [sigmas[k], sigmas[k + 1]];
    const [alpha, sigma] = ofSigma(later);
    let change = 0;
    if (k > 0 && (k < last || (final > 0 && timesteps.length >= FEW))) {
      const [h, h0] = [Math.log(now / later), Math.log(sigmas[k - 1] / now)];
      change = (alpha * (1 - later / now) * h) / (2 * h0);
    }
    return step(ofSigma(now), alpha + change, sigma, 0, -change);
  });
  return { timesteps, steps, initialScale: 1 };
}

const TIMESTEP_SCALING = 10;
const SIGMA_DATA = 0.5; // diffusers' defaults, which published models keep

/** Multistep consistency sampling of a latent consistency model (Luo et al., arXiv 2310.04378, algorithm 3). */
function lcm(spec: Scheduler, count: number): Schedule {
  const levels = new NoiseLevels(spec);
  const timesteps = distilledGrid(spec, count);
  const steps = timesteps.map((t, k) => {
    const [alpha, sigma] = levels.at(t);
    const scaled = t * TIMESTEP_SCALING;
    const skip = SIGMA_DATA ** 2 / (scaled ** 2 + SIGMA_DATA ** 2);
    const out = scaled / Math.sqrt(scaled ** 2 + SIGMA_DATA ** 2);
    const [scale, noise] = k + 1 < count ? levels.at(timesteps[k + 1]) : [1, 0];
    return step([alpha, sigma], scale * (out + skip * alpha), scale * skip * sigma, noise);
  });
  return { timesteps, steps, initialScale: 1 };
}

/** Strategic stochastic sampling of trajectory consistency distillation (Zheng et al., arXiv 2402.19159; eta: gamma). */
function tcd(spec: Scheduler, count: number): Schedule {
  const levels = new NoiseLevels(spec);
  const timesteps = distilledGrid(spec, count);
  const steps = timesteps.map((t, k) => {
    const later = timesteps[k + 1] ?? 0;
    const target = Math.floor((1 - spec.eta) * later);
    const [alpha, sigma] = levels.at(target);
    const kept = levels.alphasCumprod[later] / levels.alphasCumprod[target];
    return step(levels.at(t), Math.sqrt(kept) * alpha, Math.sqrt(kept) * sigma, Math.sqrt(1 - kept));
  });
  return { timesteps, steps, initialScale: 1 };
}
