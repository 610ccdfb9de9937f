/** Where a bundle's files come from: a folder of a web server, or files that were picked or dropped. */

import { BundleError } from "./errors";

export interface ReadOptions {
  /** The size that the file should have; more than that is not read. */
  size?: number;
  signal?: AbortSignal;
  /** Bytes read so far. */
  onBytes?: (bytes: number) => void;
}

/** Reads a bundle's files by their paths inside it. */
export interface BundleSource {
  /** What people know it by: an address or a folder's name. */
  readonly name: string;
  /** What another thread makes the same source of. */
  readonly descriptor: SourceDescriptor;
  /** Rejects with BundleError "missing" where there is no such file. */
  read(path: string, options?: ReadOptions): Promise<Uint8Array<ArrayBuffer>>;
}

/** A source as it travels to a worker. */
export type SourceDescriptor =
  | { kind: "url"; base: string }
  | { kind: "files"; name: string; files: Map<string, File> };

export function sourceOf(descriptor: SourceDescriptor): BundleSource {
  return descriptor.kind === "url" ? urlSource(descriptor.base) : filesSource(descriptor.files, descriptor.name);
}

/** The folder `base` of a web server, relative to the page. */
export function urlSource(base: string): BundleSource {
  const address = new URL(base.endsWith("/") ? base : `${base}/`, globalThis.location?.href).href;
  return {
    name: address,
    descriptor: { kind: "url", base: address },
    read: async (path, options = {}) => {
      const url = new URL(path.split("/").map(encodeURIComponent).join("/"), address);
      let response: Response;
      try {
        response = await fetch(url, { signal: options.signal ?? null });
      } catch (error) {
        options.signal?.throwIfAborted();
        throw new BundleError("missing", `${url} cannot be reached (${(error as Error).message}): check the connection`);
      }
      if (!response.ok || !response.body) {
        throw new BundleError("missing", `${url} cannot be read (HTTP ${response.status}): check the address`);
      }
      return await collect(response.body, path, options);
    },
  };
}

/** Files picked in a folder (`<input webkitdirectory>`) or dropped; keys of a map are their paths. */
export function filesSource(files: Iterable<File> | Map<string, File>, name?: string): BundleSource {
  const all =
    files instanceof Map ? files : new Map([...files].map((file) => [file.webkitRelativePath || file.name, file]));
  // the bundle is the folder nearest the root that has a manifest
  const manifests = [...all.keys()].filter((path) => /(^|\/)bundle\.json$/.test(path));
  const manifest = manifests.sort((a, b) => a.split("/").length - b.split("/").length)[0] ?? "bundle.json";
  const root = manifest.slice(0, -"bundle.json".length);
  const inside = new Map<string, File>();
  for (const [path, file] of all) if (path.startsWith(root)) inside.set(path.slice(root.length), file);
  const called = name ?? (root.split("/").at(-2) || "the files");
  return {
    name: called,
    descriptor: { kind: "files", name: called, files: inside },
    read: async (path, options = {}) => {
      const file = inside.get(path);
      if (!file) throw new BundleError("missing", `${called} has no file ${path}: choose the bundle's whole folder`);
      return await readFile(file, path, options);
    },
  };
}

async function readFile(file: File, path: string, options: ReadOptions): Promise<Uint8Array<ArrayBuffer>> {
  try {
    return await collect(file.stream(), path, { size: file.size, ...options });
  } catch (error) {
    if (error instanceof BundleError || options.signal?.aborted) throw error;
    throw new BundleError("missing", `${path} cannot be read (${(error as Error).message}): choose the folder again`);
  }
}

/** All of a stream, into one buffer where its size is known. */
async function collect(
  stream: ReadableStream<Uint8Array>,
  path: string,
  { size, signal, onBytes }: ReadOptions,
): Promise<Uint8Array<ArrayBuffer>> {
  const reader = stream.getReader();
  let buffer = allocate(size ?? 65_536, path);
  let length = 0;
  try {
    for (;;) {
      signal?.throwIfAborted();
      const { done, value } = await reader.read();
      if (done) break;
      if (length + value.length > buffer.length) {
        if (size !== undefined) {
          throw new BundleError("corrupted", `${path} is altered: it has more than ${size.toLocaleString("en")} bytes`);
        }
        const larger = allocate(2 * (length + value.length), path);
        larger.set(buffer.subarray(0, length));
        buffer = larger;
      }
      buffer.set(value, length);
      length += value.length;
      onBytes?.(length);
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
  return length === buffer.length ? buffer : buffer.slice(0, length);
}

function allocate(size: number, path: string): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(size);
  } catch {
    const megabytes = Math.round(size / 1e6).toLocaleString("en");
    throw new BundleError("too-large", `${path} has ${megabytes} MB, more than this browser gives: use a smaller bundle`);
  }
}
