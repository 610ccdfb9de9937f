"""Actions on an architecture: SnapFusion's removals and copies (section 3.2), and two that thin a block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.architecture import FEED_FORWARD_SHARES, MID, MOST_BLOCKS, Architecture, BlockName

ActionKind = Literal["remove", "remove-self-attention", "narrow-feed-forward", "duplicate"]
#: What `--actions` calls the kinds. SnapFusion has the first and the last; removing self-attention alone is
#: MobileDiffusion's (arXiv 2311.16567), a narrower feed-forward too.
KINDS: dict[str, ActionKind] = {
    "remove": "remove",
    "self-attention": "remove-self-attention",
    "feed-forward": "narrow-feed-forward",
    "duplicate": "duplicate",
}


class Action(BaseModel):
    """One change of one block; `share` is what a narrowed feed-forward keeps of the stock inner width."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ActionKind
    block: str
    share: float | None = None

    def apply(self, architecture: Architecture) -> Architecture:
        """The architecture after it; raises PocketfusionError if it does not apply to that block."""
        if self.kind == "narrow-feed-forward":
            assert self.share is not None
            return architecture.narrow_feed_forward(self.block, self.share)
        changes: dict[str, Callable[[str], Architecture]] = {
            "remove": architecture.remove,
            "remove-self-attention": architecture.without_self_attention,
            "duplicate": architecture.duplicate,
        }
        return changes[self.kind](self.block)

    @property
    def label(self) -> str:
        """A few words: `- up1.CA2`, `- up1.CA2 self-attention`, `up1.CA2 FFN x0.5`, `+ up1.CA2`."""
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


def parse_kinds(text: str) -> tuple[ActionKind, ...]:
    """Reads `--actions`; raises PocketfusionError on an unknown or missing kind."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        wrong = ", ".join(unknown) or text
        raise PocketfusionError(f"--actions {wrong!r} names no kind of action: choose among {', '.join(KINDS)}")
    return tuple(kind for name, kind in KINDS.items() if name in names)


def reductions(architecture: Architecture, kinds: Collection[str]) -> list[Action]:
    """Every action of `kinds` that makes the network smaller, in network order.

    A feed-forward is narrowed by one step of `FEED_FORWARD_SHARES` at a time. A removed ResNet leaves its shortcut
    (the architecture's rule), so every removal keeps the skips consistent.
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
    return found


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
