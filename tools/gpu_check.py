"""``make gpu-check``: everything that a GPU has to show, in one call of at most nine minutes.

For a machine with a GPU, its own torch, a toolkit, and no network; packages that it lacks may lie as wheels in
``.wheels/peers``. What is short or worth most comes first: build, self-check, the tests of the CUDA kernels on the GPU,
compute-sanitizer, the other tests, and the benchmark with all the time that is left, of which a share is kept for it.
One step runs at a time: nothing disturbs a measurement. A step that fails or runs out of time does not stop the next
ones, and the results are written anew after each (tools/gpu_summary.py), so that a run that is cut off leaves them.

Logs stay in ``runs/gpu-check``. A second call goes on from there: ``--only benchmark`` adds to what is known, as long
as the sources are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_summary
from gpu_summary import FAILED, NOT_RUN, OUT_OF_TIME, PASSED, Gpu, Result

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for everything; a lent machine ends a command after ten minutes.
DEADLINE = 525.0
#: What the carried wheels hold.
SITE = ROOT / "runs" / "gpu-check-site"
#: A step is not begun with less than this share of its own limit left.
WORTH_BEGINNING = 0.25
#: Of its time, a step gets this much (seconds at most, and share) to end by itself after an interrupt: pytest with
#: several processes takes 12 s.
GRACE, GRACE_SHARE = 20.0, 0.25
#: Files that hold tests marked gpu; collecting all others would take each process ten seconds.
TEST_FILES = (
    "test_hardware.py", "test_token_stats*.py", "test_selection*.py", "test_losses*.py", "test_cuda_*.py",
    "test_triton_*.py", "test_policy_loss*.py", "test_linear_*.py",
)  # fmt: skip
#: What the results say anew for other sources.
SOURCES = ("csrc", "entropy_kernels", "tests", "tools", "benchmarks", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".json", ".toml", ".cpp", ".h", ".cu")


@dataclass(frozen=True)
class Step:
    """A command with its own log.

    Attributes:
        command: "{seconds}" in it becomes the seconds that it has for its work.
        limit: seconds, at most.
        needs: a step that has to have passed, if it has been run, in this call or an earlier one.
        reserve: seconds that earlier steps leave to it.
        variables: environment, beside the one of this process.
        ending: seconds of its limit that are not for its work: to write what it found, before it is interrupted.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: str | None = None
    reserve: float = 0.0
    variables: dict[str, str] = field(default_factory=dict)
    ending: float = 0.0


def plan(
    python: str, work: Path, *, wheels: Path, gpu: Gpu | None, commit: str | None = None, profile: bool = False
) -> list[Step]:
    """The steps, most valuable first."""
    steps = [
        Step("machine", ("bash", "-c", f"nvidia-smi; nvidia-smi -q; nvcc --version; lscpu; {python} -m pip list"), 30),
    ]
    if any(wheels.glob("*.whl")):
        # beside this Python, not into it: what they replace would stay replaced
        install = (python, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--upgrade", "--target", str(SITE))
        steps.append(Step("wheels", (*install, *sorted(map(str, wheels.glob("*.whl")))), 60))
    # machine code for this GPU alone takes a third of the time
    build = {"FORCE_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
    if gpu is not None:
        build["TORCH_CUDA_ARCH_LIST"] = gpu.build_target
    steps += [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 180, variables=build),
        Step("doctor", ("bash", "-c", _doctor(python, work / "doctor.json")), 60),
        _tests(python, work, "cuda", 100),
        _sanitize(python, "memcheck", 60),
        _tests(python, work, "triton", 100),
        _sanitize(python, "racecheck", 75),
        _tests(python, work, "rest", 60),
        _sanitize(python, "synccheck", 45),
        _sanitize(python, "initcheck", 45),
        _sanitize(python, "memcheck", 60, backend="triton"),
    ]
    benchmark = (python, "-m", "benchmarks.run", "--device", "cuda", "--seconds", "{seconds}")
    variables = {"ENTROPY_KERNELS_COMMIT": commit} if commit else {}
    steps.append(
        Step(
            "benchmark", (*benchmark, "--output", str(work / "benchmark")), DEADLINE, reserve=170,
            variables=variables, ending=45,
        )
    )  # fmt: skip
    if profile:
        # the clocks are left as they are: the machine is shared with those who come after
        sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
        ncu = ("ncu", "--clock-control", "none", "--launch-count", "40", "--kernel-name", f"regex:{_OUR_KERNELS}")
        ncu = (*ncu, *(flag for section in sections for flag in ("--section", section)))
        steps.append(Step("profile", (*ncu, python, "tools/kernel_calls.py", "large"), 120, reserve=60))
    return steps


_OUR_KERNELS = "token_stats|linear_forward|selection|covariance|policy_loss"


def pretended(step: Step) -> Step:
    """The same on a GPU that is pretended (tools/gpu_pretence.py), with the time that it takes there."""
    start, rest = step.command[:3], step.command[3:]
    if start[1:] == ("-m", "pytest"):
        return replace(step, command=(*start, "-p", "gpu_pretence", *rest), limit=20 * step.limit)
    if start[1:] == ("-m", "benchmarks.run"):
        return replace(step, command=(start[0], "tools/gpu_pretence.py", *start[1:], *rest))
    return step


def _doctor(python: str, report: Path) -> str:
    """Both forms: for people in the log, for the summary in a file. Fails if a check does."""
    doctor = f"{shlex.quote(python)} -m entropy_kernels.cli doctor"
    return f"{doctor} --no-check; {doctor} --json > {shlex.quote(str(report))}"


def _tests(python: str, work: Path, backend: str, limit: float) -> Step:
    """The tests marked gpu of one backend; a process has one thread and, of the GPU, whatever is free."""
    processes = str(min(12, os.cpu_count() or 1))
    files = sorted(str(path.relative_to(ROOT)) for pattern in TEST_FILES for path in (ROOT / "tests").glob(pattern))
    command = (
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--gpu-backend", backend,
        "-n", processes, "--dist", "worksteal", "--timeout", "120", "--durations", "15", "--disable-warnings",
        f"--junit-xml={work / f'tests-{backend}.xml'}", *files,
    )  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # the others do without the extension
    return Step(f"tests-{backend}", command, limit, needs="build" if backend == "cuda" else None, variables=variables)


def _sanitize(python: str, tool: str, limit: float, backend: str = "cuda") -> Step:
    """Every variant of a backend's kernels once. Without torch's pool of memory each tensor has bounds of its own."""
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    command = (*sanitizer, python, "tools/kernel_calls.py", "small", "--backend", backend)
    name = tool if backend == "cuda" else f"{tool}-{backend}"
    needs = "build" if backend == "cuda" else None
    return Step(name, command, limit, needs, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def run(
    steps: Sequence[Step], work: Path, out: Path, *, deadline: float, gpu: Gpu | None = None, head: dict | None = None
) -> list[Result]:
    """Run the steps within ``deadline`` seconds: logs go to ``work`` and, after each step, the results to ``out``."""
    heed_interrupts()
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + deadline
    results = {result.name: result for result in gpu_summary.earlier(work)}
    mine = []
    for number, step in enumerate(steps):
        kept = sum(later.reserve for later in steps[number + 1 :])
        needed = results.get(step.needs or "")
        result = _run_step(step, work, end - kept, needed)
        results[step.name] = result
        mine.append(result)
        print(f"{result.state:12} {result.name:16} {result.seconds:6.1f} s  {result.note}", flush=True)
        gpu_summary.write(work, out, list(results.values()), gpu, head or {})
    return mine


def _run_step(step: Step, work: Path, end: float, needed: Result | None) -> Result:
    limit = min(step.limit, end - time.monotonic())
    command = [word.replace("{seconds}", f"{max(limit - step.ending, 1):.0f}") for word in step.command]
    shown = _here(shlex.join([*(f"{name}={value}" for name, value in step.variables.items()), *command]))
    if needed is not None and needed.state != PASSED:
        return Result(step.name, shown, NOT_RUN, 0.0, f"needs {step.needs}")
    if limit < WORTH_BEGINNING * min(step.limit, step.reserve or step.limit):
        return Result(step.name, shown, NOT_RUN, 0.0, f"{max(limit, 0):.0f} s left")
    started = time.monotonic()
    log = work / f"{step.name}.log"
    (work / f"{step.name}.xml").unlink(missing_ok=True)  # of an earlier call: a crash would be read as its success
    try:
        with open(log, "wb") as file:
            # a session of its own, so that a step that hangs goes with all of its processes
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **_ENVIRONMENT, **step.variables},
            )  # fmt: skip
            code = wait(process, limit, min(GRACE, GRACE_SHARE * limit))
    except OSError as error:
        return Result(step.name, shown, FAILED, time.monotonic() - started, str(error))
    seconds = time.monotonic() - started
    if code is None:
        return Result(step.name, shown, OUT_OF_TIME, seconds, f"after {limit:.0f} s")
    return Result(step.name, shown, PASSED if code == 0 else FAILED, seconds, _here(gpu_summary.last_words(log)))


_ENVIRONMENT = {
    # where a toolkit's tools are, if nothing else says so
    "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
    "PYTHONUNBUFFERED": "1",
}


def _here(text: str) -> str:
    """Without this machine's paths, which are nothing to commit."""
    return text.replace(f"{ROOT}{os.sep}", "").replace(sys.executable, "python")


def wait(process: subprocess.Popen, limit: float, grace: float) -> int | None:
    """The exit code, or None if the time was up: then it is interrupted, and has `grace` seconds of the limit to write
    what it has. It has to lead a session, whose other processes go with it, however this ends."""
    try:
        return process.wait(limit - grace)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def heed_interrupts() -> None:
    """A background job ignores them, and what it starts would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def find_gpu() -> Gpu | None:
    """The first GPU by name and compute capability, as nvidia-smi tells them; None without one."""
    query = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"(.+), (\d+)\.(\d)$", text.strip().splitlines()[0] if text.strip() else "")
    return Gpu(found[1], int(found[2]), int(found[3])) if found else None


def missing(gpu: Gpu | None) -> str | None:
    """What this machine lacks, if anything."""
    if gpu is None:
        return "nvidia-smi shows no GPU here"
    if subprocess.run([sys.executable, "-c", "import torch; torch.zeros(1).cuda()"], capture_output=True).returncode:
        return f"{sys.executable} has no torch that can use the GPU"
    if shutil.which("nvcc", path=_ENVIRONMENT["PATH"]) is None:
        return "there is no nvcc here"
    return None


def unwritable(argument: str, folder: Path) -> str | None:
    """Why nothing can be written into a folder, which is made if it is not there; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"argument {argument}: expected a folder to write to, got {folder}: {error.strerror}"


def fingerprint() -> str:
    """Of the sources, which may come without their repository."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        for file in files:
            if "results" not in file.relative_to(ROOT).parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def commit_of(given: str | None) -> str | None:
    if given:
        return given
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; 0 if every step passed, 2 if none could begin."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path(os.environ["OUT"]) if os.environ.get("OUT") else None,
        help="folder for the results, by default $OUT, else benchmarks/results/<gpu>",
    )  # fmt: skip
    add("--work", type=Path, default=ROOT / "runs" / "gpu-check", help="folder for logs (default: %(default)s)")
    add("--seconds", type=float, default=DEADLINE, help="for everything (default: %(default)s)")
    add("--only", metavar="A,B", help="names of the steps to run, by default all")
    add("--profile", action="store_true", help="a last step: ncu on large calls of each kernel, as text")
    add("--tune", action="store_true", help="let Triton's tilings be measured, which takes seconds per class of shapes")
    add("--commit", default=os.environ.get("COMMIT"), help="of the sources, where there is no repository; or $COMMIT")
    add(
        "--rehearse", action="store_true",
        help="run the steps without a GPU too: tests and benchmark on a pretended one, the others as far as they go",
    )  # fmt: skip
    add("--list", action="store_true", help="print the steps and stop")
    arguments = parser.parse_args(argv)
    gpu, commit, work = find_gpu(), commit_of(arguments.commit), arguments.work.resolve()
    wheels = ROOT / ".wheels" / "peers"
    steps = plan(sys.executable, work, wheels=wheels, gpu=gpu, commit=commit, profile=arguments.profile)
    if arguments.rehearse and gpu is None:
        steps = [pretended(step) for step in steps]
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {step.name for step in steps}
        if unknown:
            parser.error(f"argument --only: expected names of steps, got {', '.join(sorted(unknown))}")
        steps = [step for step in steps if step.name in wanted]
    if arguments.list:
        for step in steps:
            print(f"{step.name:16} {step.limit:4.0f} s  {shlex.join(step.command)}")
        return 0
    if not arguments.tune:
        os.environ["ENTROPY_KERNELS_TRITON_TUNE"] = "0"
    reason = None if arguments.rehearse else missing(gpu)
    if reason is not None:
        print(f"gpu-check: {reason}; every step needs it (--rehearse runs them all the same)", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / "benchmarks" / "results" / (gpu.slug if gpu else "no-gpu")
    reason = unwritable("--work", work) or unwritable("--out", out)
    if reason is not None:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    sources = fingerprint()
    if gpu_summary.sources_of(work) not in (None, sources):
        shutil.rmtree(work)  # what is known is of other sources
    head = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit, "sources": sources}
    results = run(steps, work, out, deadline=arguments.seconds, gpu=gpu, head=head)
    print(f"results in {out}, logs in {work}")
    return 0 if all(result.state == PASSED for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
