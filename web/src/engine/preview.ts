/** A picture of latents for next to nothing: one colour a position, by the manifest's linear map. */

import type { Pixels } from "./api";
import type { Preview } from "./manifest";
import { toPixels } from "./pixels";
import type { Latents } from "./samplers/sampler";
import type { Size } from "./tiles";

/** RGBA of the size of the latents [height, width, channels]: the page scales it up. */
export function previewOf(latents: Latents, { height, width }: Size, { matrix, bias }: Preview): Pixels {
  const channels = matrix.length;
  const image = new Float32Array(height * width * 3);
  image.forEach((_, i) => {
    const [at, colour] = [Math.floor(i / 3) * channels, i % 3];
    image[i] = matrix.reduce((sum, row, c) => sum + latents[at + c] * row[colour], bias[colour]);
  });
  return toPixels(image, width, height);
}
