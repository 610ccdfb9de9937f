"""Parts of a written model folder exchanged or added to: another autoencoder, fewer text layers, learnt tokens."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import ENCODER, read_json, tensors, weights_hash
from pocketfusion.models.bring.configs import vae_factor
from pocketfusion.models.bring.conversion import write_vae
from pocketfusion.models.learnt_tokens import learn
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.recognise import recognise_vae

_FACTOR = 8  #: pixels of a latent's side in Stable Diffusion
_SAME = 0.5  #: correlation of two encoders' latents of one picture, from which on they are taken for the same space
_PICTURE = 64  #: px of that picture


def put_vae(folder: Path, given: Path) -> str:
    """Puts the autoencoder `given` in the place of the model folder's own, if it has one; says in words what it is.

    `given`: a file (original layout), a folder with config.json and weights, or a model folder. Raises
    PocketfusionError if it is none, or its latents are not the UNet's: other channels, another factor or scale, or,
    measured on a picture, another space.
    """
    new = folder / "vae.new"
    if given.is_dir():
        source = next((place for place in (given, given / "vae") if (place / "config.json").is_file()), None)
        if source is None:
            raise PocketfusionError(f"{given} holds no autoencoder: give a folder with config.json and its weights")
        network = load_vae(source)
        network.to({tensor.dtype for _, tensor in tensors(source)}.pop()).save_pretrained(new)
        factor = 2 ** (len(network.config["block_out_channels"]) - 1)
    else:
        checkpoint = recognise_vae(given)
        write_vae(checkpoint, new, read_json(folder / "unet" / "config.json")["sample_size"])
        network, factor = load_vae(new), vae_factor(checkpoint)
    config, unet = read_json(new / "config.json"), read_json(folder / "unet" / "config.json")
    if config["latent_channels"] != unet["in_channels"]:
        raise PocketfusionError(
            f"{given} is of other latents: it makes {config['latent_channels']} channels, and the UNet takes "
            f"{unet['in_channels']}"
        )
    said = f"{given.name}: {config['latent_channels']} latent channels at 1/{factor}"
    own = folder / "vae"
    if own.is_dir():
        before = read_json(own / "config.json")
        factors = [2 ** (len(one["block_out_channels"]) - 1) for one in (config, before)]
        scales = [one.get("scaling_factor", 0.18215) for one in (config, before)]
        for what, (mine, theirs) in (("1/", factors), ("a scaling_factor of ", scales)):
            if mine != theirs:
                raise PocketfusionError(
                    f"{given} is of other latents: {what}{mine}, and the model's are {what}{theirs}"
                )
        if weights_hash(new, ENCODER) == weights_hash(own, ENCODER):
            said += ", the same encoder as the model's own"
        else:
            likeness = _likeness(network, load_vae(own))
            if not likeness > _SAME:
                raise PocketfusionError(
                    f"{given} is of other latents: of one picture its and the model's own correlate {likeness:.2f}"
                )
            said += f", its latents of a picture correlate {likeness:.2f} with the model's own"
        shutil.rmtree(own)
    elif factor != _FACTOR:
        raise PocketfusionError(f"{given} is of other latents: 1/{factor}, and Stable Diffusion's are 1/{_FACTOR}")
    new.rename(own)
    kind = type(network)
    library = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"vae": [library, kind.__name__]})
    return said


@torch.no_grad()
def _likeness(one: Any, other: Any) -> float:
    """Correlation of two autoencoders' latents of a smooth random picture."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, size=_PICTURE, mode="bicubic").clamp(-1, 1)
    latents = [vae.float().encode(picture).latent_dist.mean.flatten() for vae in (one, other)]
    return float(torch.nan_to_num(torch.corrcoef(torch.stack(latents))[0, 1]))


def skip_layers(folder: Path, clip_skip: int) -> int:
    """Leaves out the last `clip_skip` - 1 layers of the model folder's text encoder; returns how many are left.

    Stock pipelines then give what `clip_skip` = N - 1 gives in their call: the last layer's norm is applied.
    Raises PocketfusionError if it is no CLIP or has no layers left.
    """
    place = folder / "text_encoder"
    config = read_json(place / "config.json")
    depth = config.get("num_hidden_layers")
    if config.get("model_type") != "clip_text_model" or not isinstance(depth, int):
        raise PocketfusionError(
            f"--clip-skip is for CLIP's text encoders, and the model's is {config.get('model_type')!a}"
        )
    if not 1 <= clip_skip <= depth:
        raise PocketfusionError(f"--clip-skip {clip_skip} is not from 1 to {depth}, the text encoder's layers")
    left = depth - clip_skip + 1
    if left < depth:
        number = re.compile(r"encoder\.layers\.(\d+)\.")
        kept = {
            name: tensor
            for name, tensor in tensors(place)
            if not (found := number.search(name)) or int(found[1]) < left
        }
        _replace(place, kept)
        write_json(place / "config.json", config | {"num_hidden_layers": left})
    return left


def add_tokens(folder: Path, files: tuple[Path, ...]) -> list[str]:
    """Adds textual inversions to the model folder as diffusers keeps them: `<x>`, `<x>_1`, …; returns their names.

    Raises PocketfusionError as `learnt_tokens.add_embedding` does.
    """
    place = folder / "text_encoder"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    state = dict(tensors(place))
    name = next((name for name in state if name.endswith("token_embedding.weight")), None)
    if name is None:
        raise PocketfusionError("--embedding is for CLIP's text encoders, and the model's is none")
    added = []
    for file in files:
        token, state[name] = learn(tokenizer, state[name], file)
        added.append(token)
    _replace(place, state)
    config = read_json(place / "config.json")
    write_json(place / "config.json", config | {"vocab_size": len(state[name])})
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    return added


def _replace(place: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes a network's weights in the place of all that its folder has."""
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}  # no longer mapped from the files
    for file in [*place.glob("*.safetensors"), *place.glob("*.safetensors.index*.json")]:
        file.unlink()
    save_file(state, place / "model.safetensors", {"format": "pt"})
