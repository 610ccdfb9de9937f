"""Checkpoints of the training loop in safetensors: weights, EMA, AdamW moments and the step, nothing pickled.

One process writes whole tensors; under FSDP2 each writes its shards (torch.distributed.checkpoint), and whatever was
written is read by any number of processes, sharded or not. The moving average of the weights stands here too.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError, number_of

_STATE = ("step", "exp_avg", "exp_avg_sq")
_CODES = ("codes", "scale")  #: of moments in 8 bits
_KEEP = 2
_WHOLE = ("model", "ema", "optimizer")  #: files
_MOMENTS = "optimizer"
_PATIENCE = 20  #: seconds that a run which breaks off waits for its checkpoint; launchers kill after 30
_WRITING = ".writing"  #: where processes put their shards, until all are there


def _named(model: nn.Module, average: Average) -> list[tuple[str, nn.Parameter, torch.Tensor]]:
    return [(name, p, v) for (name, p), v in zip(model.named_parameters(), average.values, strict=True)]


def _like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor as that of a whole one, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def state_of(
    model: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds, by file and name; sharing memory with what it is of."""
    found: dict[str, dict[str, torch.Tensor]] = {
        "model": {name: value.detach() for name, value in model.state_dict().items()},
        "ema": {name: _like(value, p) for name, p, value in _named(model, average)},
        _MOMENTS: {},
    }
    for name, parameter, _ in _named(model, average):
        state = optimizer.state[parameter]
        for key in _STATE:
            if key not in state:  # a parameter that random depth has left out has fewer steps, or none
                continue
            if hasattr(state[key], "codes"):
                found[_MOMENTS] |= {f"{key}.{part}:{name}": getattr(state[key], part) for part in _CODES}
            else:
                found[_MOMENTS][f"{key}:{name}"] = state[key]
    return found


class CheckpointWriter:
    """Writes `folder/step_<step>` atomically, keeps the newest two; in the `background` training goes on meanwhile.

    It is then a copy in the CPU's memory that is written. `sharded`: every process writes its own part.
    """

    def __init__(self, folder: Path, *, first: bool, background: bool, sharded: bool):
        self.folder, self.first, self.background, self.sharded = folder, first, background, sharded
        self._thread: Thread | None = None
        self._failed: list[BaseException] = []
        # of its own, as its messages must not meet the training's
        self._group = torch.distributed.new_group(backend="gloo") if sharded else None

    def save(self, step: int, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> None:
        """All processes call it. Waits for the one before; raises what that failed with."""
        self.wait()
        if not (self.first or self.sharded):
            return
        state = state_of(model, average, optimizer)
        if self.sharded:
            flat = {f"{file}:{name}": value for file, values in state.items() for name, value in values.items()}
            partial = self.folder / f"{_WRITING}-{step:08d}"
            if self.first:
                shutil.rmtree(partial, ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            torch.distributed.barrier(self._group)
            done: Any = dcp.async_save(flat, storage_writer=writer, process_group=self._group)
            self._run(lambda: self._publish(done, partial, step))
        else:
            if self.background:
                state = {
                    file: {name: value.to("cpu", copy=True) for name, value in values.items()}
                    for file, values in state.items()
                }
            self._run(lambda: self._write(state, step))

    def _run(self, work: Callable[[], None]) -> None:
        if not self.background:
            work()
            return

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._failed.append(error)

        # one that waits for a dead process must not keep this one alive
        self._thread = Thread(target=guarded, daemon=self.sharded)
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed:
            raise self._failed.pop()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """What breaks off the training waits for the checkpoint being written, not for ever: one may be dead.

        The thread that writes shards does not outlive the program, so without this an interrupted run lost it."""
        try:
            yield
        except BaseException:
            if self._thread is not None:
                self._thread.join(_PATIENCE)
            raise

    def _write(self, state: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(self.folder / f"step_{step:08d}", overwrite=True) as partial:
            for file, values in state.items():
                save_file(
                    {name: value.contiguous() for name, value in values.items()}, partial / f"{file}.safetensors"
                )
            (partial / "state.json").write_text(json.dumps({"step": step}))
        self._forget()

    def _publish(self, done: Any, partial: Path, step: int) -> None:
        path = self.folder / f"step_{step:08d}"
        try:
            done.result()  # of the first process: all have written, or have failed to
        except BaseException as error:  # torch's is no Exception
            if self.first:
                shutil.rmtree(partial, ignore_errors=True)
            if (number := number_of(error)) is None:
                raise
            raise OSError(number, os.strerror(number), str(path)) from None
        if self.first:
            (partial / "state.json").write_text(json.dumps({"step": step}))
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            self._forget()

    def _forget(self) -> None:
        for old in sorted(self.folder.glob("step_*"))[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if any."""
    return max(folder.glob("step_*"), default=None)


def load_checkpoint(path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Restores everything in place and returns the step; raises PocketfusionError if a file is damaged."""
    try:
        step = json.loads((path / "state.json").read_text())["step"]
        if all((path / f"{file}.safetensors").is_file() for file in _WHOLE):
            found = {file: load_file(path / f"{file}.safetensors") for file in _WHOLE}
        else:
            found = _read_shards(path, model, average)
        _restore(found, model, average, optimizer)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
        raise PocketfusionError(
            f"the checkpoint {path} is damaged ({error.__class__.__name__}): delete it to resume from the one before"
        ) from None
    return step


def _read_shards(path: Path, model: nn.Module, average: Average) -> dict[str, dict[str, torch.Tensor]]:
    """What FSDP's processes wrote, whole or in shards as `model` is."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    kinds = {name: p for name, p, _ in _named(model, average)}
    wanted: dict[str, torch.Tensor] = {}
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key, entry in entries.items():
        parameter = kinds.get(key.rsplit(":", 1)[1])
        if parameter is not None and tuple(entry.size) == tuple(parameter.shape):
            wanted[key] = torch.zeros_like(parameter.detach())
        else:  # a step, or what is no parameter
            wanted[key] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone is meant
        dcp.load(wanted, storage_reader=reader, no_dist=not any(isinstance(v, DTensor) for v in wanted.values()))
    found: dict[str, dict[str, torch.Tensor]] = {file: {} for file in _WHOLE}
    for key, value in wanted.items():
        file, name = key.split(":", 1)
        found[file][name] = value
    return found


@torch.no_grad()
def _restore(
    found: dict[str, dict[str, torch.Tensor]], model: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    fused = optimizer.defaults.get("fused")
    buffers = dict(model.named_buffers())
    for name, value in found["model"].items():
        if name in buffers:
            buffers[name].copy_(value)
    for name, parameter, own in _named(model, average):
        parameter.copy_(_placed(found["model"][name], parameter))
        one = _placed(found["ema"][name], parameter)
        own.copy_(one.to_local() if isinstance(one, DTensor) else one)
        state: dict[str, torch.Tensor] = {}
        for key in _STATE:
            if f"{key}:{name}" in found[_MOMENTS]:
                value = found[_MOMENTS][f"{key}:{name}"]
                # fused AdamW keeps its step beside the parameters
                device = parameter.device if fused or key != "step" else "cpu"
                state[key] = value.to(device) if key == "step" else _placed(value, parameter)
            elif f"{key}.codes:{name}" in found[_MOMENTS]:
                state[key] = optimizer._new_buffer(parameter, key == "exp_avg")  # type: ignore[attr-defined]
                for part in _CODES:
                    getattr(state[key], part).copy_(found[_MOMENTS][f"{key}.{part}:{name}"])
        if state:
            optimizer.state[parameter] = state


def _placed(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` where `parameter` is, in a copy, and sharded as it is."""
    if isinstance(value, DTensor):
        return value
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter this process holds, sharing its memory: all of it, or its shard under FSDP2."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def update_ema(average: list[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float, step: int) -> None:
    """Exponential moving average with warm-up: decay is at most (1 + step) / (10 + step)."""
    torch._foreach_lerp_(average, list(parameters), 1 - min(decay, (1 + step) / (10 + step)))


class Average:
    """One average a parameter, of this process's part of it; with `on_cpu` in the CPU's memory, for any device."""

    def __init__(self, parameters: Iterable[nn.Parameter], on_cpu: bool = False):
        self.parameters, self.on_cpu = list(parameters), on_cpu
        self.values = [own_part(p).to("cpu" if on_cpu else p.device, copy=True) for p in self.parameters]

    def update(self, decay: float, step: int) -> None:
        """`update_ema` with the weights of now; those on a GPU come to a CPU's average one by one."""
        live = [own_part(p) for p in self.parameters]
        if not self.on_cpu:
            update_ema(self.values, live, decay, step)
            return
        for value, now in zip(self.values, live, strict=True):
            update_ema([value], [now.cpu()], decay, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the parameters hold the average, and the average the weights: nothing is held twice."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            part = own_part(parameter)
            kept = part.clone()
            part.copy_(value)
            value.copy_(kept)

    @torch.no_grad()
    def give(self) -> None:
        """The parameters become the average."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            own_part(parameter).copy_(value)
