/** What Python made for these tests (tests/web/vectors.py), in the folder POCKETFUSION_VECTORS. */

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export const folder = process.env.POCKETFUSION_VECTORS ?? "";
if (!folder) throw new Error("POCKETFUSION_VECTORS is not set: run these tests with pytest tests/web/test_engine.py");

export const bytes = (name: string): Uint8Array<ArrayBuffer> => new Uint8Array(readFileSync(join(folder, name)));

export const vectors = (kind: string): any => JSON.parse(readFileSync(join(folder, `${kind}.json`), "utf8"));

export const save = (name: string, content: Uint8Array): void => writeFileSync(join(folder, name), content);
