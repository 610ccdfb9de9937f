/** Noise, samplers, embeddings and tiles: equal to Python's. */

import { expect, test } from "vitest";
import { guidanceEmbedding, timestepEmbedding } from "../../src/engine/guidance";
import { NoiseStream } from "../../src/engine/noise";
import { Sampler } from "../../src/engine/samplers/sampler";
import { decodeTiled, starts } from "../../src/engine/tiles";
import { vectors } from "./vectors";

test("noise is numpy's, bit for bit, of 72 seeds up to 2^160", () => {
  const seeds = Object.entries<number[]>(vectors("noise"));
  expect(seeds.length).toBe(72);
  let tail = 0;
  for (const [seed, bits] of seeds) {
    const ours = new NoiseStream(BigInt(seed)).draw(bits.length);
    const words = new Uint32Array(ours.buffer);
    bits.forEach((word, i) => {
      if (words[i] === word) return;
      // beyond the ziggurat's edge the C library's log1p decides the last bit, and may be off by it
      expect([Math.abs(ours[i]) > 3.654, Math.abs(words[i] - word)], `number ${i} of seed ${seed}`).toEqual([true, 1]);
      tail++;
    });
  }
  expect(tail).toBeLessThan(5); // of 295,000
});

test("timesteps of every number of steps, and whole runs of every sampler", () => {
  let most = 0;
  for (const { name, spec, timesteps, runs } of vectors("samplers")) {
    for (const [steps, wanted] of Object.entries(timesteps)) {
      expect(new Sampler(name, spec, Number(steps)).timesteps, `${name} ${steps} ${JSON.stringify(spec)}`).toEqual(wanted);
    }
    for (const { steps, first, fresh, after, ab } of runs) {
      const sampler = new Sampler(name, spec, steps);
      let latents = sampler.start(Float32Array.from(first));
      for (let k = 0; k < steps; k++) {
        sampler.coefficients(k).forEach((c, i) => expect(c).toBeCloseTo(ab[k][i], 10));
        const output = latents.map((x) => Math.fround(x * 0.5) + 0.25);
        latents = sampler.step(output, k, latents, () => Float32Array.from(fresh));
        for (const [i, x] of latents.entries()) {
          most = Math.max(most, Math.abs(x - after[k][i]) / Math.max(1, Math.abs(after[k][i])));
        }
      }
    }
  }
  expect(most).toBeLessThan(1e-6);
});

test("a number of steps that a sampler does not have is refused", () => {
  const { spec } = vectors("samplers")[0];
  for (const steps of [0, 1001, 2.5, Number.NaN]) expect(() => new Sampler("ddim", spec, steps)).toThrow("choose 1 to 1000");
  expect(() => new Sampler("lcm", spec, 51)).toThrow("choose 1 to 50 with lcm");
});

test("embeddings of time and guidance", () => {
  const { times, scales } = vectors("embeddings");
  for (const { spec, values } of times) {
    for (const [t, wanted] of Object.entries<number[]>(values)) {
      // the angles are float32, up to 999: their last bit is 6e-5
      const ours = timestepEmbedding(Number(t), spec);
      expect(Math.max(...ours.map((x, i) => Math.abs(x - wanted[i])))).toBeLessThan(Number(t) < 2 ? 2e-7 : 7e-5);
    }
  }
  for (const [scale, dim, wanted] of scales) {
    const ours = guidanceEmbedding(scale, dim);
    wanted.forEach((x: number, i: number) => expect(Math.abs(ours[i] - x)).toBeLessThan(2e-7));
  }
});

test("tiles begin where Python's do", () => {
  for (const [length, tile, wanted] of vectors("tiles")) expect(starts(length, tile)).toEqual(wanted);
});

test("tiles are blended to what they agree on", async () => {
  // a decoder that doubles: each latent's value in 2x2 pixels of three channels
  const [height, width] = [10, 7];
  const tile = { height: 4, width: 5 };
  const latents = new Float32Array(height * width).map((_, i) => Math.sin(i));
  const decode = async (part: Float32Array) => {
    const image = new Float32Array(part.length * 12);
    image.forEach((_, i) => {
      const [y, x] = [Math.floor(i / 3 / (2 * tile.width)), Math.floor(i / 3) % (2 * tile.width)];
      image[i] = part[(y >> 1) * tile.width + (x >> 1)];
    });
    return image;
  };
  const image = await decodeTiled(decode, latents, { height, width }, tile);
  expect(image.length).toBe(latents.length * 12);
  for (const [i, value] of image.entries()) {
    const [y, x] = [Math.floor(i / 3 / (2 * width)), Math.floor(i / 3) % (2 * width)];
    expect(Math.abs(value - latents[(y >> 1) * width + (x >> 1)])).toBeLessThan(1e-6);
  }
});
