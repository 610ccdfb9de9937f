// After `vite build`: adds the packages' licences, tells the service worker which files the page has, and puts them into
// the Python package, those that compress well as .gz alone.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import { gzipSync } from "node:zlib";

const root = join(import.meta.dirname, "..");
const from = join(root, "dist");
const to = join(root, "../src/pocketfusion/serve/page");

const files = new Map();
for (const entry of readdirSync(from, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || entry.name.endsWith(".map")) continue;
  const file = join(entry.parentPath, entry.name);
  files.set(relative(from, file).split(sep).join("/"), readFileSync(file));
}

const licences = ["# Licences of the packages in this page"];
const { packages } = JSON.parse(readFileSync(join(root, "package-lock.json"), "utf-8"));
for (const [path, { dev, devOptional, optional, version, license }] of Object.entries(packages)) {
  if (!path || dev || devOptional || optional) continue;
  licences.push(`## ${path.replace(/^.*node_modules\//, "")} ${version} (${license})`);
  const text = ["LICENSE", "LICENSE.md", "LICENSE.txt"].map((name) => join(root, path, name)).find(existsSync);
  if (!text && license !== "Apache-2.0") throw new Error(`${path} has no licence's text`);
  licences.push(readFileSync(text ?? join(root, "../LICENSE"), "utf-8").trim()); // LiteRT.js names it and has no copy
}
files.set("licences.md", Buffer.from(`${licences.join("\n\n")}\n`));

const hash = (content) => createHash("sha256").update(content).digest("hex");
const listed = { now: {}, later: {} };
for (const [path, content] of [...files].sort()) {
  if (path === "sw.js") continue;
  // LiteRT has a build for each kind of device, and a device fetches one
  listed[path.startsWith("wasm/") ? "later" : "now"][path] = hash(content);
}
const build = hash(JSON.stringify(listed)).slice(0, 12);
const worker = files.get("sw.js").toString();
if (!worker.includes("__FILES__")) throw new Error("sw.js has no place for the list of files");
files.set("sw.js", Buffer.from(worker.replace("__FILES__", () => JSON.stringify({ ...listed, build }))));

rmSync(to, { recursive: true, force: true });
let raw = 0;
let packed = 0;
for (const [path, content] of files) {
  const zipped = gzipSync(content, { level: 9 });
  const small = zipped.length < 0.9 * content.length;
  const target = join(to, small ? `${path}.gz` : path);
  mkdirSync(dirname(target), { recursive: true });
  writeFileSync(target, small ? zipped : content);
  raw += content.length;
  packed += small ? zipped.length : content.length;
}
console.log(`${files.size} files, ${(raw / 1e6).toFixed(1)} MB, ${(packed / 1e6).toFixed(1)} MB as packed in ${relative(root, to)}`);
