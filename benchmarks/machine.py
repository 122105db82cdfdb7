"""What a result was measured on: processor, versions, commit. Goes into every JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import entropy_kernels as ek

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "triton", "numpy", "transformers",
    "verl", "trl", "liger-kernel", "flash-attn", "fla-core", "quack-kernels",
)  # fmt: skip
# switches that change what is measured
_VARIABLES = re.compile(
    r"^(OMP_|MKL_|KMP_|GOMP_|MALLOC_|LD_PRELOAD|TORCH|ENTROPY_KERNELS_|TRITON_|CUDA_VISIBLE_DEVICES)"
)


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, software and repository state, ready for JSON."""
    cpu = _cpuinfo()
    return {
        "machine": slug(device),
        "platform": platform.platform(),
        "cpu": {
            "model": cpu.get("model name", platform.processor() or platform.machine()),
            "family": cpu.get("cpu family"),
            "number": cpu.get("model"),
            "logical": os.cpu_count(),
            "flags": sorted(cpu.get("flags", "").split()),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "memory_bytes": _memory_bytes(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu": _gpu(device),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "versions": {"entropy_kernels": ek.__version__, **_versions()},
        "backends": ek.backends(),
        "variables": {key: value for key, value in sorted(os.environ.items()) if _VARIABLES.match(key)},
        "commit": os.environ.get("ENTROPY_KERNELS_COMMIT") or _git("rev-parse", "HEAD"),  # copies lack the repository
        # results of earlier runs do not change what is measured
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results") or ""),
    }


def slug(device: torch.device) -> str:
    """Folder name of a machine's results, from its GPU or its processor: "amd-epyc-zen3-2cpu", "nvidia-h200"."""
    if device.type == "cuda":
        return _slugify(torch.cuda.get_device_name(device))
    cpu = _cpuinfo()
    name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*|\d+-Core", "", cpu.get("model name", platform.machine()))
    widest = next((isa for isa in ("avx512f", "avx2") if isa in cpu.get("flags", "").split()), "")
    return _slugify(f"{name} {cpu.get('cpu family', '')} {cpu.get('model', '')} {widest} {os.cpu_count()}cpu")


def _slugify(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """First processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of the GPU's driver."""
    text = _first_line("/proc/driver/nvidia/version") or ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    if found is not None:
        return found.group()
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = result.stdout.split()
    return words[0] if result.returncode == 0 and words else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Print a name for times that may be compared: of this machine's GPU or processor, with its number of threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{slug(device)}-{torch.get_num_threads()}threads")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None outside one."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


if __name__ == "__main__":
    main()
