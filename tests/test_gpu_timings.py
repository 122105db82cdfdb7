"""benchmarks/gpu_timings.py on the fake GPU: what is timed and what is not, what a cut-off leaves."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_timings
from conftest import needs_fake_gpu
from stub_gpu import run_on_fake_gpu

ROOT = Path(__file__).resolve().parent.parent
# A verdict on the CUDA kernels only, one of the steps that differ in sizes alone, shapes of which one is too large,
# switches that can be looked at; then with each fault.
PROGRAM = """
import os
import torch
from benchmarks import gpu_timings
from entropy_kernels.backends import native, registry, verdict

pairs = [verdict.Pair(op, "cuda", 1, {}) for op in registry.OPS]
verdict.write(verdict.Verdict(verdict.machine(torch.device("cuda", 0)), "2026-01-01", pairs))
gpu_timings.ROWS, gpu_timings.VOCABS = (8192,), (128256, 3 * 10**9)
gpu_timings.SAMPLES, gpu_timings.WARM = 3, 1
kinds = {}
for step in gpu_timings.steps():
    too_large = step[2] == gpu_timings.VOCABS[1]
    kinds.setdefault((step[0], too_large, *(word for word in step[1:] if not isinstance(word, int))), step)
gpu_timings.steps = kinds.values
torch.cuda.mem_get_info = lambda *_: (2 * 10**8, 10**9)
switches = {"cluster_tokens": 96 * 1024, "backward_reversed": 0}
seen = {name: set() for name in switches}

def set_cuda_switch(name, value):
    before, switches[name] = switches[name], value
    seen[name].add(value)
    return before

native.set_cuda_switch = set_cuda_switch
print("code", gpu_timings.main(["--seconds", "9999", "--scale", "1000"]), flush=True)
assert switches == {"cluster_tokens": 96 * 1024, "backward_reversed": 0}
assert seen == {"cluster_tokens": {0, 2**62, 96 * 1024}, "backward_reversed": {0, 1}}, seen
for fault in ("wrong", "lost"):
    os.environ["PYTEST_CURRENT_TEST"] = f"with the fault {fault}"  # planted there
    print("code", gpu_timings.main(["--scale", "4000", "--only", "forward"]), flush=True)
"""


def run(folder: Path, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_on_fake_gpu(*command, paths=(ROOT,), XDG_CACHE_HOME=str(folder), OMP_NUM_THREADS="1", **options)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@needs_fake_gpu
def test_every_group_is_timed_and_nothing_unverified_or_wrong(tmp_path: Path) -> None:
    """A wrong result is not timed, and a lost device ends the run."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(tmp_path, tmp_path / "program.py", faults={f"fault {name}": name for name in ("wrong", "lost")})
    right, code, wrong, wrong_code, lost, lost_code = re.split(r"^code (\d)\n", done.stdout, flags=re.M)[:-1]
    assert (done.returncode, code, wrong_code, lost_code) == (0, "0", "1", "1"), done.stderr
    machine, *found = lines(right)
    assert machine["machine"]["gpu"] == "Fake H100"
    assert not [line for line in found if "error" in line]
    timed = [line for line in found if "median_us" in line]
    assert {line["group"] for line in timed} == {"roofline", *gpu_timings.EVERY}
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
    for text in (wrong, lost):
        assert not [line for line in lines(text) if "median_us" in line and line["group"] == "forward"]
    errors = [line["error"] for line in lines(wrong) if "error" in line]
    assert errors and all("wrong, so not timed" in error for error in errors)
    assert len([line for line in lines(lost) if "error" in line]) == 1
    assert "illegal memory access" in lines(lost)[-1]["lost"]


@needs_fake_gpu
def test_it_stops_by_itself(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "benchmarks.gpu_timings", "--seconds", "0", "--scale", "1000")
    assert done.returncode == 0 and lines(done.stdout)[-1]["stopped"] == "no time left", done.stderr


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """The first few are of every group: a run may be cut off."""
    assert gpu_timings.main(["--list"]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert {group for step in first for group in gpu_timings.GROUPS[getattr(gpu_timings, step)]} == {*gpu_timings.EVERY}
    assert gpu_timings.main(["--list", "--only", "selection,linear"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["selection 65536 cuda", "products 8192 4096 128256"]
    with pytest.raises(SystemExit):
        gpu_timings.main(["--only", "forwards"])
    assert "expected some of forward, backward" in capsys.readouterr().err
