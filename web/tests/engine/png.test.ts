/** PNGs with their settings: ours are Pillow's (Python looks at ours.png afterwards), Pillow's are ours. */

import { expect, test } from "vitest";
import { encodePng, readPngSettings } from "../../src/engine/png";
import { bytes, save, vectors } from "./vectors";

const { settings, pixels } = vectors("picture");
const picture = {
  width: pixels[0].length,
  height: pixels.length,
  data: Uint8ClampedArray.from(pixels.flat().flatMap((rgb: number[]) => [...rgb, 255])),
};

test("settings come back from our PNG", async () => {
  const png = await encodePng(picture, settings);
  save("ours.png", png);
  expect(await readPngSettings(png)).toEqual(settings);
});

test("settings come back from Pillow's PNG, and there are none in a plain one", async () => {
  expect(await readPngSettings(bytes("pillow.png"))).toEqual(settings);
  expect(await readPngSettings(bytes("plain.png"))).toBeNull();
});

test("what is no whole PNG is refused", async () => {
  const png = bytes("pillow.png");
  const altered = png.slice();
  altered[60] ^= 1;
  for (const broken of [png.slice(0, 200), altered, new Uint8Array(), new TextEncoder().encode("JFIF picture")]) {
    await expect(readPngSettings(broken)).rejects.toThrow("no whole PNG");
  }
});
