"""Models of the Hugging Face Hub: fetched by huggingface_hub into its cache, the commit kept for the provenance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import COMPONENTS

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A folder or file in the Hub's cache, and what it is there."""

    path: Path
    repository: str
    revision: str  #: as asked for
    commit: str  #: what that was


def fetch(identifier: str, revision: str = "main") -> Fetched:
    """`OWNER/NAME`: the repository's model folder; `OWNER/NAME/FILE.safetensors`: one file of it.

    Without a network, what the cache has. Raises PocketfusionError if there is none, or it is not to be had.
    """
    words = identifier.split("/")
    if len(words) < 2 or not all(words):
        raise PocketfusionError(
            f"{identifier!a} is no model of the Hub: give OWNER/NAME, or OWNER/NAME/FILE.safetensors"
        )
    repository, file = "/".join(words[:2]), "/".join(words[2:])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of each of its retries is one sentence here
    try:
        path = Path(hf_hub_download(repository, file, revision=revision)) if file else _snapshot(repository, revision)
    except GatedRepoError:
        reason = "it asks for its terms to be accepted on its page, and for a login (hf auth login)"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!a}"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private"
    except LocalEntryNotFoundError:
        reason = "the Hub does not answer and the cache has no copy: check the network, or import a file that you have"
    except EntryNotFoundError:
        reason = f"it has no file {file!a}"
    except HFValidationError as error:
        reason = str(error).splitlines()[0][:200]
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    else:
        names = [name for name in path.parts if _COMMIT.fullmatch(name)]
        return Fetched(path, repository, revision, names[-1] if names else "unknown")
    finally:
        logging.set_verbosity(verbosity)
    raise PocketfusionError(f"{identifier} cannot be had from the Hub: {reason}")


def _snapshot(repository: str, revision: str) -> Path:
    """The files of a model folder; weights in half precision only where there are no others."""
    wanted = ["model_index.json", "README.md"]
    wanted += [f"{part}/{end}" for part in COMPONENTS for end in ("*.json", "*.txt", "*.safetensors")]
    skipped = ["*non_ema*", "*.fp16*"]
    path = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=skipped))
    if not any((path / "unet").glob("*.safetensors")):
        snapshot_download(repository, revision=path.name, allow_patterns=wanted, ignore_patterns=skipped[:1])
    return path
