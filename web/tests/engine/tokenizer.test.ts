/** Token ids, masks and warnings of odd prompts: Python's, for BERT's tokenizer, CLIP's, and both with learnt tokens. */

import { expect, test } from "vitest";
import { readFileSync } from "node:fs";
import { cleanText, PromptTokenizer } from "../../src/engine/tokenizer/prompt_tokenizer";
import { vectors } from "./vectors";

const prompts: string[] = vectors("prompts");

for (const { file, spec, expected } of vectors("tokenizers")) {
  test(`${prompts.length} prompts with ${file.split("/").at(-1)} of ${spec.max_length} tokens`, () => {
    const tokenizer = new PromptTokenizer(readFileSync(file), spec);
    const wrong: unknown[] = [];
    prompts.forEach((prompt, i) => {
      const { inputIds, attentionMask, warning } = tokenizer.encode(prompt);
      const [ids, length, cut] = expected[i];
      const same =
        ids.every((id: number, k: number) => id === inputIds[k]) &&
        attentionMask.every((one, k) => one === (k < length ? 1 : 0)) &&
        warning === cut;
      if (!same) wrong.push([prompt, [...inputIds], ids, warning, cut]);
    });
    expect(prompts.length).toBeGreaterThanOrEqual(2000);
    expect(wrong).toEqual([]);
  });
}

test("half characters are replaced", () => {
  expect(cleanText("a\ud83cb🍎\udf4e")).toBe("a\ufffdb🍎\ufffd");
});

test("what no bundle's tokenizer has is refused in a sentence", () => {
  const { file, spec } = vectors("tokenizers")[0];
  const good = JSON.parse(readFileSync(file, "utf8"));
  const refused = (values: unknown, changed = spec) => {
    const content = new TextEncoder().encode(typeof values === "string" ? values : JSON.stringify(values));
    return expect(() => new PromptTokenizer(content, changed));
  };
  refused("{").toThrow("it is not valid JSON");
  refused({}).toThrow("none that an exported bundle has");
  const evil = { type: "Split", pattern: { Regex: "(a+)+$" }, behavior: "Removed", invert: true };
  refused({ ...good, pre_tokenizer: evil }).toThrow("its pre_tokenizer is none");
  refused({ ...good, normalizer: { type: "Prepend", prepend: "x" } }).toThrow("its normalizer is none");
  refused(good, { ...spec, max_length: 2 }).toThrow("it adds 2 tokens to prompts, which have 2");
  refused(good, { ...spec, pad_token_id: 1 }).toThrow('no token "[PAD]" with id 1');
});
