/** Text into words, as BERT's and CLIP's pre-tokenizers of Hugging Face's `tokenizers` split it. */

import * as v from "valibot";
import { slice, type Text } from "./normalize";
import { LETTERS, NUMBERS, OTHER_WORD, PUNCTUATION, SPACES } from "./unicode";

const WORDS = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+";
const SPECIALS = "<\\|startoftext\\|>|<\\|endoftext\\|>|";
const SPLITS = v.variant("type", [
  v.object({ type: v.picklist(["BertPreTokenizer", "Whitespace", "WhitespaceSplit"]) }),
  v.object({ type: v.literal("ByteLevel"), add_prefix_space: v.boolean(), use_regex: v.optional(v.boolean(), true) }),
  v.object({
    type: v.literal("Split"),
    pattern: v.object({ Regex: v.picklist([WORDS, SPECIALS + WORDS]) }),
    behavior: v.literal("Removed"),
    invert: v.literal(true),
  }),
]);

/** A part of `tokenizer.json` that splits text into words. */
export const splitSchema = v.nullish(
  v.union([SPLITS, v.object({ type: v.literal("Sequence"), pretokenizers: v.array(SPLITS) })]),
);

export type Splitter = (text: Text) => Text[];

export function makeSplitter(settings: v.InferOutput<typeof splitSchema>): Splitter {
  if (!settings) return (text) => [text];
  const steps = (settings.type === "Sequence" ? settings.pretokenizers : [settings]).map(makeOne);
  return (text) =>
    steps.reduce((words, step) => words.flatMap(step), [text]).filter((word) => word.chars.length > 0);
}

function makeOne(settings: v.InferOutput<typeof SPLITS>): Splitter {
  switch (settings.type) {
    case "BertPreTokenizer":
      return (text) => runs(text, (c) => (SPACES.has(c) ? null : PUNCTUATION.has(c) ? "one" : "word"));
    case "WhitespaceSplit":
      return (text) => runs(text, (c) => (SPACES.has(c) ? null : "word"));
    case "Whitespace":
      return (text) => runs(text, (c) => (SPACES.has(c) ? null : isWord(c) ? "word" : "other"));
    case "Split": {
      const specials = settings.pattern.Regex.startsWith(SPECIALS);
      return (text) => clipWords(text, specials);
    }
    case "ByteLevel":
      return (text) => {
        const words = settings.use_regex ? gptWords(prefixed(text, settings.add_prefix_space)) : [text];
        return words.map(bytes);
      };
  }
}

export function isWord(c: string): boolean {
  return LETTERS.has(c) || NUMBERS.has(c) || OTHER_WORD.has(c);
}

/** Runs of code points of one kind; those of kind null are left out, those of kind "one" stand alone. */
function runs(text: Text, kind: (c: string) => string | null): Text[] {
  const words: Text[] = [];
  for (let from = 0; from < text.chars.length; ) {
    const first = kind(text.chars[from]);
    const to = first === "one" ? from + 1 : runOf(text, from, (c) => kind(c) === first);
    if (first !== null) words.push(slice(text, from, to));
    from = to;
  }
  return words;
}

const CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].map((word) => [...word]);
const CLIP_SPECIALS = ["<|startoftext|>", "<|endoftext|>"].map((word) => [...word]);

const isLetter = (c: string) => LETTERS.has(c);
const isNumber = (c: string) => NUMBERS.has(c);
const isSpace = (c: string) => SPACES.has(c);
const isOther = (c: string) => !isSpace(c) && !isLetter(c) && !isNumber(c);

/** CLIP's pattern: its special tokens, contractions, letters, single digits, the rest. */
function clipWords(text: Text, specials: boolean): Text[] {
  return matches(text, (from) => {
    const fixed = fixedAt(text, from, specials ? [...CLIP_SPECIALS, ...CONTRACTIONS] : CONTRACTIONS);
    if (fixed) return from + fixed;
    const c = text.chars[from];
    if (isLetter(c)) return runOf(text, from, isLetter);
    if (isNumber(c)) return from + 1;
    return isOther(c) ? runOf(text, from, isOther) : from;
  }).filter((word) => !isSpace(word.chars[0]));
}

/** GPT-2's: contractions; letters, digits or the rest with one space before; spaces, the last of which joins a word. */
function gptWords(text: Text): Text[] {
  return matches(text, (from) => {
    const fixed = fixedAt(text, from, CONTRACTIONS);
    if (fixed) return from + fixed;
    const start = text.chars[from] === " " ? from + 1 : from;
    const next = text.chars[start];
    for (const kind of [isLetter, isNumber, isOther]) {
      if (next !== undefined && kind(next)) return runOf(text, start, kind);
    }
    const end = runOf(text, from, isSpace);
    return end < text.chars.length && end - from > 1 ? end - 1 : end;
  });
}

/** Words one behind the other: `end` says where the one at an index ends (a space that no word takes: there). */
function matches(text: Text, end: (from: number) => number): Text[] {
  const words: Text[] = [];
  for (let from = 0; from < text.chars.length; ) {
    const to = Math.max(end(from), from + 1);
    words.push(slice(text, from, to));
    from = to;
  }
  return words;
}

function fixedAt(text: Text, from: number, words: string[][]): number {
  return words.find((word) => word.every((c, k) => text.chars[from + k] === c))?.length ?? 0;
}

function runOf(text: Text, from: number, kind: (c: string) => boolean): number {
  let to = from;
  while (to < text.chars.length && kind(text.chars[to])) to++;
  return to;
}

function prefixed(text: Text, wanted: boolean): Text {
  if (!wanted || text.chars.length === 0 || text.chars[0] === " ") return text;
  return { chars: [" ", ...text.chars], at: [text.at[0], ...text.at] };
}

/** GPT-2's printable character for each byte: itself where it is one, else those from U+0100 on. */
const BYTES = (() => {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCodePoint(printable ? byte : next++);
  });
})();

function bytes(text: Text): Text {
  const made: Text = { chars: [], at: [] };
  const encoder = new TextEncoder();
  text.chars.forEach((c, i) => {
    for (const byte of encoder.encode(c)) {
      made.chars.push(BYTES[byte]);
      made.at.push(text.at[i]);
    }
  });
  return made;
}
