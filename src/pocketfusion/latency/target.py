"""What is profiled: a model folder, or a named configuration of full size with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, load_pipeline
from pocketfusion.latency.backends import Job
from pocketfusion.mobile import specs
from pocketfusion.mobile.wrappers import StablePipeline, wrap
from pocketfusion.models.architecture import Architecture
from pocketfusion.models.elastic_unet import check_family
from pocketfusion.models.sd_configs import CONFIGS, random_pipeline
from pocketfusion.quiet import quiet


class Target:
    """A pipeline's networks. `config`: the UNet's; `architecture`: the UNet's own, where it is an evolved one.

    `pipeline`: of which the UNet only gives its config.
    """

    def __init__(self, name: str, pipeline: StablePipeline):
        config = {key: value for key, value in pipeline.unet.config.items() if key != "architecture"}
        check_family({key: value for key, value in config.items() if key != "_class_name"}, f"the UNet of {name}")
        self.name = name
        self.config: Mapping[str, Any] = {key: value for key, value in config.items() if not key.startswith("_")}
        found = pipeline.unet.config.get("architecture")
        self.architecture = Architecture.model_validate(found) if found else Architecture.stock(config)
        self.evolved = self.architecture != Architecture.stock(config)
        self.text_length = specs.tokenizer_spec(pipeline).max_length
        self._modules = {key: module for key, module in wrap(pipeline).items() if key != "unet"}
        self._samples = specs.samples(pipeline, batch=1)

    def networks(self) -> tuple[dict[str, Job], dict[str, nn.Module]]:
        """Text encoder and decoder, batch 1: as jobs, and their modules."""
        jobs = {
            key: Job(f"{key}:{module}", lambda module=module: module, self._samples[key])  # type: ignore[misc]
            for key, module in self._modules.items()
        }
        return jobs, self._modules


def load_target(source: str) -> Target:
    """The target named `source`: a configuration of `sd_configs`, else a model folder.

    Raises PocketfusionError if it is neither, or not of Stable Diffusion's 1.x/2.x family.
    """
    if source in CONFIGS:
        return Target(source, random_pipeline(source))
    folder = Path(source)
    check_folder(folder)
    config = folder / "unet" / "config.json"
    try:  # before the weights are read: what another family's weights say when they do not fit helps nobody
        check_family(json.loads(config.read_text(encoding="utf-8")), f"{folder}/unet")
    except (OSError, ValueError, KeyError):
        raise PocketfusionError(f"{config} is missing or damaged: restore it from its source") from None
    with quiet():
        pipeline = load_pipeline(folder)
    return Target(source, pipeline)
