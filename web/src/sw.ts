/**
 * The service worker: the page's own files, each kept only if its SHA-256 is the one of the build, and the headers that
 * isolate the page on hosts that send none. A bundle's files are the engine's to verify and keep.
 */

/** Paths of the page's files with their SHA-256, and those fetched when they are first needed: written by the build. */
declare const __FILES__: { now: Record<string, string>; later: Record<string, string>; build: string };

const worker = self as unknown as ServiceWorkerGlobalScope;
const { now, later, build } = __FILES__;
const CACHE = `pocketfusion-page-${build}`;
const LIST = "bundles.json";
const addressOf = (path: string) => new URL(path, worker.registration.scope).href;
const hashes = new Map(Object.entries({ ...now, ...later }).map(([path, hash]) => [addressOf(path), hash]));

worker.addEventListener("install", (event) => {
  const page = Object.keys(now).map((path) => fetchVerified(addressOf(path), true));
  event.waitUntil(Promise.all([...page, newest(addressOf(LIST)).catch(() => undefined)]));
});

worker.addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) {
        if (name.startsWith("pocketfusion-page-") && name !== CACHE) await caches.delete(name);
      }
      await worker.clients.claim();
    })(),
  );
});

worker.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== worker.location.origin) return;
  event.respondWith(answer(event.request, url).then(isolated));
});

async function answer(request: Request, url: URL): Promise<Response> {
  url.search = url.hash = "";
  const home = url.href === worker.registration.scope;
  const address = home ? addressOf("index.html") : url.href;
  if (hashes.has(address)) return (await (await caches.open(CACHE)).match(address)) ?? (await fetchVerified(address));
  return address === addressOf(LIST) ? await newest(address) : await fetch(request);
}

/** The list of bundles as it is now; offline, as it was at the last visit. */
async function newest(address: string): Promise<Response> {
  const cache = await caches.open("pocketfusion-list");
  try {
    const response = await fetch(address, { cache: "no-cache" });
    if (response.ok) await cache.put(address, response.clone()).catch(() => undefined);
    return response;
  } catch (error) {
    const kept = await cache.match(address);
    if (!kept) throw error;
    return kept;
  }
}

/** Fetches a file of the page, and keeps it if it is the build's; what is not is passed on unkept. */
async function fetchVerified(address: string, installing = false): Promise<Response> {
  const response = await fetch(address, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${address} cannot be fetched (HTTP ${response.status})`);
  const content = await response.clone().arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const hash = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hash !== hashes.get(address)) {
    if (installing) throw new Error(`${address} is not the build's`); // half of an update: the old one goes on
    return response;
  }
  const headers = new Headers({ "Content-Type": response.headers.get("Content-Type") ?? "application/octet-stream" });
  const kept = new Response(content, { headers });
  await (await caches.open(CACHE)).put(address, kept.clone()).catch(() => undefined); // full: it works while online
  return kept;
}

/** With the headers of cross-origin isolation, which threads in WebAssembly need. */
function isolated(response: Response): Response {
  if (response.type === "opaque" || response.type === "error" || response.status === 0) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  const empty = [101, 204, 205, 304].includes(response.status);
  return new Response(empty ? null : response.body, { status: response.status, statusText: response.statusText, headers });
}
