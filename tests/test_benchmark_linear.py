"""The suite from hidden states: its gate has teeth, ours state what they take, plans, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import measure, ours, plots, report, results
from benchmarks.cases import (
    CPU_HIDDEN,
    GRID,
    GRID_QUICK,
    HEADLINE_HIDDEN,
    LINEAR,
    LINEAR_LOSSES,
    OPS,
    STATED,
    Case,
    Group,
    HiddenShape,
    Inputs,
    groups,
    make_inputs,
)
from benchmarks.checks import Check, check
from benchmarks.measure import Settings, run_group
from benchmarks.ours import EVERYTHING, GRADIENT, LOGPROB, MEAN_LOGPROB, REGISTRY, Implementation, of_op
from benchmarks.results import Measured, Record
from benchmarks.timing import Bandwidth

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = HiddenShape(96, 32, 1500)
FORWARD, BOTH = "linear_logprob_entropy", "linear_logprob_entropy_fwdbwd"


def _case(dtype: torch.dtype = torch.float32) -> tuple[Case, Inputs]:
    case = Case(SHAPE, dtype, CPU)
    return case, make_inputs(case)


def _check(op: str, case: Case, inputs: Inputs, role: str, outputs: Any, computes: str = EVERYTHING) -> Check:
    implementation = Implementation(op, "x", role, lambda case, inputs: None, lambda case: None, computes)  # type: ignore
    return check(implementation, case, inputs, outputs)


# --- the gate ---------------------------------------------------------------------------------------------------------


def _by_hand(inputs: Inputs, parts: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Values and gradients in float64, from some parts of the gradient by the logits."""
    hidden, weight, target = inputs["hidden"].double(), inputs["weight"].double(), inputs["target"]
    logp = (hidden @ weight.t()).log_softmax(-1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(-1)
    g_lp, g_h = inputs["grad_logprob"].double()[:, None], inputs["grad_entropy"].double()[:, None]
    onehot = torch.nn.functional.one_hot(target, logp.shape[-1])
    by_part = {
        "onehot": g_lp * onehot,
        "softmax": -g_lp * p,
        "entropy": -g_h * p * (logp + entropy[:, None]),
        "shifted": g_lp * onehot.roll(1, -1),
    }
    dz = sum((by_part[part] for part in parts), torch.zeros_like(p))
    logprob = logp.gather(-1, target[:, None])[:, 0]
    return logprob, entropy, dz @ weight, dz.t() @ hidden


RIGHT = ("onehot", "softmax", "entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "passes"),
    [
        (RIGHT, True),
        ((), False),
        (("onehot", "entropy"), False),
        (("shifted", "softmax", "entropy"), False),
        (("onehot", "softmax"), False),
    ],
    ids=["right", "zero", "no softmax term", "shifted target", "no entropy term"],
)
def test_wrong_gradients_do_not_pass(parts: tuple[str, ...], passes: bool, dtype: torch.dtype) -> None:
    case, inputs = _case(dtype)
    logprob, entropy, d_hidden, d_weight = _by_hand(inputs, parts)
    outputs = (logprob.float(), entropy.float(), d_hidden.to(dtype), d_weight.to(dtype))
    assert _check(BOTH, case, inputs, "ours", outputs).passed is passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_tile_of_either_gradient_does_not_pass(dtype: torch.dtype) -> None:
    case, inputs = _case(dtype)
    for lost in (2, 3):
        outputs = list(_by_hand(inputs, RIGHT))
        outputs[lost][: len(outputs[lost]) // 8] = 0
        assert not _check(BOTH, case, inputs, "ours", outputs).passed


def test_what_computes_less_is_checked_on_that() -> None:
    case, inputs = _case()
    logprob, _, d_hidden, d_weight = _by_hand(inputs, ("onehot", "softmax"))
    whole = _by_hand(inputs, RIGHT)
    mean = {**inputs, "grad_logprob": torch.full((SHAPE.rows,), -1.0 / SHAPE.rows)}
    of_mean = _by_hand(mean, ("onehot", "softmax"))[2:]

    def passed(op: str, computes: str, *outputs: Tensor) -> bool:
        return _check(op, case, inputs, "ours", outputs, computes).passed

    assert passed(FORWARD, LOGPROB, logprob) and not passed(FORWARD, LOGPROB, logprob + 0.1)
    assert passed(BOTH, LOGPROB, logprob, d_hidden, d_weight)
    assert not passed(BOTH, LOGPROB, logprob, *whole[2:])  # something of an entropy in it
    assert passed(BOTH, GRADIENT, d_hidden, d_weight) and not passed(BOTH, GRADIENT, -d_hidden, d_weight)
    assert passed(FORWARD, MEAN_LOGPROB, logprob.mean()) and not passed(FORWARD, MEAN_LOGPROB, logprob.mean() + 0.1)
    assert passed(BOTH, MEAN_LOGPROB, logprob.mean(), *of_mean)
    assert not passed(BOTH, MEAN_LOGPROB, logprob.mean(), 2 * of_mean[0], of_mean[1])


def test_a_sum_over_tiles_that_is_rounded_each_time_shows() -> None:
    """d_weight over 16 parts of the tokens, added up in bf16: hidden beside rounded logits, seen without them."""
    case, inputs = _case(torch.bfloat16)
    logprob, entropy, d_hidden, whole = _by_hand(inputs, RIGHT)
    summed = torch.zeros(SHAPE.vocab, SHAPE.features, dtype=torch.bfloat16)
    for begin in range(0, SHAPE.rows, SHAPE.rows // 16):
        rows = slice(begin, begin + SHAPE.rows // 16)
        part = {name: value if name == "weight" else value[rows] for name, value in inputs.items()}
        summed += _by_hand(part, RIGHT)[3].bfloat16()
    errors = []
    for d_weight in (summed, whole.bfloat16()):
        outputs = (logprob, entropy, d_hidden.bfloat16(), d_weight)
        errors.append(check(REGISTRY[BOTH, "ours-tiles"], case, inputs, outputs).errors["d_weight (relative)"])
    assert errors[0] > 1.5 * errors[1]


def test_logits_in_fp32_are_held_to_fp32() -> None:
    case, inputs = _case(torch.bfloat16)
    logprob, entropy = _by_hand(inputs, ())[:2]
    for error, name, passes in (
        (1e-2, "ours", True),
        (1e-2, "ours-fp32-logits", False),
        (1e-6, "ours-fp32-logits", True),
    ):
        implementation = replace(REGISTRY[FORWARD, "ours"], name=name)
        assert check(implementation, case, inputs, (logprob, entropy + error)).passed is passes
    drift = check(REGISTRY[FORWARD, "ours"], case, inputs, (logprob, entropy + 1e-2)).errors["entropy, mean (nats)"]
    assert drift == pytest.approx(1e-2)


def _loss_by_hand(inputs: Inputs, drop: Tensor, wrong: str = "") -> tuple[Tensor, Tensor, Tensor]:
    leaves = [inputs[name].double().requires_grad_() for name in ("hidden", "weight")]
    logp = (leaves[0] @ leaves[1].t()).log_softmax(-1).gather(-1, inputs["target"][:, None])[:, 0]
    mask, advantages = inputs["mask"], inputs["advantages"].double()
    ratio = (logp - inputs["old_logprob"]).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens = plain if wrong == "unclipped" else torch.maximum(plain, clipped)
    tokens = tokens.masked_fill(drop, 0.0)
    loss = (tokens * mask).sum() / (len(mask) if wrong == "mean over all" else mask.sum())
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("wrong", "passes"), [("", True), ("unclipped", False), ("mean over all", False)])
def test_loss_checks_accept_the_definition_and_refuse_a_neighbour(wrong: str, passes: bool) -> None:
    case, inputs = _case()
    nobody = torch.zeros(SHAPE.rows, dtype=torch.bool)
    assert _check("linear_policy_loss", case, inputs, "ours", _loss_by_hand(inputs, nobody, wrong)).passed is passes


def test_the_check_of_clip_cov_counts_and_looks_at_the_band() -> None:
    case, inputs = _case()
    mask, advantages = inputs["mask"], inputs["advantages"].double()
    logprob = _by_hand(inputs, ())[0]
    ratio = (logprob - inputs["old_logprob"]).exp()
    alive = mask & (-advantages * ratio.clamp(0.8, 1.2) <= -advantages * ratio) & (logprob.exp() < 0.9)
    covariance = (logprob - logprob[mask].mean()) * (advantages - advantages[mask].mean())
    inside = (alive & (covariance > 1.1) & (covariance < 4.9)).nonzero()[:, 0]
    outside = (alive & (covariance < 0.5)).nonzero()[:, 0]

    def passed(*tokens: Tensor) -> bool:
        drop = torch.zeros_like(mask)
        drop[torch.stack(tokens) if tokens else []] = True
        return _check("linear_clip_cov_loss", case, inputs, "ours", _loss_by_hand(inputs, drop)).passed

    assert len(inside) > 1 and len(outside) > 0
    assert passed(inside[0]) and passed(inside[1])  # whichever was drawn
    assert not passed() and not passed(inside[0], inside[1]) and not passed(outside[0])


_SLOW = {"compile", "cut-ce-compile", "liger-grpo"}  # they compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", [*LINEAR, *LINEAR_LOSSES])
def test_what_runs_here_passes(op: str, dtype: torch.dtype) -> None:
    """Ours, what is written by hand, and the peers that are installed."""
    case, inputs = _case(dtype)
    ran = []
    for implementation in of_op(op):
        if implementation.name not in _SLOW and implementation.supports(case) is None:
            result = check(implementation, case, inputs, implementation.make(case, inputs).call())
            assert result.passed, (implementation.name, result.failures)
            ran.append(implementation.name)
    assert len(ran) >= 2


# --- ours -------------------------------------------------------------------------------------------------------------


def test_tiles_cut_tokens_and_vocabulary() -> None:
    hidden, weight = (torch.empty(n, 576, dtype=torch.bfloat16, requires_grad=True) for n in (1024, 49152))
    options: dict[str, Any]
    for options in ({}, {"logits_dtype": torch.float32}):
        budget = ours.tiled(hidden, weight, **options)
        plan = ek.linear_plan(hidden, weight, memory_budget=budget, **options)
        assert plan.mode == "recompute" and min(plan.row_chunks, plan.vocab_chunks) >= ours.MANY
        more = ek.linear_plan(hidden, weight, memory_budget=int(1.05 * budget), **options)
        assert more.mode == "keep" or more.row_chunks < ours.MANY


def test_stated_memory_is_the_plans_and_the_results() -> None:
    case, inputs = _case()
    hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"]
    gradients = 4 * (hidden.numel() + weight.numel())
    weight = weight.clone().requires_grad_()
    kept = ek.linear_plan(hidden, weight, memory_budget=ours.ENOUGH).peak_bytes
    prepared = REGISTRY[BOTH, "ours"].make(case, inputs)
    assert prepared.stated_bytes == kept + gradients + 8 * SHAPE.rows
    with torch.no_grad():
        once = ek.linear_plan(hidden, weight, memory_budget=ours.ENOUGH).peak_bytes
    assert REGISTRY[FORWARD, "ours"].make(case, inputs).stated_bytes == once + 8 * SHAPE.rows
    assert REGISTRY[FORWARD, "eager"].make(case, inputs).stated_bytes is None


@pytest.mark.parametrize("op", LINEAR_LOSSES)
def test_a_loss_states_the_memory_of_its_plan(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than it takes; the rows and the table of a run have both."""
    shape = HiddenShape(512, 64, 8000)  # 16 MB of logits: small beside it what the process allocates by itself
    monkeypatch.setitem(ours.TIGHT, "cpu", 4 << 20)
    names = {"ours": ours.ENOUGH, "ours-parts": 4 << 20, "ours-composed": None}
    group = Group("From hidden states", ((op, Case(shape, torch.float32, CPU)),), only=frozenset(names), cold=False)
    settings = Settings(repeats=1, cache="hot", memory=True)
    found = run_group(group, settings, CPU, Bandwidth(1e10, 1e10, 1), lambda _: None)
    assert [record.implementation for record in found] == list(names)
    hidden, weight = (torch.empty(rows, 64, requires_grad=True) for rows in (512, 8000))
    for record, budget in zip(found, names.values(), strict=True):
        assert record.status == "ok" and record.peak_extra_bytes
        if budget is None:
            assert record.stated_bytes is None
            continue
        plan = ek.linear_plan(hidden, weight, memory_budget=budget, policy_loss=True)
        assert record.stated_bytes == plan.peak_bytes + 4 * (hidden.numel() + weight.numel()) + 4
        assert record.peak_extra_bytes < record.stated_bytes + (1 << 20)
    assert found[1].stated_bytes < found[0].stated_bytes
    assert "stated memory" in report.group_table(found)


@pytest.mark.parametrize("name", ("ours", "ours-parts"))
@pytest.mark.parametrize("op", LINEAR_LOSSES)
def test_the_fused_loss_is_right(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, inputs = _case()
    monkeypatch.setitem(ours.TIGHT, "cpu", 1 << 20)
    mine = REGISTRY[op, name]
    assert mine.supports(case) is None
    assert check(mine, case, inputs, mine.make(case, inputs).call()).passed


# --- plans and rounds -------------------------------------------------------------------------------------------------


def test_a_gpu_has_the_roofline_tables_shapes_in_bf16_the_targets_first() -> None:
    table = {HiddenShape(8192, h, v) for h in (2048, 4096) for v in (32000, 128256, 151936, 248320)}
    assert set(GRID.hidden) == table and len(GRID.hidden) == len(table)
    assert GRID.hidden[0] == HEADLINE_HIDDEN and GRID_QUICK.hidden == (HEADLINE_HIDDEN,)
    dtypes = [torch.float32, torch.bfloat16]
    found = [g for g in groups(GRID, list(OPS), dtypes, GPU) if g.title.startswith("From hidden")]
    assert {case.dtype for group in found for _, case in group.entries} == {torch.bfloat16}
    assert {case.shape for group in found for _, case in group.entries} == table
    only = groups(GRID, list(OPS), [torch.float32], GPU)
    assert any(group.title.startswith("From hidden") for group in only)  # asked for alone it is measured


def test_a_cpu_has_the_targets_shape_and_in_its_grid_more() -> None:
    assert STATED.hidden == (HiddenShape(1024, 576, 49152),) == CPU_HIDDEN[:1] and len(CPU_HIDDEN) > 1
    found = groups(STATED, list(OPS), [torch.float32, torch.bfloat16], CPU)
    first, second = (group for group in found if group.title.startswith("From hidden"))
    assert {op for op, _ in first.entries} == {*LINEAR, *LINEAR_LOSSES}
    assert {op for op, _ in second.entries} == set(LINEAR) and not first.cold


def test_products_are_not_timed_again_with_cold_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    # of a whole server it would make the flushed buffer a gigabyte
    monkeypatch.setattr("benchmarks.timing.cache_bytes", lambda device: 1 << 20)
    case = Case(SHAPE, torch.float32, CPU)
    group = Group(
        "From hidden states", ((FORWARD, case), ("linear_roofline", case)), only=frozenset({"ours", "product"})
    )
    bandwidth, settings = Bandwidth(1e10, 1e10, 1), Settings(repeats=2, cache="both", memory=True)
    for cold in (True, False):
        found = run_group(replace(group, cold=cold), settings, CPU, bandwidth, lambda _: None)
        assert [bool(record.cold) for record in found] == [cold, cold]
    fewer = measure.steps(replace(group, cold=True), settings) - measure.steps(replace(group, cold=False), settings)
    assert fewer == len(found) * settings.cold_repeats
    mine = next(record for record in found if record.implementation == "ours")
    assert mine.stated_bytes is not None and mine.peak_extra_bytes is not None


# --- tables and figures -----------------------------------------------------------------------------------------------


def _row(op: str, name: str, role: str, median: float, **fields: Any) -> Record:
    summary = {"count": 7, "min": median, "median": median, "p10": median, "p90": median, "spread": 0.0}
    fields = {"device": "cuda", "dtype": "bf16", "peak_extra_bytes": 2_000_000, **fields}
    return Record(
        op, name, role, str(HEADLINE_HIDDEN), cache="hot", size={"features": 1, "vocab": 1}, summary=summary, **fields
    )


def _rows(device: str = "cuda") -> list[Record]:
    shape = str(HEADLINE_HIDDEN if device == "cuda" else STATED.hidden[0])
    rows = [
        _row("linear_roofline", "product", "roofline", 10e-3),
        _row("linear_roofline", "three products", "roofline", 30e-3),
        _row(FORWARD, "ours", "ours", 10.5e-3, stated_bytes=3_000_000, errors={"entropy (nats)": 2e-3}),
        _row(FORWARD, "cut-ce", "peer", 12e-3, computes=LOGPROB),
        _row(FORWARD, "verl", "peer", 50e-3, errors={"entropy (nats)": 0.05}),
        _row(BOTH, "ours-tiles", "ours", 90e-3),
        _row(BOTH, "ours", "ours", 31.5e-3),
        _row("linear_clip_cov_loss", "ours", "ours", 31.2e-3, dtype="fp32"),
    ]
    return [replace(row, shape=shape, device=device) for row in rows]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_readmes_table_of_hidden_states(device: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    results.write(tmp_path / "m" / "bench.json", results.as_document({}, [Measured("G", False, _rows(device))]))
    text = report.filled("<!-- bench: m hidden -->\nold\n<!-- /bench -->\n", tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [line[1] for line in lines[1:]] == ["**ours**", "cut-ce", "verl", "**ours**", "**ours**"]
    assert lines[1][:6] == ["log-prob + entropy, bf16", "**ours**", "10.5 ms", "1.05×", "2.00 MB", "2.0e-03"]
    assert lines[2][3:] == ["1.20×", "2.00 MB", "", LOGPROB] and lines[4][3] == "1.05×"
    assert lines[5][0].endswith("fp32") and lines[5][3] == ""  # without products of its dtype there is no ratio
    assert report.filled(text, tmp_path) == text and "old" not in text
    with pytest.raises(ValueError, match="from hidden states"):
        report.hidden_table([replace(row, shape="8×8×8 hidden") for row in _rows(device)])


def test_a_groups_table_has_the_time_over_products_and_the_stated_memory() -> None:
    text = report.group_table(_rows())
    assert "over products" in text and "3.00×" in text and "3.00 MB" in text
    assert "over products" not in report.group_table([row for row in _rows() if row.op != "linear_roofline"])


def test_the_figure_has_a_row_per_op_with_times_and_memory() -> None:
    pytest.importorskip("matplotlib")
    figure = plots.hidden_figure([Measured("G", False, _rows())], "note")
    assert figure is not None
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert len(figure.axes) == 4 and any("forward + backward, 8192×4096×128256 bf16" in title for title in titles)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ours", "cut-ce*", "verl"]
    assert plots.hidden_figure([], "note") is None
