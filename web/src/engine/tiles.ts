/**
 * Decoding latents larger than the decoder's input: overlapping tiles, blended, as `pocketfusion.runtime.tiles` does.
 * Arrays are [height, width, channels] of one picture.
 */

import type { Latents } from "./samplers/sampler";
import { roundHalfEven } from "./samplers/rounding";

const OVERLAP = 0.25; // of a tile, at least, that it shares with its neighbour
const { fround } = Math;

export interface Size {
  height: number;
  width: number;
}

/** First indices of the tiles along an extent: evenly spread, the last at the edge. */
export function starts(length: number, tile: number): number[] {
  const step = Math.max(1, Math.floor(tile * (1 - OVERLAP)));
  const count = 1 + Math.ceil((length - tile) / step);
  if (count === 1) return [0];
  return Array.from({ length: count }, (_, i) => roundHalfEven((i * (length - tile)) / (count - 1)));
}

/** The image [f H, f W, 3] of latents [H, W, C]; `decode` makes [f h, f w, 3] of a tile [h, w, C]. */
export async function decodeTiled(
  decode: (part: Latents) => Promise<Latents>,
  latents: Latents,
  size: Size,
  tile: Size,
): Promise<Latents> {
  const [rows, columns] = [starts(size.height, tile.height), starts(size.width, tile.width)];
  if (rows.length === 1 && columns.length === 1) return await decode(latents);
  const channels = latents.length / (size.height * size.width);
  let [image, total, factor] = [new Float32Array(0), new Float32Array(0), 0];
  for (const top of rows) {
    for (const left of columns) {
      const part = await decode(cut(latents, size.width, channels, top, left, tile));
      if (!factor) {
        factor = Math.sqrt(part.length / (3 * tile.height * tile.width));
        image = new Float32Array(3 * factor * factor * size.height * size.width);
        total = new Float32Array(image.length / 3);
      }
      const [down, across] = [ramp(top, rows, tile.height, factor), ramp(left, columns, tile.width, factor)];
      const width = factor * tile.width;
      down.forEach((a, y) => {
        across.forEach((b, x) => {
          const weight = fround(a * b);
          const at = (factor * top + y) * factor * size.width + factor * left + x;
          total[at] += weight;
          for (let c = 0; c < 3; c++) image[3 * at + c] += fround(weight * part[3 * (y * width + x) + c]);
        });
      });
    }
  }
  return image.map((value, i) => value / total[Math.floor(i / 3)]);
}

function cut(latents: Latents, width: number, channels: number, top: number, left: number, tile: Size): Latents {
  const part = new Float32Array(tile.height * tile.width * channels);
  const row = tile.width * channels;
  for (let y = 0; y < tile.height; y++) {
    const from = ((top + y) * width + left) * channels;
    part.set(latents.subarray(from, from + row), y * row);
  }
  return part;
}

/** Weights [factor tile] along one extent: 1, falling linearly to near 0 where a neighbour overlaps. */
function ramp(start: number, every: number[], tile: number, factor: number): Float32Array {
  const index = every.indexOf(start);
  const weight = new Float32Array(factor * tile).fill(1);
  if (index > 0) {
    const shared = factor * (every[index - 1] + tile - start);
    for (let i = 0; i < shared; i++) weight[i] = Math.min(weight[i], (i + 0.5) / shared);
  }
  if (index < every.length - 1) {
    const shared = factor * (start + tile - every[index + 1]);
    for (let i = 0; i < shared; i++) {
      const at = weight.length - 1 - i;
      weight[at] = Math.min(weight[at], (i + 0.5) / shared);
    }
  }
  return weight;
}
