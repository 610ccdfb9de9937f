/** The engine built and served on a port of this machine, and a Chromium that looks at it. */

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";
import { type Browser, chromium } from "playwright-core";
import { build } from "vite";

const TYPES: Record<string, string> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
};
const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
/** As strict as the product's: no other origin, no eval. */
const POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; img-src 'self' data:";

export interface Site {
  /** Address of the page; below `isolated/` it may use threads, below `plain/` it may not. */
  address: string;
  /** Paths that were asked for. */
  requests: string[];
  close(): Promise<void>;
}

/** Builds into `out` and serves it, with `folders` beside it by their names, changed by `alter` where that says so. */
export async function serve(
  out: string,
  folders: Record<string, string>,
  alter: (path: string) => Buffer | null = () => null,
): Promise<Site> {
  if (!existsSync(join(out, "page.html"))) {
    const root = import.meta.dirname;
    const configFile = join(root, "../../vite.config.ts");
    const input = join(root, "page.html");
    await build({ root, configFile, logLevel: "warn", build: { outDir: out, emptyOutDir: false, rolldownOptions: { input } } });
  }
  const requests: string[] = [];
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url ?? "/", "http://x").pathname));
    requests.push(path);
    const [, mode, ...parts] = path.split("/");
    const folder = folders[parts[0]];
    const file = folder ? join(folder, ...parts.slice(1)) : join(out, ...parts);
    const headers = { "Content-Security-Policy": POLICY, ...(mode === "isolated" ? ISOLATION : {}) };
    const altered = alter(parts.join("/"));
    if (!altered && !(existsSync(file) && statSync(file).isFile())) response.writeHead(404, headers).end();
    else {
      response.writeHead(200, { ...headers, "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" });
      if (altered) response.end(altered);
      else createReadStream(file).pipe(response);
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    address: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    requests,
    close: () => new Promise((resolve) => (server.closeAllConnections(), server.close(() => resolve()))),
  };
}

export async function launch(flags: string[] = []): Promise<Browser> {
  return await chromium.launch({
    executablePath: process.env.POCKETFUSION_CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--no-sandbox",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      ...flags,
    ],
  });
}
