/** The page as `pocketfusion serve` gives it, with the engine and the embedded bundle, in Chromium without a GPU. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { launch } from "../engine/site";
import { ADDRESS, draw, expectCalm, ready, type Watched, watched } from "./page";

const OUT = process.env.POCKETFUSION_VECTORS ?? "";
const BUNDLE = join(import.meta.dirname, "../../../src/pocketfusion/bundles/emoji");

let browser: Browser;
let seen: Watched; // one person's visit, from test to test

beforeAll(async () => {
  browser = await launch();
  seen = await watched(browser);
  await seen.page.goto(ADDRESS);
  await ready(seen.page);
});

afterAll(async () => await browser?.close());

test("a picture is drawn, with threads, and its PNG has its settings inside", async () => {
  const { page } = seen;
  await page.locator(".settings summary").click();
  await page.getByLabel("Seed", { exact: true }).fill("3");
  await draw(page, "a red apple, noto style");
  expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
  await page.getByText(/WASM, \d threads?/).click();
  await page.getByText("WebGPU is not used: the browser finds no GPU that it may use.").waitFor();
  expect(await page.locator(".facts").innerText()).toMatch(/UNet\s+[\d.]+ m?s\s+8 × [\d.]+ m?s/);
  const download = page.waitForEvent("download");
  await page.getByLabel("Save the picture").click();
  writeFileSync(join(OUT, "from-page.png"), readFileSync(await (await download).path()));
  expectCalm(seen);
});

test("the gallery survives a reload, and its pictures are drawn again from there", async () => {
  const { page } = seen;
  await page.reload();
  await ready(page);
  const before = await page.locator(".gallery img").first().evaluate(pixels);
  await page.locator(".gallery li button").first().click();
  await page.getByRole("button", { name: "Draw again" }).click();
  await page.locator(".stop").waitFor();
  await ready(page);
  await page.locator(".gallery li").nth(1).waitFor();
  expect(await page.locator(".gallery img").first().evaluate(pixels)).toEqual(before);
});

test("a picture of `generate` is drawn again from its file", async () => {
  const { page } = seen;
  await page.getByLabel("About, models and storage").click();
  await page.getByLabel("Draw a PNG again").setInputFiles(join(OUT, "from-python.png"));
  await page.locator(".stop").waitFor();
  await ready(page);
  expect(await page.getByLabel("Prompt").inputValue()).toBe("a heart, fluent 3d style");
  await page.locator(".gallery li button").first().click();
  for (const fact of ["11", "4", "euler"]) await page.locator("dd").getByText(fact, { exact: true }).waitFor();
  const download = page.waitForEvent("download");
  await page.getByRole("link", { name: "Save", exact: true }).click();
  writeFileSync(join(OUT, "again-from-python.png"), readFileSync(await (await download).path()));
  await page.keyboard.press("Escape");
});

test("a picture that was stopped is nowhere, and the next one is drawn", async () => {
  const { page } = seen;
  await page.locator(".settings summary").click();
  await page.getByLabel("Steps").fill("50");
  await page.locator(".draw").click();
  await page.getByText(/^Step \d+ of 50$/).waitFor();
  await page.getByRole("button", { name: "Stop" }).click();
  await ready(page);
  expect(await page.locator(".gallery li").count()).toBe(3);
  await page.getByRole("button", { name: "Back to the model’s own" }).click();
});

test("it draws offline after the first visit", async () => {
  const { page, context } = seen;
  await context.setOffline(true);
  await page.reload();
  await ready(page);
  await draw(page, "a yellow star");
  expect(await page.getByRole("alert").count()).toBe(0);
  expect(await page.locator(".gallery li").count()).toBe(4);
  await context.setOffline(false);
  expectCalm(seen);
});

test("a folder from disk is opened; an altered one and a newer one are refused", async () => {
  const { page, context } = await watched(browser);
  await page.goto(ADDRESS);
  await ready(page);
  const before = await kept(page);
  for (const [folder, sentence] of [
    ["altered", /decoder.tflite is altered: its SHA-256 differs from the manifest's/],
    ["newer", /is of version 2, made by a newer pocketfusion/],
  ] as const) {
    await page.getByLabel("About, models and storage").click();
    await page.getByLabel("Open a bundle’s folder").setInputFiles(join(OUT, folder));
    if (folder === "altered") {
      await page.locator("header select").waitFor(); // its manifest is in order
      await page.locator(".draw").click();
    }
    await page.getByRole("alert").getByText(sentence).waitFor();
  }
  expect(await kept(page)).toEqual(before); // what is on disk is not kept, and what is altered is nowhere
  await context.close();
});

test("a file that is altered on its way is told and not kept", async () => {
  const { page, context } = await watched(browser, { workers: "block" }); // which would fetch it behind the route
  await context.route("**/unet.tflite", (route) => {
    const altered = readFileSync(join(BUNDLE, "unet.tflite"));
    altered[altered.length >> 1] ^= 1;
    return route.fulfill({ body: altered, headers: { "Cross-Origin-Resource-Policy": "same-origin" } });
  });
  await page.goto(ADDRESS);
  await ready(page);
  await page.locator(".draw").click();
  await page.getByRole("alert").getByText(/unet.tflite is altered/).waitFor();
  const unet = JSON.parse(readFileSync(join(BUNDLE, "bundle.json"), "utf-8")).files.unet.sha256;
  expect((await kept(page)).some((url) => url.includes(unet))).toBe(false);
  await context.close();
});

/** Addresses under which files of bundles' hashes are kept. */
async function kept(page: Page): Promise<string[]> {
  const urls = await page.evaluate(async () => (await (await caches.open("pocketfusion-bundles")).keys()).map(({ url }) => url));
  return urls.filter((url) => url.includes("sha256-"));
}

function pixels(image: SVGElement | HTMLElement): number[] {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [(image as HTMLImageElement).naturalWidth, (image as HTMLImageElement).naturalHeight];
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.drawImage(image as HTMLImageElement, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}
