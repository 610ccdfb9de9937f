/** The files of `export --target onnx` in ONNX Runtime Web on WASM: what it computes is written for Python to compare. */

import { join } from "node:path";
import { expect, test } from "vitest";
import { launch, serve } from "./site";
import { folder, save, vectors } from "./vectors";

interface Case {
  file: string;
  inputs: { name: string; type: "float32" | "int32"; dims: number[] }[];
  dims: number[];
}

test("every network loads and computes", async () => {
  const cases: Case[] = vectors("onnx");
  const runtime = join(import.meta.dirname, "../onnx/node_modules/onnxruntime-web/dist");
  const site = await serve(folder, { runtime }); // that folder has a page of its own: nothing is built
  const browser = await launch();
  try {
    const page = await browser.newPage();
    const foreign: string[] = [];
    page.on("request", (request) => {
      if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(site.address)) foreign.push(request.url());
    });
    await page.goto(`${site.address}plain/page.html`);
    await page.addScriptTag({ url: "runtime/ort.wasm.min.js" });
    for (const one of cases) {
      const { dims, data } = await page.evaluate(async ({ file, inputs }) => {
        const at = new URL("runtime/", location.href).href;
        const { ort } = window as any;
        Object.assign(ort.env.wasm, { wasmPaths: at, numThreads: 1 });
        const bytes = async (name: string) => await (await fetch(name)).arrayBuffer();
        // as this project's own runtime: 8-bit weights are unpacked at load, and computed with in float32
        const extra = { session: { disable_quant_qdq: "1" } };
        const session = await ort.InferenceSession.create(new Uint8Array(await bytes(file)), { extra });
        const given: Record<string, unknown> = {};
        for (const { name, type, dims } of inputs) {
          const raw = await bytes(`${file}.${name}`);
          given[name] = new ort.Tensor(type, type === "int32" ? new Int32Array(raw) : new Float32Array(raw), dims);
        }
        const output = (await session.run(given))[session.outputNames[0]];
        await session.release();
        return { dims: [...output.dims], data: [...(output.data as Float32Array)] };
      }, one);
      expect(dims, one.file).toEqual(one.dims);
      save(`${one.file}.found`, new Uint8Array(new Float32Array(data).buffer));
    }
    expect(foreign).toEqual([]);
    expect(site.requests.some((path) => path.endsWith(".wasm"))).toBe(true);
  } finally {
    await browser.close();
    await site.close();
  }
});
