import { cpSync, readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { defineConfig, type Plugin } from "vite";

/** LiteRT's WebAssembly, beside the page in `wasm/`: the builds that the engine chooses from (not the JSPI one). */
function litertWasm(): Plugin {
  let out = "";
  return {
    name: "litert-wasm",
    apply: "build",
    configResolved: (config) => {
      out = join(resolve(config.root, config.build.outDir), "wasm");
    },
    writeBundle: () => {
      const from = join(import.meta.dirname, "node_modules/@litertjs/core/wasm");
      for (const file of readdirSync(from)) {
        if (!file.includes("jspi")) cpSync(join(from, file), join(out, file));
      }
    },
  };
}

const project = readFileSync(join(import.meta.dirname, "../pyproject.toml"), "utf8");
const version = /^version = "(.+)"$/m.exec(project)?.[1];

export default defineConfig({
  define: { __VERSION__: JSON.stringify(version) },
  base: "./", // the page works in any folder of any host
  build: {
    target: "es2022",
    rolldownOptions: {
      input: { index: join(import.meta.dirname, "index.html"), sw: join(import.meta.dirname, "src/sw.ts") },
      // the service worker's address never changes, and its scope is where it lies
      output: { entryFileNames: ({ name }) => (name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
  // a classic worker: LiteRT loads its glue with importScripts
  worker: { format: "iife" },
  plugins: [litertWasm()],
  test: { include: ["tests/**/*.test.ts"], testTimeout: 300_000, hookTimeout: 300_000 },
} as import("vite").UserConfig & { test: object });
