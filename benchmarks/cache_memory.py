"""Peak memory and speed of filling a cache of latents, against the number of pictures.

    python benchmarks/cache_memory.py [--pictures 1000 10000 50000] [--size 64] [--shard 1000] [--json FILE]

Draws webdataset shards of synthetic JPEGs, and fills a cache of each set with a tiny random AutoencoderKL of factor 8
in a process of its own, the reading of `data cache`. Prints peak RSS (`ru_maxrss`), pictures a second and the sizes;
for comparison, what all pictures as pixels and as latents would be. The cache is then opened and a batch of 256 read
from it at random places, for the memory of a trainer.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw_shards(folder: Path, pictures: int, shard: int, size: int) -> int:
    """JPEGs of `size` by `size` in numbered shards with captions; their bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    field = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).resize((4 * size, 4 * size))
    total = 0
    for first in range(0, pictures, shard):
        with tarfile.open(folder / f"{first // shard:05d}.tar", "w") as tar:
            for number in range(first, min(first + shard, pictures)):
                left, top = rng.integers(0, 3 * size, 2)
                stream = io.BytesIO()
                field.crop((left, top, left + size, top + size)).save(stream, "JPEG", quality=90)
                for suffix, data in (("jpg", stream.getvalue()), ("txt", f"synthetic picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    total += len(data)
    return total


def _peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fill_cache(data: Path, out: Path, size: int, answer: Any) -> None:
    """In a process of its own: fills, finishes, opens and reads a cache; sends the figures."""
    import torch
    from diffusers import AutoencoderKL

    from pocketfusion.data.latents.filling import fill
    from pocketfusion.data.latents.finishing import finish
    from pocketfusion.data.latents.layout import Plan
    from pocketfusion.data.latents.reading import open_cache
    from pocketfusion.data.rows import LeftOut
    from pocketfusion.data.sources import open_source
    from pocketfusion.train.cache import encoding_of, latent_encoder

    torch.manual_seed(0)
    blocks = 4
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=4,
    )
    encode = latent_encoder(vae, torch.device("cpu"))
    encode(np.zeros((32, size, size, 3), np.uint8), False)  # what the libraries take at their first call
    before = _peak()
    source = open_source(data, LeftOut(False))
    plan = Plan.of(source, encoding_of(vae, "0" * 64, size), False, str(data))
    began, busy = time.perf_counter(), time.process_time()
    count = fill(out, source, plan, encode)
    filled, seconds, busy = _peak(), time.perf_counter() - began, time.process_time() - busy
    finish(out)
    finished = _peak()
    began = time.perf_counter()
    cache = open_cache(out)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    cache.latents(np.random.default_rng(0).permutation(count)[:256])
    answer.send(
        {
            "pictures": count,
            "peak_before_mb": before,
            "peak_filled_mb": filled,
            "peak_finished_mb": finished,
            "peak_read_mb": _peak(),
            "pictures_a_second": count / seconds,
            "processor_ms_a_picture": 1000 * busy / count,
            "open_s": opened,
            "batch_256_ms": 1000 * (time.perf_counter() - began),
            "cache_mb": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
        }
    )


def main() -> None:
    """Measures each number of pictures in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 10_000, 50_000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--shard", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for pictures in given.pictures:
        folder = Path(tempfile.mkdtemp(prefix="cache-memory-"))
        try:
            draw_shards(folder / "data", pictures, given.shard, given.size)
            here, there = multiprocessing.Pipe()
            arguments = (folder / "data", folder / "cache", given.size, there)
            process = multiprocessing.get_context("spawn").Process(target=fill_cache, args=arguments)
            process.start()
            row = here.recv()
            process.join()
        finally:
            shutil.rmtree(folder)
        row["pixels_mb"] = pictures * 3 * given.size**2 / 1e6
        rows.append(row)
        print(
            f"{pictures:>7,} pictures: peak {row['peak_before_mb']:.0f} MB before, "
            f"{row['peak_filled_mb']:.0f} filled, {row['peak_finished_mb']:.0f} finished, "
            f"{row['peak_read_mb']:.0f} read; "
            f"{row['pictures_a_second']:.0f} pictures/s, {row['processor_ms_a_picture']:.1f} ms CPU each; "
            f"cache {row['cache_mb']:.0f} MB "
            f"(pixels {row['pixels_mb']:.0f} MB)",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
