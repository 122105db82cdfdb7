"""``make gpu-smoke``, ``make gpu-verify``, ``make gpu-bench``: what a GPU has to show, in three short runs.

    smoke   libraries, machine, every family of kernels, memcheck, timings, profile: is it right, is it fast?
    verify  the families again, the tests marked gpu of the CUDA backend and of none, racecheck: may `auto` choose it?
    bench   the other backends' tests, synccheck, initcheck, the benchmark with its peers

Read in this order: COURSES, the steps below, then `Course`, which gives each step its time. One step runs at a time, so
that nothing disturbs a measurement. A step that fails, or is out of time, does not stop the next ones. Every result is
a JSON line in ``OUT/<course>.jsonl`` the moment that it is known, so that a run that is cut off leaves all it had; logs
lie in ``OUT/logs``. Exit code 0: all is right; 1: something is not; 2: nothing could begin.

It needs a GPU, a torch that can use it, nvcc for the build (or libraries of ``make gpu-prebuilt``), and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import gpu_prebuilt

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds of its limit that a step gets to end by itself after an interrupt: xdist takes a few
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
TAIL = 30  # lines of a failed step's log that go into its record


class Gpu(NamedTuple):
    """As nvidia-smi tells it."""

    name: str
    capability: str
    driver: str

    @property
    def build_target(self) -> str:
        """As in TORCH_CUDA_ARCH_LIST: from Hopper on, with what only this architecture has."""
        return self.capability + ("a" if float(self.capability) >= 9 else "")


@dataclass
class Step:
    """What became of one; ``note``: its last words."""

    name: str
    state: str
    seconds: float
    note: str


class Course:
    """The steps of one command, their time, and the file that says what they found."""

    def __init__(self, name: str, arguments: argparse.Namespace, gpu: Gpu) -> None:
        self.name, self.arguments, self.gpu = name, arguments, gpu
        self.out: Path = arguments.out.resolve()
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.steps: list[Step] = []
        self.recorded: set[str] = set()
        self._file = open(self.out / f"{name}.jsonl", "w")  # noqa: SIM115  (for the life of the process)
        self.record("course", name=name, date=now(), commit=commit(), gpu=gpu.name, driver=gpu.driver)

    def record(self, kind: str, **fields: Any) -> None:
        self.recorded.add(kind)
        after = round(time.monotonic() - self.begin, 1)
        print(json.dumps({"record": kind, "after": after, **fields}), file=self._file, flush=True)

    def left(self, limit: float) -> float:
        return min(limit, self.arguments.seconds - (time.monotonic() - self.begin))

    def step(self, name: str, limit: float, work: Callable[[float], tuple[str, str]]) -> bool:
        """Do ``work(seconds)``, which returns a state and a note, unless too little time is left; whether it passed."""
        print(f"... {name}", flush=True)
        seconds, begin = self.left(limit), time.monotonic()
        state, note = NOT_RUN, f"{max(seconds, 0):.0f} s left of its {limit:.0f}"
        if seconds > 0.2 * limit:
            try:
                state, note = work(seconds)
            except Exception as error:  # a step that cannot be done is a finding: the next ones are still to come
                state, note = FAILED, f"{type(error).__name__}: {error}"
        step = Step(name, state, round(time.monotonic() - begin, 1), here(note))
        self.steps.append(step)
        self.record("step", **vars(step))
        print(f"{state:12} {name:12} {step.seconds:6.1f} s  {step.note}", flush=True)
        return state == PASSED

    def run(self, name: str, command: Sequence[str], limit: float, **variables: str) -> bool:
        """A program as a step. JSON lines that it prints become records; its log stays."""
        return self.step(name, limit, lambda seconds: self.program(name, command, seconds, variables))

    def program(self, name: str, command: Sequence[str], seconds: float, variables: dict[str, str]) -> tuple[str, str]:
        command = [word.replace("{seconds}", f"{seconds - GRACE:.0f}") for word in command]
        log = self.logs / f"{self.name}-{name}.log"
        with open(log, "wb") as file:
            # a session of its own, so that a step that hangs goes with all of its processes
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "PATH": PATH, "PYTHONUNBUFFERED": "1", **variables},
            )  # fmt: skip
            code = wait(process, seconds)
        lines = log.read_text(errors="replace").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError):
                if line.startswith("{"):
                    self.record(name, **json.loads(line))
        words = [line.strip("= ") for line in lines if line.strip(" =\t") and not line.startswith("{")]
        counted = [line for line in words if "SUMMARY:" in line or re.search(r"\d+ (passed|failed)", line)]
        if code != 0:
            self.record("log", step=name, tail=[here(line) for line in lines[-TAIL:]])
        state = OUT_OF_TIME if code is None else PASSED if code == 0 else FAILED
        return state, (counted or words or [""])[-1][:160]

    def finish(self) -> int:
        """The table; 0 if all is right."""
        from entropy_kernels._console import print_table

        rows = [(s.name, "OK" if s.state == PASSED else s.state, f"{s.seconds:.0f} s", s.note) for s in self.steps]
        title = f"gpu-{self.name} on {self.gpu.name}, {time.monotonic() - self.begin:.0f} s"
        print_table(title, rows, ("step", "result", "time", "last words"))
        print(f"results in {here(str(self.out))}")
        return 0 if all(step.state == PASSED for step in self.steps) else 1


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code, or None if the time was up: it is interrupted, to write what it has, and then killed with all
    processes of its session. One that waits inside the driver may not go at once: it is not waited for."""
    try:
        return process.wait(max(seconds - GRACE, 0.8 * seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, 0.2 * seconds))
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)


def here(text: str) -> str:
    """Without this machine's paths, which are nothing to commit."""
    return text.replace(f"{ROOT}{os.sep}", "").replace(sys.executable, "python")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """$COMMIT where the sources come without their repository."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


# ---- steps -----------------------------------------------------------------------------------------------------------


def libraries(course: Course) -> None:
    """The compiled halves: prebuilt ones where they load, else built for this GPU alone."""
    if not course.arguments.build:
        return
    folder = course.arguments.prebuilt
    reason = gpu_prebuilt.install(folder, ROOT / "entropy_kernels") if folder.exists() else f"no {folder}"
    if reason is None:
        course.step("libraries", 10, lambda _: (PASSED, f"prebuilt, of {folder}"))
        return
    course.record("prebuilt", refused=here(reason))
    variables = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": course.gpu.build_target, "MAX_JOBS": str(os.cpu_count())}
    course.run("libraries", (sys.executable, "setup.py", "build_ext", "--inplace"), 150, **variables)


_MACHINE = """
import json, torch
from entropy_kernels.backends import native, registry, verdict
from entropy_kernels.ops import products
device = registry.gpus()[0]
def told(fact):
    try:
        return fact()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
facts = {
    **told(lambda: vars(verdict.machine(device))),
    "loads": native.cuda_load_error or "yes",
    "kernels": told(lambda: len(native.cuda_kernels())),
    "in local memory": told(lambda: [kernel.name for kernel in native.cuda_kernels() if kernel.local]),
    "largest cluster": told(native.largest_cluster),
    "adds bf16 products to fp32": told(lambda: products.adds_to_fp32(torch.bfloat16, device)),
    "free bytes": told(lambda: torch.cuda.mem_get_info(device)[0]),
}
print(json.dumps(facts))
spilled = isinstance(facts["in local memory"], list) and facts["in local memory"]
raise SystemExit(native.cuda_load_error or (f"kernels in local memory: {spilled}" if spilled else 0))
"""


def machine(course: Course) -> bool:
    """What the libraries and the device say of themselves, in a process of its own: they may not even load.

    Returns:
        Whether they said it. Then the others can be tried, even if the CUDA half cannot.
    """
    with contextlib.suppress(OSError):
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, env={"PATH": PATH}).stdout
        (course.logs / "nvidia-smi.txt").write_text(text)
    course.run("machine", (sys.executable, "-c", _MACHINE), 45)
    return "machine" in course.recorded


def families(course: Course, limit: float) -> list[Any]:
    """The smoke matrix, whose verdict `auto` follows from here on."""
    from entropy_kernels import verify
    from entropy_kernels.backends import registry

    outcomes: list[Any] = []

    def work(seconds: float) -> tuple[str, str]:
        def ended(outcome: verify.Outcome) -> None:
            course.record("family", **outcome.as_dict())
            if not outcome.passed:
                print(outcome, flush=True)

        _, _, found = verify.verify(registry.gpus()[0], ended=ended, seconds=seconds, at_once=at_once())
        outcomes.extend(found)
        return _of_families(found)

    course.step("families", limit, work)
    return outcomes


def sanitize(course: Course, tool: str, limit: float, outcomes: Sequence[Any], wanted: Callable[[str], bool]) -> None:
    """compute-sanitizer over the families that passed. Without torch's pool each tensor has bounds of its own."""
    from entropy_kernels import verify
    from entropy_kernels.backends import registry

    passed = [outcome.family for outcome in outcomes if outcome.passed and wanted(outcome.family.name)]
    prefix = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")

    def work(seconds: float) -> tuple[str, str]:
        found = verify.run_families(
            passed, registry.gpus()[0], seconds=seconds, prefix=prefix, at_once=at_once(), patience=3.0,
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PATH": PATH},
            ended=lambda outcome: course.record(tool, **outcome.as_dict()),
        )  # fmt: skip
        return _of_families(found)

    course.step(tool, limit, work)


def _of_families(outcomes: Sequence[Any]) -> tuple[str, str]:
    wrong = [f"{o.family.name} {o.state}, {o.detail}" for o in outcomes if not o.passed]
    note = f"{len(outcomes) - len(wrong)} of {len(outcomes)} families passed"
    more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
    return (PASSED if outcomes and not wrong else FAILED), "; ".join([note, *wrong[:5], *more])


def at_once() -> int:
    return max(1, min(8, os.cpu_count() or 1))


def tests(course: Course, groups: str, limit: float) -> Path:
    """The tests marked gpu of some backends; the log says which ended, and how."""
    log = course.logs / f"{course.name}-tests-{groups.replace(',', '-')}.jsonl"
    processes = str(max(1, min(12, os.cpu_count() or 1)))
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if has_gpu_tests(path))
    command = (
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--gpu-backend", groups,
        "--gpu-log", str(log), "-n", processes, "--dist", "worksteal", "--max-worker-restart", "100",
        "--timeout", "25", "--disable-warnings", *course.arguments.pytest, *files,
    )  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    course.run(f"tests-{groups.replace(',', '-')}", command, limit, **variables)
    for event in events(log):
        if event["event"] == "device_lost" or event.get("outcome") == "failed":
            course.record("test", **event)
    for test in unended(events(log)):
        course.record("test", event="begun and not ended", test=test)
    return log


def has_gpu_tests(path: Path) -> bool:
    """Files without any are not collected, which takes each process seconds."""
    text = path.read_text(encoding="utf-8")
    return any(word in text for word in ("mark.gpu", "on_gpu", "place"))


def events(log: Path) -> list[dict[str, Any]]:
    """What a run of the tests wrote; a line that was cut off is left out."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def unended(found: Sequence[dict[str, Any]]) -> list[str]:
    """Tests that were begun and did not end: where a process hung or was lost."""
    ended = {event["test"] for event in found if event["event"] == "end"}
    return [event["test"] for event in found if event["event"] == "begin" and event["test"] not in ended]


def conclude(course: Course, outcomes: Sequence[Any], log: Path) -> None:
    """Which (op, backend) passed all of its tests and those that name none, its families, and racecheck."""
    from entropy_kernels import verify

    found = events(log)
    complete = any(e["event"] == "finish" for e in found) and not unended(found)
    raced = [step for step in course.steps if step.name == "racecheck" and step.state != PASSED]
    ends = [event for event in found if event["event"] == "end"]
    pairs = []
    for pair in verify.pairs_of(outcomes):
        mine = [e for e in ends if not e["backend"] or (e["backend"] == pair.backend and pair.op in e["ops"])]
        failed = [e["test"] for e in mine if e["outcome"] == "failed"]
        count = sum(e["outcome"] == "passed" for e in mine if e["backend"])
        reasons = [f"{name}: {text}" for name, text in pair.failed.items()]
        reasons += [f"{len(failed)} tests failed, {failed[0].rpartition('::')[2]} first"] if failed else []
        reasons += [] if complete else ["not all tests ended"]
        reasons += [] if count else ["no test of it ran"]
        reasons += [f"racecheck: {step.note}" for step in raced if pair.backend == "cuda"]
        pairs.append({"op": pair.op, "backend": pair.backend, "tests": count, "verified": not reasons, "not": reasons})
    document = {
        "date": now(), "commit": commit(), "gpu": course.gpu.name, "driver": course.gpu.driver,
        "architecture": f"sm_{course.gpu.capability.replace('.', '')}", "pairs": pairs,
    }  # fmt: skip
    (course.out / "verification.json").write_text(json.dumps(document, indent=1) + "\n")
    for pair in pairs:
        course.record("pair", **pair)
    right = [pair for pair in pairs if pair["verified"]]
    asked = [pair for pair in pairs if pair["backend"] == "cuda"]
    missing = [f"{p['op']}: {'; '.join(p['not'])}" for p in asked if not p["verified"]]
    note = f"{len(right)} of {len(pairs)} pairs; " + "; ".join(missing or ["all of cuda"])
    course.step("verified", 10, lambda _: (FAILED if missing or not asked else PASSED, note))


# ---- courses ---------------------------------------------------------------------------------------------------------

_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")


def smoke(course: Course) -> None:
    outcomes = families(course, 75)
    sanitize(course, "memcheck", 60, outcomes, lambda name: name.startswith("cuda/"))
    course.run("timings", (sys.executable, "tools/gpu_timings.py", "--seconds", "{seconds}", *extra(course)), 60)
    if course.arguments.profile:
        # the clocks are left as they are: they belong to the machine
        ncu = ["ncu", "--clock-control", "none", "--kernel-name", "regex:token_stats|selection|covariance"]
        ncu += [word for section in _SECTIONS for word in ("--section", section)]
        course.run("profile", (*ncu, sys.executable, "tools/gpu_timings.py", "--profile", *extra(course)), 30)


def verification(course: Course) -> None:
    outcomes = families(course, 75)
    log = tests(course, "cuda,none", 150)
    kinds = ("forward-bulk", "forward-clusters", "forward-parts", "selection", "covariance", "policy-loss")
    sanitize(course, "racecheck", 60, outcomes, lambda name: name.startswith(tuple(f"cuda/{kind}" for kind in kinds)))
    conclude(course, outcomes, log)


def bench(course: Course) -> None:
    outcomes = families(course, 75)
    command = (sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--seconds", "{seconds}")
    out = ("--output", str(course.out / "benchmark"), *course.arguments.bench)
    course.run("benchmark", (*command, *out), max(120.0, course.arguments.seconds - 220))
    tests(course, "triton,torch", 120)
    for tool in ("synccheck", "initcheck"):
        sanitize(course, tool, 45, outcomes, lambda name: name.startswith("cuda/"))


def extra(course: Course) -> list[str]:
    return course.arguments.timings


COURSES = {"smoke": (smoke, 180.0), "verify": (verification, 240.0), "bench": (bench, 540.0)}


def find_gpu() -> Gpu | None:
    """The first one; None without one."""
    query = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=True, env={**os.environ, "PATH": PATH}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"(.+), (\d+\.\d), (\S+)$", (done.stdout.strip().splitlines() or [""])[0])
    return Gpu(*found.groups()) if found else None


def missing(gpu: Gpu | None) -> str | None:
    """What this machine lacks to begin."""
    if gpu is None:
        return "nvidia-smi shows no GPU here"
    code = "import torch; torch.zeros(1).cuda()"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode:
        return f"{sys.executable} has no torch that can use the GPU: make gpu-smoke PYTHON=..."
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_smoke", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("course", choices=COURSES)
    add("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results (default: %(default)s)")
    add("--seconds", type=float, help="for everything; by default what the course is meant to take")
    add("--prebuilt", type=Path, default=ROOT / "build" / "gpu-prebuilt", help="libraries of make gpu-prebuilt")
    add("--no-build", dest="build", action="store_false", help="take the libraries that are in place")
    add("--no-profile", dest="profile", action="store_false", help="without Nsight Compute")
    for name in ("timings", "pytest", "bench"):
        add(f"--{name}", type=shlex.split, default=[], metavar="ARGS", help=f"more arguments of the {name} step")
    arguments = parser.parse_args(argv)
    # the package of this checkout, installed or not, also in the processes of the steps
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    work, seconds = COURSES[arguments.course]
    arguments.seconds = arguments.seconds or seconds
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job's children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gpu = find_gpu()
    reason = missing(gpu)
    if gpu is None or reason is not None:
        print(f"gpu-{arguments.course}: {reason}", file=sys.stderr)
        return 2
    try:
        course = Course(arguments.course, arguments, gpu)
    except OSError as error:
        print(f"gpu-{arguments.course}: argument --out: expected a folder to write to, got {error}", file=sys.stderr)
        return 2
    libraries(course)
    if machine(course):
        work(course)
    return course.finish()


if __name__ == "__main__":
    sys.exit(main())
