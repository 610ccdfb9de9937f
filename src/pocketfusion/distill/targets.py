"""Teacher targets, kept on disk: a step's targets depend on its seed and number alone, so runs can share them."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketfusion.artefact import atomic_file
from pocketfusion.train.batch import Batch


class TargetCache:
    """Tensors by training step, in a folder named by the hash of all they depend on; fp32 `.npy` files.

    Runs with the same teacher, data, seed, grid and guidance draws (another student, or another γ) find each other's.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = folder / f"targets-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: Batch, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for this part of this step, on the CPU; read if an earlier run has written it."""
        file = self.folder / f"{batch.step:07d}-{batch.start}-{len(batch.indices)}of{batch.total}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file, allow_pickle=False))
        made = make()
        with atomic_file(file) as partial:
            np.save(partial, made.cpu().numpy())
        return made
