/** The page as `pocketfusion serve` gives it on a device with a GPU: one in software, which it is made to take for real. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "vitest";
import { launch } from "../engine/site";
import { ADDRESS, draw, expectCalm, ready, watched } from "./page";

test("it takes the form for WebGPU, checks the GPU, and draws on it", async () => {
  const browser = await launch(["--enable-unsafe-webgpu"]);
  const real = () => {
    for (const kind of [globalThis.GPUAdapterInfo, globalThis.GPUAdapter]) {
      Object.defineProperty(kind.prototype, "isFallbackAdapter", { get: () => false });
    }
  };
  const seen = await watched(browser, { before: real });
  const { page } = seen;
  await page.goto(ADDRESS);
  await ready(page);
  await page.locator(".settings summary").click();
  await page.getByLabel("Steps").fill("2");
  await page.getByLabel("Seed", { exact: true }).fill("11");
  await page.getByLabel("Not in the picture").fill("blue");
  await draw(page, "a red cat");
  await page.getByText("WebGPU, fp32").click();
  await page.getByText(/The GPU was checked: it computes what the bundle says, to \d+ dB\./).waitFor();
  const download = page.waitForEvent("download");
  await page.getByLabel("Save the picture").click();
  writeFileSync(join(process.env.POCKETFUSION_VECTORS ?? "", "from-gpu.png"), readFileSync(await (await download).path()));
  expectCalm(seen);
  await browser.close();
});
