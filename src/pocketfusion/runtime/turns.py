"""One call at a time: networks hold the inputs and results of one, and a second would silently mix them up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from pocketfusion.errors import PocketfusionError


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
