/** The page on hosts that send no headers, from a folder of theirs, and as a file. */
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join } from "node:path";
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { launch } from "../engine/site";
import { draw, ready, watched } from "./page";

const SITE = process.env.POCKETFUSION_SITE ?? ""; // as `pocketfusion web-build` writes it
const TYPES: Record<string, string> = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".wasm": "application/wasm" };

let browser: Browser;
let server: Server;

beforeAll(async () => {
  browser = await launch();
  server = createServer((request, response) => {
    const path = new URL(request.url ?? "/", "http://x").pathname.replace(/^\/a\/folder\//, "");
    const file = join(SITE, path || "index.html");
    if (!existsSync(file) || !statSync(file).isFile()) return response.writeHead(404).end();
    response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" });
    return createReadStream(file).pipe(response);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
});

const address = () => `http://127.0.0.1:${(server.address() as AddressInfo).port}/a/folder/`;

afterAll(async () => {
  await browser?.close();
  server?.closeAllConnections();
  server?.close();
});

test("the service worker isolates it, so it has threads", async () => {
  const { page, context, errors } = await watched(browser);
  await page.goto(address());
  await page.waitForFunction(() => crossOriginIsolated);
  await ready(page);
  await draw(page, "a boat");
  expect(await page.locator(".facts summary").innerText()).toMatch(/WASM, [2-9] threads/);
  await context.setOffline(true);
  await page.reload();
  await ready(page);
  expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
  expect(errors).toEqual([]);
  await context.close();
});

test("without a service worker and a secure context's storage it draws on one thread", async () => {
  const bare = () => {
    Object.defineProperty(navigator, "serviceWorker", { value: undefined });
    Reflect.deleteProperty(globalThis, "caches");
    Object.defineProperty(globalThis, "crossOriginIsolated", { value: false });
  };
  const { page, context } = await watched(browser, { before: bare });
  await page.goto(address());
  await ready(page);
  await draw(page, "a boat");
  await page.getByText("WASM, 1 thread").click();
  await page.getByText("One thread: the page is not cross-origin isolated.").waitFor();
  await context.close();
});

test("opened as a file it says what to do", async () => {
  const { page, context } = await watched(browser);
  await page.goto(`file://${join(SITE, "index.html")}`);
  await page.getByText("run pocketfusion serve", { exact: false }).waitFor();
  await context.close();
});
