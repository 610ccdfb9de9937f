/**
 * Text as normalizers change it, each code point with its place in the prompt: BERT's and CLIP's normalizers as Hugging
 * Face's `tokenizers` has them, lower-casing code point by code point (no final sigma).
 */

import * as v from "valibot";
import { BERT_ACCENTS, DROPPED, IDEOGRAPHS, MARKS, SPACES, UNDECOMPOSED } from "./unicode";

/** Code points, and the index of each in the prompt that it comes of. */
export interface Text {
  chars: string[];
  at: number[];
}

export type Normalizer = (text: Text) => Text;

const CLIP_SPACES = { Regex: "\\s+" };
const NORMALIZERS = v.variant("type", [
  v.object({
    type: v.literal("BertNormalizer"),
    clean_text: v.boolean(),
    handle_chinese_chars: v.boolean(),
    strip_accents: v.nullish(v.boolean()),
    lowercase: v.boolean(),
  }),
  v.object({ type: v.picklist(["NFC", "NFD", "Lowercase", "StripAccents"]) }),
  v.object({
    type: v.literal("Replace"),
    pattern: v.union([
      v.object({ Regex: v.literal(CLIP_SPACES.Regex) }),
      v.object({ String: v.pipe(v.string(), v.minLength(1)) }),
    ]),
    content: v.string(),
  }),
]);

/** A part of `tokenizer.json` that changes text. */
export const normalizerSchema = v.nullish(
  v.union([NORMALIZERS, v.object({ type: v.literal("Sequence"), normalizers: v.array(NORMALIZERS) })]),
);

export function textOf(prompt: string): Text {
  const chars = [...prompt];
  return { chars, at: chars.map((_, i) => i) };
}

export function slice({ chars, at }: Text, from: number, to: number): Text {
  return { chars: chars.slice(from, to), at: at.slice(from, to) };
}

export function makeNormalizer(settings: v.InferOutput<typeof normalizerSchema>): Normalizer {
  if (!settings) return (text) => text;
  const parts = settings.type === "Sequence" ? settings.normalizers : [settings];
  const steps = parts.map(makeOne);
  return (text) => steps.reduce((changed, step) => step(changed), text);
}

function makeOne(settings: v.InferOutput<typeof NORMALIZERS>): Normalizer {
  switch (settings.type) {
    case "BertNormalizer":
      return bert(settings);
    case "NFC":
      return compose;
    case "NFD":
      return decompose;
    case "Lowercase":
      return lowercase;
    case "StripAccents":
      return (text) => keep(text, (c) => !MARKS.has(c));
    case "Replace": {
      const { pattern, content } = settings;
      return "Regex" in pattern ? (text) => joinSpaces(text, content) : (text) => replace(text, pattern.String, content);
    }
  }
}

function bert(settings: {
  clean_text: boolean;
  handle_chinese_chars: boolean;
  strip_accents?: boolean | null | undefined;
  lowercase: boolean;
}): Normalizer {
  const steps: Normalizer[] = [];
  if (settings.clean_text) {
    steps.push((text) => each(keep(text, (c) => !DROPPED.has(c)), (c) => (SPACES.has(c) ? " " : c)));
  }
  if (settings.handle_chinese_chars) steps.push((text) => each(text, (c) => (IDEOGRAPHS.has(c) ? ` ${c} ` : c)));
  if (settings.strip_accents ?? settings.lowercase) {
    steps.push((text) => keep(decompose(text), (c) => !BERT_ACCENTS.has(c)));
  }
  if (settings.lowercase) steps.push(lowercase);
  return (text) => steps.reduce((changed, step) => step(changed), text);
}

const lowercase: Normalizer = (text) => each(text, (c) => c.toLowerCase());

/** Canonical decomposition; what it makes of a code point keeps that one's place. */
const decompose: Normalizer = (text) =>
  inOrder(each(text, (c) => (UNDECOMPOSED.has(c) ? c : c.normalize("NFD"))));

/** Canonical composition, of each run that begins with a letter and goes on with marks. */
const compose: Normalizer = (text) => {
  const made: Text = { chars: [], at: [] };
  for (const [from, to] of clusters(text)) {
    const composed = [...text.chars.slice(from, to).join("").normalize("NFC")];
    composed.forEach((c, i) => {
      made.chars.push(c);
      made.at.push(text.at[Math.min(from + i, to - 1)]);
    });
  }
  return made;
};

/** If a code point may compose with, or be put in order among, those before it: marks, Hangul's vowels and finals. */
function joins(c: string): boolean {
  return MARKS.has(c) || /^[\p{M}\u1161-\u1175\u11a8-\u11c2]$/u.test(c);
}

/** From where to where each code point goes with those that join it. */
function* clusters({ chars }: Text): Generator<[number, number]> {
  for (let from = 0; from < chars.length; ) {
    let to = from + 1;
    while (to < chars.length && joins(chars[to])) to++;
    yield [from, to];
    from = to;
  }
}

/** Marks in canonical order, as decomposing a whole string leaves them. */
function inOrder(text: Text): Text {
  const made: Text = { chars: [...text.chars], at: [...text.at] };
  for (const [from, to] of clusters(text)) {
    const run = text.chars.slice(from, to);
    if (run.length < 3 || run.some((c) => UNDECOMPOSED.has(c))) continue;
    const wanted = [...run.join("").normalize("NFD")];
    if (wanted.length === run.length) made.chars.splice(from, run.length, ...wanted);
  }
  return made;
}

/** Runs of spaces as one `content`. */
function joinSpaces(text: Text, content: string): Text {
  const made: Text = { chars: [], at: [] };
  text.chars.forEach((c, i) => {
    if (!SPACES.has(c)) push(made, c, text.at[i]);
    else if (i === 0 || !SPACES.has(text.chars[i - 1])) push(made, content, text.at[i]);
  });
  return made;
}

/** Every `pattern` as `content`. */
function replace(text: Text, pattern: string, content: string): Text {
  const wanted = [...pattern];
  const made: Text = { chars: [], at: [] };
  for (let i = 0; i < text.chars.length; ) {
    if (wanted.every((c, k) => text.chars[i + k] === c)) {
      push(made, content, text.at[i]);
      i += wanted.length;
    } else {
      push(made, text.chars[i], text.at[i]);
      i++;
    }
  }
  return made;
}

function keep(text: Text, holds: (c: string) => boolean): Text {
  const made: Text = { chars: [], at: [] };
  text.chars.forEach((c, i) => {
    if (holds(c)) push(made, c, text.at[i]);
  });
  return made;
}

function each(text: Text, change: (c: string) => string): Text {
  const made: Text = { chars: [], at: [] };
  text.chars.forEach((c, i) => push(made, change(c), text.at[i]));
  return made;
}

function push(text: Text, characters: string, at: number): void {
  for (const c of characters) {
    text.chars.push(c);
    text.at.push(at);
  }
}
