"""What a phone said of a device pack: form, logs and pictures as one report. Nothing else makes a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.benchmark_log import partitions, statistics
from pocketfusion.likeness import psnr
from pocketfusion.port.device_pack import FORM, INDEX, RESULTS, SCRIPT

PLACES = ("cpu", "gpu")


class _Pack(BaseModel):
    """`device-pack.json`."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["pocketfusion-device-pack"]
    version: Literal[1]
    bundle: dict[str, str]
    weights: dict[str, str]
    files: dict[str, str]
    prompt: str
    seed: int
    num_inference_steps: int


class _Form(BaseModel):
    """What run.sh asked the phone itself: `key=value` lines."""

    model_config = ConfigDict(extra="forbid")

    pack: str
    maker: str = Field(min_length=1, max_length=200)
    model: str = Field(min_length=1, max_length=200)
    soc: str = Field(max_length=200)
    android: str = Field(min_length=1, max_length=50)
    driver: str = Field(max_length=500)
    memory: str = Field(max_length=50)
    tool: str = Field(max_length=64)


def device_report(folder: Path) -> dict[str, Any]:
    """The report of the pack at `folder`, which a phone has run.

    Raises PocketfusionError if it is no pack, has not been run, or its form is none or of another pack. A network that
    failed on the phone, or was not asked of, is null with the reason.
    """
    pack = _read_pack(folder)
    form = _read_form(folder / RESULTS / FORM)
    if form.pack != pack.bundle["sha256"]:
        raise PocketfusionError(f"{folder / RESULTS / FORM} is of another pack: run this pack's {SCRIPT}")
    results = folder / RESULTS
    networks = {
        name: {place: _network(results / f"{file}-{place}.log") for place in PLACES}
        for name, file in pack.files.items()
    }
    pictures = {place: _picture(results, place, folder / "reference.png") for place in PLACES}
    return {
        "format": "pocketfusion-device-report",
        "version": 1,
        "bundle": pack.bundle,
        "weights": pack.weights,
        "num_inference_steps": pack.num_inference_steps,
        "device": form.model_dump(exclude={"pack"}),
        "networks": networks,
        "pictures": pictures,
    }


def _read_pack(folder: Path) -> _Pack:
    try:
        return _Pack.model_validate_json((folder / INDEX).read_text(encoding="utf-8"))
    except OSError:
        raise PocketfusionError(f"{folder} has no {INDEX}: write a pack there with device-pack") from None
    except (ValidationError, ValueError):
        raise PocketfusionError(f"{folder / INDEX} is not a device pack's: write the pack again") from None


def _read_form(path: Path) -> _Form:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise PocketfusionError(f"{path} is missing: run the pack's {SCRIPT} with the phone on adb first") from None
    try:
        return _Form.model_validate({key: value.strip() for key, _, value in (line.partition("=") for line in lines)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:60]
        raise PocketfusionError(
            f"{path} is not a form that {SCRIPT} filled ({where}: {first['msg']}): run the pack's {SCRIPT} again"
        ) from None


def _network(log: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {"ms": statistics(log), "failure": None}
    except PocketfusionError as error:
        return {"ms": None, "failure": str(error), "nodes": None}
    taken = partitions(log)
    found["nodes"] = None if taken is None else dict(zip(("delegated", "all", "partitions"), taken, strict=True))
    return found


def _picture(results: Path, place: str, reference: Path) -> dict[str, Any] | None:
    """Times of the C++ example and the picture's PSNR to the reference; None if it was not asked to draw."""
    log = results / f"draw-{place}.log"
    if not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        said = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        times = {
            name: {key: said[name][key] for key in ("load_ms", "run_ms", "where")} for name in said if name != "format"
        }
        with Image.open(results / f"{place}.png") as picture, Image.open(reference) as wanted:
            ours, theirs = (np.asarray(image.convert("RGB")) for image in (picture, wanted))
        if ours.shape != theirs.shape:
            raise ValueError(f"a picture of {ours.shape[1]}x{ours.shape[0]}")
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        last = lines[-1] if lines else str(error)
        return {"failure": f"{log.name}: {last[:200]}", "psnr_db": None, "largest_difference": None, "networks": None}
    largest = int(np.abs(ours.astype(int) - theirs).max())
    return {
        "failure": None,
        "psnr_db": round(psnr(ours, theirs), 2) if largest else None,
        "largest_difference": largest,
        "networks": times,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page, whose first table's row belongs into docs/devices.md."""
    device, bundle = report["device"], report["bundle"]
    name = " ".join((device["maker"], device["model"]))
    rows = [
        f"# {bundle['name']} on {name}",
        "",
        "For `docs/devices.md`:",
        "",
        *TABLE_HEAD,
        row(report),
        "",
        f"{device['soc'] or 'chip not told'}, {device['driver'] or 'driver not told'}, {device['memory']} of memory; "
        f"benchmark_model sha256 {device['tool']}; bundle {bundle['sha256'][:12]}, made for {bundle['target']}.",
        "",
        "| network | on | median ms (min to max, runs) | nodes on the delegate | partitions |",
        "|---|---|---|---|---|",
    ]
    for network, places in report["networks"].items():
        for place, one in places.items():
            rows.append(f"| {network} | {place} | {_time(one)} | {_nodes(one)} |")
    for place, picture in report["pictures"].items():
        if picture is not None:
            rows += ["", f"Picture on the {place}: {_likeness(picture)}."]
    return "\n".join(rows) + "\n"


TABLE_HEAD = (
    "| device | Android | bundle | text encoder, UNet, decoder: CPU ms | GPU ms | GPU partitions | picture |",
    "|---|---|---|---|---|---|---|",
)


def row(report: dict[str, Any]) -> str:
    """The table's row of one report."""
    device, networks = report["device"], report["networks"]

    def medians(place: str) -> str:
        found = [one[place]["ms"] for one in networks.values()]
        return ", ".join("failed" if ms is None else f"{ms['median']:.1f}" for ms in found)

    parts = [one["gpu"]["nodes"] for one in networks.values()]
    counts = ", ".join("not told" if nodes is None else str(nodes["partitions"]) for nodes in parts)
    pictures = {place: one for place, one in report["pictures"].items() if one is not None}
    likeness = "; ".join(f"{place} {_likeness(one)}" for place, one in pictures.items()) or "not drawn"
    cells = (
        f"{device['maker']} {device['model']}",
        device["android"],
        f"{report['bundle']['name']} {report['bundle']['sha256'][:12]}",
        medians("cpu"),
        medians("gpu"),
        counts,
        likeness,
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _time(one: dict[str, Any]) -> str:
    ms = one["ms"]
    return "failed" if ms is None else f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f}, {ms['runs']})"


def _nodes(one: dict[str, Any]) -> str:
    nodes = one["nodes"]
    return (
        "not told | not told" if nodes is None else f"{nodes['delegated']} of {nodes['all']} | {nodes['partitions']}"
    )


def _likeness(picture: dict[str, Any]) -> str:
    if picture["failure"] is not None:
        return "failed"
    return "equal" if picture["psnr_db"] is None else f"{picture['psnr_db']:.1f} dB"
