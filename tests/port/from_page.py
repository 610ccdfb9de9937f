"""docs/port.md in Python: the rules of that page and nothing else, on numpy and LiteRT.

Usage: python from_page.py BUNDLE UNICODE.json OUT.npy PROMPT SEED [SAMPLER STEPS]   (pixels)
       python from_page.py BUNDLE UNICODE.json OUT.json                 (token ids of the JSON list on standard input)
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

real = np.float32


class Unicode:
    def __init__(self, file: Path) -> None:
        data = json.loads(file.read_text())
        names = ("dropped", "spaces", "ideographs", "accents", "punctuation", "letters", "numbers")
        self.sets = {name: {c for first, last in data[name] for c in range(first, last + 1)} for name in names}
        self.lower = {row[0]: row[1:] for row in data["lower"]}
        self.decomposed = {row[0]: row[1:] for row in data["decomposed"]}
        self.classes = {c: order for first, last, order in data["classes"] for c in range(first, last + 1)}
        self.composed = {(a, b): c for a, b, c in data["composed"]}

    def decompose(self, text: list[int]) -> list[int]:
        made: list[int] = []
        for c in text:
            if 0xAC00 <= c < 0xD7A4:
                index = c - 0xAC00
                made += [0x1100 + index // 588, 0x1161 + index % 588 // 28]
                made += [0x11A7 + index % 28] if index % 28 else []
            else:
                made += self.decomposed.get(c, [c])
        start = 0
        while start < len(made):  # marks by class, those of one class as they stand
            end = start
            while end < len(made) and self.classes.get(made[end], 0):
                end += 1
            made[start:end] = sorted(made[start:end], key=lambda c: self.classes[c])
            start = max(end, start + 1)
        return made

    def compose(self, text: list[int]) -> list[int]:
        made: list[int] = []
        starter = -1
        before = 0  # the class of the last one that stayed behind the starter
        for c in self.decompose(text):
            order = self.classes.get(c, 0)
            if starter >= 0 and (before < order or before == 0 and starter == len(made) - 1):
                joined = self._join(made[starter], c)
                if joined is not None:
                    made[starter] = joined
                    continue
            if order == 0:
                starter = len(made)
            before = order
            made.append(c)
        return made

    def _join(self, a: int, b: int) -> int | None:
        if 0x1100 <= a < 0x1113 and 0x1161 <= b < 0x1176:
            return 0xAC00 + ((a - 0x1100) * 21 + b - 0x1161) * 28
        if 0xAC00 <= a < 0xD7A4 and (a - 0xAC00) % 28 == 0 and 0x11A8 <= b < 0x11C3:
            return a + b - 0x11A7
        return self.composed.get((a, b))


class Tokenizer:
    def __init__(self, file: Path, spec: dict, unicode: Unicode) -> None:
        data, self.spec, self.unicode = json.loads(file.read_text(encoding="utf-8")), spec, unicode
        self.model = data["model"]
        self.vocabulary = self.model["vocab"]
        normalizer = data["normalizer"]
        self.normalizers = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        added = sorted(data["added_tokens"], key=lambda token: -len(token["content"]))
        self.raw = [([ord(c) for c in t["content"]], t["id"]) for t in added if not t["normalized"]]
        self.normalized = [(self.normalize([ord(c) for c in t["content"]]), t["id"]) for t in added if t["normalized"]]
        post = data["post_processor"]
        if post["type"] == "TemplateProcessing":
            ids = [
                post["special_tokens"][p["SpecialToken"]["id"]]["ids"][0] if "SpecialToken" in p else None
                for p in post["single"]
            ]
            middle = ids.index(None)
            self.before, self.after = ids[:middle], ids[middle + 1 :]
        else:
            self.before, self.after = [post["cls"][1]], [post["sep"][1]]
        if self.model["type"] == "BPE":
            merges = (m.split(" ") if isinstance(m, str) else m for m in self.model["merges"])
            self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}

    def encode(self, prompt: str) -> tuple[list[int], int]:
        text = [0xFFFD if 0xD800 <= ord(c) < 0xE000 else ord(c) for c in prompt]
        ids: list[int] = []
        for part in self._without(text, self.raw):
            if isinstance(part, int):
                ids.append(part)
                continue
            for inner in self._without(self.normalize(part), self.normalized):
                if isinstance(inner, int):
                    ids.append(inner)
                else:
                    ids += [i for word in self._words(inner) for i in self._pieces(word)]
        length = self.spec["max_length"]
        ids = [*self.before, *ids[: length - len(self.before) - len(self.after)], *self.after]
        return ids + [self.spec["pad_token_id"]] * (length - len(ids)), len(ids)

    @staticmethod
    def _without(text: list[int], added: list[tuple[list[int], int]]) -> list:
        parts: list = []
        i = start = 0
        while i < len(text):
            found = next(((c, number) for c, number in added if c and text[i : i + len(c)] == c), None)
            if found is None:
                i += 1
                continue
            parts += [text[start:i]] * (i > start) + [found[1]]
            i = start = i + len(found[0])
        return parts + [text[start:]] * (start < len(text))

    def normalize(self, text: list[int]) -> list[int]:
        u, sets = self.unicode, self.unicode.sets
        for step in self.normalizers:
            kind = step["type"]
            if kind == "BertNormalizer":
                text = [c for c in text if c not in sets["dropped"]]
                text = [0x20 if c in sets["spaces"] else c for c in text]
                text = [d for c in text for d in ([0x20, c, 0x20] if c in sets["ideographs"] else [c])]
                if step["lowercase"] if step["strip_accents"] is None else step["strip_accents"]:
                    text = [c for c in u.decompose(text) if c not in sets["accents"]]
                if step["lowercase"]:
                    text = [d for c in text for d in u.lower.get(c, [c])]
            elif kind == "NFC":
                text = u.compose(text)
            elif kind == "Lowercase":
                text = [d for c in text for d in u.lower.get(c, [c])]
            elif "Regex" in step["pattern"]:  # \s+
                space = [c in sets["spaces"] for c in text]
                text = [0x20 if space[i] else c for i, c in enumerate(text) if not (space[i] and i and space[i - 1])]
            else:  # a learnt token's name
                name = [ord(c) for c in step["pattern"]["String"]]
                content, made, i = [ord(c) for c in step["content"]], [], 0
                while i < len(text):
                    here = text[i : i + len(name)] == name
                    made += content if here else [text[i]]
                    i += len(name) if here else 1
                text = made
        return text

    def _words(self, text: list[int]) -> list[list[int]]:
        sets = self.unicode.sets
        words: list[list[int]] = []
        i = 0
        if self.model["type"] == "WordPiece":
            while i < len(text):
                end = i + 1
                if text[i] not in sets["spaces"]:
                    while (
                        text[i] not in sets["punctuation"]
                        and end < len(text)
                        and text[end] not in sets["spaces"]
                        and text[end] not in sets["punctuation"]
                    ):
                        end += 1
                    words.append(text[i:end])
                i = end
            return words
        fixed = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
        while i < len(text):
            word = next((w for w in fixed if text[i : i + len(w)] == [ord(c) for c in w]), None)
            end = i + 1
            if word is not None:
                end = i + len(word)
            elif text[i] in sets["spaces"]:
                i += 1
                continue
            elif text[i] in sets["letters"]:
                while end < len(text) and text[end] in sets["letters"]:
                    end += 1
            elif text[i] not in sets["numbers"]:
                while end < len(text) and not any(text[end] in sets[s] for s in ("spaces", "letters", "numbers")):
                    end += 1
            words.append(text[i:end])
            i = end
        return words

    def _pieces(self, word: list[int]) -> list[int]:
        if self.model["type"] == "WordPiece":
            unknown = [self.vocabulary[self.model["unk_token"]]]
            if len(word) > self.model["max_input_chars_per_word"]:
                return unknown
            ids: list[int] = []
            start = 0
            while start < len(word):
                for end in range(len(word), start, -1):
                    piece = "".join(map(chr, word[start:end]))
                    number = self.vocabulary.get((self.model["continuing_subword_prefix"] if start else "") + piece)
                    if number is not None:
                        break
                else:
                    return unknown
                ids.append(number)
                start = end
            return ids
        letters = [LETTERS[b] for b in "".join(map(chr, word)).encode()]
        letters[-1] += self.model["end_of_word_suffix"] or ""
        parts = [p if p in self.vocabulary else self.model["unk_token"] for p in letters]
        parts = [p for p in parts if p is not None]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            made, i = [], 0
            while i < len(parts):
                joins = tuple(parts[i : i + 2]) == best
                made.append(parts[i] + parts[i + 1] if joins else parts[i])
                i += 1 + joins
            parts = made
        return [self.vocabulary[p] for p in parts]


_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in _printable}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in LETTERS)}


class Schedule:
    """Timesteps, the scale of the first noise, and by step: a, b, noise, and what the next one does with x_0."""

    def __init__(self, spec: dict, sampler: str, steps: int) -> None:
        self.spec, n = spec, spec["num_train_timesteps"]
        first, last = spec["beta_start"], spec["beta_end"]
        power = 2 if spec["beta_schedule"] == "scaled_linear" else 1
        first, last = first ** (1 / power), last ** (1 / power)
        betas = [(last if i == n - 1 else i * ((last - first) / (n - 1)) + first) ** power for i in range(n)]
        self.bars, product = [], 1.0
        for beta in betas:
            product *= 1 - beta
            self.bars.append(product)
        self.sigmas = [math.sqrt((1 - bar) / bar) for bar in self.bars]
        self.scale, self.rows = 1.0, []
        getattr(self, "_" + sampler.replace("-", "_").replace("+", "p"))(steps)

    def _at(self, t: int) -> tuple[float, float]:
        return math.sqrt(self.bars[t]), math.sqrt(1 - self.bars[t])

    def _row(
        self, alpha: float, sigma: float, x_0: float, epsilon: float, noise: float = 0, before: float = 0
    ) -> None:
        if self.spec["prediction_type"] == "epsilon":
            a, b = x_0 / alpha, epsilon - x_0 * sigma / alpha
        else:
            a, b = x_0 * alpha + epsilon * sigma, epsilon * alpha - x_0 * sigma
        self.rows.append({"a": a, "b": b, "noise": noise, "before": before, "alpha": alpha, "sigma": sigma})

    def _spaced(self, steps: int, above_zero: bool = False) -> list[int]:
        spec, n, more = self.spec, self.spec["num_train_timesteps"], int(above_zero)
        if spec["timestep_spacing"] == "trailing":
            return [round(n + k * (n - n / steps - n)) - 1 for k in range(steps)]
        if spec["timestep_spacing"] == "linspace":
            count = steps + more
            values = [n - 1 if 0 < i == count - 1 else i * ((n - 1) / max(count - 1, 1)) for i in range(count)]
            return [round(v) for v in reversed(values[more:])]
        falling = [(steps - 1 - k + more) * (n // (steps + more)) for k in range(steps)]
        offset = min(spec["steps_offset"], n - 1 - falling[0])
        return [t + offset for t in falling]

    def _distilled(self, steps: int) -> list[int]:
        n = self.spec["num_train_timesteps"]
        original = min(50, n)
        return [(original - math.floor(k * (original / steps))) * (n // original) - 1 for k in range(steps)]

    def _ddim(self, steps: int) -> None:
        self.timesteps = self._spaced(steps)
        for t in self.timesteps:
            then = t - self.spec["num_train_timesteps"] // steps
            bar = 1.0 if self.spec.get("set_alpha_to_one", True) else self.bars[0]
            later = self._at(then) if then >= 0 else (math.sqrt(bar), math.sqrt(1 - bar))
            self._row(*self._at(t), *later)

    def _euler(self, steps: int, ancestral: bool = False) -> None:
        n = self.spec["num_train_timesteps"]
        self.timesteps = self._spaced(steps)
        if self.spec["timestep_spacing"] == "linspace":
            values = [n - 1 if 0 < i == steps - 1 else i * ((n - 1) / max(steps - 1, 1)) for i in range(steps)]
            self.timesteps = [float(real(v)) for v in reversed(values)]
        sigmas = []
        for t in self.timesteps:
            low = min(int(t), n - 2)
            sigmas.append((self.sigmas[low + 1] - self.sigmas[low]) * (t - low) + self.sigmas[low])
        final = self.sigmas[0] if self.spec.get("final_sigmas_type") == "sigma_min" and not ancestral else 0.0
        if self.spec["timestep_spacing"] != "leading":
            self.scale = _of_sigma(sigmas[0])[1]
        for k, (now, later) in enumerate(zip(sigmas, [*sigmas[1:], final], strict=True)):
            up = math.sqrt(later**2 * (now**2 - later**2)) / now if ancestral else 0.0
            down = math.sqrt(later**2 - up**2)
            scale = _of_sigma(later)[0] if k < steps - 1 else 1.0
            self._row(*_of_sigma(now), scale, scale * down, scale * up)

    def _euler_ancestral(self, steps: int) -> None:
        self._euler(steps, ancestral=True)

    def _dpmpp_2m(self, steps: int) -> None:
        self.timesteps = self._spaced(steps, above_zero=True)
        self._multistep([self.sigmas[t] for t in self.timesteps])

    def _dpmpp_2m_karras(self, steps: int) -> None:
        a, b, n = self.sigmas[-1] ** (1 / 7), self.sigmas[0] ** (1 / 7), len(self.sigmas)
        ramp = [1.0 if 0 < k == steps - 1 else k * (1 / max(steps - 1, 1)) for k in range(steps)]
        sigmas = [(a + r * (b - a)) ** 7 for r in ramp]
        logs = [math.log(s) for s in self.sigmas]
        self.timesteps = [round(float(np.interp(math.log(s), logs, range(n)))) for s in sigmas]
        self._multistep(sigmas)

    def _multistep(self, sigmas: list[float]) -> None:
        final = self.sigmas[0] if self.spec.get("final_sigmas_type") == "sigma_min" else 0.0
        last, levels = len(sigmas) - 1, [*sigmas, final]
        for k in range(len(sigmas)):
            now, later = levels[k], levels[k + 1]
            alpha, sigma = _of_sigma(later)
            change = 0.0
            if k > 0 and (k < last or (final > 0 and len(sigmas) >= 15)):
                change = alpha * (1 - later / now) * math.log(now / later) / (2 * math.log(levels[k - 1] / now))
            self._row(*_of_sigma(now), alpha + change, sigma, before=-change)

    def _lcm(self, steps: int) -> None:
        self.timesteps = self._distilled(steps)
        for t, later in zip(self.timesteps, [*self.timesteps[1:], None], strict=True):
            alpha, sigma = self._at(t)
            skip, out = 0.25 / ((t * 10) ** 2 + 0.25), t * 10 / math.sqrt((t * 10) ** 2 + 0.25)
            scale, noise = (1.0, 0.0) if later is None else self._at(later)
            self._row(alpha, sigma, scale * (out + skip * alpha), scale * skip * sigma, noise)

    def _tcd(self, steps: int) -> None:
        self.timesteps = self._distilled(steps)
        for t, later in zip(self.timesteps, [*self.timesteps[1:], 0], strict=True):
            target = math.floor((1 - self.spec.get("eta", 0.3)) * later)
            alpha, sigma = self._at(target)
            kept = self.bars[later] / self.bars[target]
            self._row(*self._at(t), math.sqrt(kept) * alpha, math.sqrt(kept) * sigma, math.sqrt(1 - kept))


def _of_sigma(sigma: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha


def time_embedding(t: float, spec: dict) -> np.ndarray:
    half = spec["dim"] // 2
    exponents = real(-math.log(10000)) * np.arange(half, dtype=real) / real(half - spec["downscale_freq_shift"])
    angles = real(t) * np.array([math.exp(e) for e in exponents.tolist()], real)
    sines, cosines = ([f(a) for a in angles.tolist()] for f in (math.sin, math.cos))
    values = [*cosines, *sines] if spec["flip_sin_to_cos"] else [*sines, *cosines]
    return np.array([*values, *[0.0] * (spec["dim"] % 2)], real)


def guidance_embedding(scale: float, dim: int) -> np.ndarray:
    half = dim // 2
    angles = [1000 * (scale - 1) * 10000 ** -(i / max(half - 1, 1)) for i in range(half)]
    return np.array([*map(math.sin, angles), *map(math.cos, angles), *[0.0] * (dim % 2)], real)


class Network:
    def __init__(self, folder: Path, manifest: dict, name: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.spec = manifest["networks"][name]
        path = folder / manifest["files"][name]["path"]
        self.runner = Interpreter(str(path), num_threads=1).get_signature_runner()
        self.shapes = {tensor["name"]: tensor["shape"] for tensor in self.spec["inputs"]}

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        values = {
            tensor["name"]: np.asarray(inputs[tensor["name"]], tensor["dtype"]).reshape(tensor["shape"])
            for tensor in self.spec["inputs"]
        }
        return self.runner(**values)[self.spec["outputs"][0]["name"]]


def draw(folder: Path, unicode: Unicode, prompt: str, seed: int, sampler: str | None, steps: int | None) -> np.ndarray:
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    files, defaults = manifest["files"], manifest["defaults"]
    kind = manifest.get("guidance", "classifier-free")
    scale = max(defaults["guidance_scale"], 1.0)
    # text
    tokenizer = Tokenizer(folder / files["tokenizer"]["path"], manifest["tokenizer"], unicode)
    encoder = Network(folder, manifest, "text_encoder")

    def encode(text: str) -> np.ndarray:
        ids, count = tokenizer.encode(text)
        mask = [1] * count + [0] * (len(ids) - count)
        return encoder(input_ids=np.array(ids), attention_mask=np.array(mask))

    rows = [encode(prompt)]
    if kind == "classifier-free":
        if "empty_prompt_embeds" in files:
            empty = np.frombuffer((folder / files["empty_prompt_embeds"]["path"]).read_bytes(), "<f4")
            rows.insert(0, empty.reshape(rows[0].shape))
        else:
            rows.insert(0, encode(""))
    # steps
    unet = Network(folder, manifest, "unet")
    batch = unet.shapes["encoder_hidden_states"][0]
    folded = "step_coefficients" in unet.shapes
    calls = [np.concatenate(rows)] if batch == 2 else rows if scale > 1 else rows[-1:]
    schedule = Schedule(
        manifest["scheduler"], sampler or manifest.get("sampler", "ddim"), steps or defaults["num_inference_steps"]
    )
    shape = [manifest["latents"][key] for key in ("height", "width", "channels")]
    noise = np.random.Generator(np.random.PCG64(seed))
    sample = noise.standard_normal(shape, real) * real(schedule.scale)
    previous = None
    for t, row in zip(schedule.timesteps, schedule.rows, strict=True):
        inputs: dict[str, np.ndarray] = {"timestep": np.full(batch, t, real)}
        if "timestep_embedding" in unet.shapes:
            inputs["timestep_embedding"] = np.tile(time_embedding(t, manifest["time_embedding"]), (batch, 1))
        if "timestep_cond" in unet.shapes:
            inputs["timestep_cond"] = guidance_embedding(defaults["guidance_scale"], unet.shapes["timestep_cond"][1])
        if folded:
            inputs["step_coefficients"] = np.array([scale, row["a"], row["b"]], real)
            after = unet(sample=sample, encoder_hidden_states=calls[0], **inputs)[0]
        else:
            copies = np.repeat(sample[None], batch, axis=0)
            predictions = [unet(sample=copies, encoder_hidden_states=text, **inputs) for text in calls]
            both = np.concatenate(predictions)
            output = both[-1]
            if len(both) == 2 and scale > 1:
                output = (both[1] - both[0]) * real(scale) + both[0]
            after = real(row["a"]) * sample + real(row["b"]) * output
            if row["before"] and previous is not None:
                after = after + real(row["before"]) * previous
            alpha, sigma = real(row["alpha"]), real(row["sigma"])
            if manifest["scheduler"]["prediction_type"] == "epsilon":
                previous = (sample - sigma * output) / alpha
            else:
                previous = alpha * sample - sigma * output
        if row["noise"]:
            after = after + real(row["noise"]) * noise.standard_normal(shape, real)
        sample = after
    # picture
    image = Network(folder, manifest, "decoder")(latents=sample)[0]
    return np.rint(np.clip(image / 2 + real(0.5), 0, 1) * real(255)).astype(np.uint8)


def main() -> None:
    folder, unicode, out, *asked = sys.argv[1:]
    tables = Unicode(Path(unicode))
    if asked:
        sampler, steps = (asked[2], int(asked[3])) if len(asked) > 2 else (None, None)
        np.save(out, draw(Path(folder), tables, asked[0], int(asked[1]), sampler, steps))
    else:
        manifest = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
        file = Path(folder) / manifest["files"]["tokenizer"]["path"]
        tokenizer = Tokenizer(file, manifest["tokenizer"], tables)
        rows = [tokenizer.encode(prompt) for prompt in json.load(sys.stdin)]
        Path(out).write_text(json.dumps(rows))
    foreign = {"pocketfusion", "tokenizers", "PIL", "transformers", "torch"} & set(sys.modules)
    assert not foreign, foreign


if __name__ == "__main__":
    main()
