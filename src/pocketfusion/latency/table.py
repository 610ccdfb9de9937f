"""The latency table as a file: a time per part and batch size, the overhead, and predictions made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pocketfusion import __version__
from pocketfusion.artefact import write_json
from pocketfusion.bounded import MB, check_numbers, read_bytes
from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.unet_parts import Part, base_shapes, list_parts, unknown_part
from pocketfusion.models.elastic.architecture import Architecture


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        return check_numbers(value, 1e16)


#: A number of samples, in JSON a key.
Batch = Annotated[int, Field(ge=1, le=1_000_000)]


class Timing(_Value):
    """Milliseconds of one call: median, minimum and maximum of `runs` calls."""

    median: float = Field(ge=0)
    min: float = Field(ge=0)
    max: float = Field(ge=0)
    runs: int = Field(ge=1)


class Entry(_Value):
    """One part: parameters, multiply-adds of one sample, and its timing by batch size."""

    kind: str
    parameters: int = Field(ge=0)
    macs: int = Field(ge=0)
    ms: dict[Batch, Timing]  #: none yet where a pack's logs are to give them


class Whole(_Value):
    """A measured whole network beside the sum of its `count` parts, in ms."""

    whole: Timing
    parts: float
    count: int = Field(ge=0)

    @classmethod
    def beside(cls, whole: Timing, parts: Sequence[Part], ms: Mapping[str, float]) -> Whole:
        """`whole` beside its `parts`, of which `ms` holds the milliseconds by key."""
        return cls(whole=whole, parts=round(sum(ms[part.key] for part in parts), 4), count=len(parts))

    @property
    def beyond(self) -> float:
        """What the whole takes beyond its parts: below zero where parts cost more alone than in their network."""
        return self.whole.median - self.parts


class Overhead(Whole):
    """The base at one batch size, and `bare`, the base without any block: the two ends of what evolving can reach.

    Between the two the overhead is taken as linear in the number of parts: a constant (the network's own inputs and
    outputs) and a share a part (a call of its own, layout changes at its borders that vanish inside the network).
    `empty`: one call of a graph with a single small addition. `interleaved`: whether wholes and parts were timed in
    the same rounds (what does not fit into memory beside the parts is timed after them).
    """

    bare: Whole
    empty: float = 0.0
    interleaved: bool = True

    @model_validator(mode="after")
    def _has_two_ends(self) -> Overhead:
        if self.count <= self.bare.count:
            raise ValueError("the base has no more parts than the base without any block")
        return self

    @classmethod
    def between(cls, base: Whole, bare: Whole, *, empty: float, interleaved: bool) -> Overhead:
        """The overhead that the two networks show."""
        return cls(**dict(base), bare=bare, empty=empty, interleaved=interleaved)

    @property
    def per_part(self) -> float:
        """Milliseconds to add for each part."""
        return (self.beyond - self.bare.beyond) / (self.count - self.bare.count)

    def of(self, count: int) -> float:
        """Milliseconds to add to the sum of `count` parts."""
        return self.beyond + self.per_part * (count - self.count)


class Check(_Value):
    """One architecture's measured and predicted latency in ms; `error` is predicted / measured - 1."""

    name: str
    batch: int
    measured: Timing
    predicted: float
    error: float
    architecture: dict[str, Any]


class Settings(_Value):
    """Where and how the times were measured: tables that differ here are not comparable."""

    device: str
    backend: str
    runtime: str
    weights: str
    threads: int


class LatencyTable(_Value):
    """What `pocketfusion profile` writes."""

    format: Literal["pocketfusion-latency"] = "pocketfusion-latency"
    version: Literal[1] = 1
    created_by: str = f"pocketfusion {__version__}"
    settings: Settings
    base: dict[str, Any]
    text_length: int = Field(ge=1, le=100_000)
    parts: dict[str, Entry]
    #: by batch size
    overhead: dict[Batch, Overhead]
    #: `text_encoder` and `decoder`, batch 1
    networks: dict[str, Entry] = {}
    validation: list[Check] = []

    @field_validator("parts", "networks")
    @classmethod
    def _are_timed(cls, value: dict[str, Entry]) -> dict[str, Entry]:
        for key, entry in value.items():
            if not entry.ms:
                raise ValueError(f"{key[:80]} has no timing")
        return value

    @classmethod
    def load(cls, path: Path | str) -> LatencyTable:
        """Reads a table; raises PocketfusionError if there is none or it is damaged."""
        path = Path(path)
        try:
            return cls.model_validate_json(read_bytes(path, 64 * MB))
        except OSError as error:
            raise PocketfusionError(
                f"the latency table {path} cannot be read ({error.strerror}): check the path"
            ) from None
        except ValueError:
            raise PocketfusionError(
                f"{path} is not a latency table of this version: write it with `pocketfusion profile`"
            ) from None

    def save(self, path: Path | str) -> None:
        """Writes the table as JSON, atomically."""
        write_json(Path(path), self.model_dump(mode="json"))

    def predict(self, config: Mapping[str, Any], architecture: Architecture, batch: int = 2) -> float:
        """Milliseconds of one call of the UNet at `batch` (2 is one guided step): sum of its parts plus the overhead.

        The overhead is as `Overhead` says. Raises PocketfusionError naming the block whose part, or the batch size,
        the table lacks.
        """
        if batch not in self.overhead:
            raise PocketfusionError(
                f"the latency table has no batch size {batch}: profile again with --batch {batch}, "
                f"or use {' or '.join(map(str, self.overhead))}"
            )
        parts = list_parts(config, architecture, self.text_length)
        total = 0.0
        for part in parts:
            entry = self.parts.get(part.key)
            if entry is None or batch not in entry.ms:
                raise unknown_part(part)
            total += entry.ms[batch].median
        return total + self.overhead[batch].of(len(parts))

    def compare(
        self, config: Mapping[str, Any], name: str, architecture: Architecture, batch: int, measured: Timing
    ) -> Check:
        """The prediction for an architecture beside what was measured."""
        predicted = self.predict(config, architecture, batch)
        return Check(
            name=name,
            batch=batch,
            measured=measured,
            predicted=round(predicted, 4),
            error=round(predicted / measured.median - 1, 5),
            architecture=architecture.model_dump(mode="json"),
        )

    def check(
        self, config: Mapping[str, Any], settings: Settings | None = None, *, force: bool = False, batch: int = 2
    ) -> None:
        """Raises PocketfusionError naming what differs if the table is of another base, or measured otherwise.

        `settings`: those wanted; not compared where None. `force` accepts another device, runtime, weights or number
        of threads; another base only as far as its parts are in the table.
        """
        if batch not in self.overhead:
            raise PocketfusionError(f"the latency table has no batch size {batch}: profile again with --batch {batch}")
        if force:
            return
        for what, mine, wanted in self.differences(config, settings):
            raise PocketfusionError(
                f"the latency table is for {what} {mine}, not {wanted}: profile again, or pass --force"
            )

    def differences(
        self, config: Mapping[str, Any], settings: Settings | None = None
    ) -> Sequence[tuple[str, Any, Any]]:
        """(what, the table's, the wanted) for each value that differs."""
        wanted = base_shapes(config)
        found = [(f"a base whose {key} is", self.base.get(key), value) for key, value in wanted.items()]
        if settings is not None:
            found += [(f"the {key}", getattr(self.settings, key), value) for key, value in settings]
        return [(what, mine, value) for what, mine, value in found if mine != value]
