"""``python -m benchmarks.run``: measure ours and the peers, judge the bars, write JSON, a Markdown table and plots."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars, machine, plots, tables
from benchmarks.implementations import OPS, names
from benchmarks.measure import Group, Record, Settings, candidates, groups, run_group, steps
from benchmarks.shapes import BARS, DISTRIBUTIONS, DTYPES, QUICK, LogitsShape, Plan, TokensShape, parse_logits
from benchmarks.traffic import measure_bandwidth
from entropy_kernels.analysis._require import require

Tick = Callable[[str], Any]
FORMAT = 1  # of the JSON document


def _listed(kind: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """Argparse type: names separated by commas, each of them known."""

    def parse(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            what = f"no {kind} {', '.join(map(repr, unknown))}" if unknown else f"expected the name of a {kind}"
            raise argparse.ArgumentTypeError(f"{what}; there are: {', '.join(known)}")
        return wanted

    return parse


def _logits_shape(text: str) -> LogitsShape:
    try:
        return parse_logits(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--shape: ")) from None


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return parse


def parser() -> argparse.ArgumentParser:
    """Command line of the suite."""
    result = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__, allow_abbrev=False)
    add = result.add_argument
    add("--quick", action="store_true", help="smaller shapes, at most two minutes")
    add("--ops", type=_listed("op", list(OPS)), metavar="A,B", help=f"ops to run, by default all: {', '.join(OPS)}")
    add(
        "--impl", type=_listed("implementation", names()), metavar="A,B",
        help=f"implementations to run, by default all: {', '.join(names())}",
    )  # fmt: skip
    add("--shape", type=_logits_shape, action="append", metavar="N,V", help="rows and vocabulary; may be repeated")
    add("--tokens", type=_at_least(1), action="append", metavar="N", help="tokens of the selection; may be repeated")
    add("--dtype", type=_listed("dtype", list(DTYPES)), metavar="A,B", help="of the logits; by default fp32,bf16")
    add("--device", default="cpu", help="cpu or cuda[:n]; default %(default)s")
    add("--threads", type=_at_least(1), help="torch's threads; by default torch's own choice")
    add("--repeats", type=_at_least(1), help=f"rounds; by default {BARS.repeats}")
    add(
        "--cache", choices=("hot", "cold"), default="hot",
        help="hot: caches as the previous call left them; cold: flushed before each call; default %(default)s",
    )  # fmt: skip
    add("--no-memory", action="store_true", help="do not measure the peak extra memory")
    add("--list", action="store_true", help="list ops and implementations with what cannot run here, and stop")
    add(
        "--output", type=Path,
        help="folder for the results; by default benchmarks/results/<machine> for a run with no restriction, else "
        "runs/bench/<machine>, so that a partial run does not replace a whole one",
    )  # fmt: skip
    return result


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Shapes and repeats that the arguments ask for."""
    plan = QUICK if arguments.quick else BARS
    if arguments.shape:
        plan = replace(plan, logits=tuple(arguments.shape))
    if arguments.tokens:
        tokens = tuple(TokensShape(count, distribution) for count in arguments.tokens for distribution in DISTRIBUTIONS)
        plan = replace(plan, tokens=tokens)
    return replace(plan, repeats=arguments.repeats) if arguments.repeats else plan


def output_folder(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Where the results go; see ``--output``."""
    if arguments.output is not None:
        return arguments.output
    restricted = arguments.quick or arguments.cache != "hot" or arguments.no_memory
    restricted = restricted or any(
        getattr(arguments, name) for name in ("ops", "impl", "shape", "tokens", "dtype", "repeats", "threads")
    )
    folder = machine.ROOT / "runs" / "bench" if restricted else machine.ROOT / "benchmarks" / "results"
    return folder / machine.slug(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; returns 0, or 1 if an implementation of ours failed or gave a wrong result."""
    arguments = parser().parse_args(argv)
    device = _device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtypes = [DTYPES[name] for name in arguments.dtype or ("fp32", "bf16")]
    plan = plan_of(arguments)
    work = groups(plan, arguments.ops or list(OPS), dtypes, device)
    settings = Settings(
        repeats=plan.repeats,
        cache=arguments.cache,
        names=frozenset(arguments.impl) if arguments.impl else None,
        memory=not arguments.no_memory,
    )
    if arguments.list:
        _list(work, settings)
        return 0
    head = {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "settings": {"repeats": settings.repeats, "cache": settings.cache, "memory": settings.memory},
        "stated_sizes": bars.at_the_stated_sizes(plan),
    }
    started = time.perf_counter()
    measured, head["bandwidth"] = _run(work, settings, device)
    head["seconds"] = round(time.perf_counter() - started, 1)
    records = [record for _, part in measured for record in part]
    verdicts = [verdict for verdict in bars.judge(records, plan, device.type) if not verdict.absent]
    folder = output_folder(arguments, device)
    text = tables.markdown(head, verdicts, [(group.title, group.host, part) for group, part in measured])
    _write(folder, head, measured, verdicts, text)
    print(text)
    print(f"{head['seconds']:.0f} s; results in {folder}")
    broken = [record for record in records if record.role == "ours" and record.status in ("failed", "wrong")]
    for record in broken:
        print(f"ours {record.status}: {record.op} {record.implementation}: {record.reason}", file=sys.stderr)
    return 1 if broken else 0


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        parser().error(f"argument --device: expected cpu or cuda[:n], got {text!r}")
    if device.type not in ("cpu", "cuda"):
        parser().error(f"argument --device: expected cpu or cuda[:n], got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser().error("argument --device: torch sees no CUDA device here")
    return device


def _run(
    work: Sequence[Group], settings: Settings, device: torch.device
) -> tuple[list[tuple[Group, list[Record]]], dict[str, float]]:
    progress_module = require("rich.progress", "the benchmark's progress bar", "bench")
    console = require("rich.console", "the benchmark's progress bar", "bench").Console(stderr=True)
    columns = (
        progress_module.TextColumn("{task.percentage:>3.0f}%"),
        progress_module.BarColumn(bar_width=24),
        progress_module.TimeElapsedColumn(),
        progress_module.TextColumn("{task.description}"),
    )
    measured = []
    # drawn twice a second: too little to disturb the timing, enough to look alive
    with progress_module.Progress(*columns, console=console, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("bandwidth", total=sum(steps(group, settings) for group in work) + 1)
        bandwidth = measure_bandwidth(device)
        done = 1
        for group in work:

            def tick(what: str) -> None:
                progress.update(task, advance=1, description=what)

            measured.append((group, run_group(group, settings, device, bandwidth, tick)))
            done += steps(group, settings)
            progress.update(task, completed=done)
    return measured, asdict(bandwidth)


def _write(
    folder: Path,
    head: dict[str, Any],
    measured: Sequence[tuple[Group, list[Record]]],
    verdicts: Sequence[bars.Verdict],
    text: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        **head,
        "bars": [verdict.as_dict() for verdict in verdicts],
        "groups": [{"title": group.title, "records": [asdict(record) for record in part]} for group, part in measured],
    }
    (folder / "bench.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    (folder / "bench.md").write_text(text)
    commit = (head["machine"]["commit"] or "unknown")[:10]
    note = f"{head['machine']['machine']}, {head['machine']['threads']} threads, {head['time'][:10]}, {commit}"
    drawn = [(group.title, part) for group, part in measured]
    statistics = [(title, part) for title, part in drawn if "logits" in title]
    plots.save(plots.time_figure(statistics, note), folder / "time_statistics.png")
    plots.save(
        plots.time_figure([pair for pair in drawn if pair not in statistics], note), folder / "time_selection.png"
    )
    plots.save(plots.error_figure(drawn, note), folder / "error.png")


def _list(work: Sequence[Group], settings: Settings) -> None:
    for group in work:
        print(group.title)
        for implementation, case in candidates(group, settings):
            reason = implementation.supports(case)
            print(f"  {implementation.op} {implementation.name} {case.dtype_name}" + (f": {reason}" if reason else ""))


if __name__ == "__main__":
    sys.exit(main())
