"""Actions on an architecture: SnapFusion's removals and copies (section 3.2), and ours: thinning, dropping layers.

Removing blocks one by one never takes a layer's shortcut, a skip or a sampler away, so Algorithm 1 as published cannot
reach what BK-SDM's hand-picked networks are: without whole layers, the mid block or the innermost level. `drop` can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import FEED_FORWARD_SHARES, MID, MOST_BLOCKS, Architecture, BlockName
from pocketfusion.models.elastic.skips import is_sound

ActionKind = Literal["remove", "remove-self-attention", "narrow-feed-forward", "drop", "duplicate"]
#: What `--actions` calls the kinds. SnapFusion has the first and the last; removing self-attention alone is
#: MobileDiffusion's (arXiv 2311.16567), a narrower feed-forward too; dropping layers and levels is BK-SDM's.
KINDS: dict[str, ActionKind] = {
    "remove": "remove",
    "self-attention": "remove-self-attention",
    "feed-forward": "narrow-feed-forward",
    "drop": "drop",
    "duplicate": "duplicate",
}


class Action(BaseModel):
    """One change of one block; `share` is what a narrowed feed-forward keeps of the stock inner width.

    What is dropped is no block: `mid_block`, `down_blocks.3` (that innermost level with all that it is for), or a down
    layer with the up layer that goes with it, `down_blocks.1.1+up_blocks.2.1`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ActionKind
    block: str
    share: float | None = None

    def apply(self, architecture: Architecture) -> Architecture:
        """The architecture after it; raises PocketfusionError if it does not apply to that block."""
        if self.kind == "narrow-feed-forward":
            assert self.share is not None
            return architecture.narrow_feed_forward(self.block, self.share)
        if self.kind == "drop":
            return _drop(architecture, self.block)
        changes: dict[str, Callable[[str], Architecture]] = {
            "remove": architecture.remove,
            "remove-self-attention": architecture.without_self_attention,
            "duplicate": architecture.duplicate,
        }
        return changes[self.kind](self.block)

    def touches(self, architecture: Architecture) -> set[str]:
        """The blocks that it changes or takes away."""
        if self.kind == "drop":
            return set(architecture.names()) - set(self.apply(architecture).names())
        return {self.block}

    @property
    def label(self) -> str:
        """A few words: `- up1.CA2`, `- up1.CA2 self-attention`, `up1.CA2 FFN x0.5`, `- level 3`, `+ up1.CA2`."""
        if self.kind == "drop":
            return f"- {_dropped_name(self.block)}"
        name = short_name(self.block)
        return {
            "remove": f"- {name}",
            "remove-self-attention": f"- {name} self-attention",
            "narrow-feed-forward": f"{name} FFN x{self.share or 0:g}",
            "duplicate": f"+ {name}",
        }[self.kind]

    @property
    def key(self) -> str:
        """What the log calls it; no two actions on one architecture share a key."""
        return ":".join([self.kind, self.block, *([f"{self.share:g}"] if self.share is not None else [])])


def short_name(block: str) -> str:
    """`up_blocks.1.attentions.2` as `up1.CA2`, `mid_block.resnets.0` as `mid.R0`."""
    at = BlockName.parse(block)
    stage = "mid" if at.stage == MID else at.stage.replace("_blocks.", "")
    return f"{stage}.{'CA' if at.kind == 'attentions' else 'R'}{at.key}"


def _dropped_name(what: str) -> str:
    if what == MID:
        return "mid"
    if "+" not in what:
        return f"level {what.split('.')[1]}"
    return " and ".join(layer.replace("_blocks.", "").replace(".", ".layer ") for layer in what.split("+"))


def _drop(architecture: Architecture, what: str) -> Architecture:
    if what == MID:
        return architecture.drop_stage(MID)
    if "+" not in what:
        return architecture.drop_level(int(what.split(".")[1]))
    for layer in what.split("+"):
        stage, index = layer.rsplit(".", 1)
        architecture = architecture.drop_layer(stage, int(index))
    return architecture


def parse_kinds(text: str) -> tuple[ActionKind, ...]:
    """Reads `--actions`; raises PocketfusionError on an unknown or missing kind."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        wrong = ", ".join(unknown) or text
        raise PocketfusionError(f"--actions {wrong!r} names no kind of action: choose among {', '.join(KINDS)}")
    return tuple(kind for name, kind in KINDS.items() if name in names)


def reductions(architecture: Architecture, kinds: Collection[str], config: Mapping[str, Any]) -> list[Action]:
    """Every action of `kinds` that makes a network on `config`'s base smaller, in network order, drops last.

    A feed-forward is narrowed by one step of `FEED_FORWARD_SHARES` at a time. A removed ResNet leaves its shortcut
    (the architecture's rule), so every removal keeps the skips consistent; of drops only those are here that do.
    """
    found = []
    for at, block in architecture.blocks():
        name = str(at)
        if "remove" in kinds:
            found.append(Action(kind="remove", block=name))
        if at.kind == "attentions" and block.self_attention and "remove-self-attention" in kinds:
            found.append(Action(kind="remove-self-attention", block=name))
        narrower = [share for share in FEED_FORWARD_SHARES if share < block.feed_forward]
        whole = block.feed_forward_units is None  # a pruned one may have fewer than a share
        if at.kind == "attentions" and narrower and whole and "narrow-feed-forward" in kinds:
            found.append(Action(kind="narrow-feed-forward", block=name, share=max(narrower)))
    if "drop" in kinds:
        found += _drops(architecture, config)
    return found


def _drops(architecture: Architecture, config: Mapping[str, Any]) -> Iterator[Action]:
    """Each down layer with an up layer, the mid block (of several blocks), the innermost level, as far as shapes let.

    The up layer is the one that takes the down layer's skip, or else, where that one changes channels, the nearest
    that does not: BK-SDM's pairs are of this kind.
    """
    outermost = sum(name.startswith("down") for name in architecture.stages) - 1
    for level in range(outermost + 1):
        down, up = f"down_blocks.{level}", f"up_blocks.{outermost - level}"
        given = [layer.index for layer in architecture.stages[down].layers]
        taking = [layer.index for layer in architecture.stages[up].layers]
        for place, index in enumerate(reversed(given)):
            for partner in sorted(taking, key=lambda other: abs(taking.index(other) - place)):
                pair = Action(kind="drop", block=f"{down}.{index}+{up}.{partner}")
                if is_sound(pair.apply(architecture), config):
                    yield pair
                    break
    whole = [MID] if sum(name.startswith(f"{MID}.") for name in architecture.names()) > 1 else []
    for what in [*whole, *([f"down_blocks.{architecture.depth}"] if architecture.depth else [])]:
        action = Action(kind="drop", block=what)
        if is_sound(action.apply(architecture), config):
            yield action


def copies(architecture: Architecture) -> list[Action]:
    """Every copy that a layer still has room for, in network order."""
    counts: dict[tuple, int] = {}
    for at, _ in architecture.blocks():
        place = (at.stage, at.kind, at.index)
        counts[place] = counts.get(place, 0) + 1
    free = [at for at, _ in architecture.blocks() if counts[at.stage, at.kind, at.index] < MOST_BLOCKS]
    return [Action(kind="duplicate", block=str(at)) for at in free]


def apply_all(actions: Iterable[Action], architecture: Architecture) -> Architecture:
    """The architecture after all `actions`, in their order."""
    for action in actions:
        architecture = action.apply(architecture)
    return architecture


def applied(actions: Iterable[Action], architecture: Architecture, config: Mapping[str, Any]) -> Architecture | None:
    """The architecture after all `actions`, or None if they do not go together on `config`'s base."""
    try:
        after = apply_all(actions, architecture)
    except PocketfusionError:  # what one of them changes is gone
        return None
    return after if is_sound(after, config) else None
