"""The pinned packages that hold the drawings and their names, fetched by npm and checked against the lock file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote


@dataclass(frozen=True)
class Style:
    """One drawing style: its npm package, the licence stated inside it, and the family of look-alike styles."""

    name: str
    package: str
    family: str
    spdx: str
    attribution: str

    @property
    def words(self) -> str:
        """The style's name as captions write it."""
        return self.name.replace("-", " ")

    @property
    def licence_note(self) -> LicenceNote:
        """The licence of its drawings."""
        return LicenceNote(f"Drawings {self.name}", self.spdx, self.attribution)


_ICONIFY = "@iconify-json"
STYLES = {
    style.name: style
    for style in (
        Style("noto", f"{_ICONIFY}/noto", "noto", "Apache-2.0", "Noto Emoji, Google Inc"),
        Style("noto-v1", f"{_ICONIFY}/noto-v1", "noto-v1", "Apache-2.0", "Noto Emoji (2016), Google Inc"),
        Style("twemoji", f"{_ICONIFY}/twemoji", "twemoji", "CC-BY-4.0", "Twemoji, Twitter, Inc and contributors"),
        Style("fluent-flat", f"{_ICONIFY}/fluent-emoji-flat", "fluent", "MIT", "Fluent Emoji, Microsoft"),
        Style(
            "fluent-contrast", f"{_ICONIFY}/fluent-emoji-high-contrast", "contrast", "MIT", "Fluent Emoji, Microsoft"
        ),
        Style("fluent-3d", "@lobehub/fluent-emoji-3d", "fluent", "MIT", "Fluent Emoji, Microsoft, packed by LobeHub"),
        Style("fxemoji", f"{_ICONIFY}/fxemoji", "fxemoji", "Apache-2.0", "FxEmojis, Mozilla"),
        Style("emojione", f"{_ICONIFY}/emojione", "emojione", "CC-BY-4.0", "EmojiOne 2 (EmojiTwo), emojione.com"),
        Style("openmoji", f"{_ICONIFY}/openmoji", "openmoji", "CC-BY-SA-4.0", "OpenMoji, openmoji.org"),
        Style("emojione-v1", f"{_ICONIFY}/emojione-v1", "emojione-v1", "CC-BY-SA-4.0", "EmojiOne 1, emojione.com"),
    )
}
#: No share-alike terms among these (facts/data.md 1.5); the others are by option.
DEFAULT_STYLES = tuple(name for name, style in STYLES.items() if not style.spdx.endswith("-SA-4.0"))

LOCK_FILES = ("package.json", "package-lock.json")


def lock_hash() -> str:
    """SHA-256 of the lock files: it names the exact bytes of every package."""
    folder = resources.files(__package__)
    return sha256(b"".join((folder / name).read_bytes() for name in LOCK_FILES)).hexdigest()


def default_cache() -> Path:
    """Where fetched packages are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfusion"


def fetch_packages(cache: Path | None = None) -> Path:
    """Installs the locked packages once and returns their `node_modules` folder.

    npm checks every tarball against the lock file's SHA-512; install scripts are never run.
    Raises PocketfusionError if npm is missing or the registry cannot be reached.
    """
    home = (cache or default_cache()) / f"emoji-packages-{lock_hash()[:12]}"
    if home.is_dir():
        return home / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        raise PocketfusionError("npm was not found: install Node.js, which the emoji packages are fetched with")
    home.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(home, overwrite=True) as partial:  # another process may be as far
        for name in LOCK_FILES:
            (partial / name).write_bytes((resources.files(__package__) / name).read_bytes())
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps", "--loglevel=error"]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip() and "config" not in line]
            reason = lines[0] if lines else f"exit code {done.returncode}"
            raise PocketfusionError(
                f"npm could not fetch the emoji packages ({reason.strip()}): "
                "check that the npm registry can be reached and run the command again"
            )
    return home / "node_modules"


def read_json(path: Path) -> dict:
    """Parses a JSON file of a package; raises PocketfusionError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PocketfusionError(
            f"{path} is missing or damaged ({error.__class__.__name__}): delete {path.parents[2]} and run again"
        ) from None
