/** Words into the vocabulary's pieces: WordPiece (BERT's) and byte-pair encoding (CLIP's; Sennrich et al., 2016). */

import * as v from "valibot";
import { BundleError } from "../errors";
import type { Text } from "./normalize";

const vocabulary = v.record(v.string(), v.pipe(v.number(), v.safeInteger(), v.minValue(0), v.maxValue(2 ** 24)));
const merge = v.union([v.string(), v.tuple([v.string(), v.string()])]);

/** The part of `tokenizer.json` that knows the pieces. */
export const modelSchema = v.variant("type", [
  v.object({
    type: v.literal("WordPiece"),
    vocab: vocabulary,
    unk_token: v.string(),
    continuing_subword_prefix: v.string(),
    max_input_chars_per_word: v.pipe(v.number(), v.maxValue(1000)),
  }),
  v.object({
    type: v.literal("BPE"),
    vocab: vocabulary,
    merges: v.array(merge),
    dropout: v.nullish(v.null()),
    unk_token: v.nullish(v.string()),
    continuing_subword_prefix: v.nullish(v.string()),
    end_of_word_suffix: v.nullish(v.string()),
    fuse_unk: v.boolean(),
    byte_fallback: v.optional(v.literal(false), false),
    ignore_merges: v.optional(v.boolean(), false),
  }),
]);

/** A token: its id and the prompt's index that it begins at. */
export interface Token {
  id: number;
  at: number;
}

export interface Model {
  vocabulary: Map<string, number>;
  /** The tokens of a word. */
  pieces(word: Text): Token[];
}

export function makeModel(settings: v.InferOutput<typeof modelSchema>): Model {
  const known = new Map(Object.entries(settings.vocab));
  const pieces = settings.type === "WordPiece" ? wordPiece(settings, known) : bytePairs(settings, known);
  return { vocabulary: known, pieces };
}

type Settings<Type> = Extract<v.InferOutput<typeof modelSchema>, { type: Type }>;

/** The longest piece that fits, again and again; a word that is not made of pieces is one unknown token. */
function wordPiece(settings: Settings<"WordPiece">, known: Map<string, number>): Model["pieces"] {
  const prefix = settings.continuing_subword_prefix;
  const unknown = known.get(settings.unk_token);
  if (unknown === undefined) throw new BundleError("invalid", "tokenizer.json lacks its own token for unknown words");
  let longest = 0;
  for (const piece of known.keys()) longest = Math.max(longest, piece.length);
  return (word) => {
    const tokens: Token[] = [];
    const { chars, at } = word;
    if (chars.length > settings.max_input_chars_per_word) return [{ id: unknown, at: at[0] }];
    for (let from = 0; from < chars.length; ) {
      let to = Math.min(chars.length, from + longest) + 1;
      let id: number | undefined;
      while (id === undefined && --to > from) {
        id = known.get((from > 0 ? prefix : "") + chars.slice(from, to).join(""));
      }
      if (id === undefined) return [{ id: unknown, at: at[0] }];
      tokens.push({ id, at: at[from] });
      from = to;
    }
    return tokens;
  };
}

/** Neighbours merged in the order that they were learnt in. */
function bytePairs(settings: Settings<"BPE">, known: Map<string, number>): Model["pieces"] {
  const prefix = settings.continuing_subword_prefix ?? "";
  const suffix = settings.end_of_word_suffix ?? "";
  const unknown = settings.unk_token == null ? undefined : known.get(settings.unk_token);
  const ranks = new Map<string, { rank: number; id: number }>();
  settings.merges.forEach((merge, rank) => {
    const [a, b] = typeof merge === "string" ? merge.split(" ") : merge;
    const id = known.get(a + (prefix && b.startsWith(prefix) ? b.slice(prefix.length) : b));
    const [left, right] = [known.get(a), known.get(b)];
    if (id !== undefined && left !== undefined && right !== undefined) ranks.set(`${left} ${right}`, { rank, id });
  });

  /** The word's characters, the last with the suffix; characters that are no pieces are unknown, or left out. */
  function letters({ chars, at }: Text): Token[] {
    const tokens: Token[] = [];
    let fused = false;
    chars.forEach((c, i) => {
      const id = known.get((i > 0 ? prefix : "") + c + (i === chars.length - 1 ? suffix : ""));
      if (id !== undefined) tokens.push({ id, at: at[i] });
      else if (unknown !== undefined && !(fused && settings.fuse_unk)) tokens.push({ id: unknown, at: at[i] });
      fused = id === undefined;
    });
    return tokens;
  }

  return (word) => {
    if (settings.ignore_merges) {
      const id = known.get(word.chars.join(""));
      if (id !== undefined) return [{ id, at: word.at[0] }];
    }
    let tokens = letters(word);
    for (;;) {
      const pairs = tokens.slice(1).map((token, i) => ranks.get(`${tokens[i].id} ${token.id}`));
      let best: { rank: number; id: number } | undefined;
      for (const pair of pairs) if (pair && (!best || pair.rank < best.rank)) best = pair;
      if (!best) return tokens;
      const merged: Token[] = [];
      for (let i = 0; i < tokens.length; i++) {
        const pair = pairs[i];
        if (pair?.rank === best.rank) {
          merged.push({ id: best.id, at: tokens[i].at });
          i++;
        } else merged.push(tokens[i]);
      }
      tokens = merged;
    }
  };
}
