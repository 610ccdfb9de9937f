/** What people give the page: a picture to draw again, or a bundle's folder. */

import { type BundleSource, filesSource } from "../engine/api";

export type Given = { picture: File } | { folder: BundleSource };

const MOST_FILES = 2000;
const MOST_DEPTH = 6;

/** What picked files are; throws a sentence for what is neither picture nor bundle. */
export function given(files: Map<string, File>): Given {
  const all = [...files.values()];
  if (all.length === 1 && (all[0].type.startsWith("image/") || /\.png$/i.test(all[0].name))) return { picture: all[0] };
  if (![...files.keys()].some((path) => /(^|\/)bundle\.json$/.test(path))) {
    throw new Error("That is neither a PNG picture nor a bundle: choose a folder with a bundle.json in it.");
  }
  return { folder: filesSource(files) };
}

export function picked(list: FileList): Given {
  return given(new Map([...list].map((file) => [file.webkitRelativePath || file.name, file])));
}

/** What was dropped, folders with all that is in them. To be called in the event itself: its items do not outlive it. */
export async function dropped(transfer: DataTransfer): Promise<Given> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const files = new Map<string, File>();
  await Promise.all(entries.map((entry) => walk(entry, files, 0)));
  return given(files);
}

async function walk(entry: FileSystemEntry, files: Map<string, File>, depth: number): Promise<void> {
  if (depth > MOST_DEPTH || files.size > MOST_FILES) {
    throw new Error("That folder holds far more than a bundle: choose the folder with the bundle.json itself.");
  }
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    files.set(entry.fullPath.replace(/^\//, ""), file);
    return;
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return;
    for (const inner of some) await walk(inner, files, depth + 1);
  }
}
