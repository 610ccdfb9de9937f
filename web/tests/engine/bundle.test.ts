/** A bundle is verified before it is used or kept, and what is wrong with it is said in a sentence. */

import { sha256 } from "@noble/hashes/sha2.js";
import { expect, test, vi } from "vitest";
import { type BundleCache, openBundle } from "../../src/engine/bundle";
import { BundleError } from "../../src/engine/errors";
import { parseManifest } from "../../src/engine/manifest";
import { fitTogether } from "../../src/engine/residency";
import type { Backend } from "../../src/engine/api";
import { type BundleSource, filesSource } from "../../src/engine/source";
import { vectors } from "./vectors";

const encode = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));
const hex = (data: Uint8Array) => Buffer.from(data).toString("hex");
const [{ manifest: good }] = vectors("manifests");

/** A source of a bundle whose UNet is a few bytes, in memory. */
function source(change: (files: Map<string, Uint8Array<ArrayBuffer>>) => void = () => undefined) {
  const unet = new TextEncoder().encode("a network");
  const manifest = structuredClone(good);
  manifest.files.unet = { path: "parts/unet.tflite", size: unet.length, sha256: hex(sha256(unet)) };
  const files = new Map<string, Uint8Array<ArrayBuffer>>([["bundle.json", encode(manifest)], ["parts/unet.tflite", unet]]);
  change(files);
  const read = vi.fn(async (path: string) => {
    const file = files.get(path);
    if (!file) throw new BundleError("missing", `there is no ${path}`);
    return file.slice();
  });
  return { name: "made", descriptor: { kind: "url", base: "made" }, read } satisfies BundleSource;
}

function memoryCache(full = false): BundleCache & { kept: Map<string, Uint8Array<ArrayBuffer>> } {
  const kept = new Map<string, Uint8Array<ArrayBuffer>>();
  return {
    kept,
    has: async (key) => kept.has(key),
    get: async (key) => kept.get(key) ?? null,
    put: async (key, value) => {
      if (full) throw new DOMException("no room", "QuotaExceededError");
      kept.set(key, value);
    },
    delete: async (key) => void kept.delete(key),
    clear: async () => kept.clear(),
  };
}

test("what networks need of the heap is their files, and their weights as the kernels take them", () => {
  const manifest = parseManifest(encode(good), "here");
  const fits = (weights: string, target: "litert-cpu" | "litert-gpu", backend: Backend = "wasm", parameters = 650e6) => {
    const changed = structuredClone({ ...manifest, target });
    Object.assign(changed.networks.unet, { parameters, weights });
    changed.files.unet.size = parameters;
    try {
      return fitTogether(changed, backend) ? "together" : "in turns";
    } catch (error) {
      return fault(error);
    }
  };
  expect(fits("int8-dynamic", "litert-cpu")).toBe("together");
  expect(fits("int8-dynamic", "litert-cpu", "wasm", 1e9)).toBe("in turns");
  expect(fits("int8", "litert-cpu")).toBe("too-large"); // float kernels
  expect(fits("int8", "litert-gpu")).toBe("together"); // straight into the operation
  expect(fits("float16", "litert-gpu")).toBe("too-large");
  expect(fits("float16", "litert-gpu", "webgpu")).toBe("together");
});

const fault = (error: unknown) => (error as BundleError).fault;

test("manifests are valid where Python says so", () => {
  const cases = vectors("manifests");
  expect(cases.length).toBeGreaterThan(30);
  for (const { manifest, change, holds } of cases) {
    let valid = true;
    try {
      parseManifest(encode(manifest), "here");
    } catch (error) {
      expect(error, change).toBeInstanceOf(BundleError);
      expect((error as Error).message, change).toMatch(/^here\/bundle\.json is not a valid manifest \(.+\): restore/);
      valid = false;
    }
    expect(valid, change).toBe(holds);
  }
});

test("what is no bundle, and a newer one", () => {
  for (const content of ["", "[]", "null", "{}", '"pocketfusion-bundle"', '{"format": "other"}', "<!doctype html>"]) {
    expect(() => parseManifest(new TextEncoder().encode(content), "here")).toThrow(/not a bundle/);
  }
  const newer = encode({ format: "pocketfusion-bundle", version: 2, surprise: [] });
  expect(() => parseManifest(newer, "here")).toThrow("of version 2, made by a newer pocketfusion");
});

test("a file is verified, kept, and read from there the next time", async () => {
  const cache = memoryCache();
  const from = source();
  const bundle = await openBundle(from, cache);
  expect(new TextDecoder().decode(await bundle.file("unet"))).toBe("a network");
  expect(cache.kept.size).toBe(2);
  from.read.mockClear();
  expect((await bundle.file("unet")).length).toBe(9);
  expect(from.read).not.toHaveBeenCalled();
});

test("an altered or truncated file is refused and not kept", async () => {
  for (const [content, why] of [["a netwolk", "SHA-256"], ["a net", "truncated"], ["a network.", "altered"]]) {
    const cache = memoryCache();
    const bundle = await openBundle(source((files) => files.set("parts/unet.tflite", new TextEncoder().encode(content))), cache);
    const error = await bundle.file("unet").catch((reason) => reason);
    expect(fault(error)).toBe("corrupted");
    expect(error.message).toContain(why);
    expect([...cache.kept.keys()]).toEqual(["manifest-made"]);
  }
});

test("a kept file that was altered since is read again", async () => {
  const cache = memoryCache();
  const bundle = await openBundle(source(), cache);
  await bundle.file("unet");
  const [key] = [...cache.kept.keys()].filter((name) => name.startsWith("sha256"));
  cache.kept.set(key, new Uint8Array(9));
  expect(new TextDecoder().decode(await bundle.file("unet"))).toBe("a network");
  expect(cache.kept.get(key)?.[0]).toBe(97);
});

test("storage that is full or refused stops nothing", async () => {
  const bundle = await openBundle(source(), memoryCache(true));
  await bundle.file("unet");
  expect(bundle.notKept).toContain("could not be kept");
});

test("offline, the manifest is the last visit's", async () => {
  const cache = memoryCache();
  await (await openBundle(source(), cache)).file("unet");
  const offline = source((files) => files.clear());
  expect((await (await openBundle(offline, cache)).file("unet")).length).toBe(9);
  await expect(openBundle(offline, memoryCache())).rejects.toThrow("there is no bundle.json");
});

test("without the browser's own SHA-256 (a page that is not secure) files are verified all the same", async () => {
  vi.stubGlobal("crypto", {});
  try {
    const altered = source((files) => files.set("parts/unet.tflite", new TextEncoder().encode("a netwolk")));
    expect((await (await openBundle(source())).file("unet")).length).toBe(9);
    await expect((await openBundle(altered)).file("unet")).rejects.toThrow("SHA-256");
  } finally {
    vi.unstubAllGlobals();
  }
});

test("picked files: the bundle is the folder with the manifest, and a folder without one is no bundle", async () => {
  const picked = new Map([
    ["stuff/notes.txt", new File(["x"], "notes.txt")],
    ["stuff/my bundle/bundle.json", new File([encode(good)], "bundle.json")],
    ["stuff/my bundle/unet.tflite", new File(["short"], "unet.tflite")],
    ["stuff/my bundle/old/bundle.json", new File(["{}"], "bundle.json")],
  ]);
  const bundle = await openBundle(filesSource(picked));
  expect(bundle.manifest.name).toBe(good.name);
  expect(fault(await bundle.file("unet").catch((reason) => reason))).toBe("corrupted");
  expect(fault(await bundle.file("decoder").catch((reason) => reason))).toBe("missing");
  const none = await openBundle(filesSource([new File(["x"], "notes.txt")])).catch((reason) => reason);
  expect(fault(none)).toBe("not-a-bundle");
  expect(none.message).toContain("no bundle.json");
});
