/** Prompts to token ids, cut or padded to the text encoder's fixed length, as `pocketfusion.runtime.tokenizer` does. */

import * as v from "valibot";
import { BundleError } from "../errors";
import type { Manifest } from "../manifest";
import { makeModel, modelSchema, type Token } from "./models";
import { makeNormalizer, normalizerSchema, slice, type Text, textOf } from "./normalize";
import { isWord, makeSplitter, splitSchema } from "./split";
import { SPACES } from "./unicode";

/** A prompt as the text encoder takes it. */
export interface Tokens {
  /** [1, max_length] */
  inputIds: Int32Array<ArrayBuffer>;
  /** [1, max_length], 1 where a token is, 0 where padding. */
  attentionMask: Int32Array<ArrayBuffer>;
  /** What was cut off, in a sentence; null if nothing. */
  warning: string | null;
}

const id = v.pipe(v.number(), v.safeInteger(), v.minValue(0), v.maxValue(2 ** 24));
const added = v.object({
  id,
  content: v.string(),
  single_word: v.boolean(),
  lstrip: v.boolean(),
  rstrip: v.boolean(),
  normalized: v.boolean(),
});
const pair = v.tuple([v.string(), id]);
const piece = v.union([
  v.object({ SpecialToken: v.object({ id: v.string() }) }),
  v.object({ Sequence: v.object({ id: v.string() }) }),
]);
const file = v.object({
  version: v.literal("1.0"),
  added_tokens: v.array(added),
  normalizer: normalizerSchema,
  pre_tokenizer: splitSchema,
  post_processor: v.nullish(
    v.variant("type", [
      v.object({
        type: v.literal("TemplateProcessing"),
        single: v.array(piece),
        special_tokens: v.record(v.string(), v.object({ ids: v.array(id) })),
      }),
      v.object({ type: v.picklist(["BertProcessing", "RobertaProcessing"]), sep: pair, cls: pair }),
    ]),
  ),
  model: modelSchema,
});
type AddedToken = v.InferOutput<typeof added> & { chars: string[] };
type File = v.InferOutput<typeof file>;

/** `text` with lone surrogates (half of a character pair) replaced by U+FFFD. */
export function cleanText(text: string): string {
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

export class PromptTokenizer {
  private readonly normalize;
  private readonly split;
  private readonly model;
  private readonly raw: AddedToken[];
  private readonly normalized: AddedToken[];
  /** The special tokens' ids before and after a prompt's. */
  private readonly before: number[];
  private readonly after: number[];

  /** Throws BundleError if `content` is no tokenizer of a kind that bundles have, or does not fit the manifest. */
  constructor(
    content: Uint8Array,
    private readonly spec: Manifest["tokenizer"],
  ) {
    const parsed = parse(content);
    this.normalize = makeNormalizer(parsed.normalizer);
    this.split = makeSplitter(parsed.pre_tokenizer);
    this.model = makeModel(parsed.model);
    const tokens = parsed.added_tokens.filter((token) => token.content);
    const longest = (list: AddedToken[]) => list.sort((a, b) => b.chars.length - a.chars.length);
    this.raw = longest(tokens.filter((t) => !t.normalized).map((t) => ({ ...t, chars: [...t.content] })));
    this.normalized = longest(
      tokens.filter((t) => t.normalized).map((t) => ({ ...t, chars: this.normalize(textOf(t.content)).chars })),
    );
    [this.before, this.after] = template(parsed);
    const special = this.before.length + this.after.length;
    if (special >= spec.max_length) {
      throw broken(`it adds ${special} tokens to prompts, which have ${spec.max_length}`);
    }
    const padding = tokens.find((t) => t.content === spec.pad_token)?.id ?? this.model.vocabulary.get(spec.pad_token);
    if (padding !== spec.pad_token_id) {
      throw broken(`it has no token ${JSON.stringify(spec.pad_token)} with id ${spec.pad_token_id}`);
    }
  }

  /** Token ids and mask of `prompt`, with a warning that says from which word on it was cut, if it was. */
  encode(prompt: string): Tokens {
    const text = textOf(cleanText(prompt));
    const tokens = this.tokens(text);
    const length = this.spec.max_length;
    const room = length - this.before.length - this.after.length;
    const kept = tokens.slice(0, room).map((token) => token.id);
    const ids = [...this.before, ...kept, ...this.after];
    const inputIds = new Int32Array(length).fill(this.spec.pad_token_id);
    inputIds.set(ids);
    const attentionMask = new Int32Array(length).fill(1, 0, ids.length);
    return { inputIds, attentionMask, warning: tokens.length > room ? cut(text.chars, tokens, room) : null };
  }

  private tokens(text: Text): Token[] {
    return splitOff(text, this.raw).flatMap((part) => {
      if ("id" in part) return [part];
      return splitOff(this.normalize(part), this.normalized).flatMap((inner) =>
        "id" in inner ? [inner] : this.split(inner).flatMap((word) => this.model.pieces(word)),
      );
    });
  }
}

function parse(content: Uint8Array): File {
  let values: unknown;
  try {
    values = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch {
    throw broken("it is not valid JSON");
  }
  const result = v.safeParse(file, values, { abortEarly: true });
  if (!result.success) {
    const [part] = String(v.getDotPath(result.issues[0]) ?? "").split(".");
    throw broken(`its ${part.slice(0, 40) || "content"} is none that an exported bundle has`);
  }
  return result.output;
}

function broken(what: string): BundleError {
  return new BundleError("invalid", `tokenizer.json is not this bundle's (${what}): restore it from its source`);
}

function template({ post_processor: post }: File): [number[], number[]] {
  if (!post) return [[], []];
  if (post.type !== "TemplateProcessing") return [[post.cls[1]], [post.sep[1]]];
  const parts = post.single.map((one) => {
    if ("Sequence" in one) return null;
    const special = post.special_tokens[one.SpecialToken.id];
    if (!special) throw broken("its post_processor names a token that it lacks");
    return special.ids;
  });
  const middle = parts.indexOf(null);
  if (middle < 0) throw broken("its post_processor leaves the prompt out");
  const ids = (list: (number[] | null)[]) => list.flatMap((one) => one ?? []);
  return [ids(parts.slice(0, middle)), ids(parts.slice(middle + 1))];
}

/** The text between the added tokens in it, and these: the leftmost first, of several the longest. */
function splitOff(text: Text, tokens: AddedToken[]): (Text | Token)[] {
  const parts: (Text | Token)[] = [];
  let from = 0;
  const push = (to: number) => {
    if (to > from) parts.push(slice(text, from, to));
  };
  for (let i = 0; tokens.length && i < text.chars.length; ) {
    const found = tokens.find((token) => token.chars.length && token.chars.every((c, k) => text.chars[i + k] === c));
    const end = i + (found?.chars.length ?? 1);
    if (!found || (found.single_word && [text.chars[i - 1], text.chars[end]].some((c) => c !== undefined && isWord(c)))) {
      i = found ? end : i + 1;
      continue;
    }
    let [start, stop] = [i, end];
    while (found.lstrip && start > from && SPACES.has(text.chars[start - 1])) start--;
    while (found.rstrip && stop < text.chars.length && SPACES.has(text.chars[stop])) stop++;
    push(start);
    parts.push({ id: found.id, at: text.at[start] });
    from = i = stop;
  }
  push(text.chars.length);
  return parts;
}

/** What Python's `str.split` splits at. */
function isSpace(c: string): boolean {
  return SPACES.has(c) || (c >= "\x1c" && c <= "\x1f");
}

function cut(prompt: string[], tokens: Token[], kept: number): string {
  const start = tokens[kept].at;
  const begins = (c: string, i: number) => !isSpace(c) && (i === 0 || isSpace(prompt[i - 1]));
  const word = prompt.slice(0, start + 1).filter(begins).length;
  const rest = prompt.slice(start);
  const snippet = rest.length <= 40 ? rest.join("") : `${rest.slice(0, 40).join("")}…`;
  const total = tokens.length.toLocaleString("en");
  return `the prompt has ${total} tokens and ${kept} fit: it is cut at word ${word}, where "${snippet}" begins`;
}
