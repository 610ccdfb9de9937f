"""Which of a bundle's networks are in memory, and when: the modes of a pipeline.

`pipelined` is the execution of *Squeezing Large-Scale Diffusion Models for Mobile* (arXiv 2307.01193): the UNet stays
from start-up on, the text encoder is there for a prompt only, and the decoder is loaded by a thread while the UNet
still denoises, so that its loading costs no time; never are all three in memory. The others are its neighbours.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar, get_args

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import NETWORKS
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.trace import Trace

#: `resident`: all three networks, always. `pipelined`: the UNet always, the others in turns. `sequential`: one at a
#: time. In order of speed.
Mode = Literal["resident", "pipelined", "sequential"]
MODES: tuple[Mode, ...] = get_args(Mode)
_KEPT: dict[Mode, tuple[str, ...]] = {"resident": NETWORKS, "pipelined": ("unet",), "sequential": ()}


def check_mode(mode: str) -> None:
    """Raises PocketfusionError for a mode that is none of `MODES`."""
    if mode not in MODES:
        raise PocketfusionError(f"the mode is {mode!r}: choose {', '.join(MODES[:-1])} or {MODES[-1]}")


class Residency:
    """Loads, lends and frees the networks of a pipeline by its mode. `load(name)` makes a network.

    Not thread-safe, but for the loading thread of its own.
    """

    def __init__(self, mode: Mode, load: Callable[[str], Network], trace: Trace) -> None:
        """Loads what the mode keeps."""
        self.mode, self._load, self._trace = mode, load, trace
        self._networks: dict[str, Network] = {}
        self._users: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False
        for name in _KEPT[mode]:
            self._load_now(name)

    @contextmanager
    def use(self, name: str) -> Iterator[Network]:
        """Lends a network for a block, which may be nested: it is loaded if need be, and freed after the outermost
        block unless the mode keeps it.

        Raises PocketfusionError if it cannot be loaded, and for a second network in `sequential` mode.
        """
        if self._closed:
            raise PocketfusionError("this pipeline is closed: load another to draw with")
        others = [other for other, users in self._users.items() if users and other != name]
        if self.mode == "sequential" and others:
            raise PocketfusionError(
                f"the mode is sequential and the {_words(others[0])} is in memory, so the {_words(name)} cannot be: "
                "choose another mode, or do without previews"
            )
        self._join()
        if name not in self._networks:
            self._load_now(name)
        self._users[name] += 1
        try:
            yield self._networks[name]
        finally:
            self._users[name] -= 1
            self._free(name)

    def prefetch(self, name: str) -> None:
        """Begins to load a network in a thread, in `pipelined` mode; `use` waits for it."""
        if self.mode == "pipelined" and name not in self._networks:
            self._join()
            self._thread = threading.Thread(target=self._fetch, args=(name,), name=f"load {name}")
            self._thread.start()

    def check(self) -> None:
        """Raises what a loading thread has failed with, if it has, as PocketfusionError."""
        failure, self._failure = self._failure, None
        if isinstance(failure, PocketfusionError):
            raise failure
        if failure is not None:
            raise PocketfusionError(
                f"the decoder could not be loaded while the UNet ran ({type(failure).__name__}: {failure}): "
                "choose --mode sequential if memory is short"
            ) from failure

    def settle(self) -> None:
        """Waits for the loading thread and frees what nobody uses and the mode does not keep."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._failure = None
        for name in list(self._networks):
            self._free(name)

    def close(self) -> None:
        """Frees every network; none is lent from now on."""
        self._closed = True
        self.settle()
        for name in list(self._networks):
            self._close(name)

    def _join(self) -> None:
        if self._thread is not None:
            with self._trace.span("wait", "decoder"):
                self._thread.join()
            self._thread = None
        self.check()

    def _fetch(self, name: str) -> None:
        try:
            self._load_now(name)
        except BaseException as error:  # told in the main thread, by check()
            self._failure = error

    def _load_now(self, name: str) -> None:
        with self._trace.span("load", name):
            self._networks[name] = self._load(name)

    def _free(self, name: str) -> None:
        if not self._users[name] and name not in _KEPT[self.mode]:
            self._close(name)

    def _close(self, name: str) -> None:
        with self._trace.span("free", name):
            self._networks.pop(name).close()


def _words(name: str) -> str:
    return {"unet": "UNet"}.get(name, name.replace("_", " "))


class Turns:
    """Whose turn it is: one thread's, which may make a `whole` call and others within it, but no second whole one."""

    def __init__(self) -> None:
        self.lock, self.in_whole = threading.RLock(), False


class HasTurns(Protocol):
    turns: Turns


Self = TypeVar("Self", bound=HasTurns)
P = ParamSpec("P")
R = TypeVar("R")
_Method = Callable[Concatenate[Self, P], R]


def in_turn(*, whole: bool) -> Callable[[_Method[Self, P, R]], _Method[Self, P, R]]:
    """Decorates a method that no other thread may call meanwhile; and if `whole`, nor may this one from a callback.

    It never waits, as the other thread may be waiting for this one, but raises PocketfusionError.
    """

    def decorate(method: _Method[Self, P, R]) -> _Method[Self, P, R]:
        @wraps(method)
        def guarded(self: Self, *args: P.args, **kwargs: P.kwargs) -> R:
            turns = self.turns
            if not turns.lock.acquire(blocking=False):
                raise PocketfusionError(
                    "this pipeline is at work in another thread: wait for its end, or load a pipeline for each thread"
                )
            try:
                if whole and turns.in_whole:
                    raise PocketfusionError(
                        "this pipeline is drawing, and a callback can neither draw with it nor close it: "
                        "load a second pipeline"
                    )
                before, turns.in_whole = turns.in_whole, turns.in_whole or whole
                try:
                    return method(self, *args, **kwargs)
                finally:
                    turns.in_whole = before
            finally:
                turns.lock.release()

        return guarded

    return decorate
