/** The engine on WASM in Chromium. */

import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { afterAll, afterEach, beforeAll, expect, test } from "vitest";
import type * as Engine from "../../src/engine/api";
import { bundles, cases, difference, draw, load } from "./drawn";
import { launch, type Site, serve } from "./site";

const out = mkdtempSync(join(tmpdir(), "engine-"));
let site: Site;
let browser: Browser;
const pages: Page[] = [];
const altered = new Map<string, Buffer>();

beforeAll(async () => {
  site = await serve(out, bundles, (path) => altered.get(path) ?? null);
  browser = await launch();
});

afterAll(async () => {
  await browser?.close();
  await site?.close();
  rmSync(out, { recursive: true, force: true });
});

afterEach(async () => {
  altered.clear();
  for (const page of pages.splice(0)) await page.close();
});

/** A page, isolated (threads) or plain; requests to other origins fail the test. */
async function open(mode: "isolated" | "plain"): Promise<Page> {
  const page = await browser.newPage();
  pages.push(page);
  const foreign: string[] = [];
  page.on("request", (request) => {
    if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(site.address)) foreign.push(request.url());
  });
  page.on("close", () => expect(foreign).toEqual([]));
  await page.goto(`${site.address}${mode}/page.html`);
  return page;
}

/** Puts `script` before the worker's own. */
function beforeWorker(script: string): void {
  const [worker] = readdirSync(join(out, "assets")).filter((file) => file.startsWith("worker"));
  altered.set(`assets/${worker}`, Buffer.concat([Buffer.from(script), readFileSync(join(out, "assets", worker))]));
}

const ofEmoji = cases.filter(({ bundle }) => bundle === "emoji");

test("with threads: Python's pictures, within 2 of 255", async () => {
  const page = await open("isolated");
  const report = await load(page, "emoji");
  expect(report).toMatchObject({ backend: "wasm", precision: "fp32" });
  expect(report.threads).toBe(await page.evaluate(() => Math.min(navigator.hardwareConcurrency, 4)));
  expect(report.notes[0]).toMatch(/^WebGPU is not used: /);
  expect(ofEmoji.length).toBe(4);
  for (const one of ofEmoji) {
    const pictures = await draw(page, one.request);
    expect(difference(pictures, one), JSON.stringify(one.request)).toBeLessThanOrEqual(2);
    pictures.forEach(({ settings }, i) => {
      expect(settings.seed).toBe((one.request.seed as number) + i);
      expect(settings.bundle).toBe(`emoji64 ${one.hash}`);
      expect(settings.Software).toMatch(/^pocketfusion \d/);
    });
  }
});

test("without isolation: one thread, with a note why, and the same pictures; the heap does not grow", async () => {
  const page = await open("plain");
  const report = await load(page, "emoji");
  expect(report.threads).toBe(1);
  expect(report.notes).toContain("one thread: the page is not cross-origin isolated");
  const [first] = ofEmoji;
  expect(difference(await draw(page, first.request), first)).toBeLessThanOrEqual(2);
  const heap = () => page.evaluate(async () => (await (window as any).loaded.memory()).heapBytes);
  const before = await heap();
  expect(before).toBeGreaterThan(100e6);
  const count = Number(process.env.POCKETFUSION_PICTURES ?? 5);
  await draw(page, { prompt: "a house", steps: 2, count });
  expect(await heap()).toBe(before);
}, 600_000);

test("every form of UNet draws Python's pictures; settings out of range are refused", async () => {
  const page = await open("plain");
  const small = cases.filter(({ bundle }) => ["plain", "single", "outside", "folded"].includes(bundle));
  expect(small.length).toBe(4);
  for (const one of small) {
    await load(page, one.bundle, { backend: "wasm" });
    expect(difference(await draw(page, one.request), one), one.bundle).toBeLessThanOrEqual(1);
  }
  const refused = (request: Engine.GenerateRequest) => expect(draw(page, request)).rejects;
  await refused({ prompt: "x", sampler: "dpmpp-2m" }).toThrow("with the step in its graph does not give");
  await refused({ prompt: "x", seed: 2 ** 32 }).toThrow("the seed is 4294967296: choose 0 to 4294967295");
  await refused({ prompt: "x", count: 0 }).toThrow("the number of pictures is 0");
  await refused({ prompt: "x", steps: 1001 }).toThrow("the number of steps is 1001: choose 1 to 1000");
  await refused({ prompt: "x", guidance: Number.NaN }).toThrow("the guidance scale is NaN");
});

test("events, a second request while one is drawn, cancelling, and stopping", async () => {
  const page = await open("plain");
  await load(page, "folded", { backend: "wasm" });
  const seen = await page.evaluate(async () => {
    const { loaded } = window as unknown as { loaded: Engine.Engine };
    const steps: string[] = [];
    const order: number[] = [];
    const warnings: string[] = [];
    const fault = (error: Engine.EngineError) => error.fault;
    await loaded.generate(
      { prompt: "red ".repeat(40), steps: 2, count: 2, previewEvery: 2 },
      {
        onStep: ({ picture, count, step, of, preview }) => steps.push(`${picture}/${count} ${step}/${of} ${preview?.data.length}`),
        onPicture: (_, index) => order.push(index),
        onWarning: (sentence) => warnings.push(sentence),
      },
    );
    const cancel = new AbortController();
    const drawing = loaded.generate({ prompt: "a", steps: 1000 }, { signal: cancel.signal, onStep: () => cancel.abort() });
    const busy = await loaded.generate({ prompt: "b" }).catch(fault);
    const cancelled = await drawing.catch(fault);
    const long = loaded.generate({ prompt: "a", steps: 1000 });
    setTimeout(() => loaded.stop(), 50);
    const stopped = await long.catch(fault);
    const [again] = await loaded.generate({ prompt: "a", steps: 1 });
    return { steps, order, warnings, busy, cancelled, stopped, again: again.data.length };
  });
  expect(seen.steps).toEqual(["0/2 1/2 undefined", "0/2 2/2 256", "1/2 1/2 undefined", "1/2 2/2 256"]);
  expect(seen.order).toEqual([0, 1]);
  expect(seen.warnings).toEqual([expect.stringContaining("the prompt has 40 tokens and 30 fit")]);
  expect(seen).toMatchObject({ busy: "busy", cancelled: "cancelled", stopped: "cancelled", again: 64 * 64 * 4 });
});

test("an altered file, a newer bundle, one too large, none at all: told, nothing of it kept", async () => {
  const manifest = JSON.parse(readFileSync(join(bundles.folded, "bundle.json"), "utf8"));
  const unet = readFileSync(join(bundles.folded, "unet.tflite"));
  unet[1000] ^= 1;
  const large = structuredClone(manifest);
  large.networks.unet.parameters = 6e8;
  const page = await open("plain");
  const attempt = () =>
    page.evaluate(async () => {
      const { engine } = window;
      const cache = engine.cacheStorage("test");
      const loaded = new engine.Engine({ wasm: "wasm/" });
      try {
        await loaded.load(await engine.openBundle(engine.urlSource("folded/"), cache), { backend: "wasm" });
        return "loaded";
      } catch (error) {
        return `${(error as Engine.BundleError).fault}: ${(error as Error).message}`;
      }
    });
  const kept = () =>
    page.evaluate(async () => {
      const paths: string[] = [];
      for (const name of await caches.keys()) {
        for (const { url } of await (await caches.open(name)).keys()) paths.push(decodeURIComponent(url));
      }
      return paths;
    });
  altered.set("folded/bundle.json", Buffer.from(JSON.stringify({ ...manifest, version: 2 })));
  expect(await attempt()).toMatch(/^newer-version: .*made by a newer pocketfusion/);
  altered.set("folded/bundle.json", Buffer.from("<!doctype html>"));
  expect(await attempt()).toMatch(/^not-a-bundle: /);
  expect(await kept()).toEqual([]);
  altered.set("folded/bundle.json", Buffer.from(JSON.stringify(large)));
  expect(await attempt()).toMatch(/^too-large: the bundle needs 2,4\d\d MB of memory and LiteRT has 2,147 MB/);
  altered.clear();
  altered.set("folded/unet.tflite", unet);
  expect(await attempt()).toMatch(/^corrupted: unet.tflite is altered: its SHA-256/);
  const sound = await kept();
  expect(sound.some((url) => url.endsWith(`sha256-${manifest.files.decoder.sha256}`))).toBe(false);
  expect(sound.some((url) => url.endsWith(`sha256-${manifest.files.unet.sha256}`))).toBe(false);
  altered.clear();
  expect(await attempt()).toBe("loaded");
  expect((await kept()).length).toBe(6); // the manifest, three networks, the tokenizer, the empty prompt
  site.requests.length = 0;
  expect(await attempt()).toBe("loaded");
  expect(site.requests.filter((path) => path.endsWith(".tflite"))).toEqual([]);
});

test("networks that do not fit into memory together come in turns, and draw the same", async () => {
  const manifest = JSON.parse(readFileSync(join(bundles.single, "bundle.json"), "utf8"));
  manifest.networks.unet.parameters = 4.5e8; // 1.8 GB as the kernels take them: it says
  altered.set("single/bundle.json", Buffer.from(JSON.stringify(manifest)));
  const page = await open("plain");
  const report = await load(page, "single", { backend: "wasm" });
  expect(report.notes).toContain("the networks are loaded in turns: they do not fit into memory together");
  const one = cases.find(({ bundle }) => bundle === "single")!;
  const pictures = await draw(page, { ...one.request, count: 2 });
  expect(difference(pictures.slice(0, 1), one)).toBeLessThanOrEqual(1);
  expect(pictures.map(({ settings }) => settings.seed)).toEqual([11, 12]);
});

test("a bundle from a folder on disk", async () => {
  const page = await open("plain");
  await page.evaluate(() => {
    document.body.innerHTML = '<input type="file" webkitdirectory>';
  });
  await page.locator("input").setInputFiles(bundles.folded);
  const one = cases.find(({ bundle }) => bundle === "folded")!;
  const pictures = await page.evaluate(async (request) => {
    const { engine } = window;
    const files = (document.querySelector("input") as HTMLInputElement).files as FileList;
    const loaded = new engine.Engine({ wasm: "wasm/" });
    await loaded.load(await engine.openBundle(engine.filesSource([...files])), { backend: "wasm" });
    return (await loaded.generate(request)).map(({ data, ...rest }) => ({ ...rest, data: Array.from(data) }));
  }, one.request);
  expect(difference(pictures, one)).toBeLessThanOrEqual(1);
});

test("a browser without relaxed SIMD: another build, one thread, and why; the same picture", async () => {
  // the modules that features are tried with are small
  beforeWorker(`
    const make = WebAssembly.instantiate;
    WebAssembly.instantiate = (code, ...more) =>
      code.byteLength < 200 && Array.from(code).includes(0xfd)
        ? Promise.reject(new WebAssembly.CompileError("no SIMD"))
        : make(code, ...more);
  `);
  const page = await open("isolated");
  site.requests.length = 0;
  const report = await load(page, "emoji");
  expect(report.threads).toBe(1);
  expect(report.notes.join()).toContain("one thread: this browser cannot run LiteRT's threads (Threads are only supported");
  expect(site.requests.filter((path) => path.endsWith(".wasm"))).toEqual(["/isolated/wasm/litert_wasm_compat_internal.wasm"]);
  const [first] = ofEmoji;
  expect(difference(await draw(page, first.request), first)).toBeLessThanOrEqual(2);
});

test("a browser that gives no more memory: one sentence, and a smaller bundle still loads", async () => {
  beforeWorker(`
    const grow = WebAssembly.Memory.prototype.grow;
    WebAssembly.Memory.prototype.grow = function (pages) {
      if (this.buffer.byteLength + 65536 * pages > 60e6) throw new RangeError("no more");
      return grow.call(this, pages);
    };
  `);
  const page = await open("plain");
  await expect(load(page, "emoji")).rejects.toThrow("the browser seems to have run out of memory");
  const report = await load(page, "folded", { backend: "wasm" });
  expect(report.backend).toBe("wasm");
});
