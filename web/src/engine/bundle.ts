/** A bundle: its manifest, and its files as the manifest names them, none used or kept before its hash is compared. */

import { sha256 } from "@noble/hashes/sha2.js";
import { BundleError } from "./errors";
import { type Manifest, parseManifest } from "./manifest";
import { type BundleSource, type ReadOptions, type SourceDescriptor, sourceOf } from "./source";

const MANIFEST = "bundle.json";
const MANIFEST_LIMIT = 8e6;

/** Where verified files are kept between visits, by a key. */
export interface BundleCache {
  has(key: string): Promise<boolean>;
  get(key: string): Promise<Uint8Array<ArrayBuffer> | null>;
  /** Rejects if the storage is full or refused. */
  put(key: string, bytes: Uint8Array<ArrayBuffer>): Promise<void>;
  delete(key: string): Promise<void>;
  /** Forgets all. */
  clear(): Promise<void>;
}

/** The browser's Cache API as a BundleCache; null where there is none (it needs https or localhost). */
export function cacheStorage(name = "pocketfusion-bundles"): BundleCache | null {
  if (!("caches" in globalThis)) return null;
  const address = (key: string) => new URL(`/.pocketfusion/${encodeURIComponent(key)}`, location.origin);
  return {
    has: async (key) => (await (await caches.open(name)).match(address(key))) !== undefined,
    get: async (key) => {
      const response = await (await caches.open(name)).match(address(key));
      return response ? new Uint8Array(await response.arrayBuffer()) : null;
    },
    put: async (key, bytes) => await (await caches.open(name)).put(address(key), new Response(bytes)),
    delete: async (key) => void (await (await caches.open(name)).delete(address(key))),
    clear: async () => void (await caches.delete(name)),
  };
}

/** What a worker opens the same bundle of. */
export interface BundleDescriptor {
  source: SourceDescriptor;
  manifest: Uint8Array<ArrayBuffer>;
  cached: boolean;
}

export class Bundle {
  readonly manifest: Manifest;
  /** SHA-256 of bundle.json, which holds every other file's: it names the bundle's whole content. */
  readonly hash: string;
  /** Why a file could not be kept for the next visit; null while all could. */
  notKept: string | null = null;

  constructor(
    private readonly source: BundleSource,
    private readonly content: Uint8Array<ArrayBuffer>,
    private readonly cache: BundleCache | null,
  ) {
    this.manifest = parseManifest(content, source.name);
    this.hash = hex(sha256(content));
  }

  static of({ source, manifest, cached }: BundleDescriptor): Bundle {
    return new Bundle(sourceOf(source), manifest, cached ? cacheStorage() : null);
  }

  get descriptor(): BundleDescriptor {
    return { source: this.source.descriptor, manifest: this.content, cached: this.cache !== null };
  }

  /** The content of the file that the manifest calls `name`, verified; BundleError if it is missing or altered. */
  async file(name: string, options: Omit<ReadOptions, "size"> = {}): Promise<Uint8Array<ArrayBuffer>> {
    const expected = this.manifest.files[name];
    const key = `sha256-${expected.sha256}`;
    const kept = await this.cache?.get(key).catch(() => null);
    if (kept) {
      if (kept.length === expected.size && (await digest(kept)) === expected.sha256) {
        options.onBytes?.(kept.length);
        return kept;
      }
      await this.cache?.delete(key).catch(() => undefined);
    }
    const bytes = await this.source.read(expected.path, { ...options, size: expected.size });
    const restore = "restore the bundle from its source or export it again";
    if (bytes.length !== expected.size) {
      const sizes = `it has ${bytes.length.toLocaleString("en")} bytes, not ${expected.size.toLocaleString("en")}`;
      throw new BundleError(
        "corrupted",
        `${expected.path} is ${bytes.length < expected.size ? "truncated" : "altered"}: ${sizes}: ${restore}`,
      );
    }
    if ((await digest(bytes)) !== expected.sha256) {
      throw new BundleError(
        "corrupted",
        `${expected.path} is altered: its SHA-256 differs from the manifest's: ${restore}`,
      );
    }
    await this.keep(key, bytes);
    return bytes;
  }

  private async keep(key: string, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
    try {
      await this.cache?.put(key, bytes);
    } catch (error) {
      this.notKept = `the bundle could not be kept for the next visit (${(error as Error).name})`;
    }
  }
}

/**
 * Opens a bundle: reads and validates its manifest. With a cache, verified files are kept there, and a manifest that
 * cannot be reached (offline) is the one of the last visit. Rejects with BundleError.
 */
export async function openBundle(source: BundleSource, cache: BundleCache | null = null): Promise<Bundle> {
  const key = `manifest-${source.name}`;
  let content: Uint8Array<ArrayBuffer>;
  let fresh = true;
  try {
    content = await source.read(MANIFEST);
  } catch (error) {
    if (!(error instanceof BundleError) || error.fault !== "missing") throw error;
    const kept = await cache?.get(key).catch(() => null);
    if (!kept) throw source.descriptor.kind === "url" ? error : notOne(source.name);
    [content, fresh] = [kept, false];
  }
  if (content.length > MANIFEST_LIMIT) {
    throw new BundleError("not-a-bundle", `${source.name} is not a bundle: its ${MANIFEST} has more than 8 MB`);
  }
  const bundle = new Bundle(source, content, cache);
  if (fresh) await cache?.put(key, content).catch(() => undefined);
  return bundle;
}

function notOne(name: string): BundleError {
  return new BundleError("not-a-bundle", `${name} is not a bundle: it has no ${MANIFEST}: choose a bundle's folder`);
}

/** SHA-256 in hex: the browser's own, or noble's where a page that is not secure has none. */
async function digest(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  return hex(globalThis.crypto?.subtle ? new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)) : sha256(bytes));
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
