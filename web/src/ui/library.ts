/** The models that the page offers: those of its site, by `bundles.json`, and folders that were opened from disk. */

import { type Bundle, type BundleSource, cacheStorage, openBundle, urlSource } from "../engine/api";

/** One model in every form that the site has of it. */
export interface Model {
  id: string;
  name: string;
  /** The form for CPUs, and the one for WebGPU; at least one is there. */
  forms: { wasm?: Form; webgpu?: Form };
}

export interface Form {
  source: BundleSource;
  /** SHA-256 of its bundle.json where the site tells it. */
  sha256: string | null;
  bytes: number;
  /** If its files may be kept for the next visit: those on disk are there anyway. */
  kept: boolean;
}

interface Listed {
  path: string;
  name: string;
  target: string;
  model: string | null;
  sha256: string;
  bytes: number;
}

/** The site's models; none where it has no list. */
export async function siteModels(): Promise<Model[]> {
  const response = await fetch("bundles.json", { cache: "no-cache" }).catch(() => null);
  if (!response?.ok) return [];
  const { bundles } = (await response.json()) as { bundles: Listed[] };
  const models = new Map<string, Model>();
  for (const listed of bundles) {
    const kind = listed.target === "litert-gpu" ? "webgpu" : "wasm";
    const form = { source: urlSource(listed.path), sha256: listed.sha256, bytes: listed.bytes, kept: true };
    const same = listed.model ? models.get(listed.model) : undefined;
    if (same && !same.forms[kind]) same.forms[kind] = form;
    else {
      const id = listed.model && !same ? listed.model : listed.sha256;
      models.set(id, { id, name: listed.name, forms: { [kind]: form } });
    }
  }
  return [...models.values()];
}

/** A folder from disk as a model; rejects with BundleError where it is none. */
export async function diskModel(source: BundleSource): Promise<Model> {
  const bundle = await openBundle(source);
  const bytes = Object.values(bundle.manifest.files).reduce((sum, file) => sum + file.size, 0);
  const form = { source, sha256: bundle.hash, bytes, kept: false };
  const kind = bundle.manifest.target === "litert-gpu" ? "webgpu" : "wasm";
  return { id: bundle.hash, name: bundle.manifest.name, forms: { [kind]: form } };
}

/** The form that a device runs best: WebGPU's where it can be used, else the other, else what there is. */
export function bestForm(model: Model, webgpu: boolean): Form {
  const { wasm, webgpu: gpu } = model.forms;
  return ((webgpu ? gpu : undefined) ?? wasm ?? gpu) as Form;
}

export async function open(form: Form): Promise<Bundle> {
  return await openBundle(form.source, form.kept ? cacheStorage() : null);
}

/** The styles that the model was taught, as prompts name them; none where the bundle does not say. */
export async function stylesOf(bundle: Bundle): Promise<string[]> {
  if (!("styles" in bundle.manifest.files)) return [];
  const styles: unknown = JSON.parse(new TextDecoder().decode(await bundle.file("styles")));
  if (!Array.isArray(styles)) return [];
  return styles.filter((style): style is string => typeof style === "string" && style.length <= 60).slice(0, 24);
}

/** If all that drawing needs was kept at an earlier visit; not where the browser refuses storage. */
export async function isKept(bundle: Bundle): Promise<boolean> {
  const cache = cacheStorage();
  if (!cache) return false;
  const needed = ["text_encoder", "unet", "decoder", "tokenizer"];
  const found = needed.map((name) => cache.has(`sha256-${bundle.manifest.files[name].sha256}`));
  return (await Promise.all(found).catch(() => [false])).every(Boolean);
}
