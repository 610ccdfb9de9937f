/** A decoder's image as pixels. */

import type { Pixels } from "./api";
import { roundHalfEven } from "./samplers/rounding";

/** RGBA of an image [height, width, 3] of -1 to 1: `round-half-even(clip(x / 2 + 0.5) * 255)` in float32. */
export function toPixels(image: Float32Array, width: number, height: number): Pixels {
  const data = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) {
      const level = Math.fround(Math.fround(image[3 * i + c] / 2) + 0.5);
      data[4 * i + c] = roundHalfEven(Math.fround(Math.min(Math.max(level, 0), 1) * 255));
    }
  }
  return { data, width, height };
}
