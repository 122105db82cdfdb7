"""``make gpu-check``: everything that a GPU has to show, in one call of at most nine minutes.

For a machine with a GPU, its own torch, a toolkit, and no network; packages that it lacks may lie as wheels in
``.wheels/``. Steps run in the order of what is worth most: build, self-check, tests on the GPU, compute-sanitizer,
benchmark. Each has a time limit and a log; a step that fails or runs out of time does not stop the next ones, and what
has been seen so far is packed after each, so that a run that is cut off still leaves its results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for everything; a lent machine ends a command after ten minutes.
DEADLINE = 525.0
#: A step is not begun with less than this share of its own limit left.
WORTH_BEGINNING = 0.25


@dataclass(frozen=True)
class Step:
    """A command with its own log; ``limit`` in seconds. Without ``needs`` (a step that passed) it is not run."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: str | None = None


@dataclass
class Result:
    """What became of a step: "passed", "failed", "out of time" or "not run", and why."""

    name: str
    command: str
    state: str
    seconds: float
    note: str = ""


def plan(python: str, out: Path, *, wheels: Path) -> list[Step]:
    """The steps, most valuable first."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=200")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all")
    steps = [
        Step("machine", ("bash", "-c", f"nvidia-smi; nvidia-smi -q; nvcc --version; {python} -m pip list"), 30),
    ]
    if any(wheels.glob("*.whl")):
        install = (python, "-m", "pip", "install", "--no-deps", "--no-index", "-q")
        steps.append(Step("wheels", (*install, *sorted(map(str, wheels.glob("*.whl")))), 60))
    steps += [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 150),
        Step("doctor", (python, "-m", "entropy_kernels.cli", "doctor"), 60),
        Step("tests", (*pytest, "-m", "gpu", "-n", "8", "--dist", "loadfile", "tests"), 200, needs="build"),
        Step("benchmark-quick", _benchmark(python, out / "quick", "--quick"), 100, needs="build"),
    ]
    # doctor's self-check calls every op of every backend on small data: the tools are a hundred times slower
    self_check = (python, "-m", "entropy_kernels.cli", "doctor")
    steps += [
        Step(tool, (*sanitizer, "--tool", tool, *self_check), 60, needs="build")
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ]
    steps.append(Step("benchmark", _benchmark(python, out / "full"), 240, needs="build"))
    return steps


def _benchmark(python: str, out: Path, *flags: str) -> tuple[str, ...]:
    return (python, "-m", "benchmarks.run", "--device", "cuda", "--output", str(out), *flags)


def run(steps: Sequence[Step], out: Path, *, deadline: float) -> list[Result]:
    """Run the steps within ``deadline`` seconds; leaves logs, summary.json, and all of it in results.tar.gz."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + deadline
    results: list[Result] = []
    for step in steps:
        result = _run_step(step, out, end, {r.name for r in results if r.state == "passed"})
        results.append(result)
        print(f"{result.state:12} {result.name:16} {result.seconds:6.1f} s  {result.note}", flush=True)
        (out / "summary.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        _pack(out)
    return results


def _run_step(step: Step, out: Path, end: float, passed: set[str]) -> Result:
    command = shlex.join(step.command)
    if step.needs is not None and step.needs not in passed:
        return Result(step.name, command, "not run", 0.0, f"needs {step.needs}")
    limit = min(step.limit, end - time.monotonic())
    if limit < WORTH_BEGINNING * step.limit:
        return Result(step.name, command, "not run", 0.0, f"{max(limit, 0):.0f} s left")
    started = time.monotonic()
    log = out / f"{step.name}.log"
    try:
        with open(log, "wb") as file:
            # a session of its own, so that a step that hangs goes with all of its processes
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Result(step.name, command, "out of time", time.monotonic() - started, f"after {limit:.0f} s")
    except OSError as error:
        return Result(step.name, command, "failed", time.monotonic() - started, str(error))
    lines = log.read_text(errors="replace").strip().splitlines()
    note = lines[-1][:160] if lines else ""
    return Result(step.name, command, "passed" if code == 0 else "failed", time.monotonic() - started, note)


def _pack(out: Path) -> None:
    scratch = out / ".results.tmp"
    with tarfile.open(scratch, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.name not in (scratch.name, "results.tar.gz"):
                archive.add(path, path.relative_to(out))
    os.replace(scratch, out / "results.tar.gz")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; 0 if every step passed."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check"), help="folder for logs"
    )
    parser.add_argument("--seconds", type=float, default=DEADLINE, help="for everything (default: %(default)s)")
    parser.add_argument("--only", metavar="A,B", help="names of the steps to run, by default all")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    arguments = parser.parse_args(argv)
    steps = plan(sys.executable, arguments.out, wheels=ROOT / ".wheels")
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {step.name for step in steps}
        if unknown:
            parser.error(f"argument --only: expected names of steps, got {', '.join(sorted(unknown))}")
        steps = [step for step in steps if step.name in wanted]
        known = {step.name for step in steps}
        steps = [Step(s.name, s.command, s.limit, s.needs if s.needs in known else None) for s in steps]
    if arguments.list:
        for step in steps:
            print(f"{step.name:16} {step.limit:4.0f} s  {shlex.join(step.command)}")
        return 0
    results = run(steps, arguments.out, deadline=arguments.seconds)
    print(f"results in {arguments.out}")
    return 0 if all(result.state == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
