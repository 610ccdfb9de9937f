"""webdataset shards behind a URL, fetched one at a time by fsspec; a local name never gets there."""

from __future__ import annotations

import errno
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pocketfusion.data.found import tell_gaps
from pocketfusion.data.rows import LeftOut, Part, Sample
from pocketfusion.data.shards import shard_samples
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote
from pocketfusion.temporaries import scratch_folder

SCHEMES = ("s3", "gs", "hf", "http", "https")
_WAITS = (1.0, 2.0, 4.0)  #: seconds before a URL is tried again
_MOST = 100_000  #: shards that a pattern may name
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  #: of the scratch folder: no matter of the URL
_SILENCE = 60  #: seconds that a server may say nothing

Answer = TypeVar("Answer")


def is_url(text: str) -> bool:
    """Whether it names a scheme; raises PocketfusionError if that is none of `SCHEMES`."""
    if "://" not in text:
        return False
    if (scheme := text.partition("://")[0]) not in SCHEMES:
        raise PocketfusionError(
            f"{shown(text)} is of a kind that is not read ({scheme}): give a URL of {', '.join(SCHEMES)}, or a path"
        )
    return True


def shown(url: str) -> str:
    """A URL without what may be secret: user, password, query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteSource:
    """The shards that a URL names: one ending in .tar, a pattern as {00000..00099}.tar, or all of a folder."""

    fingerprint: str | None = None
    licences: Sequence[LicenceNote] = ()
    notes: Sequence[str] = ()

    def __init__(self, url: str, left_out: LeftOut, scratch: Path):
        """`scratch`: where a shard lies while it is read. Raises PocketfusionError if there are none."""
        self.scratch = scratch
        self.files = _filesystem(url)
        self.urls = _expanded(url) if urlsplit(url).path.endswith(".tar") else self._listed(url)
        if not self.urls:
            raise PocketfusionError(f"{shown(url)} lists no .tar shards: name them, as URL/{{00000..00099}}.tar")
        self.names = [PurePosixPath(urlsplit(one).path).name for one in self.urls]
        self.name = PurePosixPath(urlsplit(url).path).name or urlsplit(url).netloc.rpartition("@")[2]
        tell_gaps(self.names, shown(url), left_out)
        self.left_out = list(left_out.found)
        self.parts = [Part(f"shard-{number:05d}", name) for number, name in enumerate(self.names)]

    def _listed(self, url: str) -> list[str]:
        found = _tried(url, lambda: self.files.ls(url, detail=False))
        named = [name if "://" in name else f"{urlsplit(url).scheme}://{name}" for name in map(str, found)]
        below = url.partition("?")[0].rstrip("/") + "/"
        return sorted(name for name in named if name.startswith(below) and urlsplit(name).path.endswith(".tar"))

    @contextmanager
    def reading(self, number: int, left_out: LeftOut) -> Iterator[Iterator[Sample]]:
        """See `Source`; the shard is fetched as a whole before, and gone after."""
        url = self.urls[number]
        self.scratch.mkdir(parents=True, exist_ok=True)
        with scratch_folder("shard", self.scratch) as folder:
            file = folder / "shard.tar"
            _tried(url, lambda: self.files.get_file(url, str(file)))
            yield shard_samples(file, PurePosixPath(self.names[number]), len(self.urls), left_out, shown(url))


def _filesystem(url: str) -> Any:
    """fsspec's of the URL's scheme; raises PocketfusionError if what it needs is not installed."""
    import fsspec

    scheme, options = urlsplit(url).scheme, {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            limit = aiohttp.ClientTimeout(total=None, connect=20, sock_read=_SILENCE)
            options = {"client_kwargs": {"timeout": limit}}
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise PocketfusionError(
            f"{shown(url)} needs a package that is missing ({str(error).splitlines()[0]}): "
            "pip install '.[remote]' in pocketfusion's clone"
        ) from None


def _expanded(url: str) -> list[str]:
    """`{A..B}` as the numbers from A to B, as wide as A; raises PocketfusionError for too many."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", url)
    choices: list[list[str]] = [parts[:1]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        count = int(last) - int(first) + 1
        if not 0 < count <= _MOST:
            raise PocketfusionError(
                f"{shown(url)} names {count:,} shards: give {{A..B}} with A below B, up to {_MOST:,}"
            )
        choices += [[f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)], [text]]
    return ["".join(chosen) for chosen in itertools.islice(itertools.product(*choices), _MOST)]


def _tried(url: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask` answers, tried again a few times; raises PocketfusionError naming the URL.

    What is not there or not allowed is not asked for again.
    """
    reason = ""
    for wait in (*_WAITS, None):
        try:
            return ask()
        except FileNotFoundError:
            raise PocketfusionError(f"{shown(url)} is not there: check the URL") from None
        except PermissionError:
            raise PocketfusionError(f"{shown(url)} may not be read: give this machine access to it") from None
        except Exception as error:  # each file system has its own kinds, few of them OSErrors
            status = getattr(error, "status", None)
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}".replace(url, shown(url))
            if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
                raise PocketfusionError(f"{shown(url)} may not be read ({status}): check the URL and access") from None
            if getattr(error, "errno", None) in _DISK:
                raise
            if wait is not None:
                time.sleep(wait)
    raise PocketfusionError(
        f"{shown(url)} cannot be reached after {len(_WAITS) + 1} tries ({reason}): check the connection and run again"
    )
