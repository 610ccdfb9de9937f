/** Requests and the pictures that Python draws of them (tests/web/drawn.py), and the engine in a page to compare. */

import type { Page } from "playwright-core";
import type * as Engine from "../../src/engine/api";
import { vectors } from "./vectors";

export interface Case {
  bundle: string;
  request: Engine.GenerateRequest;
  pictures: number[][];
  size: [number, number];
  hash: string;
}

export const { bundles, cases }: { bundles: Record<string, string>; cases: Case[] } = vectors("drawn");

declare global {
  interface Window {
    engine: typeof Engine;
  }
}

/** A picture as it leaves the page. */
export interface Drawn {
  data: number[];
  settings: Engine.Settings;
  width: number;
  height: number;
}

/** The largest difference of a level to Python's, over all pictures of a case. */
export function difference(pictures: Drawn[], { pictures: wanted, size }: Case): number {
  if (pictures.length !== wanted.length) return Number.POSITIVE_INFINITY;
  let most = 0;
  pictures.forEach(({ data, width, height }, i) => {
    if (width !== size[0] || height !== size[1]) most = Number.POSITIVE_INFINITY;
    wanted[i].forEach((level, k) => (most = Math.max(most, Math.abs(level - data[4 * Math.floor(k / 3) + (k % 3)]))));
  });
  return most;
}

/** Opens and loads a bundle of the site in a new engine of the page, kept as `window.loaded`; what it reports. */
export async function load(page: Page, bundle: string, options: Engine.LoadOptions = {}): Promise<Engine.LoadReport> {
  return await page.evaluate(
    async ([name, settings]) => {
      const { engine } = window;
      const loaded = new engine.Engine({ wasm: "wasm/" });
      Object.assign(window, { loaded });
      return await loaded.load(await engine.openBundle(engine.urlSource(`${name}/`)), settings);
    },
    [bundle, options] as const,
  );
}

/** Draws with the page's engine. */
export async function draw(page: Page, request: Engine.GenerateRequest): Promise<Drawn[]> {
  return await page.evaluate(async (asked) => {
    const { loaded } = window as unknown as { loaded: Engine.Engine };
    const pictures = await loaded.generate(asked);
    return pictures.map(({ data, ...rest }) => ({ ...rest, data: Array.from(data) }));
  }, request);
}
