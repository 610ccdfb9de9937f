/**
 * Times of the engine on WASM with threads in Chromium, in turns with a process that times something else: it makes the
 * file `turn-N`, and finds the answer in `turn-N.json`. Run by benchmarks/browser.py.
 */

import { existsSync, mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import type { Page } from "playwright-core";
import { test } from "vitest";
import type * as Engine from "../../src/engine/api";
import { launch, serve } from "./site";

const folder = process.env.POCKETFUSION_TURNS as string;
const bundle = process.env.POCKETFUSION_BUNDLE as string;
const turns = Number(process.env.POCKETFUSION_ROUNDS);
/** Visits with the bundle in the cache. */
const visits = Number(process.env.POCKETFUSION_VISITS);
const request = { prompt: "a red apple, noto style", seed: 3, steps: Number(process.env.POCKETFUSION_STEPS) };

/** Milliseconds from an empty page to the first picture, with the engine's own report. */
async function first(page: Page, address: string) {
  await page.goto(address);
  return await page.evaluate(async (asked) => {
    const began = performance.now();
    const { engine } = window;
    const opened = await engine.openBundle(engine.urlSource("bundle/"), engine.cacheStorage());
    const loaded = new engine.Engine({ wasm: "wasm/" });
    const report = await loaded.load(opened, { backend: "wasm" });
    const heaps = [(await loaded.memory()).heapBytes];
    const [{ milliseconds }] = await loaded.generate(asked);
    const first = performance.now() - began;
    heaps.push((await loaded.memory()).heapBytes);
    Object.assign(window, { loaded });
    return { first, load: report.milliseconds, threads: report.threads, picture: milliseconds, heaps };
  }, request);
}

test("measure", { timeout: 3_600_000 }, async () => {
  const out = mkdtempSync(join(tmpdir(), "engine-"));
  const site = await serve(out, { bundle });
  const browser = await launch();
  const write = (name: string, value: unknown) => {
    writeFileSync(join(folder, `${name}.partial`), JSON.stringify(value));
    renameSync(join(folder, `${name}.partial`), join(folder, `${name}.json`));
  };
  try {
    const page = await browser.newPage();
    const address = `${site.address}isolated/page.html`;
    const cold = await first(page, address);
    const warm = [];
    for (let visit = 0; visit < visits; visit++) warm.push(await first(page, address));
    write("begin", { cold, warm, browser: browser.version(), cores: cpus().length });
    for (let turn = 0; turn < turns; turn++) {
      while (!existsSync(join(folder, `turn-${turn}`))) await new Promise((resolve) => setTimeout(resolve, 20));
      write(
        `turn-${turn}`,
        await page.evaluate(async (asked) => {
          const { loaded } = window as unknown as { loaded: Engine.Engine };
          const [{ milliseconds }] = await loaded.generate(asked);
          return { ...milliseconds, heap: (await loaded.memory()).heapBytes };
        }, request),
      );
    }
  } finally {
    await browser.close();
    await site.close();
    rmSync(out, { recursive: true, force: true });
  }
});
