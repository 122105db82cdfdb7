"""``python -m benchmarks.run``: measure ours and the peers, judge the targets, write JSON, a Markdown table and plots.

Read cases (what), ours and peers (by whom), checks (the gate), measure with timing (how), targets, results,
report.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import report, results, targets
from benchmarks.cases import (
    CPU_HIDDEN,
    DISTRIBUTIONS,
    DTYPES,
    GRID,
    GRID_QUICK,
    OPS,
    QUICK,
    STATED,
    Group,
    HiddenShape,
    LogitsShape,
    Plan,
    TokensShape,
    groups,
)
from benchmarks.measure import OUT_OF_TIME, DeviceLost, Settings, candidates, run_group, steps
from benchmarks.ours import names
from benchmarks.results import Measured
from benchmarks.timing import Bandwidth, measure_bandwidth
from entropy_kernels._console import Call, Parser
from entropy_kernels._progress import ProgressBoard, in_words

WRITE_EVERY = 3.0  # seconds between writes of a document that grows to megabytes
QUICK_SECONDS = 100.0  # "at most two minutes", with what was begun before and the plots
STOPPED, INTERRUPTED = "it was stopped", "it was interrupted"
QUICK_BUDGET = 0.7  # seconds that an implementation may take of a group's rounds


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


def shape(kind: type, expected: str) -> Callable[[str], Any]:
    """Argparse type: the sizes of a shape, between commas or times signs."""

    def parse(text: str) -> Any:
        parts = re.split("[,x×]", text)
        if len(parts) != len(fields(kind)) or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return kind(*map(int, parts))

    return parse


LOGITS = shape(LogitsShape, "N,V with N and V > 0, for example 512,151936")
HIDDEN = shape(HiddenShape, "N,H,V, all > 0, for example 1024,576,49152")


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            expected = "an integer >= 1" if kind is int else "a number > 0"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def parser(prog: str = results.COMMAND) -> argparse.ArgumentParser:
    """Command line of the suite."""
    # fmt: off
    result = Parser(
        prog=prog, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add = result.add_argument
    add("--quick", action="store_true", help="smaller shapes, at most two minutes")
    add("--grid", action="store_true",
        help="N × V grid of both dtypes, the most telling sizes first; on a GPU that is the default")
    add("--seconds", type=_positive(float), metavar="S",
        help="begin nothing new after S seconds, and write what there is; by default no limit, 100 with --quick")
    add("--ops", type=_listed("op", list(OPS)), metavar="A,B", help=f"ops to run, by default all: {', '.join(OPS)}")
    add("--impl", type=_listed("implementation", names()), metavar="A,B",
        help=f"implementations to run, by default all: {', '.join(names())}")
    add("--hidden", type=HIDDEN, action="append", metavar="N,H,V", help="tokens, features, vocabulary")
    add("--shape", type=LOGITS, action="append", metavar="N,V",
        help="rows and vocabulary; may be repeated")
    add("--tokens", type=_positive(int), action="append", metavar="N", help="tokens of the selection; may be repeated")
    add("--dtype", type=_listed("dtype", list(DTYPES)), metavar="A,B", help="of the logits; by default fp32,bf16")
    add("--device", default="cpu", help="cpu or cuda[:n]; default %(default)s")
    add("--threads", type=_positive(int), help="torch's threads; by default torch's own choice")
    add("--repeats", type=_positive(int),
        help=f"rounds; by default {STATED.repeats}, on a GPU at most {GRID.repeats}")
    add("--cache", choices=("hot", "cold", "both"),
        help="hot: caches as the previous call left them; cold: flushed before each call; by default both, with "
        "--quick on a CPU hot")
    add("--no-memory", action="store_true", help="do not measure the peak extra memory")
    add("--resume", action="store_true", help="keep the rows that the output folder has, and measure the others")
    add("--list", action="store_true", help="list ops and implementations with what cannot run here, and stop")
    add("--output", type=Path,
        help="folder for the results; by default benchmarks/results/<machine>, in place of the run before it, for a "
        "run with no restriction, else runs/bench/<machine>, so that a partial run does not replace a whole one")
    # fmt: on
    return result


def plan_of(arguments: argparse.Namespace, device: torch.device) -> Plan:
    """Shapes and repeats that the arguments ask for."""
    if arguments.grid or device.type != "cpu":
        plan = GRID_QUICK if arguments.quick else GRID
        if device.type == "cpu":
            plan = replace(plan, repeats=STATED.repeats, hidden=() if arguments.quick else CPU_HIDDEN)
    else:
        plan = QUICK if arguments.quick else STATED
    if arguments.shape:
        plan = replace(plan, logits=tuple(arguments.shape), hidden=())
    if arguments.hidden:
        plan = replace(plan, hidden=tuple(arguments.hidden))
    if arguments.tokens:
        tokens = tuple(TokensShape(count, distribution) for count in arguments.tokens for distribution in DISTRIBUTIONS)
        plan = replace(plan, tokens=tokens)
    return replace(plan, repeats=arguments.repeats) if arguments.repeats else plan


def output_folder(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Where the results go; see ``--output``."""
    if arguments.output is not None:
        return arguments.output
    restricted = arguments.quick or arguments.cache not in (None, "both") or arguments.no_memory or arguments.seconds
    restricted = restricted or any(
        getattr(arguments, name) for name in ("ops", "impl", "shape", "hidden", "tokens", "dtype", "repeats", "threads")
    )
    folder = results.ROOT / "runs" / "bench" if restricted else results.ROOT / "benchmarks" / "results"
    return folder / (results.slug(device) + ("-grid" if arguments.grid and device.type == "cpu" else ""))


@dataclass
class Run:
    """A run under way: what has been measured, and where it is written."""

    head: dict[str, Any]
    plan: Plan
    device: torch.device
    folder: Path
    measured: list[Measured] = field(default_factory=list)
    written: float = -math.inf  # time.monotonic of the last write

    @property
    def document(self) -> Path:
        return self.folder / "bench.json"

    def add(self, group: Group, found: list[results.Record]) -> None:
        """Take the records of a group, one that another process began included, and write what there is by now."""
        if found:
            begun = next((part for part in self.measured if part.title == group.title), None)
            if begun is None:
                self.measured.append(Measured(group.title, group.host, found))
            else:
                begun.records.extend(found)
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()

    def outcomes(self) -> list[targets.Outcome]:
        found = [record for part in self.measured for record in part.records]
        bandwidth = Bandwidth(**self.head["bandwidth"])
        outcomes = targets.judge(found, self.plan, self.device.type, bandwidth)
        return [outcome for outcome in outcomes if not outcome.absent]

    def write(self) -> None:
        self.written = time.monotonic()
        results.write(self.document, results.as_document(self.head, self.measured, self.outcomes()))


def main(argv: Sequence[str] | None = None, prog: str = results.COMMAND) -> int:
    """Run the suite; returns 0, 1 if an implementation of ours failed or gave a wrong result, or 130 after Ctrl-C."""
    started = time.monotonic()
    arguments = parser(prog).parse_args(argv)
    refuse = parser(prog).error
    device = _device(arguments.device, refuse)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = plan_of(arguments, device)
    dtypes = [DTYPES[name] for name in arguments.dtype or ("fp32", "bf16")]
    if arguments.quick and plan.by_value and not arguments.dtype:
        dtypes = [torch.bfloat16]
    work = groups(plan, arguments.ops or list(OPS), dtypes, device)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else math.inf)
    settings = Settings(
        repeats=plan.repeats,
        cache=arguments.cache or ("hot" if arguments.quick and device.type == "cpu" else "both"),
        names=frozenset(arguments.impl) if arguments.impl else None,
        memory=not arguments.no_memory,
        deadline=started + seconds,
        budget=QUICK_BUDGET if arguments.quick else None,
    )
    if arguments.list:
        _list(work, settings)
        return 0
    command = list(sys.argv[1:] if argv is None else argv)
    head = {
        "command": shlex.join([*results.COMMAND.split(), *command]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "machine": results.describe(device),
        "settings": {"repeats": settings.repeats, "cache": settings.cache, "memory": settings.memory},
        "stated_sizes": targets.at_the_stated_sizes(plan, device.type),
        "complete": False,
        "why_incomplete": "it has not ended yet",
        "not_reached": [],
    }
    run = Run(head, plan, device, output_folder(arguments, device))
    if run.folder.exists() and not run.folder.is_dir():
        refuse(f"argument --output: expected a folder, got the file {run.folder}")
    if arguments.resume and run.document.exists():
        before, run.measured = _before(run, refuse)
        settings = replace(settings, done=frozenset(r.key for part in run.measured for r in part.records))
        head.update({key: before[key] for key in ("command", "time", "machine")})
        started -= before["seconds"]
    other = report.in_the_way(run.folder)
    if other is not None:
        refuse(
            f"argument --output: expected a folder for results, got {run.folder}, whose {other} is no result; move it "
            "away or name another folder"
        )
    lost = _measure(run, work, settings, started)
    if lost is not None:
        _begin_again(command, settings.deadline, lost)
    text = report.write(run.folder)
    print(text)
    print(f"{head['seconds']:.0f} s; results in {run.folder}")
    code = _complain(run)
    if head["why_incomplete"] != INTERRUPTED:
        return code
    again = Call(prog, command).again("--resume")
    print(f"stopped; what was measured is kept in {run.folder}. To measure the rest:\n  {again}", file=sys.stderr)
    return 130


def _before(run: Run, refuse: Callable[[str], NoReturn]) -> tuple[dict[str, Any], list[Measured]]:
    """Head and groups of the document to go on with, whose head then stands for the new rows too."""
    try:
        before, measured = results.read(run.document)
        was, now = before["machine"], run.head["machine"]
        changed = [name for name in ("machine", "threads", "versions", "commit") if was[name] != now[name]]
    except (ValueError, TypeError, KeyError) as error:
        refuse(f"argument --resume: {run.document} cannot be read: {type(error).__name__}: {error}")
    if changed:
        refuse(f"argument --resume: {run.document} is of another {', '.join(changed)}")
    return before, measured


def _complain(run: Run) -> int:
    found = [record for part in run.measured for record in part.records]
    broken = [record for record in found if record.role == "ours" and record.status in ("failed", "wrong")]
    for record in broken:
        print(
            f"ours {record.status}: {record.op} {record.implementation} {record.shape}: {record.reason}",
            file=sys.stderr,
        )
    if run.head.get("complete", True) and not any(record.summary for record in found):
        print("nothing was timed: --list says what can run here, and why the rest cannot", file=sys.stderr)
        return 1
    return 1 if broken else 0


def _begin_again(command: list[str], deadline: float, why: str) -> None:
    """A broken CUDA context ends with its process: a new one goes on behind the row that broke it.

    On a CPU-only machine nothing gets here. Returns only if there is no time left for it.
    """
    left = deadline - time.monotonic()
    print(f"the device is lost ({why})", file=sys.stderr)
    if left < 20:
        return
    kept = [word for i, word in enumerate(command) if not _is_seconds(command, i) and word != "--resume"]
    limit = [] if math.isinf(left) else ["--seconds", f"{left:.0f}"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *kept, *limit, "--resume"])


def _is_seconds(command: list[str], i: int) -> bool:
    return command[i].startswith("--seconds") or (i > 0 and command[i - 1] == "--seconds")


def _device(text: str, refuse: Callable[[str], NoReturn]) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        refuse(f"argument --device: expected cpu or cuda[:n], got {text!r}")
    if device.type not in ("cpu", "cuda"):
        refuse(f"argument --device: expected cpu or cuda[:n], got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse("argument --device: torch sees no CUDA device here")
    return device


class _Terminated(KeyboardInterrupt):
    """By SIGTERM."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a run like Ctrl-C: what there is, is written."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _measure(run: Run, work: Sequence[Group], settings: Settings, started: float) -> str | None:
    """Measure the groups in their order until all are done, the time is up or somebody stops it; writes after each.

    Returns:
        None, or which row has broken the device.
    """
    total = sum(steps(group, settings) for group in work) + 1
    head = run.head

    def ended(why: str, not_reached: Sequence[Group]) -> None:
        head.update(complete=not why, why_incomplete=why, not_reached=[group.title for group in not_reached])
        head["seconds"] = round(time.monotonic() - started, 1)

    bandwidth = measure_bandwidth(run.device)
    head["bandwidth"] = asdict(bandwidth)
    done = reached = 1
    lost = None

    def tick(what: str) -> None:
        nonlocal reached
        reached += 1
        board.update("benchmark", min(reached, total), total, what)

    with ProgressBoard(file=sys.stderr, brief=True, ticking=False) as board:  # a thread would disturb the timing
        left = settings.deadline - time.monotonic()
        limit = "" if math.isinf(left) else f" for at most {in_words(left)}"
        board.say(f"measuring on {run.device}{limit}, into {run.folder}. Ctrl-C stops and keeps what there is.")
        for i, group in enumerate(work):
            try:
                with _stoppable():
                    if settings.out_of_time:
                        ended("its time was up", work[i:])
                        break
                    found = run_group(group, settings, run.device, bandwidth, tick)
            except DeviceLost as error:
                ended(f"the device was lost at {error}", work[i + 1 :])
                run.add(group, error.records)
                lost = str(error)
                break
            except KeyboardInterrupt as stop:
                ended(STOPPED if isinstance(stop, _Terminated) else INTERRUPTED, work[i:])
                break
            ended("it has not ended yet", work[i + 1 :])
            run.add(group, found)
            done += steps(group, settings)
            reached = done
        else:
            cut = any(record.reason == OUT_OF_TIME for part in run.measured for record in part.records)
            ended("its time was up" if cut else "", [])
    run.write()
    return lost


def _list(work: Sequence[Group], settings: Settings) -> None:
    for group in work:
        print(group.title)
        for implementation, case in candidates(group, settings):
            reason = implementation.supports(case)
            print(f"  {implementation.op} {implementation.name} {case.dtype_name}" + (f": {reason}" if reason else ""))


if __name__ == "__main__":
    sys.exit(main())
