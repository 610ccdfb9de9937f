"""What is written is whole or not there: over kills at every line, rivals, links, devices, full disks and power."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketfusion import artefact, temporaries
from pocketfusion.artefact import MARKS, atomic_file, atomic_folder, check_files, check_new, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.locks import LOCK, hold, locked, release
from pocketfusion.temporaries import scratch_folder


def elsewhere(statement: str) -> subprocess.Popen[str]:
    """A process in which `statement` has been run, and which then sleeps inside of it."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pocketfusion import artefact, locks, temporaries\n"
        + statement
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    return process


def inside(block: str) -> str:
    return f"with {block} as made:\n    print('in', flush=True); time.sleep(60)"


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fill(path: Path, text: str) -> None:
    with atomic_folder(path, overwrite=True) as partial:
        for name in "ab":
            (partial / name).write_text(text)


def contents(path: Path) -> set[str]:
    assert names(path) == ["a", "b"]
    return {(path / name).read_text() for name in "ab"}


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_line_it_leaves_the_old_or_the_new(tmp_path, exchange):
    """A child is killed at the n-th line that `atomic_folder` executes, for each n; the next writer cleans up."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(int(exchange))], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines, old, new = map(int, done.stdout.split())
    assert lines > 100 and old > 50 and new > 10, done.stdout


def kill_at_every_line(place: Path, exchange: bool) -> None:
    if not exchange:
        artefact._exchange = lambda one, other: False
    os.fsync = lambda descriptor: None  # slow, and a kill is no power failure
    number = finished = old = new = 0
    while not finished:
        number += 1
        out = place / "out"
        fill(out, "old")
        child = os.fork()
        if child == 0:
            die_at(number)
            fill(out, "new")
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        if exchange:
            assert out.is_dir(), f"nothing is there after a kill at line {number}"
        fill(place / "other", "")  # whoever writes next beside it cleans up
        assert names(place) == ["other", "out"], f"{names(place)} after a kill at line {number}"
        (found,) = contents(out)
        old, new = old + (found == "old"), new + (found == "new")
    print(number, old, new)


def die_at(number: int) -> None:
    left = number

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in (artefact.__file__, temporaries.__file__):
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def test_what_a_live_run_writes_stays_and_what_a_dead_one_left_goes(tmp_path):
    live = elsewhere(inside(f"artefact.atomic_folder(Path({str(tmp_path / 'live')!r}))"))
    dead = elsewhere(inside(f"artefact.atomic_folder(Path({str(tmp_path / 'dead')!r}))"))
    file = elsewhere(inside(f"artefact.atomic_file(Path({str(tmp_path / 'file.png')!r}))"))
    scratch = elsewhere(inside(f"temporaries.scratch_folder('scratch', Path({str(tmp_path)!r}))"))
    for process in (dead, file, scratch):
        killed(process)
    assert len(names(tmp_path)) == 4
    fill(tmp_path / "out", "new")
    kept = names(tmp_path)
    killed(live)
    assert len(kept) == 2 and kept[0].startswith(".live.") and kept[1] == "out"


def test_what_only_looks_like_a_temporary_is_left_alone(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").touch()
    (tmp_path / ".x.0123456789abcdef.partial").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / ".y.0123456789abcdef.partial")
    (tmp_path / ".z.partial").mkdir()
    fill(tmp_path / "out", "new")
    assert (tmp_path / "target" / "precious").exists() and len(names(tmp_path)) == 5


def test_a_temporary_is_never_made_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for suffix in ("", ".json"):
        (tmp_path / f".a.json.0000000000000000.partial{suffix}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", "attack")
    with pytest.raises(FileExistsError):
        fill(tmp_path / "a.json", "attack")
    assert victim.read_text() == "precious"


def test_rivals_for_one_name_each_write_a_whole(tmp_path):
    meet = threading.Barrier(2)

    def write(text: str) -> None:
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").write_text(text)
            meet.wait()
            (partial / "b").write_text(text)
            meet.wait()

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(contents(tmp_path / "out")) == 1 and names(tmp_path) == ["out"]


def test_without_overwrite_a_faster_rival_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PocketfusionError, match="out exists already"), atomic_folder(out) as partial:
        (partial / "late").touch()
        fill(out, "first")
    assert contents(out) == {"first"} and names(tmp_path) == ["out"]


def test_modes_are_kept_and_new_ones_are_the_users(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        fill(tmp_path / "out", "x")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "out")]
        assert modes == [0o640, 0o750]
        (tmp_path / "a.json").chmod(0o604)
        (tmp_path / "out").chmod(0o705)
        write_json(tmp_path / "a.json", 2)
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            assert (
                stat.S_IMODE(partial.stat().st_mode) == 0o700
            )  # nobody reads it before its mode is known to be right
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "out")] == [0o604, 0o705]
    fill(tmp_path / "locked", "x")
    (tmp_path / "locked").chmod(0o555)
    fill(tmp_path / "locked", "y")
    assert names(tmp_path) == ["a.json", "locked", "out"]


def test_devices_pipes_and_links_to_them_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    refused = pytest.raises(PocketfusionError, match="is a device, pipe or socket: choose the name of a file")
    for path in (tmp_path / "fifo", tmp_path / "link"):
        for write in (lambda p: write_json(p, 1), lambda p: fill(p, "x")):
            with refused:
                write(path)
    for path in (Path("/dev/stdout"), Path("/dev/full"), Path("/proc/self/fd/1")):  # whatever they lead to
        with refused:
            check_files(path)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and (tmp_path / "link").is_symlink()


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "real.json").write_text("precious")
    (tmp_path / "real").mkdir()
    (tmp_path / "a.json").symlink_to("real.json")
    (tmp_path / "out").symlink_to("real")
    (tmp_path / "gone").symlink_to("nowhere")
    write_json(tmp_path / "a.json", 1)
    for name in ("out", "gone"):
        with pytest.raises(PocketfusionError, match=f"{name} exists already"), atomic_folder(tmp_path / name):
            pass
        fill(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "real.json").read_text() == "precious" and names(tmp_path / "real") == []
    assert names(tmp_path) == ["a.json", "gone", "out", "real", "real.json"]


def test_a_folder_takes_no_files_place_nor_a_file_a_folders(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PocketfusionError, match="file is a file and the output a folder"):
        fill(tmp_path / "file", "x")
    with pytest.raises(PocketfusionError, match="is a folder: give the name of a file in it"):
        write_json(tmp_path, 1)


def test_equal_names_and_long_names(tmp_path):
    (tmp_path / "same").symlink_to(tmp_path)
    with pytest.raises(PocketfusionError, match="a.png is given for two outputs"):
        check_files(tmp_path / "a.png", None, tmp_path / "same" / "x" / ".." / "a.png")
    check_files(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(PocketfusionError, match="has 304 bytes: choose an output path whose name has at most 220"):
        check_files(tmp_path / ("n" * 300 + ".png"))
    write_json(tmp_path / ("ü" * 110), 1)


def test_disk_first_then_the_name_then_the_folder(tmp_path, monkeypatch):
    """After a power failure the new name leads to whole files, or there is none."""
    told: list[str] = []

    def watch(module: object, name: str, tell: Callable[..., str]) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (told.append(tell(*given)), real(*given))[1])

    watch(os, "fsync", lambda descriptor: "sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix[1:])
    watch(os, "replace", lambda *paths: "rename")
    watch(artefact, "_exchange", lambda *paths: "rename")
    with atomic_file(tmp_path / "a.json") as partial:
        partial.touch()
    assert told == ["sync json", "rename", "sync "]
    told.clear()
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.deep").touch()
    assert told == ["sync deep", "sync ", "sync partial", "rename", "sync "]


class InWords(Exception):
    """As safetensors tells of a full disk."""


def test_a_full_disk_is_told_of_with_what_was_to_be_written(tmp_path, monkeypatch):
    full, words = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), InWords("I/O error (os error 28)")
    other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/other/disk")
    monkeypatch.chdir(tmp_path)
    for atomic in (atomic_folder, atomic_file):
        for error, named in ((full, "out"), (words, "out"), (other, "/other/disk")):
            with pytest.raises(OSError, match="No space left") as found, atomic(Path("out")):
                raise error
            assert found.value.filename == named
        with pytest.raises(InWords), atomic(Path("out")):
            raise InWords("a fault of our own")
    nested = pytest.raises(OSError, match="No space left")
    with nested as found, atomic_folder(Path("out")) as partial, atomic_file(partial / "inner"):
        raise full
    assert found.value.filename == "out" and not names(tmp_path)


def test_a_run_folder_is_one_processs_until_it_dies(tmp_path):
    run = tmp_path / "a" / "run"
    owner = elsewhere(f"locks.hold(Path({str(run)!r})); print('in', flush=True); time.sleep(60)")
    with pytest.raises(
        PocketfusionError, match=rf"run is in use by another run \(process {owner.pid}\): wait for its"
    ):
        hold(run)
    killed(owner)
    hold(run)
    hold(run)  # its own
    with pytest.raises(PocketfusionError, match="in use"), locked(run):
        pass
    release(run)
    with locked(run):
        hold(tmp_path / "other")
    hold(run)
    assert (run / LOCK).read_text() == f"{os.getpid()}\n"
    probe = f"from pathlib import Path; from pocketfusion.locks import hold; hold(Path({str(run)!r}))"
    assert (
        "is in use by another run"
        in subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stderr
    )
    again = subprocess.run(
        [sys.executable, "-c", probe], env={**os.environ, "RANK": "1"}, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr  # another process of the same launch


def test_whoever_works_in_a_run_folder_asks_for_it(tmp_path):
    from loop_task import LineTask, settings

    from pocketfusion.evolve.algorithm import Ledger
    from pocketfusion.train.loop import train
    from pocketfusion.train.place import StageRun
    from pocketfusion.train.stage import run_stage

    run = tmp_path / "out.run"
    owner = elsewhere(f"locks.hold(Path({str(run)!r})); print('in', flush=True); time.sleep(60)")
    for work in (
        lambda: train(LineTask(), settings(), run, fingerprint={}),
        lambda: run_stage(StageRun.at(tmp_path / "out"), LineTask(), settings(), {}, write=dict, reopen=list),
        lambda: Ledger(run, {}),
    ):
        with pytest.raises(PocketfusionError, match="out.run is in use by another run"):
            work()
    killed(owner)
    assert names(run) == [LOCK]
    with pytest.raises(PocketfusionError, match="--run .*/out/run lies in --out .*/out, which is replaced whole"):
        StageRun.at(tmp_path / "out", tmp_path / "out" / "run")


def test_a_run_that_was_refused_leaves_no_folder(tmp_path):
    code = "from pathlib import Path; from pocketfusion.locks import hold; [hold(Path(name)) for name in 'ab']"
    subprocess.run([sys.executable, "-c", code + "; Path('b', 'log').touch()"], cwd=tmp_path, check=True)
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == [LOCK, "log"]


def test_a_locked_block_lets_go(tmp_path):
    with locked(tmp_path / "work"), pytest.raises(PocketfusionError, match="in use"), locked(tmp_path / "work"):
        pass
    with locked(tmp_path / "work"):
        pass


def test_no_file_is_created_through_a_lock_that_is_a_link(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), locked(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_scratch_folder_is_private_and_goes(tmp_path):
    with scratch_folder("x", tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a").touch()
    assert names(tmp_path) == []


if __name__ == "__main__":
    kill_at_every_line(Path(sys.argv[1]), sys.argv[2] == "1")


def test_only_what_was_written_here_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / MARKS[0]).write_text("{}")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    check_new(tmp_path / "empty", overwrite=True)
    check_new(tmp_path / "ours", overwrite=True)
    with pytest.raises(PocketfusionError, match="work holds other things .* not replaced"):
        check_new(tmp_path / "work", overwrite=True)
    (tmp_path / "ours" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "ours" / "below")
    for path in (Path(""), Path(".."), tmp_path / "ours"):
        with pytest.raises(PocketfusionError, match="the folder that you work in, or above it"):
            check_new(path, overwrite=True)


def test_no_command_replaces_a_folder_of_other_things(tmp_path, tiny_folder, tiny_recipe, tiny_data, tiny_bundle, cli):
    file = tmp_path / "work" / "my.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"years of work")
    commands = {
        "import": [file, file.parent],
        "web-build": [file.parent, tiny_bundle],
        "export": [tiny_folder, file.parent],
        "vectors": [tiny_bundle, file.parent],
        "device-pack": [tiny_bundle, file.parent],
        "prune": [tiny_folder, "--out", file.parent],
        "architecture": [tiny_folder, "--preset", "snapfusion", "--out", file.parent],
        "evaluate": [tiny_folder, "--data", tiny_data, "--judge", tiny_folder, "--out", file.parent],
        "data emoji": [file.parent],
        "train-autoencoder": [tiny_recipe, "--data", tiny_data, "--out", file.parent],
        "train-elastic": [tiny_folder, "--recipe", tiny_recipe, "--data", tiny_data, "--out", file.parent],
    }
    for name, arguments in commands.items():
        done = cli(*name.split(), *arguments, "--overwrite")
        assert done.returncode == 2 and "not replaced" in done.stderr, (name, done.stderr)
        assert names(tmp_path) == ["work"] and names(file.parent) == ["my.safetensors"], name
