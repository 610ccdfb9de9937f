/** The page with an engine of blots: what it does with what an engine tells it, and whether everybody can use it. */
import axe from "axe-core";
import type { Browser, Page } from "playwright-core";
import type { ViteDevServer } from "vite";
import { afterAll, beforeAll, expect, test } from "vitest";
import { launch } from "../engine/site";
import type { Plan } from "./fake";
import { draw, expectCalm, ready, type Settings, type Watched, watch, watched } from "./page";
import { fakePage } from "./server";

let browser: Browser;
let server: ViteDevServer;
let address: string;

beforeAll(async () => {
  ({ address, server } = await fakePage());
  browser = await launch();
});

afterAll(async () => {
  await browser?.close();
  await server?.close();
});

async function opened(plan: Plan = {}, settings: Settings = {}): Promise<Watched> {
  const seen = await watched(browser, settings);
  await seen.page.goto(`${address}?plan=${encodeURIComponent(JSON.stringify(plan))}`);
  await ready(seen.page);
  return seen;
}

/** What axe finds that keeps people out; all of the page, in the state that it is in. */
async function barriers(page: Page): Promise<string[]> {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(async () => {
    return await (window as unknown as { axe: typeof axe }).axe.run(document, { resultTypes: ["violations"] });
  });
  const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
  return serious.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html.slice(0, 200)).join(" | ")}`);
}

for (const [width, scheme] of [[360, "light"], [1280, "dark"]] as const) {
  test(`nobody is kept out, at ${width} px, ${scheme}`, async () => {
    const { page, context } = await opened({ stepMilliseconds: 500 }, { width, scheme });
    expect(await barriers(page)).toEqual([]);
    await page.getByLabel("Prompt").fill("a boat");
    await page.locator(".draw").click();
    await page.getByText(/^Step [1-7] of 8$/).waitFor();
    expect(await barriers(page)).toEqual([]);
    await ready(page);
    for (const summary of await page.locator("summary").all()) await summary.click();
    expect(await barriers(page)).toEqual([]);
    // nothing lies beyond the edge
    expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBe(width);
    await page.locator(".gallery li button").first().click();
    expect(await barriers(page)).toEqual([]);
    await page.keyboard.press("Escape");
    await page.getByLabel("About, models and storage").click();
    expect(await barriers(page)).toEqual([]);
    await context.close();
  });
}

test("the keyboard alone draws, looks and goes back", async () => {
  const seen = await opened();
  const { page } = seen;
  await page.getByLabel("Prompt").focus();
  await page.keyboard.type("a boat");
  await page.keyboard.press("Enter");
  await page.getByRole("status").getByText("The picture is ready").waitFor({ state: "attached" });
  const picture = page.getByRole("button", { name: /Picture 1: a boat/ });
  await picture.focus();
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
  expect(await picture.evaluate((element) => element === document.activeElement)).toBe(true);
  expectCalm(seen);
  await seen.context.close();
});

test("who asks for nothing is shown an example", async () => {
  const { page, context } = await opened();
  await page.locator(".draw").click();
  expect(await page.getByLabel("Prompt").inputValue()).toBe("a red heart");
  await ready(page);
  expect(await page.locator(".gallery li").count()).toBe(1);
  await context.close();
});

test("who draws from far below the stage sees it", async () => {
  const { page, context } = await opened();
  for (const summary of await page.locator("summary").all()) await summary.click();
  await page.evaluate(() => scrollTo(0, document.body.scrollHeight));
  const top = () => page.locator(".stage").evaluate((stage) => stage.getBoundingClientRect().top);
  expect(await top()).toBeLessThan(0);
  await page.locator(".draw").click();
  expect(await top()).toBeGreaterThanOrEqual(0);
  await context.close();
});

test("a style chip is the prompt's end, and only one is", async () => {
  const { page, context } = await opened();
  const prompt = page.getByLabel("Prompt");
  await prompt.fill("a boat");
  await page.getByRole("button", { name: "noto", exact: true }).click();
  expect(await prompt.inputValue()).toBe("a boat, noto style");
  await page.getByRole("button", { name: "noto v1", exact: true }).click();
  expect(await prompt.inputValue()).toBe("a boat, noto v1 style");
  await page.getByRole("button", { name: "noto v1", exact: true }).click();
  expect(await prompt.inputValue()).toBe("a boat");
  await context.close();
});

test("stopping leaves no half picture and no error", async () => {
  const { page, context } = await opened({ stepMilliseconds: 500 });
  await page.getByLabel("Prompt").fill("a boat");
  await page.locator(".draw").click();
  await page.getByText(/^Step [1-7] of 8$/).waitFor();
  await page.getByRole("button", { name: "Stop" }).click();
  await ready(page);
  expect(await page.locator(".place, .error, .gallery").count()).toBe(0);
  expect(await page.getByLabel("Prompt").inputValue()).toBe("a boat");
  await context.close();
});

test("what the engine refuses is told, and the next picture is drawn", async () => {
  const message = "this device has too little memory for it: choose a smaller model";
  for (const plan of [{ loadFails: message }, { drawFails: { fault: "memory", message } }] satisfies Plan[]) {
    const { page, context } = await opened(plan);
    await page.getByLabel("Prompt").fill("a boat");
    await page.locator(".draw").click();
    await page.getByRole("alert").getByText("This device has too little memory for it: choose a smaller model.").waitFor();
    expect(await page.locator(".place").count()).toBe(0);
    await page.getByLabel("Put this message away").click();
    expect(await page.getByRole("alert").count()).toBe(0);
    await context.close();
  }
});

test("a lost GPU is told and keeps the prompt", async () => {
  const { page, context } = await opened({ webgpu: true, losesDevice: true });
  await draw(page, "a boat");
  await page.getByText("WASM, 2 threads").click();
  await page.getByText("The GPU went away: the CPU draws on.").waitFor();
  expect(await page.locator(".gallery li").count()).toBe(1);
  expect(await page.getByLabel("Prompt").inputValue()).toBe("a boat");
  await context.close();
});

test("a browser that keeps nothing draws all the same, and says so", async () => {
  const refuse = () => {
    const refused = () => new DOMException("refused", "SecurityError");
    const thrown = () => {
      throw refused();
    };
    Object.defineProperty(globalThis, "indexedDB", { value: { open: thrown } });
    Object.defineProperty(globalThis, "localStorage", { get: thrown });
    CacheStorage.prototype.open = () => Promise.reject(refused());
  };
  const { page, context } = await opened({}, { before: refuse });
  await page.getByText("This browser keeps no pictures for this page: save those that you want.").waitFor();
  await draw(page, "a boat");
  expect(await page.locator(".gallery li").count()).toBe(1);
  await context.close();
});

test("a full storage is told, and the picture can still be saved", async () => {
  const fill = () => {
    IDBObjectStore.prototype.add = () => {
      throw new DOMException("full", "QuotaExceededError");
    };
  };
  const { page, context } = await opened({}, { before: fill });
  await draw(page, "a boat");
  await page.getByText("The storage is full: this picture is gone with the page. Save it, or delete others.").waitFor();
  const download = page.waitForEvent("download");
  await page.getByLabel("Save the picture").click();
  expect((await download).suggestedFilename()).toMatch(/^a-boat-\d+\.png$/);
  await context.close();
});

test("two tabs share the gallery", async () => {
  const first = await opened();
  const second = await watch(first.context);
  await second.page.goto(first.page.url());
  await ready(second.page);
  await Promise.all([draw(first.page, "a boat"), draw(second.page, "a tree")]);
  for (const { page } of [first, second]) await page.locator(".gallery li").nth(1).waitFor();
  await first.page.locator(".gallery li button").first().click();
  await first.page.getByRole("button", { name: "Delete" }).click();
  await second.page.waitForFunction(() => document.querySelectorAll(".gallery li").length === 1);
  await first.context.close();
});

test("what is neither picture nor bundle is refused in a sentence", async () => {
  const { page, context } = await opened();
  await page.getByLabel("About, models and storage").click();
  await page.getByLabel("Draw a PNG again").setInputFiles({ name: "a.png", mimeType: "image/png", buffer: Buffer.from("no") });
  await page.getByRole("alert").getByText("The file is no whole PNG picture: choose another.").waitFor();
  await page.getByLabel("About, models and storage").click();
  await page.getByLabel("Draw a PNG again").setInputFiles({ name: "a.txt", mimeType: "text/plain", buffer: Buffer.from("no") });
  await page.getByRole("alert").getByText("That is neither a PNG picture nor a bundle").waitFor();
  await context.close();
});

test("a picture is shared as a file where the device can", async () => {
  const share = () => {
    const shared: string[] = [];
    Object.assign(globalThis, { shared });
    Object.assign(navigator, {
      canShare: ({ files }: ShareData) => files?.length === 1,
      share: async ({ files }: ShareData) => void shared.push(`${files?.[0].name} ${files?.[0].type}`),
    });
  };
  const { page, context } = await opened({}, { before: share });
  await draw(page, "a boat");
  await page.getByLabel("Share the picture").click();
  const shared = await page.evaluate(() => (globalThis as unknown as { shared: string[] }).shared);
  expect(shared).toHaveLength(1);
  expect(shared[0]).toMatch(/^a-boat-\d+\.png image\/png$/);
  await context.close();
});

test("less motion is less motion", async () => {
  const { page, context } = await opened({ stepMilliseconds: 100 });
  await page.emulateMedia({ reducedMotion: "reduce" });
  await page.locator(".draw").click();
  await page.locator(".progress span").waitFor({ state: "attached" });
  const moving = await page.evaluate(() => document.getAnimations().length);
  expect(moving).toBe(0);
  await context.close();
});
