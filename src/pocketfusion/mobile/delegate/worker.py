"""The oracle's child process: compiles and runs `.tflite` files, one job per line of standard input.

A process of its own because native code reports through file descriptor 2, hangs and crashes, and because the choice
of a Vulkan driver is read from the environment when the process starts. One process serves many jobs.

A job is a JSON object: `file`; `device` "gpu" or "cpu"; `precision` "fp32" or "fp16"; `log`, where native messages
go; `inputs` and `outputs`, `.npz` files of arrays by name (absent: compile only); `signature`; `threads` (CPU). The
answer: `{"compiled": true, "seconds": …}` or `{"error": …}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever native code prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 2)
        os.dup2(log, 1)
        os.close(log)
        start = time.perf_counter()
        try:
            answer = _gpu(job) if job["device"] == "gpu" else _cpu(job)
        except Exception as error:  # LiteRT raises RuntimeError, ValueError and others; all are verdicts
            answer = {"error": str(error).strip() or type(error).__name__}
        answers.write(json.dumps({**answer, "seconds": time.perf_counter() - start}) + "\n")
        answers.flush()


def _gpu(job: dict[str, Any]) -> dict[str, Any]:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.gpu_options import GpuOptions
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import Options

    options = GpuOptions(enforce_f32=job["precision"] == "fp32")
    model = CompiledModel.from_file(
        job["file"], options=Options(hardware_accelerators=HardwareAccelerator.GPU, gpu_options=options)
    )
    if not model.is_fully_accelerated():
        return {"error": "the delegate left operations to the CPU"}
    if "inputs" not in job:
        return {"compiled": True}
    index = model.get_signature_index(job["signature"])
    arrays = np.load(job["inputs"])
    inputs, outputs = model.create_input_buffers(index), model.create_output_buffers(index)
    names = model.get_signature_list()[job["signature"]]
    for name, buffer in zip(names["inputs"], inputs, strict=True):
        buffer.write(np.ascontiguousarray(arrays[name]))
    model.run_by_index(index, inputs, outputs)
    details = model.get_output_tensor_details(job["signature"])
    results = {}
    for name, buffer in zip(names["outputs"], outputs, strict=True):
        shape, dtype = details[name]["shape"], np.dtype(details[name]["dtype"])
        results[name] = buffer.read(int(np.prod(shape)), dtype).reshape(shape)
    np.savez(Path(job["outputs"]), **results)
    return {"compiled": True}


def _cpu(job: dict[str, Any]) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(job["file"], num_threads=job["threads"])
    arrays = np.load(job["inputs"])
    results = interpreter.get_signature_runner(job["signature"])(**arrays)
    np.savez(Path(job["outputs"]), **results)
    return {"compiled": True}


if __name__ == "__main__":
    main()
