"""``make gpu-wheels``: the benchmark's peers as wheels in ``.wheels/``, for a GPU machine that has no network.

``make gpu-check`` installs there what lies in the folder, without dependencies; the peers' kernels need only torch and
triton, and verl's losses are loaded without its cluster (benchmarks/standins.py). quack's cross-entropies and Liger's
scaled one are left out: they need nvidia-cutlass-dsl, 84 MiB. Versions are those of the ``bench`` extra in
pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: einops: fla imports it. setuptools: older ones cannot read pyproject.toml, and the machine may have one.
PEERS = ("liger-kernel", "verl", "trl", "fla-core", "cut-cross-entropy")
ALSO = ("einops==0.8.2", "setuptools==80.9.0")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Download; 1 if the folder has grown beyond the limit."""
    parser = argparse.ArgumentParser(prog="gpu_wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".wheels", help="default: %(default)s")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = requirements((ROOT / "pyproject.toml").read_text())
    # one version of each: two of them would stop the whole installation
    for old in arguments.folder.glob("*.whl"):
        if old.name.split("-")[0] in {name.partition("==")[0].replace("-", "_") for name in wanted}:
            old.unlink()
    subprocess.run(command(wanted, arguments.folder, arguments.python_version), check=True)
    return report(arguments.folder)


def report(folder: Path) -> int:
    """Print the wheels and their sizes; 1 if they are too large together."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / (1 << 20):6.1f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / (1 << 20):6.1f} MiB  in {folder}, of {LIMIT >> 20} MiB")
    if total > LIMIT:
        print("too large together to travel with the working tree", file=sys.stderr)
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
