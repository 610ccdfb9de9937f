/** The denoising loop by every kind of guidance and form of UNet: Python's latents, of a made-up UNet. */

import { expect, test } from "vitest";
import { Denoiser } from "../../src/engine/denoise";
import { parseManifest, type Network as Spec } from "../../src/engine/manifest";
import type { Network } from "../../src/engine/network";
import { NoiseStream } from "../../src/engine/noise";
import { toPixels } from "../../src/engine/pixels";
import { previewOf } from "../../src/engine/preview";
import { resolveSampler } from "../../src/engine/samplers/sampler";
import { vectors } from "./vectors";

const mean = (values: ArrayLike<number>) => Array.from(values).reduce((sum, x) => sum + x, 0) / values.length;

/** A sum of its inputs, as tests/web/vectors.py has it. */
class MadeUp implements Network {
  private readonly values: Record<string, Float32Array<ArrayBuffer>> = {};

  constructor(readonly spec: Spec) {}

  write(name: string, values: Float32Array<ArrayBuffer> | Int32Array<ArrayBuffer>): void {
    this.values[name] = Float32Array.from(values);
  }

  async run(): Promise<Float32Array<ArrayBuffer>> {
    const { sample, encoder_hidden_states: states, timestep, timestep_embedding: time } = this.values;
    const { timestep_cond: condition, step_coefficients: step } = this.values;
    const rows = this.spec.inputs.find(({ name }) => name === "encoder_hidden_states")!.shape[0];
    const part = (values: Float32Array, row: number) =>
      values.subarray((row * values.length) / rows, ((row + 1) * values.length) / rows);
    const added = Array.from({ length: rows }, (_, row) => {
      const base = 0.1 * mean(part(states, row)) + (time ? 0.05 * mean(part(time, row)) : 0.001 * timestep[row]);
      return base + (condition ? 0.2 * mean(condition) : 0);
    });
    if (!step) return Float32Array.from(sample, (x, i) => 0.3 * x + added[Math.floor((i * rows) / sample.length)]);
    const [scale, a, b] = step;
    return Float32Array.from(sample, (x) => {
      const [uncond, cond] = added.map((one) => 0.3 * x + one);
      return a * x + b * (uncond + scale * (cond - uncond));
    });
  }
}

test("latents of whole pictures", async () => {
  const cases = vectors("denoising");
  expect(cases.length).toBe(30);
  for (const { form, sampler, scale, states, manifest: values, latents } of cases) {
    const manifest = parseManifest(new TextEncoder().encode(JSON.stringify(values)), form);
    const rows = states.map((row: number[]) => Float32Array.from(row.flatMap((x) => Array(384).fill(x))));
    const chosen = resolveSampler(manifest, sampler, 4, null);
    const denoiser = new Denoiser(new MadeUp(manifest.networks.unet), manifest, chosen, rows, scale);
    const stream = new NoiseStream(7);
    denoiser.start(stream.draw(8 * 8 * 16), stream);
    for (let k = 0; k < 4; k++) {
      const ours = (await denoiser.step(k)).filter((_, i) => i % 61 === 0);
      ours.forEach((x, i) => {
        const wanted = latents[k][i];
        expect(Math.abs(x - wanted) / Math.max(1, Math.abs(wanted)), `${form} ${sampler} ${scale} step ${k}`).toBeLessThan(5e-6);
      });
    }
  }
});

test("settings that a bundle cannot follow are refused in a sentence", () => {
  const { manifest: values } = vectors("denoising")[0];
  const manifest = parseManifest(new TextEncoder().encode(JSON.stringify(values)), "here");
  expect(() => resolveSampler(manifest, "plms", 4, null)).toThrow('the sampler "plms" is not known: choose ddim or euler');
  expect(() => resolveSampler({ ...manifest, samplers: ["ddim"] }, "lcm", 4, null)).toThrow("was not taught");
  expect(() => resolveSampler(manifest, null, 4, 0.5)).toThrow("eta is 0.5, but the sampler is ddim");
  expect(() => resolveSampler(manifest, "tcd", 4, 2)).toThrow("eta is 2: choose 0");
  expect(resolveSampler(manifest, "tcd", 4, 0).schedule.steps.every(({ noise }) => noise === 0)).toBe(true);
});

test("previews and pixels, rounded as Python rounds", () => {
  const { matrix, bias, latents, picture, levels, pixels } = vectors("previews");
  const preview = previewOf(Float32Array.from(latents), { height: 8, width: 8 }, { matrix, bias, psnr_db: 20, r2: 1 });
  const wanted = picture.flat().flatMap((rgb: number[]) => [...rgb, 255]);
  const most = Math.max(...wanted.map((level: number, i: number) => Math.abs(level - preview.data[i])));
  expect(most).toBeLessThanOrEqual(1); // sums in another order
  const grey = Float32Array.from(levels.flatMap((x: number) => [x, x, x]));
  expect(Array.from(toPixels(grey, levels.length, 1).data.filter((_, i) => i % 4 === 0))).toEqual(pixels);
});
