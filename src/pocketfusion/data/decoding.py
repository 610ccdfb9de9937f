"""Pictures decoded by several threads, in order and a few at a time: Pillow lets other threads run meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from pocketfusion.data.buckets import fit
from pocketfusion.data.pictures import Stored
from pocketfusion.data.rows import LeftOut, Sample
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.networks import available_cores

Made = TypeVar("Made")


def default_workers() -> int:
    """Threads that decode: one a core, eight at most."""
    return min(8, available_cores())


def decoded(
    samples: Iterable[Sample], make: Callable[[Image.Image], Made], left_out: LeftOut, workers: int | None = None
) -> Iterator[tuple[Sample, Made]]:
    """Each sample with what `make` gives of its picture, in order; so many at a time that no thread waits.

    Raises PocketfusionError naming a picture that cannot be decoded, unless `left_out` takes it.
    """
    workers = workers or default_workers()
    waiting: deque[tuple[Sample, Future[Made]]] = deque()

    def first() -> list[tuple[Sample, Made]]:
        sample, future = waiting.popleft()
        with left_out.or_raise():
            return [(sample, future.result())]
        return []

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        ended: PocketfusionError | None = None
        try:
            try:
                for sample in samples:
                    waiting.append((sample, pool.submit(lambda stored: make(stored.open()), sample.picture)))
                    if len(waiting) > 2 * workers:
                        yield from first()
            except PocketfusionError as error:  # what was read before it comes before it, bad or not
                ended = error
            while waiting:
                yield from first()
            if ended is not None:
                raise ended
        finally:
            for _, future in waiting:
                future.cancel()


class LazyPictures:
    """Pictures on disk as an array uint8 [N, size, size, 3] that decodes what is asked for: `pictures[indices]`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, places: list[Stored], size: int):
        self.places, self.shape = places, (len(places), size, size, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: int | slice | np.ndarray | list[int]) -> np.ndarray:
        if isinstance(chosen, int | np.integer):
            return self._one(self.places[chosen])
        numbers = np.arange(len(self.places))[chosen]
        places = [self.places[i] for i in numbers.reshape(-1)]
        if len(places) < 3:
            found = [self._one(place) for place in places]
        else:
            with ThreadPoolExecutor(default_workers()) as pool:
                found = list(pool.map(self._one, places))
        return np.array(found, np.uint8).reshape(*numbers.shape, *self.shape[1:])

    def _one(self, place: Stored) -> np.ndarray:
        return fit(place.open(), *self.shape[1:3])
