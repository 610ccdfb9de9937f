/** The engine on WebGPU in Chromium, over SwiftShader (in software, fp32): few steps, as each takes long. */

import { createHash } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import type * as Engine from "../../src/engine/api";
import { bundles, cases, type Drawn, difference, draw, load } from "./drawn";
import { launch, type Site, serve } from "./site";

/** Put before the worker's script: its GPU device, for a test to take away. */
const HOOK = `
const ask = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...given) { return (self.gpuDevice = await ask.apply(this, given)); };
`;

const out = mkdtempSync(join(tmpdir(), "engine-"));
const altered = new Map<string, Buffer>();
let site: Site;
let browser: Browser;
let page: Page;
let lines: string[];

beforeAll(async () => {
  site = await serve(out, bundles, (path) => altered.get(path) ?? null);
  const [worker] = readdirSync(join(out, "assets")).filter((file) => file.startsWith("worker"));
  altered.set(`assets/${worker}`, Buffer.concat([Buffer.from(HOOK), readFileSync(join(out, "assets", worker))]));
  browser = await launch(["--enable-unsafe-webgpu"]);
});

afterAll(async () => {
  await browser?.close();
  await site?.close();
  rmSync(out, { recursive: true, force: true });
});

beforeEach(async () => {
  await page?.close();
  page = await browser.newPage();
  lines = [];
  page.on("console", (message) => lines.push(message.text()));
  await page.goto(`${site.address}plain/page.html`);
});

const [one] = cases.filter(({ bundle }) => bundle === "gpu");

test("a bundle for GPUs is checked and draws Python's picture, in fp32 where there is no fp16", async () => {
  const device = await page.evaluate(() => window.engine.probe());
  expect(device).toMatchObject({ software: true, shaderF16: false });
  expect(device.adapter).toContain("swiftshader");
  const report = await load(page, "gpu", { backend: "webgpu" });
  expect(report).toMatchObject({
    backend: "webgpu",
    precision: "fp32",
    fullyAccelerated: { text_encoder: true, unet: true, decoder: true },
  });
  const [, decibels] = /^the GPU was checked: .* to (\d+) dB$/.exec(report.notes[0]) ?? [];
  expect(Number(decibels)).toBeGreaterThan(80);
  expect(difference(await draw(page, one.request), one)).toBeLessThanOrEqual(1);
  expect(lines.filter((line) => /WGSL|Invalid/.test(line))).toEqual([]);
});

test("a GPU that is lost while it draws: the same request goes on on WASM", async () => {
  expect((await load(page, "gpu", { backend: "webgpu" })).backend).toBe("webgpu");
  const request = { prompt: "a red cat", seed: 4, steps: 60 };
  await page.evaluate((asked) => {
    const { loaded } = window as unknown as { loaded: Engine.Engine };
    const seen = { steps: 0, fallback: null as Engine.LoadReport | null, result: null as Promise<Drawn[]> | null };
    loaded.onFallback = (report) => (seen.fallback = report);
    const drawing = loaded.generate(asked, { onStep: () => void seen.steps++ });
    seen.result = drawing.then((all) => all.map(({ data, ...rest }) => ({ ...rest, data: Array.from(data) })));
    Object.assign(window, { seen });
  }, request);
  await page.waitForFunction(() => (window as any).seen.steps >= 2, null, { polling: 20 });
  await page.workers()[0].evaluate(() => (self as any).gpuDevice.destroy());
  const { fallback, pictures } = await page.evaluate(async () => {
    const { seen } = window as any;
    const pictures: Drawn[] = await seen.result;
    return { fallback: seen.fallback as Engine.LoadReport, pictures };
  });
  expect(fallback.backend).toBe("wasm");
  expect(fallback.notes[0]).toMatch(/^WebGPU is not used: the GPU was lost \(/);
  expect(pictures[0].settings).toMatchObject({ prompt: "a red cat", seed: 4, num_inference_steps: 60 });
  expect(await draw(page, request)).toEqual([{ ...pictures[0], milliseconds: expect.anything() }]);
});

test("a GPU that computes something else, and a bundle without a self-check: WASM, and why", async () => {
  const manifest = JSON.parse(readFileSync(join(bundles.gpu, "bundle.json"), "utf8"));
  const wrong = Buffer.from(Float32Array.from({ length: manifest.files.selfcheck.size / 4 }, (_, i) => Math.sin(i)).buffer);
  manifest.files.selfcheck.sha256 = createHash("sha256").update(wrong).digest("hex");
  altered.set("gpu/selfcheck.f32", wrong);
  altered.set("gpu/bundle.json", Buffer.from(JSON.stringify(manifest)));
  const distrusted = await load(page, "gpu", { backend: "webgpu" });
  expect(distrusted.backend).toBe("wasm");
  expect(distrusted.notes[0]).toMatch(/^WebGPU is not used: the GPU computes something else \(its UNet is -?\d+ dB/);
  delete manifest.files.selfcheck;
  altered.set("gpu/bundle.json", Buffer.from(JSON.stringify(manifest)));
  const unchecked = await load(page, "gpu", { backend: "webgpu" });
  expect([unchecked.backend, unchecked.notes[0]]).toEqual([
    "wasm",
    "WebGPU is not used: the bundle has no self-check: export it again",
  ]);
  altered.delete("gpu/bundle.json");
  altered.delete("gpu/selfcheck.f32");
  const slower = await load(page, "gpu");
  expect(slower.backend).toBe("wasm");
  expect(slower.notes[0]).toMatch(/^WebGPU is not used: this browser computes WebGPU in software \(google swiftshader/);
  const forCpu = await load(page, "plain", { backend: "webgpu" });
  expect([forCpu.backend, forCpu.notes[0]]).toEqual(["wasm", "WebGPU is not used: the bundle was exported for CPUs"]);
});
