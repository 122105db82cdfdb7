"""benchmarks/gpu_timings.py on the fake GPU: what is timed and what is not, what a cut-off leaves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import needs_fake_gpu
from stub_gpu import run_on_fake_gpu

ROOT = Path(__file__).resolve().parent.parent
TOOL = ("-m", "benchmarks.gpu_timings")
# A verdict on the CUDA kernels only, few shapes of which one is too large, switches that can be looked at.
PROGRAM = """
import sys
import torch
from benchmarks import gpu_timings
from entropy_kernels.backends import native, registry, verdict

pairs = [verdict.Pair(op, "cuda", 1, {}) for op in registry.OPS]
verdict.write(verdict.Verdict(verdict.machine(torch.device("cuda", 0)), "2026-01-01", pairs))
gpu_timings.ROWS, gpu_timings.VOCABS = (8192, 1), (128256, 151937, 3 * 10**9)
gpu_timings.SAMPLES = 3
torch.cuda.mem_get_info = lambda *_: (2 * 10**8, 10**9)
switches = {"cluster_tokens": 96 * 1024, "backward_reversed": 0}
seen = {name: set() for name in switches}

def set_cuda_switch(name, value):
    before, switches[name] = switches[name], value
    seen[name].add(value)
    return before

native.set_cuda_switch = set_cuda_switch
code = gpu_timings.main(sys.argv[1:])
assert switches == {"cluster_tokens": 96 * 1024, "backward_reversed": 0}
if "forward" not in sys.argv:
    assert seen == {"cluster_tokens": {0, 2**62, 96 * 1024}, "backward_reversed": {0, 1}}, seen
sys.exit(code)
"""
pytestmark = needs_fake_gpu


def run(folder: Path, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_on_fake_gpu(*command, paths=(ROOT,), XDG_CACHE_HOME=str(folder), OMP_NUM_THREADS="1", **options)


def lines(done: subprocess.CompletedProcess[str], code: int = 0) -> list[dict[str, Any]]:
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_group_is_timed_and_nothing_unverified(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", PROGRAM, "--seconds", "9999", "--scale", "1000")
    machine, *found = lines(done)
    assert machine["machine"]["gpu"] == "Fake H100"
    assert not [line for line in found if "error" in line]
    timed = [line for line in found if "median_us" in line]
    groups = [line["group"] for line in timed]
    first = {group: groups.index(group) for group in ("forward", "backward", "selection", "losses", "linear")}
    assert max(first.values()) < 60  # of several hundred at full size
    for line in timed:
        assert len(line["samples_us"]) == 3 and line["p10_us"] <= line["median_us"] <= line["p90_us"], line
        expected = {"roofline": {"torch"}, "losses": {"cuda", "torch"}}.get(line["group"], {"cuda"})
        assert line["backend"] in expected
        # samples are rounded to 0.01 µs
        assert line["gbps"] == pytest.approx(1e-3 * line["bytes"] / line["median_us"], rel=0.01, abs=0.01)
        assert line["group"] == "roofline" or {"of_copy", "of_product"} & line.keys(), line
    variants = {(line["op"], line["variant"]) for line in timed}
    assert variants >= {
        ("logits_roofline", "copy"),
        ("logits_roofline", "read"),
        ("tokens_roofline", "topk"),
        ("token_stats", ""),
        ("logprob_entropy_bwd", "in place, behind forward, rows reversed"),
        ("clip_cov_mask", "with covariance cluster"),
        ("kl_cov_mask", ""),
        ("token_covariance", "grid"),
        ("kl_cov_loss", "graph"),
        ("clip_cov_loss", "eager"),
        ("policy_loss", "graph"),
        ("policy_loss", "compiled"),
        ("linear_clip_cov_loss", "default budget"),
        ("linear_clip_cov_loss", "1 GiB"),
    }
    skipped = [line for line in found if "skipped" in line]
    assert {line["backend"] for line in skipped if "backend" in line} == {"triton"}
    assert any("GB are free" in line["skipped"] for line in skipped if "backend" not in line)
    assert "rows reversed" in done.stderr and "not verified" in done.stderr


@pytest.mark.parametrize("fault", ["wrong", "lost"])
def test_a_wrong_result_is_not_timed_and_a_lost_device_ends_the_run(tmp_path: Path, fault: str) -> None:
    faults = {"--only forward": fault}
    done = run(tmp_path, "-c", PROGRAM, "--scale", "4000", "--only", "forward", faults=faults)
    _, *found = lines(done, code=1)
    assert not [line for line in found if "median_us" in line and line["group"] == "forward"]
    errors = [line["error"] for line in found if "error" in line]
    if fault == "lost":
        assert len(errors) == 1 and "illegal memory access" in found[-1]["lost"]
    else:
        assert errors and all("wrong, so not timed" in error for error in errors)


def test_it_stops_by_itself(tmp_path: Path) -> None:
    done = run(tmp_path, *TOOL, "--seconds", "0", "--scale", "1000")
    assert lines(done)[-1]["stopped"] == "no time left"


def test_profile_and_list(tmp_path: Path) -> None:
    assert lines(run(tmp_path, *TOOL, "--profile", "--scale", "1000")) == []
    listed = run(tmp_path, *TOOL, "--list", "--only", "selection,linear").stdout.splitlines()
    assert listed[:2] == ["selection 65536 cuda", "products 8192 4096 128256"]
    refused = run(tmp_path, *TOOL, "--only", "forwards")
    assert refused.returncode == 2 and "expected some of forward, backward" in refused.stderr
