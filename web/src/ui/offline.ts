/** The service worker: it makes the page work offline, and isolates it where the host sends no headers for that. */

const REFRESHED = "pocketfusion-isolating";

/**
 * Registers the worker and resolves once it controls the page, so that all that is fetched from then on is kept; also
 * resolves where there is none. On a host that does not isolate the page, it is reloaded once to come through the worker.
 */
export async function startOffline(): Promise<void> {
  let workers: ServiceWorkerContainer;
  try {
    workers = navigator.serviceWorker; // none without https or localhost
    await workers.register("sw.js", { type: "module" });
  } catch {
    return;
  }
  await Promise.race([controlled(workers), new Promise((resolve) => setTimeout(resolve, 5000))]);
  if (!workers.controller || crossOriginIsolated) return;
  try {
    if (sessionStorage.getItem(REFRESHED)) return;
    sessionStorage.setItem(REFRESHED, "1");
  } catch {
    return; // without storage it might reload for ever
  }
  location.reload();
  await new Promise(() => undefined);
}

async function controlled(workers: ServiceWorkerContainer): Promise<void> {
  if (workers.controller) return;
  await new Promise<void>((resolve) => workers.addEventListener("controllerchange", () => resolve(), { once: true }));
}
