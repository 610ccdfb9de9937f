"""Exact rewrites of modules into forms that phones' delegates take, each a named pass; targets choose among them.

torch's group normalisation lowers to BROADCAST_TO, which the GPU delegate refuses, others to tensors that a phone
cannot hold or to numbers beyond fp16 (*Squeezing Large-Scale Diffusion Models for Mobile*, arXiv 2307.01193).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.devices import TARGETS, Target
from pocketfusion.mobile.rewrites.activations import GELU, SILU_NHWC
from pocketfusion.mobile.rewrites.attention import ATTENTION, MASKS, SPLIT_ATTENTION
from pocketfusion.mobile.rewrites.convolution import SERIALISE_CONV
from pocketfusion.mobile.rewrites.linear import GEGLU_SPLIT, LINEAR_TO_CONV, SERIALISE_MATMUL
from pocketfusion.mobile.rewrites.norms import GROUP_NORM, LAYER_NORM
from pocketfusion.mobile.rewrites.passes import Rewrite, shared_copy
from pocketfusion.mobile.rewrites.resampling import PADDING, SUBPIXEL, UPSAMPLE

__all__ = ["PASSES", "Rewrite", "rewrite"]

#: Every pass by name, in the order of application: whole blocks first, then what is left of their layers.
PASSES: dict[str, Rewrite] = {
    one.name: one
    for one in (
        MASKS,
        SPLIT_ATTENTION,
        ATTENTION,
        SUBPIXEL,
        UPSAMPLE,
        GEGLU_SPLIT,
        GELU,
        SERIALISE_MATMUL,
        LINEAR_TO_CONV,
        SERIALISE_CONV,
        PADDING,
        GROUP_NORM,
        LAYER_NORM,
        SILU_NHWC,
    )
}


def rewrite(
    module: nn.Module, target: Target = TARGETS["litert-cpu"], names: Iterable[str] | None = None
) -> tuple[nn.Module, dict[str, int]]:
    """A copy of `module` in eval mode, rewritten for `target`, and how many submodules each pass replaced.

    `names`: passes to apply instead of the target's own; the order is always `PASSES`'. The copy shares `module`'s
    parameters, which are not changed and may lie on `meta`. Raises PocketfusionError for an unknown name.
    """
    chosen = set(target.rewrites if names is None else names)
    unknown = chosen - PASSES.keys()
    if unknown:
        raise PocketfusionError(f"there is no rewrite {sorted(unknown)[0]!r}: choose among {', '.join(PASSES)}")
    holder = nn.ModuleList([shared_copy(module)])  # passes replace children, and the module may itself be one
    counts = {name: one(holder, target.limits) for name, one in PASSES.items() if name in chosen}
    return holder[0].eval(), counts
