"""`check`, `device-pack`, `device-report`, `vectors`: does a bundle run on a phone, rightly, and in a port."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared_options import BundleArg, OutArg, ReplaceOutOpt
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.mobile.delegate.check import GraphCheck, Report
    from pocketfusion.terminal import Console

#: Rows of a table's lists that are printed; all are in the JSON.
_ROWS = 12
_WRONG = "the GPU's numbers differ from the CPU's"


@app.command("check")
def check_command(
    path: Annotated[Path, typer.Argument(help="Bundle or .tflite file.", show_default=False)],
    static: Annotated[bool, typer.Option("--static", help="Judge by the rules alone, without a GPU stack.")] = False,
    stack: Annotated[
        str | None, typer.Option(help="GPU stack to ask, by name. Default: the best per precision.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or fp16. Default: each that a stack here has.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one compilation with its run.")] = 600,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report here.")
    ] = None,
) -> None:
    """Compile every network on LiteRT's GPU delegate and compare its numbers with the CPU's.

    A Core ML bundle is drawn with by a small executor of its operations, in fp32 and rounded to fp16. Names each
    refused operation, its module and the rewrite that cures it, and the layers whose numbers fp16 may not
    hold. Exits with code 1 if anything falls off the GPU or comes out wrong.
    """
    from pocketfusion.artefact import check_files, write_json
    from pocketfusion.runtime.manifest import MANIFEST, read_manifest
    from pocketfusion.runtime.networks import check_threads
    from pocketfusion.terminal import Console

    if precision not in (None, "fp32", "fp16"):
        raise PocketfusionError(f"the precision is {precision!r}: choose fp32 or fp16")
    check_threads(threads)
    if not 0 < timeout <= 86_400:
        raise PocketfusionError(f"the timeout is {timeout:g} s: choose a number above zero, at most a day")
    check_files(json_file)
    if path.is_dir() and (path / MANIFEST).is_file() and read_manifest(path)[0].target == "coreml":
        if static or stack or precision:
            raise PocketfusionError(
                f"{path} is for Core ML, which no GPU stack runs: leave --static, --stack and --precision out"
            )
        return _check_coreml(path, json_file)
    from pocketfusion.mobile.delegate.check import PRECISIONS, check

    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("reading") as status:
        report = check(
            path,
            static=static,
            stack=stack,
            precisions=(precision,) if precision else PRECISIONS,
            threads=threads,
            timeout=timeout,
            progress=status.update,
        )
    _print_check(report, static, console)
    if json_file:
        write_json(json_file, report.as_dict())
    if not report.passed:
        raise typer.Exit(1)


def _check_coreml(path: Path, json_file: Path | None) -> None:
    from rich import box
    from rich.table import Table

    from pocketfusion.artefact import write_json
    from pocketfusion.cli.shared import require_coreml
    from pocketfusion.quiet import quiet
    from pocketfusion.terminal import Console

    require_coreml("pocketfusion check of a Core ML bundle")
    with quiet():  # the libraries' import messages
        from pocketfusion.mobile.coreml.verdict import LEAST, judge
    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("reading") as status:
        verdict = judge(path, status.update)
    console.print(
        f"Core ML, iOS {verdict.ios} and later, layout {verdict.layout}; run here by a MIL executor in torch"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("network", "packages", "operations", "kinds", "FP16 to FP32, dB"):
        table.add_column(title, justify="right" if title not in ("network", "packages") else "left")
    for one in verdict.networks:
        counts, db = one.operations, one.fp16_sqnr_db
        cells = (f"{sum(counts.values()):,}", str(len(counts)), "computes in FP32" if db is None else f"{db:.1f}")
        table.add_row(one.network, ", ".join(one.packages), *cells)
    console.print(table)
    psnr = verdict.picture_psnr_db
    console.print(f"picture in FP16 to that in FP32: {'NaN' if psnr is None else f'{psnr:.1f} dB PSNR'}")
    console.print(
        "every operation runs, and FP16 keeps what it must; Apple's own kernels were not run"
        if verdict.passed
        else f"FP16 loses too much: at least {LEAST:.0f} dB are asked of each network; export it with "
        "--NETWORK-weights float32",
        style="green" if verdict.passed else "red",
    )
    if json_file:
        write_json(json_file, verdict.as_dict())
    if not verdict.passed:
        raise typer.Exit(1)


def _print_check(report: Report, static: bool, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from pocketfusion.mobile.delegate.stack import advice

    if report.target == "litert-cpu":
        console.print(
            "this bundle was made for the CPU: what follows is how it would do on a GPU; "
            "export it with --target litert-gpu for one",
            style="yellow",
        )
    for stack in report.stacks:
        console.print(f"GPU stack {stack.name}: {stack.adapter}, {' and '.join(stack.precisions)}")
    if not report.stacks:
        why = "as asked" if static else f"no GPU stack works here: {advice()}"
        console.print(f"static verdict, by the rules alone ({why})", style="yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for title in ("on GPU", "rejected", "FP32 dB/error", "FP16 dB/error", "risks"):
        table.add_column(title, justify="right", no_wrap=True)
    for graph in report.graphs:
        table.add_row(*_row(graph, report))
    console.print(table)
    for graph in report.graphs:
        _details(graph, console)
    by_rules = "" if report.stacks else "by the rules, "
    console.print(
        f"{by_rules}all of it runs on the GPU delegate"
        if report.passed
        else f"{by_rules}not all of it runs on the GPU delegate, or rightly",
        style="green" if report.passed else "red",
    )


def _title(graph: GraphCheck, graphs: tuple[GraphCheck, ...]) -> str:
    several = sum(other.network == graph.network for other in graphs) > 1
    return f"{graph.network} {graph.signature}" if several else graph.network


def _row(graph: GraphCheck, report: Report) -> list[str]:
    on_gpu = 0 if graph.failure else graph.operations - len(graph.refused)
    cells = [_title(graph, report.graphs), f"{on_gpu:,}/{graph.operations:,}", f"{len(graph.refused):,}"]
    for precision in ("fp32", "fp16"):
        found = next((one for one in graph.parities if one.precision == precision), None)
        wrong = "NaN" if found is not None and not found.finite else ""
        cells.append(wrong if found is None or wrong else f"{found.sqnr_db:.1f} / {found.max_error:.0e}")
    return [*cells, "" if graph.ranges is None else str(sum(risk.certain for risk in graph.ranges.risks))]


def _details(graph: GraphCheck, console: Console) -> None:
    from pocketfusion.runtime.manifest import NETWORKS

    wrong = [p for p in graph.parities if not p.right]
    lines = [
        f"  {_WRONG}: {p.precision} on {p.stack}"
        + ("" if graph.counts(p) else "; the bundle asks for this network in fp32")
        for p in wrong
    ]
    if [p.precision for p in wrong if graph.counts(p)] == ["fp16"] and graph.network in NETWORKS:
        lines.append(f"  cure: a rewrite of what is at fault, or `export --gpu-fp32 {graph.network}`")
    groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for one in graph.refused:
        place = f"#{one.index} {one.module or 'module unknown'}: {one.tensors}"
        groups.setdefault((one.operation, re.sub(r"\d+", "N", one.reason), one.cure), []).append((one.reason, place))
    for (operation, _, cure), members in groups.items():
        places = [place for _, place in members]
        lines.append(f"  {len(places)} × {operation}: {members[0][0]}")
        lines.append(f"    cure: {cure}")
        lines += [f"    {place}" for place in places[:3]]
        if len(places) > 3:
            lines.append(f"    … and {len(places) - 3} more")
    if graph.failure:
        lines.append(f"  the graph fails as a whole: {graph.failure}")
    if graph.culprit:
        lines.append(f"  at fault: {graph.culprit}")
    if graph.ranges:
        where = graph.ranges.largest_module or "module unknown"
        lines.append(f"  largest activation: {graph.ranges.largest:,.4g} of {where}; fp16 ends at 65,504")
    risks = graph.ranges.risks if graph.ranges else ()
    for risk in risks[:_ROWS]:
        word = "beyond fp16" if risk.certain else "near fp16's limits"
        where = risk.module or "module unknown"
        lines.append(
            f"  {word}: #{risk.index} {risk.operation} of {where}, {risk.kind} ({risk.value:.3g}); {risk.cure}"
        )
    if len(risks) > _ROWS:
        lines.append(f"  … and {len(risks) - _ROWS} more at risk")
    lines += [f"  {note}" for note in graph.notes]
    if graph.refused and not any(one.module for one in graph.refused):
        lines.append("  the file does not name its modules: export it again with this version for their paths")
    if graph.inputs == "seeded" and (graph.parities or graph.ranges):
        lines.append("  inputs: seeded normal numbers, not real ones; check a bundle for real ranges")
    if lines:
        console.print(f"{graph.network}:")
        for line in lines:
            console.print(line)


@app.command("device-pack")
def device_pack_command(
    bundle: BundleArg,
    out: OutArg,
    overwrite: ReplaceOutOpt = False,
) -> None:
    """Write all that one run of a bundle on an Android phone needs, over adb.

    The bundle, a script around LiteRT's own benchmark, the C++ example's source, a reference picture. The benchmark
    itself is LiteRT's to fetch. `device-report` reads the results.
    """
    from pocketfusion.port.device_pack import SCRIPT, write_device_pack
    from pocketfusion.terminal import Console

    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("drawing the reference"):
        opened = write_device_pack(bundle, out, overwrite=overwrite)
    console.print(
        f"{out}: {opened.manifest.name}; with a phone on adb: {out}/{SCRIPT} BENCHMARK_MODEL [LIBRARIES] "
        f"({out}/README.md), then pocketfusion device-report {out} REPORT.md"
    )


@app.command("device-report")
def device_report_command(
    pack: Annotated[Path, typer.Argument(help="Pack whose run.sh a phone has run.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.md", help="Report, with OUT.json.", show_default=False)],
) -> None:
    """Write what a phone said of a device pack: device, driver, times, partitions, its pictures' PSNR."""
    from pocketfusion.artefact import atomic_file, check_files, write_json
    from pocketfusion.port.device_report import device_report, markdown, row
    from pocketfusion.terminal import Console

    if out.suffix.lower() != ".md":
        raise PocketfusionError(f"the output is {out}: give it a name that ends in .md")
    check_files(out, beside := out.with_suffix(".json"))
    report = device_report(pack)
    with atomic_file(out) as page:
        page.write_text(markdown(report), encoding="utf-8")
    write_json(beside, report)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(row(report))
    console.print(f"written: {out}, {beside}")


@app.command("vectors")
def vectors_command(
    bundle: BundleArg,
    out: OutArg,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Of the picture. Default: a red apple.")] = None,
    threads: Annotated[int, typer.Option("--threads", help="CPU threads; more than one may change last bits.")] = 1,
    overwrite: ReplaceOutOpt = False,
) -> None:
    """Write what a port of the runtime compares itself with, as plain JSON and .npy.

    Token ids of 50 odd prompts, noise, every sampler's coefficients, each network's inputs and outputs, the latents
    after every step, the picture. docs/port.md has the rules.
    """
    from pocketfusion.port.vectors import PROMPT, write_vectors
    from pocketfusion.runtime.networks import check_threads
    from pocketfusion.terminal import Console

    check_threads(threads)
    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("opening the bundle") as status:
        index = write_vectors(
            bundle,
            out,
            prompt=PROMPT if prompt is None else prompt,
            num_threads=threads,
            overwrite=overwrite,
            progress=status.update,
        )
    picture = index["picture"]
    console.print(
        f"{out}: {index['bundle']['name']}, {picture['prompt']!r} with seed {picture['seed']} in "
        f"{picture['num_inference_steps']} steps of {picture['sampler']}; docs/port.md has the rules"
    )
