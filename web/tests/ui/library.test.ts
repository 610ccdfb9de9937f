/** Which form of which model is drawn with, and how the page writes what it says. */
import { afterEach, expect, test, vi } from "vitest";
import { bestForm, siteModels } from "../../src/ui/library";
import { fileName, median, sentence, styleOf, withStyle } from "../../src/ui/words";

afterEach(() => vi.unstubAllGlobals());

function listed(...bundles: object[]) {
  vi.stubGlobal("location", { href: "http://page.example/a/" });
  vi.stubGlobal("fetch", async () => new Response(JSON.stringify({ bundles })));
}

const entry = (path: string, target: string, model: string | null) => ({
  path: `bundles/${path}/`,
  name: path,
  target,
  model,
  sha256: path,
  bytes: 1,
});

test("two forms of one model are one model, and a device takes its own", async () => {
  listed(entry("cpu", "litert-cpu", "m"), entry("other", "litert-cpu", null), entry("gpu", "litert-gpu", "m"));
  const models = await siteModels();
  expect(models.map(({ name }) => name)).toEqual(["cpu", "other"]);
  expect(bestForm(models[0], true).sha256).toBe("gpu");
  expect(bestForm(models[0], false).sha256).toBe("cpu");
  expect(bestForm(models[1], true).sha256).toBe("other");
  expect(bestForm(models[0], true).source.name).toBe("http://page.example/a/bundles/gpu/");
});

test("a second bundle of the same form is a model of its own; one without a pair is taken anywhere", async () => {
  listed(entry("a", "litert-cpu", "m"), entry("b", "litert-cpu", "m"), entry("c", "litert-gpu", "n"));
  const models = await siteModels();
  expect(models.map(({ id }) => id)).toEqual(["m", "b", "n"]);
  expect(bestForm(models[2], false).sha256).toBe("c");
});

test("a site without a list has no models", async () => {
  vi.stubGlobal("fetch", async () => new Response("", { status: 404 }));
  expect(await siteModels()).toEqual([]);
  vi.stubGlobal("fetch", async () => Promise.reject(new TypeError("offline")));
  expect(await siteModels()).toEqual([]);
});

test("a prompt ends with one style at most", () => {
  const styles = ["noto style", "noto v1 style", "3d style", "fluent 3d style"];
  expect(styleOf("a cat, fluent 3d style ", styles)).toBe("fluent 3d style");
  expect(styleOf("a cat, Noto Style", styles)).toBe("noto style");
  expect(styleOf("a knoto style", styles)).toBe(null);
  expect(withStyle("a cat, fluent 3d style", "noto style", styles)).toBe("a cat, noto style");
  expect(withStyle("", "noto style", styles)).toBe("noto style");
  expect(withStyle("noto style", null, styles)).toBe("");
});

test("sentences begin and end as such, but for names of files", () => {
  expect(sentence("one thread: the page is not isolated")).toBe("One thread: the page is not isolated.");
  expect(sentence("unet.tflite is altered")).toBe("unet.tflite is altered.");
  expect(sentence("http://x/y cannot be read!")).toBe("http://x/y cannot be read!");
});

test("a file is named after its prompt, in any script", () => {
  const named = (prompt: string) => fileName({ prompt, seed: 7 } as Parameters<typeof fileName>[0]);
  expect(named("A red apple, noto style")).toBe("a-red-apple-noto-style-7.png");
  expect(named("../../赤い りんご")).toBe("赤い-りんご-7.png");
  expect(named("…")).toBe("picture-7.png");
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1])).toBe(2.5);
});
