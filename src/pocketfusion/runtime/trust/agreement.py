"""What a manifest says of the three networks, checked against each other: what one gives, the next one takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocketfusion.runtime.specs import Network, TensorSpec

if TYPE_CHECKING:
    from pocketfusion.runtime.manifest import Manifest


def check_agreement(manifest: Manifest) -> None:
    """Raises ValueError that names the first two of the manifest's values that do not go together."""
    networks, latents, image = manifest.networks, manifest.latents, manifest.image
    tokens = manifest.tokenizer.max_length
    _takes("text_encoder", networks.text_encoder, input_ids=[1, tokens], attention_mask=[1, tokens])
    embeds = _output("text_encoder", networks.text_encoder, [1, tokens, None])
    _check_unet(manifest, embeds)
    tile = networks.decoder.input("latents")
    _takes("decoder", networks.decoder, latents=[1, None, None, latents.channels])
    factor, rest = divmod(image.height, latents.height)
    if rest or image.width != factor * latents.width:
        raise ValueError(
            f"the image is {image.height}x{image.width}, no whole multiple of the latents' "
            f"{latents.height}x{latents.width}"
        )
    assert tile is not None
    _output("decoder", networks.decoder, [1, factor * tile.shape[1], factor * tile.shape[2], 3])
    if manifest.preview is not None and len(manifest.preview.matrix) != latents.channels:
        raise ValueError(f"preview.matrix has {len(manifest.preview.matrix)} rows for {latents.channels} channels")
    if manifest.scheduler.steps_offset >= manifest.scheduler.num_train_timesteps:
        raise ValueError("scheduler.steps_offset is not below scheduler.num_train_timesteps")
    if manifest.guidance_range and not manifest.guidance_range[0] <= manifest.guidance_range[1]:
        raise ValueError(f"guidance_range is {list(manifest.guidance_range)}, which does not ascend")


def _check_unet(manifest: Manifest, embeds: TensorSpec) -> None:
    unet, latents = manifest.networks.unet, manifest.latents
    rows = unet.batch
    if rows not in (1, 2):
        raise ValueError(f"the UNet takes {rows} rows of text: one, or two for guidance")
    folded = unet.input("step_coefficients") is not None
    given = unet.input("sample")
    one = folded and given is not None and given.shape[0] == 1  # both rows are made of it in the graph
    sample = [1 if one else rows, latents.height, latents.width, latents.channels]
    shapes: dict[str, Sequence[int | None]] = {"sample": sample, "encoder_hidden_states": [rows, *embeds.shape[1:]]}
    if manifest.time_embedding is None:
        shapes["timestep"] = [rows]
    else:
        shapes["timestep_embedding"] = [rows, manifest.time_embedding.dim]
    if manifest.guidance == "embedded":
        shapes["timestep_cond"] = [1, None]
    if folded:
        shapes["step_coefficients"] = [1, 3]
    _takes("unet", unet, **shapes)
    _output("unet", unet, sample)


def _takes(name: str, network: Network, **shapes: Sequence[int | None]) -> None:
    """The network's inputs are those of `shapes` (None: any extent), and no others."""
    given = [tensor.name for tensor in network.inputs]
    if sorted(given) != sorted(shapes):
        raise ValueError(f"networks.{name} takes {', '.join(given)}, not {', '.join(shapes)}")
    for tensor in network.inputs:
        kind = "int32" if tensor.name in ("input_ids", "attention_mask") else "float32"
        _compare(f"networks.{name} takes {tensor.name}", tensor, kind, shapes[tensor.name])


def _output(name: str, network: Network, shape: Sequence[int | None]) -> TensorSpec:
    tensor = network.outputs[0]
    _compare(f"networks.{name} gives {tensor.name}", tensor, "float32", shape)
    return tensor


def _compare(what: str, tensor: TensorSpec, kind: str, shape: Sequence[int | None]) -> None:
    same = len(tensor.shape) == len(shape) and all(
        wanted in (None, extent) for extent, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not same or tensor.dtype != kind:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{what} {tensor.shape} {tensor.dtype}, where the rest makes it [{wanted}] {kind}")
