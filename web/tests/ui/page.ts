/** What the page's tests share: a browser, pages that note what they should not do, and the server's address. */
import type { Browser, BrowserContext, Page } from "playwright-core";
import { expect, vi } from "vitest";

/** A browser and an engine on a machine that has other things to do. */
const PATIENCE = 240_000;
vi.setConfig({ testTimeout: PATIENCE, hookTimeout: PATIENCE });

/** Where `pocketfusion serve` is, for tests of the real page. */
export const ADDRESS = process.env.POCKETFUSION_PAGE ?? "";
/** Messages of a browser without a GPU, of a refused fetch and of Vite's server, which are no fault. */
const HARMLESS = /No available adapters|Failed to create default WebGPU device|Failed to load resource|WebSocket|\[vite\]/;

export interface Watched {
  page: Page;
  context: BrowserContext;
  /** Addresses of other origins that the page asked for. */
  foreign: string[];
  /** Errors on the console, and exceptions that nothing caught. */
  errors: string[];
}

export interface Settings {
  width?: number;
  scheme?: "light" | "dark";
  /** If service workers may be registered. */
  workers?: "allow" | "block";
  /** Runs in the page before its own code. */
  before?: () => void;
}

export async function watched(browser: Browser, { width = 360, scheme = "light", workers = "allow", before }: Settings = {}): Promise<Watched> {
  const context = await browser.newContext({
    viewport: { width, height: width < 600 ? 740 : 800 },
    colorScheme: scheme,
    serviceWorkers: workers,
  });
  return await watch(context, before);
}

/** Another page of the same person. */
export async function watch(context: BrowserContext, before?: () => void): Promise<Watched> {
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE / 2);
  if (before) await page.addInitScript(before);
  const [foreign, errors]: [string[], string[]] = [[], []];
  const own = new URL(ADDRESS || "http://127.0.0.1").hostname;
  page.on("request", (request) => {
    const url = new URL(request.url());
    if (!["blob:", "data:"].includes(url.protocol) && url.hostname !== own) foreign.push(request.url());
  });
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error" && !HARMLESS.test(message.text())) errors.push(message.text());
  });
  return { page, context, foreign, errors };
}

export async function ready(page: Page): Promise<void> {
  await page.locator(".draw:not(:disabled)").waitFor();
}

/** Writes a prompt, presses the button and waits for the picture or an error. */
export async function draw(page: Page, prompt: string): Promise<void> {
  await page.getByLabel("Prompt").fill(prompt);
  await page.locator(".draw").click();
  await page.locator(".stop").waitFor();
  await ready(page);
}

/** Nothing unasked for happened. */
export function expectCalm({ foreign, errors }: Watched): void {
  expect(foreign).toEqual([]);
  expect(errors).toEqual([]);
}
