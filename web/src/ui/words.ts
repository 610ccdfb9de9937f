/** How the page writes numbers and names. */

import type { Settings } from "../engine/api";

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

export function duration(milliseconds: number): string {
  if (milliseconds < 1) return "under 1 ms";
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(milliseconds < 1e4 ? 2 : 1)} s`;
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** As a sentence is written: begun with a capital unless it begins with a file's name, ended with a stop. */
export function sentence(text: string): string {
  const trimmed = text.trim();
  const begun = /^[\p{L}\d’'-]+(?=[,;:!?]?(\s|$))/u.test(trimmed) ? trimmed.charAt(0).toUpperCase() + trimmed.slice(1) : trimmed;
  return begun + (/[.!?…]$/.test(trimmed) ? "" : ".");
}

/** A file's name that says what is on it. */
export function fileName({ prompt, seed }: Settings): string {
  const words = prompt
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "");
  return `${words.slice(0, 50) || "picture"}-${seed}.png`;
}

/** `prompt` with `style` as its last part, in the place of another of `styles`; without one if `style` is null. */
export function withStyle(prompt: string, style: string | null, styles: string[]): string {
  const present = styleOf(prompt, styles);
  const bare = present ? prompt.slice(0, prompt.length - present.length).replace(/[,\s]+$/, "") : prompt.trimEnd();
  if (!style) return bare;
  return bare ? `${bare}, ${style}` : style;
}

/** The style that the prompt ends with; the longest, as one may end as another does. */
export function styleOf(prompt: string, styles: string[]): string | null {
  const end = prompt.trimEnd().toLowerCase();
  const fitting = styles.filter((style) => {
    const before = end.slice(0, -style.length);
    return end.endsWith(style.toLowerCase()) && (before === "" || /[,\s]$/.test(before));
  });
  return fitting.sort((a, b) => b.length - a.length)[0] ?? null;
}
