import { cpSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

/** LiteRT's WebAssembly, beside the page in `wasm/`: the builds that the engine chooses from (not the JSPI one). */
function litertWasm(): Plugin {
  let out = "";
  return {
    name: "litert-wasm",
    apply: "build",
    configResolved: (config) => {
      out = join(config.root, config.build.outDir, "wasm");
    },
    writeBundle: () => {
      const from = join(import.meta.dirname, "node_modules/@litertjs/core/wasm");
      for (const file of readdirSync(from)) {
        if (!file.includes("jspi")) cpSync(join(from, file), join(out, file));
      }
    },
  };
}

export default defineConfig({
  base: "./", // the page works in any folder of any host
  build: {
    target: "es2022",
    // bundles the licences' comments of packages into the files
    license: true,
  },
  // a classic worker: LiteRT loads its glue with importScripts
  worker: { format: "iife" },
  plugins: [litertWasm()],
  test: { include: ["tests/**/*.test.ts"], testTimeout: 60_000 },
} as import("vite").UserConfig & { test: object });
