/** A bundle as `export --target litert-gpu` writes it, on WebGPU over SwiftShader: its self-check holds. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { bundles, draw, load } from "./drawn";
import { launch, serve } from "./site";

test("the GPU computes what the exporter says", async () => {
  const out = mkdtempSync(join(tmpdir(), "engine-"));
  const site = await serve(out, bundles);
  const browser = await launch(["--enable-unsafe-webgpu"]);
  try {
    const page = await browser.newPage();
    await page.goto(`${site.address}plain/page.html`);
    const report = await load(page, "exported", { backend: "webgpu" });
    expect(report.backend, report.notes.join()).toBe("webgpu");
    const [, decibels] = /^the GPU was checked: .* to (\d+) dB$/.exec(report.notes[0]) ?? [];
    expect(Number(decibels)).toBeGreaterThan(80);
    expect(await draw(page, { prompt: "a red cat", steps: 1 })).toHaveLength(1);
  } finally {
    await browser.close();
    await site.close();
    rmSync(out, { recursive: true, force: true });
  }
});
