"""What a device is compared with before it is trusted: a UNet's step and a decoding of fixed noise, in the bundle.

A GPU's faults raise no exception. The browser's engine runs both networks on the inputs below at start-up and compares
(`web/src/engine/selfcheck.ts` makes the same inputs); the results are LiteRT's on the CPU, in floating point as a GPU
computes. The text encoder has its empty prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketfusion.mobile.measure import Run
from pocketfusion.runtime.denoise import NoiseStream, guidance_embedding, timestep_embedding
from pocketfusion.runtime.specs import SchedulerSpec, TensorSpec, TimeEmbedding

Array = npt.NDArray[np.float32]


def known_result(
    run: Run,
    inputs: Sequence[TensorSpec],
    output: str,
    scheduler: SchedulerSpec,
    guidance_scale: float,
    embedding: TimeEmbedding | None,
) -> Array:
    """What the file that `run` runs, a UNet's or a decoder's with these `inputs`, gives for the known ones.

    float32, in a row. Of a decoder's image the means over each latent's pixels.
    """
    given = known_inputs(inputs, scheduler, guidance_scale, embedding)
    values = run([given], output)[0]
    if output == "image":
        _, height, width, channels = values.shape
        _, rows, columns, _ = inputs[0].shape
        blocks = values.reshape(rows, height // rows, columns, width // columns, channels)
        values = blocks.mean((1, 3), dtype=np.float64)
    return values.astype(np.float32).ravel()


def known_inputs(
    inputs: Sequence[TensorSpec], scheduler: SchedulerSpec, guidance_scale: float, embedding: TimeEmbedding | None
) -> dict[str, Array]:
    """Noise of seed 0 (the text's of seed 1), equal in every row; the middle timestep; the default guidance scale."""
    timestep = float(scheduler.num_train_timesteps // 2)
    known: dict[str, Array] = {}
    for tensor in inputs:
        row = tensor.shape[1:]
        if tensor.name == "timestep":
            values = np.array([timestep], np.float32)
        elif tensor.name == "timestep_embedding" and embedding is not None:
            values = timestep_embedding(timestep, embedding)
        elif tensor.name == "timestep_cond":
            values = guidance_embedding(guidance_scale, row[0])
        elif tensor.name == "step_coefficients":
            values = np.array([[1, 0, 1]], np.float32)  # the prediction itself
        else:
            stream = NoiseStream(int(tensor.name == "encoder_hidden_states"), int(np.prod(row)), 1, 1)
            values = stream.draw().reshape(1, *row)
        known[tensor.name] = np.repeat(values, tensor.shape[0] // len(values), axis=0)
    return known
