"""Bundles of every form with their kits, and tokenizers with token ids: what ports in other languages are run on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pocketfusion.artefact import write_json
from pocketfusion.port.vectors import odd_prompts, token_rows, write_vectors
from pocketfusion.runtime.manifest import embedded_bundle
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text


def make_kits(folder: Path, forms: dict[str, Path]) -> None:
    """Below `folder`: bundles/NAME and kits/NAME of the embedded bundle, of each form, and of one for the GPU."""
    for name in ("bundles", "kits"):
        (folder / name).mkdir()
    for name, source in ({"emoji": embedded_bundle()} | forms | {"gpu": forms["outside"]}).items():
        bundle = Path(shutil.copytree(source, folder / "bundles" / name))
        if name == "gpu":
            manifest = json.loads((bundle / "bundle.json").read_text()) | {"target": "litert-gpu"}
            manifest["networks"]["text_encoder"]["gpu_precision"] = "fp32"
            (bundle / "bundle.json").write_text(json.dumps(manifest))
        write_vectors(bundle, folder / "kits" / name, prompt="ein roter Apfel, Æther 苹果")


def make_tokenizers(folder: Path) -> None:
    """Below `folder`, for each tokenizer: tokenizer.json, spec.json and tokens.json."""
    from vectors import tokenizer_files

    (folder / "files").mkdir()
    prompts = [clean_text(prompt) for prompt in odd_prompts(800)]
    for number, (file, spec) in enumerate(tokenizer_files(folder / "files")):
        one = folder / "tokenizers" / str(number)
        one.mkdir(parents=True)
        shutil.copyfile(file, one / "tokenizer.json")
        write_json(one / "spec.json", spec.model_dump())
        rows = zip(prompts, token_rows(PromptTokenizer(file, spec), prompts), strict=True)
        write_json(
            one / "tokens.json", [{"prompt": prompt, "ids": ids, "count": count} for prompt, (ids, count, _) in rows]
        )
