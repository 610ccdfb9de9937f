"""A cache of latents: filled part by part, killed, shared, merged, damaged; read without the pictures.

The encoder here is arithmetic on pixels (`made_pictures.encode_means`), so that every record can be computed by hand.
"""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from made_pictures import encode_means, photo_shards, png, shard
from PIL import Image

from pocketfusion.data.buckets import PHONES, Bucket, choose_bucket, fit, make_buckets
from pocketfusion.data.latents import filling
from pocketfusion.data.latents.filling import fill
from pocketfusion.data.latents.finishing import finish, merge
from pocketfusion.data.latents.layout import Encoding, Plan
from pocketfusion.data.latents.reading import LatentCache, open_cache
from pocketfusion.data.rows import LeftOut
from pocketfusion.data.sources import PicturesSource, open_dataset, open_source, open_training_data
from pocketfusion.errors import PocketfusionError

SPAWN = multiprocessing.get_context("spawn")  # a fork copies other threads' locks
ENCODING = Encoding("a" * 64, 4, 8, 16, (Bucket(16, 16),), halved=True)


def begin(data: Path, encoding: Encoding = ENCODING, skip_bad: bool = False):
    source = open_source(data, LeftOut(skip_bad))
    return source, Plan.of(source, encoding, skip_bad, str(data))


def make(data: Path, out: Path, encoding: Encoding = ENCODING, skip_bad: bool = False, **how) -> LatentCache:
    source, plan = begin(data, encoding, skip_bad)
    fill(out, source, plan, encode_means, batch=4, **how)
    finish(out)
    return open_cache(out, verify=True)


def content(out: Path) -> dict[str, bytes]:
    """All of a cache but the times in it."""
    files = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if file.name in ("part.json", "cache.json"):
            values = json.loads(data)
            values = {k: v for k, v in values.items() if k not in ("seconds", "provenance", "parts")}
            data = json.dumps(values).encode()
        files[str(file.relative_to(out))] = data
    return files


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three shards of 7 photos, every third of which may be mirrored."""
    return photo_shards(tmp_path_factory.mktemp("shards"), 3, 7)


@pytest.fixture(scope="module")
def cache(shards, tmp_path_factory) -> LatentCache:
    return make(shards, tmp_path_factory.mktemp("cache") / "c")


def test_it_stands_for_its_pictures(shards, cache):
    """Rows, splits, name and fingerprint are those of the folder; latents are the encoder's of each picture."""
    data = open_dataset(shards, 16)
    assert list(cache.rows) == data.rows and len(cache) == 21
    assert (cache.name, cache.fingerprint, cache.size) == (data.name, data.fingerprint, 16)
    assert {k: v.tolist() for k, v in cache.splits.items()} == {k: v.tolist() for k, v in data.splits.items()}
    assert (cache.flips == data.flips).all() and 0 < cache.flips.sum() < 21
    order = np.array([20, 3, 3, 11, 0])
    wanted = encode_means(data.images[order], False)
    assert (cache.latents(order) == wanted).all() and cache.latents(order).shape == (5, 8, 2, 2)
    mirrored = np.array([True, True, False, True, True])
    turned = np.where(
        (mirrored & data.flips[order])[:, None, None, None], data.images[order][:, :, ::-1], data.images[order]
    )
    assert (cache.latents(order, mirrored) == encode_means(turned, False)).all()
    assert (cache.latents(order, mirrored, halved=True) == encode_means(turned, True)).all()
    assert cache.latents(order, halved=True).shape == (5, 8, 1, 1)


def test_it_is_read_without_the_pictures(shards, cache, tmp_path):
    copy = shutil.copytree(cache.path, tmp_path / "copy")
    data = open_training_data(copy, 16)
    assert data.rows[4]["captions"] == ["photo 4 of 0"] and data.latents(np.arange(21)).shape == (21, 8, 2, 2)
    for needs_pictures in (lambda: data.images[0], lambda: open_dataset(copy, 16)):
        with pytest.raises(PocketfusionError, match="cache of latents without pictures, and this needs them: give .*"):
            needs_pictures()
    with pytest.raises(PocketfusionError, match="pictures of 16 px and the recipe's data.size is 64: make one with"):
        open_training_data(copy, 64)
    with pytest.raises(PocketfusionError, match="another autoencoder .aaaaaaaaaaaa and not bbbbbbbbbbbb"):
        data.check_encoder("b" * 64, False)


def _fill_and_die(data: Path, out: Path, calls: int) -> None:
    def deadly(pixels, halved):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_means(pixels, halved)

    source, plan = begin(data)
    fill(out, source, plan, deadly, batch=4)


def _fill_share(data: Path, out: Path, share: int) -> None:
    source, plan = begin(data)
    fill(out, source, plan, encode_means, batch=4, share=(share, 2))


@pytest.mark.parametrize("calls", [1, 8, 14])
def test_a_killed_run_goes_on_to_the_same_cache(shards, cache, tmp_path, calls):
    process = SPAWN.Process(target=_fill_and_die, args=(shards, tmp_path / "c", calls))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole = [p.name for p in (tmp_path / "c" / "parts").iterdir() if not p.name.startswith(".")]
    with pytest.raises(PocketfusionError, match="is a cache that is not finished"):
        open_training_data(tmp_path / "c", 16)
    seen = []
    source, plan = begin(shards)
    made = fill(tmp_path / "c", source, plan, lambda *given: seen.append(given) or encode_means(*given), batch=4)
    assert made == 21 - 7 * len(whole) and len(whole) == (calls - 1) // 6
    finish(tmp_path / "c")
    assert content(tmp_path / "c") == content(cache.path)


def test_two_processes_fill_one_cache(shards, cache, tmp_path):
    workers = [SPAWN.Process(target=_fill_share, args=(shards, tmp_path / "c", share)) for share in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    finish(tmp_path / "c")
    assert content(tmp_path / "c") == content(cache.path)


def test_parts_made_apart_are_merged(shards, cache, tmp_path):
    source, plan = begin(shards)
    for share in range(2):
        fill(tmp_path / f"m{share}", source, plan, encode_means, batch=4, share=(share, 2))
    with pytest.raises(PocketfusionError, match=r"lacks 1 of 3 parts \(shard-00001\)"):
        merge(tmp_path / "one", [tmp_path / "m0"])
    merge(tmp_path / "all", [tmp_path / "m0", tmp_path / "m1"])
    assert content(tmp_path / "all") == content(cache.path)
    other = photo_shards(tmp_path / "other", 3, 2)
    source, plan = begin(other)
    fill(tmp_path / "m2", source, plan, encode_means)
    with pytest.raises(PocketfusionError, match="begun with another pictures"):
        merge(tmp_path / "all", [tmp_path / "m2"])


def test_a_full_disk_ends_it_and_room_goes_on(shards, cache, tmp_path, monkeypatch):
    """Writing fails in the middle of the second part: as much as fits is whole, and the rest follows."""
    plain, written = filling._Hashed.write, 0

    def full(self, data):
        nonlocal written
        written += len(data)
        if written > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, data)

    source, plan = begin(shards)
    with monkeypatch.context() as patch:
        patch.setattr(filling._Hashed, "write", full)
        with pytest.raises(
            PocketfusionError, match=r"no space left on device: free some space and run again \(1 of 3"
        ):
            fill(tmp_path / "c", source, plan, encode_means, batch=4)
    assert [p.name for p in (tmp_path / "c" / "parts").iterdir()] == ["shard-00000"]
    fill(tmp_path / "c", source, plan, encode_means, batch=4)
    finish(tmp_path / "c")
    assert content(tmp_path / "c") == content(cache.path)


def test_what_is_missing_or_altered_is_named_and_made_again(shards, cache, tmp_path):
    out = shutil.copytree(cache.path, tmp_path / "c")
    shutil.rmtree(out / "parts" / "shard-00001")
    with pytest.raises(PocketfusionError, match="shard-00001/part.json is missing: run the same 'data cache' again"):
        open_cache(out)
    assert content(make(shards, out).path) == content(cache.path)
    records = out / "parts" / "shard-00002" / "latents-16x16.f16"
    data = records.read_bytes()
    records.write_bytes(data[:-2])
    with pytest.raises(PocketfusionError, match="latents-16x16.f16 is missing or truncated"):
        open_cache(out)
    records.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    open_cache(out)
    with pytest.raises(PocketfusionError, match="latents-16x16.f16 was altered since it was made"):
        open_cache(out, verify=True)
    records.unlink()
    assert content(make(shards, out).path) == content(cache.path)
    for name, text, match in (
        ("cache.json", "{}", "of no cache that this version"),
        ("cache.json", '{"format": "pocketfusion-latents", "version": 1, "parts": {}}', "do not fit"),
        ("plan.json", '{"format": "pocketfusion-latents", "version": 2}', "of no cache that this version"),
        ("plan.json", '{"format": "pocketfusion-latents", "version": 1}', "plan.json is damaged"),
        ("index.npy", "x", "index.npy is missing or truncated"),
    ):
        before = (out / name).read_bytes()
        (out / name).write_text(text)
        with pytest.raises(PocketfusionError, match=match):
            open_cache(out)
        (out / name).write_bytes(before)
    part = out / "parts" / "shard-00000" / "part.json"
    values = json.loads(part.read_text())
    for changes in ({"files": None}, {"files": {"rows.jsonl": 1}}, {"plan": "x"}):
        part.write_text(json.dumps(values | changes))
        with pytest.raises(PocketfusionError, match="part.json is damaged|is of another cache"):
            open_cache(out)
    assert content(make(shards, out).path) == content(cache.path)
    index = np.load(out / "index.npy")
    for name, value, match in (("part", 9, "names a part that there is not"), ("record", 999, "do not fit")):
        wrong = index.copy()
        wrong[name][0] = value
        np.save(out / "index.npy", wrong)
        with pytest.raises(PocketfusionError, match=match):
            open_cache(out).latents(np.array([0]))
    with pytest.raises(PocketfusionError, match="index.npy was altered"):
        open_cache(out, verify=True)


def test_another_plan_is_refused(shards, cache, tmp_path):
    out = shutil.copytree(cache.path, tmp_path / "c")
    for changes, match in (
        ({"autoencoder": "b" * 64}, "begun with another autoencoder: delete it"),
        ({"size": 32, "buckets": (Bucket(32, 32),)}, "begun with another size or buckets"),
        ({"halved": False}, "begun with another settings"),
    ):
        with pytest.raises(PocketfusionError, match=match):
            make(shards, out, Encoding(**{**vars(ENCODING), **changes}))
    more = shutil.copytree(shards, tmp_path / "more")
    shard(more / "00003.tar", {"x.png": png(), "x.txt": b"red"})
    with pytest.raises(PocketfusionError, match="begun with another pictures"):
        make(more, out)


def test_bad_samples_stop_it_or_are_left_out_and_listed(tmp_path):
    data = photo_shards(tmp_path / "data", 2, 3)
    shard(data / "00002.tar", {"a.jpg": png()[:40], "a.txt": b"red", "b.png": png(), "b.txt": b"blue", "c.png": png()})
    with pytest.raises(PocketfusionError, match="00002.tar: sample 'a' is not a readable picture .*--skip-bad"):
        make(data, tmp_path / "c")
    with pytest.raises(PocketfusionError, match="begun with another --skip-bad"):
        make(data, tmp_path / "c", skip_bad=True)
    cache = make(data, tmp_path / "d", skip_bad=True)
    assert len(cache) == 7 and cache.name == "data (2 bad samples left out)"
    assert cache.notes[0].startswith("2 bad samples were left out (") and "sample 'a'" in cache.notes[0]
    assert len((tmp_path / "d" / "left_out.txt").read_text().splitlines()) == 2
    assert (cache.name, cache.fingerprint) == (lambda d: (d.name, d.fingerprint))(
        open_dataset(data, 16, skip_bad=True)
    )


def test_a_shard_that_is_missing_in_the_middle(tmp_path):
    data = photo_shards(tmp_path / "data", 4, 1)
    (data / "00002.tar").unlink()
    with pytest.raises(PocketfusionError, match="lacks 00002.tar between 00000.tar and 00003.tar: fetch .*--skip-bad"):
        make(data, tmp_path / "c")
    cache = make(data, tmp_path / "c", skip_bad=True)
    assert len(cache) == 3 and "lacks 00002.tar" in cache.notes[0]


@pytest.mark.parametrize(
    ("made", "match"),
    [(np.full((4, 8, 2, 2), np.nan), "not finite: check its weights"), (np.zeros((4, 8, 4, 4)), "of another kind")],
)
def test_latents_that_cannot_be(shards, tmp_path, made, match):
    source, plan = begin(shards)
    with pytest.raises(PocketfusionError, match=match):
        fill(tmp_path / "c", source, plan, lambda pixels, halved: made[: len(pixels)], batch=4)
    assert not list((tmp_path / "c" / "parts").iterdir())


def test_pictures_that_are_open_already(tiny_data, tmp_path):
    """Packed ones go through the same writer and keep their fingerprint and rows."""
    data = open_dataset(tiny_data, 64)
    encoding, out = Encoding("a", 4, 8, 64, (Bucket(64, 64),)), tmp_path / "c"
    source = PicturesSource(data)
    fill(out, source, Plan.of(source, encoding, False, "x"), encode_means)
    finish(out)
    cache = open_cache(out)
    assert (cache.fingerprint, cache.name, cache.licences) == (data.fingerprint, data.name, data.licences)
    assert list(cache.rows) == data.rows
    assert (cache.latents(np.arange(72)) == encode_means(data.images, False)).all()


def test_buckets_of_phones():
    """Of a square's area within a ninth, in multiples of an eighth of the side: four levels of a UNet halve them."""
    assert make_buckets([512], PHONES, 8) == ((512, 512), (448, 576), (384, 704))
    assert make_buckets([64], ["9:16"], 8) == ((48, 88),)
    buckets = make_buckets([256, 512], PHONES, 8)
    for bucket in buckets:
        side = 256 if bucket.width < 300 and bucket.height < 400 else 512
        assert bucket.width % (side // 8) == bucket.height % (side // 8) == 0
        assert bucket.width * bucket.height == pytest.approx(side**2, rel=1 / 9)
    for size, wanted in (((3000, 4000), (448, 576)), ((1080, 1920), (384, 704)), ((999, 1001), (512, 512))):
        assert buckets[choose_bucket(*size, buckets)] == wanted
    assert buckets[choose_bucket(300, 400, buckets)] == (224, 288)  # 448x576 would enlarge it
    assert (
        buckets[choose_bucket(90, 90, buckets)] == (256, 256) and buckets[choose_bucket(4000, 1000, buckets)][0] == 512
    )
    for size, aspect, match in ((100, "1:1", "100 is no multiple of 8"), (64, "1:9", "'1:9'"), (64, "x", "'x'")):
        with pytest.raises(PocketfusionError, match=match):
            make_buckets([size], [aspect], 8)
    assert fit(Image.new("RGB", (10, 100)), 48, 88).shape == (88, 48, 3)


def test_a_cache_of_several_buckets(tmp_path):
    data = photo_shards(tmp_path / "data", 2, 9, shapes=((64, 64), (48, 64), (36, 64)))
    buckets = make_buckets([64], PHONES, 8)
    cache = make(data, tmp_path / "c", Encoding("a" * 64, 4, 8, 64, buckets))
    assert np.bincount(cache.buckets).tolist() == [6, 6, 6]
    for number, bucket in enumerate(buckets):
        own = np.flatnonzero(cache.buckets == number)
        assert cache.latents(own).shape == (6, 8, bucket.height // 8, bucket.width // 8)
    with pytest.raises(ValueError, match="2 buckets"):
        cache.latents(np.array([0, 1]))
    assert cache.fingerprint != open_dataset(data, 64).fingerprint


def _peak(data: Path, out: Path, report) -> None:
    source, plan = begin(data, Encoding("a" * 64, 4, 8, 64, (Bucket(64, 64),)))
    fill(out, source, plan, encode_means, batch=32)
    finish(out)
    # not ru_maxrss, which begins with the parent's
    report.send(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="/proc: a Linux system")
def test_the_memory_does_not_grow_with_the_pictures(tmp_path):
    """400 and 1,600 pictures of 64 px in shards of 200: all pixels would be 5 and 20 MB, all latents 0.4 and 1.6."""
    peaks = []
    for shards in (2, 8):
        data = photo_shards(tmp_path / f"{shards}", shards, 200, shapes=((64, 64),))
        here, there = multiprocessing.Pipe()
        process = SPAWN.Process(target=_peak, args=(data, tmp_path / f"c{shards}", there))
        process.start()
        peaks.append(here.recv())
        process.join()
    assert peaks[1] - peaks[0] < 4096  # KiB
