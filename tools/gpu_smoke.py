"""``make gpu-smoke``, ``make gpu-verify``, ``make gpu-bench``: what a GPU has to show, in three short runs.

    smoke   libraries, machine, every family of kernels, memcheck, timings, profile: is it right, is it fast?
    verify  the families again, the tests marked gpu of the CUDA backend and of none, racecheck: may `auto` choose it?
    bench   the benchmark with its peers, synccheck, initcheck, the other backends' tests

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
AT_ONCE = min(16, os.cpu_count() or 1)  # processes, of families or of tests
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
TAIL = 30  # lines of a failed step's log that go into its record


class Gpu(NamedTuple):
    """Name and compute capability by torch, driver by nvidia-smi."""

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
        self.recorded: dict[str, dict[str, Any]] = {}  # the last of each kind
        self._file = open(self.out / f"{name}.jsonl", "w", encoding="utf-8")  # noqa: SIM115  (for the life of the process)
        self.record("course", name=name, date=now(), commit=commit(), gpu=gpu.name, driver=gpu.driver)

    def record(self, kind: str, /, **fields: Any) -> None:
        """A line of results; ``record`` and ``after`` (seconds) are its own."""
        self.recorded[kind] = fields
        after = round(time.monotonic() - self.begin, 1)
        line = json.dumps({"record": kind, "after": after, **fields}, ensure_ascii=False)
        print(line, file=self._file, flush=True)

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
        command = [word.replace("{seconds}", f"{max(1.0, seconds - GRACE):.0f}") for word in command]
        log = self.logs / f"{self.name}-{name}.log"
        told = 0

        def hear() -> None:
            """Whole lines that have come since."""
            nonlocal told
            new = log.read_bytes()[told:]
            new = new[: new.rfind(b"\n") + 1]
            told += len(new)
            for fields in json_lines(new.decode(errors="replace")):
                self.record(name, **fields)

        with open(log, "wb") as file:
            # a session of its own, so that a step that hangs goes with all of its processes
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "PATH": PATH, "PYTHONUNBUFFERED": "1", **variables},
            )  # fmt: skip
            code = wait(process, seconds, hear)
        lines = log.read_text(errors="replace").splitlines()
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
        print_table(title, rows, ("step", "result", "time", "note"))
        print(f"results in {here(str(self.out))}")
        return 0 if all(step.state == PASSED for step in self.steps) else 1


def wait(process: subprocess.Popen, seconds: float, hear: Callable[[], None]) -> int | None:
    """The exit code, or None if the time was up: it is interrupted, to write what it has, and then killed with all
    processes of its session. One that waits inside the driver may not go at once: it is not waited for.

    Meanwhile what it writes is heard.
    """
    end = time.monotonic() + max(seconds - GRACE, 0.8 * seconds)
    try:
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(1.0, max(0.01, end - time.monotonic())))
            hear()
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, 0.2 * seconds))
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        hear()


def json_lines(text: str) -> list[dict[str, Any]]:
    """The objects among its lines; one that was cut off is left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.startswith("{") else []
    return found


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
    folder = course.arguments.prebuilt
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    variables = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": course.gpu.build_target, "MAX_JOBS": str(os.cpu_count())}

    def work(seconds: float) -> tuple[str, str]:
        reason = gpu_prebuilt.install(folder, ROOT / "entropy_kernels") if folder.exists() else f"no {folder}"
        if reason is None:
            return PASSED, f"prebuilt, of {folder}"
        course.record("prebuilt", refused=here(reason))
        return course.program("libraries", command, seconds, variables)

    if course.arguments.build:
        course.step("libraries", 150, work)


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
print(", ".join(f"{name} {facts.get(name)}" for name in ("gpu", "architecture", "torch", "largest cluster")))
spilled = isinstance(facts["in local memory"], list) and facts["in local memory"]
raise SystemExit(native.cuda_load_error or (f"kernels in local memory: {spilled}" if spilled else 0))
"""


def machine(course: Course) -> bool:
    """What the libraries and the device say of themselves, in a process of its own: they may not even load.

    Returns:
        Whether they said it. Then the others can be tried, even if the CUDA half cannot; unless it was to be in place,
        where a run without it would only take time.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, env={"PATH": PATH}).stdout
        (course.logs / "nvidia-smi.txt").write_text(text)
    right = course.run("machine", (sys.executable, "-c", _MACHINE), 45)
    return "machine" in course.recorded and (right or course.arguments.build)


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

        _, where, found = verify.verify(registry.gpus()[0], ended=ended, seconds=seconds, at_once=AT_ONCE)
        outcomes.extend(found)
        course.record("verdict", kept=here(where))
        return _of_families(found)

    course.step("families", limit, work)
    return outcomes


def families_seen(course: Course, limit: float) -> list[Any]:
    """What became of them in an earlier course in the same folder, if it had this machine and these kernels."""
    from entropy_kernels import verify
    from entropy_kernels.backends import registry, verdict

    gpu = registry.gpus()[0]
    kept = verdict.read(verdict.machine(gpu))
    if kept is None:
        return families(course, limit)
    failed = {name: text for pair in kept.pairs for name, text in pair.failed.items()}
    found = []
    for family in verify.families_here(gpu):
        if all(kept.of(op, family.backend) for op in family.ops):  # else it was not judged
            text = failed.get(family.name, "")
            found.append(verify.Outcome(family, verify.WRONG if text else verify.PASSED, detail=text))
    state, note = _of_families(found)
    course.step("families", limit, lambda _: (state, f"{note}, as found {kept.date}"))
    return found


def sanitize(course: Course, tool: str, limit: float, outcomes: Sequence[Any], wanted: Callable[[str], bool]) -> None:
    """compute-sanitizer over the families that passed. Without torch's pool each tensor has bounds of its own."""
    from entropy_kernels import verify
    from entropy_kernels.backends import registry

    passed = [outcome.family for outcome in outcomes if outcome.passed and wanted(outcome.family.name)]
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    prefix += ["--launch-timeout", "120"]  # by default 10 s, after which the program runs unseen
    prefix += ["--report-api-errors", "no"] if tool == "memcheck" else []  # CUDA's own start asks for what is not there

    def work(seconds: float) -> tuple[str, str]:
        found = verify.run_families(
            passed, registry.gpus()[0], seconds=seconds, at_once=AT_ONCE, patience=3.0,
            prefix=prefix, needed=r"SUMMARY: 0 (errors|hazards)",
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


def tests(course: Course, groups: str, limit: float) -> Path:
    """The tests marked gpu of some backends; the log says which ended, and how."""
    log = course.logs / f"{course.name}-tests-{groups.replace(',', '-')}.jsonl"
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if has_gpu_tests(path))
    command = (
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--gpu-backend", groups,
        "--gpu-log", str(log), "-n", str(AT_ONCE), "--dist", "worksteal", "--max-worker-restart", "100",
        "--timeout", "25", "--disable-warnings", *course.arguments.pytest, *files,
    )  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    course.run(f"tests-{groups.replace(',', '-')}", command, limit, **variables)
    for event in events(log):
        if event["event"] in ("device_lost", "collect_failed") or event.get("outcome") == "failed":
            course.record("test", **event)
    for test in unended(events(log)):
        course.record("test", event="begun and not ended", test=test)
    return log


def has_gpu_tests(path: Path) -> bool:
    """Files without any are not collected, which takes each process seconds."""
    return (
        re.search(
            r"mark\.gpu|on_gpu|BackendDevice|backend_devices|\b(loss|selection)_on\b", path.read_text(encoding="utf-8")
        )
        is not None
    )


def events(log: Path) -> list[dict[str, Any]]:
    """What a run of the tests wrote."""
    return json_lines(log.read_text()) if log.exists() else []


def unended(found: Sequence[dict[str, Any]]) -> list[str]:
    """Tests that were begun and did not end: where a process hung or was lost."""
    ended = {event["test"] for event in found if event["event"] == "end"}
    return [event["test"] for event in found if event["event"] == "begin" and event["test"] not in ended]


def conclude(course: Course, outcomes: Sequence[Any], log: Path) -> None:
    """Which (op, backend) passed all of its tests and those that name none, its families, and racecheck."""
    from entropy_kernels import verify

    found = events(log)
    ends = [event for event in found if event["event"] == "end"]
    collected = next((event["tests"] for event in found if event["event"] == "collected"), -1)
    complete = (
        any(event["event"] == "finish" and event["exit"] in (0, 1) for event in found)
        and not any(event["event"] == "collect_failed" for event in found)
        and len({event["test"] for event in ends}) == collected
        and not unended(found)
    )
    raced = [step for step in course.steps if step.name == "racecheck" and step.state != PASSED]
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
        "architecture": f"sm_{course.gpu.capability.replace('.', '')}", "machine": course.recorded.get("machine"),
        "pairs": pairs,
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

TIMINGS = (sys.executable, "-m", "benchmarks.gpu_timings")
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats")


def smoke(course: Course) -> None:
    outcomes = families(course, 75)
    sanitize(course, "memcheck", 60, outcomes, lambda name: name.startswith("cuda/"))
    course.run("timings", (*TIMINGS, "--seconds", "{seconds}", *course.arguments.timings), 60)
    if course.arguments.profile:
        # the clocks are left as they are: they belong to the machine
        ncu = ["ncu", "--clock-control", "none", "--kernel-name", "regex:token_stats|selection|covariance"]
        ncu += [word for section in _SECTIONS for word in ("--section", section)]
        course.run("profile", (*ncu, *TIMINGS, "--profile", *course.arguments.timings), 30)


def verification(course: Course) -> None:
    outcomes = families(course, 75)
    log = tests(course, "cuda,none", 150)
    kinds = ("forward-bulk", "forward-clusters", "forward-parts", "selection", "covariance")
    sanitize(course, "racecheck", 60, outcomes, lambda name: name.startswith(tuple(f"cuda/{kind}" for kind in kinds)))
    conclude(course, outcomes, log)


def bench(course: Course) -> None:
    outcomes = families_seen(course, 75)
    command = (sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--seconds", "{seconds}")
    out = ("--output", str(course.out / "benchmark"), *course.arguments.bench)
    course.run("benchmark", (*command, *out), 0.75 * course.arguments.seconds)
    for tool in ("synccheck", "initcheck"):
        sanitize(course, tool, 45, outcomes, lambda name: name.startswith("cuda/"))
    tests(course, "triton,torch", 120)


COURSES = {"smoke": (smoke, 180.0), "verify": (verification, 240.0), "bench": (bench, 540.0)}


def find_gpu() -> Gpu | str:
    """The first that torch finds, on which all steps run; else what this machine lacks to begin."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    code = "import torch; torch.zeros(1).cuda(); p = torch.cuda.get_device_properties(0); "
    code += "print(p.name, f'{p.major}.{p.minor}', sep='\\n')"
    try:
        driver = answer(query).strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        driver = []
    if not driver or not re.match(r"\d+\.", driver[0]):
        return "nvidia-smi is not installed here, or shows no GPU"
    try:
        name, capability = answer((sys.executable, "-c", code)).splitlines()[-2:]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return f"{sys.executable} has no torch that can use the GPU ({why[-1]}); PYTHON=... names another one"
    return Gpu(name, capability, driver[0])


def answer(command: Sequence[str]) -> str:
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_smoke", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("course", choices=COURSES, metavar="COMMAND", help=f"one of {', '.join(COURSES)}")
    add("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results (default: %(default)s)")
    limits = ", ".join(f"{seconds:.0f}" for _, seconds in COURSES.values())
    add("--seconds", type=float, help=f"limit of the whole run (default: {limits})")
    add("--prebuilt", type=Path, default=ROOT / "build" / "gpu-prebuilt", help="libraries of make gpu-prebuilt")
    add("--no-build", dest="build", action="store_false", help="take the libraries that are in place")
    add("--no-profile", dest="profile", action="store_false", help="without Nsight Compute")
    for name in ("timings", "pytest", "bench"):
        more = f"more arguments of the {name} step, as one word"
        add(f"--{name}", type=shlex.split, default=[], metavar="ARGS", help=more)
    arguments = parser.parse_args(argv)
    # the package of this checkout, installed or not, also in the processes of the steps
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    work, seconds = COURSES[arguments.course]
    arguments.seconds = arguments.seconds or seconds
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job's children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(f"gpu-{arguments.course}: {gpu}", file=sys.stderr)
        return 2
    # a verdict of this course, not the user's: it may be cut short
    os.environ["XDG_CACHE_HOME"] = str(arguments.out.resolve() / "cache")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # steps are ended then, as by Ctrl-C
    try:
        course = Course(arguments.course, arguments, gpu)
    except OSError as error:
        print(f"gpu-{arguments.course}: argument --out: expected a folder to write to, got {error}", file=sys.stderr)
        return 2
    try:
        libraries(course)
        if machine(course):
            work(course)
    except KeyboardInterrupt:
        course.steps.append(Step("interrupted", FAILED, 0.0, ""))
    return course.finish()


if __name__ == "__main__":
    sys.exit(main())
