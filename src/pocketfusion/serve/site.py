"""What a site holds: the built page, the list of bundles and the bundles' files, by the paths of their addresses.

Only what is listed here is ever served. The page lies in the package as `npm run build` leaves it: files that compress
well are kept as `NAME.gz` alone. `web-build` writes the same as files for any host.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mimetypes
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import MANIFEST, Bundle

#: The list of the site's bundles, which the page reads first.
BUNDLES = "bundles.json"
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".tflite": "application/octet-stream",
    ".txt": "text/plain; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
_COMPRESSED = 4_000_000  #: bytes: larger files of a bundle are weights, which hardly compress


@dataclass(frozen=True)
class Entry:
    """One address, by where its content is: in a file as it is, in memory, or in memory as gzip made it."""

    name: str  #: path below the site's root
    sha256: str  #: of the content
    file: Path | None = None
    state: tuple[int, ...] = ()  #: of the file, when it was listed (`state_of`)
    content: bytes | None = None
    gzipped: bytes | None = None

    @property
    def media_type(self) -> str:
        """As a browser must hear it: it runs no module and compiles no stream of another type."""
        suffix = Path(self.name).suffix.lower()
        return _TYPES.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")

    def read(self) -> bytes:
        """The whole content."""
        if self.file is not None:
            return self.file.read_bytes()
        return gzip.decompress(self.gzipped) if self.gzipped is not None else self.content or b""


def state_of(about: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, stat.S_IFMT(about.st_mode)


def page_folder() -> Path:
    """The built page inside the package; raises PocketfusionError where it was never built."""
    folder = Path(__file__).parent / "page"
    if not (folder / "index.html.gz").is_file():
        raise PocketfusionError(
            "the page is not built in this installation: run `make page` in a checkout, which needs npm, "
            "or install a released wheel, which has it"
        )
    return folder


def page_entries(folder: Path) -> list[Entry]:
    """The built page's files; links and names that begin with a dot are left out."""
    entries = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_symlink() or not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        name, content = inside.as_posix(), file.read_bytes()
        if file.suffix == ".gz":
            entries.append(Entry(name[: -len(".gz")], _sha256(gzip.decompress(content)), gzipped=content))
        else:
            entries.append(Entry(name, _sha256(content), content=content))
    return entries


def identity(bundle: Bundle) -> str:
    """The bundle's folder in a site: its name as an address can have it, and the beginning of its hash."""
    name = re.sub(r"[^a-z0-9]+", "-", bundle.manifest.name.lower()).strip("-")[:40]
    return f"{name or 'bundle'}-{bundle.hash[:8]}"


def model_of(bundle: Bundle) -> str | None:
    """What names the model that the bundle is a form of: the hash of its model folder and the pictures' size. None for
    bundles with adapters, learnt tokens or another decoder merged in, and for those that do not say."""
    provenance, image = bundle.manifest.provenance, bundle.manifest.image
    folder = provenance.get("model_folder")
    if not isinstance(folder, str) or not re.fullmatch("[0-9a-f]{64}", folder):
        return None
    if any(key in provenance for key in ("lora", "embeddings", "vae")):
        return None
    return f"{folder}-{image.height}x{image.width}"


def bundle_entries(bundles: Iterable[Bundle]) -> list[Entry]:
    """`bundles.json` and every file that the bundles' manifests name, each bundle in a folder of its own.

    Bundles that share `model` (see `model_of`) are one model for different targets: the page takes the one that its
    device runs best.
    """
    listed: dict[str, dict[str, Any]] = {}
    entries: list[Entry] = []
    for bundle in bundles:
        manifest, folder = bundle.manifest, identity(bundle)
        if folder in listed:
            continue
        files = {MANIFEST: (bundle.path / MANIFEST, bundle.hash)}
        files |= {each.path: (bundle.file(key), each.sha256) for key, each in manifest.files.items()}
        entries += [_file_entry(f"bundles/{folder}/{name}", path, sha) for name, (path, sha) in files.items()]
        listed[folder] = {
            "path": f"bundles/{folder}/",
            "name": manifest.name,
            "target": manifest.target,
            "model": model_of(bundle),
            "sha256": bundle.hash,
            "bytes": sum(each.size for each in manifest.files.values()),
        }
    content = json.dumps({"bundles": list(listed.values())}, indent=1, ensure_ascii=False).encode()
    return [Entry(BUNDLES, _sha256(content), content=content), *entries]


def _file_entry(name: str, path: Path, sha256: str) -> Entry:
    real = path.resolve()
    about = real.stat()
    if about.st_size <= _COMPRESSED:
        content = real.read_bytes()
        gzipped = gzip.compress(content, 9, mtime=0)
        if len(gzipped) < 0.8 * len(content):
            return Entry(name, sha256, gzipped=gzipped)
    return Entry(name, sha256, file=real, state=state_of(about))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class SiteReport:
    """A site that was written: number of files, bytes of all, and of the page alone as a first visit fetches it."""

    out: str
    files: int
    size: int


def write_site(entries: Iterable[Entry], out: Path, *, overwrite: bool = False) -> SiteReport:
    """Writes every entry at its path below `out`, and `NAME.gz` beside those that gzip makes smaller, for hosts that
    send such files by themselves; PocketfusionError if `out` exists and `overwrite` is false, or cannot be written."""
    files = size = 0
    with atomic_folder(out, overwrite=overwrite) as partial:
        for entry in entries:
            target = partial / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content := entry.read())
            files, size = files + 1, size + len(content)
            if entry.gzipped is not None:
                target.with_name(target.name + ".gz").write_bytes(entry.gzipped)
    return SiteReport(str(out), files, size)
