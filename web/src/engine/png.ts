/**
 * PNG files with the settings inside, as `pocketfusion generate` writes them: one iTXt chunk (uncompressed) a setting.
 * PNG: W3C, Portable Network Graphics (third edition).
 */

import type { Pixels, Settings } from "./api";
import { EngineError } from "./errors";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const NUMBERS = ["seed", "num_inference_steps", "guidance_scale"];
const TEXTS = ["prompt", "negative_prompt", "sampler", "bundle", "Software"];
const MOST_TEXT = 1e6; // bytes of one chunk's

/** An opaque picture's PNG (RGB, 8 bits), with `settings` as text chunks. */
export async function encodePng({ data, width, height }: Pixels, settings: Settings): Promise<Uint8Array<ArrayBuffer>> {
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set([8, 2], 8); // 8 bits, RGB; deflate, the five filters, not interlaced
  const chunks = [chunk("IHDR", header)];
  for (const [key, value] of Object.entries(settings)) {
    // whole numbers of Python's floats as it writes them
    const whole = (key === "guidance_scale" || key === "eta") && Number.isInteger(value);
    const text = whole ? `${value}.0` : String(value);
    chunks.push(chunk("iTXt", new TextEncoder().encode(`${key}\0\0\0\0\0${text}`)));
  }
  chunks.push(chunk("IDAT", await deflate(filtered(data, width, height))), chunk("IEND", new Uint8Array()));
  return join([Uint8Array.from(SIGNATURE), ...chunks]);
}

/** The settings in a PNG's text chunks, null if it has none; throws EngineError "setting" for what is no whole PNG. */
export async function readPngSettings(bytes: Uint8Array): Promise<Settings | null> {
  const texts = new Map<string, string>();
  for (const { type, data } of chunksOf(bytes)) {
    if (type !== "iTXt" && type !== "tEXt") continue;
    const [key, value] = await readText(type, data);
    if (value !== null) texts.set(key, value);
  }
  if (!texts.has("prompt")) return null;
  const settings: Record<string, string | number> = {};
  for (const key of TEXTS) settings[key] = texts.get(key) ?? "";
  for (const key of texts.has("eta") ? [...NUMBERS, "eta"] : NUMBERS) {
    const number = Number(texts.get(key) || Number.NaN);
    if (!Number.isFinite(number)) throw new EngineError("setting", `the picture's ${key} is no number: choose another`);
    settings[key] = number;
  }
  return settings as unknown as Settings;
}

/** Rows of RGB, each with the Paeth filter. */
function filtered(data: Uint8ClampedArray, width: number, height: number): Uint8Array<ArrayBuffer> {
  const rows = new Uint8Array(height * (1 + 3 * width));
  const at = (x: number, y: number, c: number) => (x < 0 || y < 0 ? 0 : data[4 * (y * width + x) + c]);
  let i = 0;
  for (let y = 0; y < height; y++) {
    rows[i++] = 4;
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) {
        const [a, b, d] = [at(x - 1, y, c), at(x, y - 1, c), at(x - 1, y - 1, c)];
        const [pa, pb, pd] = [Math.abs(b - d), Math.abs(a - d), Math.abs(a + b - 2 * d)];
        rows[i++] = at(x, y, c) - (pa <= pb && pa <= pd ? a : pb <= pd ? b : d);
      }
    }
  }
  return rows;
}

function chunk(type: string, data: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

function* chunksOf(bytes: Uint8Array): Generator<{ type: string; data: Uint8Array }> {
  const broken = new EngineError("setting", "the file is no whole PNG picture: choose another");
  if (bytes.length < 8 || SIGNATURE.some((byte, i) => bytes[i] !== byte)) throw broken;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; ; ) {
    if (at + 12 > bytes.length) throw broken;
    const end = at + 8 + view.getUint32(at);
    if (end + 4 > bytes.length || crc32(bytes.subarray(at + 4, end)) !== view.getUint32(end)) throw broken;
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (type === "IEND") return;
    yield { type, data: bytes.subarray(at + 8, end) };
    at = end + 4;
  }
}

/** Key and value of a text chunk; no value where it is longer than any setting. */
async function readText(type: "iTXt" | "tEXt", data: Uint8Array): Promise<[string, string | null]> {
  let at = data.indexOf(0);
  const key = new TextDecoder("latin1").decode(data.subarray(0, Math.max(at, 0)));
  if (at < 0 || data.length > MOST_TEXT) return [key, null];
  if (type === "tEXt") return [key, new TextDecoder("latin1").decode(data.subarray(at + 1))];
  const compressed = data[at + 1] === 1;
  at = data.indexOf(0, data.indexOf(0, at + 3) + 1); // the language and the translated key, both ended by 0
  if (compressed || at < 0) return [key, null];
  return [key, new TextDecoder().decode(data.subarray(at + 1))];
}

async function deflate(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function join(parts: Uint8Array[]): Uint8Array<ArrayBuffer> {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
