"""The gate before every timing has teeth: for each op a right result passes, and its neighbours do not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import BatchShape, Case, LogitsShape, TokensShape, make_inputs
from benchmarks.checks import Check, check
from benchmarks.ours import EVERYTHING, GRADIENT, LOGPROB, MEAN_LOGPROB, REGISTRY, Implementation, Prepared

CPU = torch.device("cpu")


def _check(op: str, case: Case, inputs: dict, role: str, outputs: Any, computes: str = EVERYTHING) -> Check:
    def make(case: Case, inputs: dict) -> Prepared:
        raise AssertionError("a check makes nothing")

    return check(Implementation(op, "x", role, make, lambda case: None, computes), case, inputs, outputs)


def _exact(inputs: dict) -> dict[str, torch.Tensor]:
    """Correct outputs in float32, with the parts of the gradient that a wrong kernel may lose."""
    logp = inputs["logits"].double().log_softmax(-1)
    p, target = logp.exp(), inputs["target"]
    entropy = -(p * logp).sum(-1)
    onehot = torch.nn.functional.one_hot(target, logp.shape[-1])
    g_lp, g_h = inputs["grad_logprob"].double()[:, None], inputs["grad_entropy"].double()[:, None]
    return {
        "logprob": logp.gather(-1, target[:, None])[:, 0],
        "entropy": entropy,
        "onehot": g_lp * onehot,
        "softmax": -g_lp * p,
        "entropy_term": -g_h * p * (logp + entropy[:, None]),
        "shifted": g_lp * onehot.roll(1, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "passes"),
    [
        (("onehot", "softmax", "entropy_term"), True),
        ((), False),
        (("onehot", "entropy_term"), False),
        (("shifted", "softmax", "entropy_term"), False),
        (("onehot", "softmax"), False),
    ],
    ids=["right", "zero", "no softmax term", "shifted target", "no entropy term"],
)
def test_wrong_gradients_do_not_pass(parts: tuple[str, ...], passes: bool, dtype: torch.dtype) -> None:
    # a vocabulary wide enough that the target's element hides the others
    case = Case(LogitsShape(24, 30011), dtype, CPU)
    inputs = make_inputs(case)
    exact = _exact(inputs)
    zero = torch.zeros(inputs["logits"].shape, dtype=torch.float64)
    gradient = sum((exact[part] for part in parts), zero).to(dtype)
    outputs = (exact["logprob"].float(), exact["entropy"].float(), gradient)
    assert _check("logprob_entropy_fwdbwd", case, inputs, "ours", outputs).passed is passes
    assert _check("logprob_entropy_bwd", case, inputs, "ours", outputs[-1:]).passed is passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_computes_less_is_checked_on_that(dtype: torch.dtype) -> None:
    """A cross-entropy: its log-prob and gradient, with no entropy in either; a mean's; a policy loss's gradient."""
    case = Case(LogitsShape(24, 30011), dtype, CPU)
    inputs = make_inputs(case)
    exact = _exact(inputs)
    logprob = exact["logprob"].float()
    gradient = (exact["onehot"] + exact["softmax"]).to(dtype)
    wrong = (exact["onehot"] + exact["softmax"] + exact["entropy_term"]).to(dtype)
    mean = ((exact["onehot"] + exact["softmax"]) / inputs["grad_logprob"].double()[:, None] / -24).to(dtype)

    def passed(op: str, computes: str, *outputs: torch.Tensor) -> bool:
        return _check(op, case, inputs, "peer", outputs, computes).passed

    assert passed("logprob_entropy", LOGPROB, logprob)
    assert not passed("logprob_entropy", LOGPROB, logprob + 1)
    for op, values in (("logprob_entropy_fwdbwd", (logprob,)), ("logprob_entropy_bwd", ())):
        assert passed(op, LOGPROB, *values, gradient)
        assert not passed(op, LOGPROB, *values, -gradient)
        assert not passed(op, LOGPROB, *values, torch.zeros_like(gradient))
    assert not _check("logprob_entropy_fwdbwd", case, inputs, "ours", (logprob, wrong), LOGPROB).passed
    assert passed("logprob_entropy_fwdbwd", MEAN_LOGPROB, exact["logprob"].mean(), mean)
    assert not passed("logprob_entropy_fwdbwd", MEAN_LOGPROB, exact["logprob"].mean() + 1, mean)
    assert not passed("logprob_entropy_fwdbwd", MEAN_LOGPROB, exact["logprob"].mean(), 2 * mean)
    assert passed("logprob_entropy_fwdbwd", GRADIENT, gradient)
    assert not passed("logprob_entropy_fwdbwd", GRADIENT, exact["onehot"].to(dtype))


def test_a_coarse_gradient_of_a_converged_row_is_no_other_function() -> None:
    """torch's own cross-entropy in bf16, where 1 - p of the target is all rounding: it passes, with its error shown."""
    case = Case(LogitsShape(64, 128256), torch.bfloat16, CPU)
    inputs = make_inputs(case)
    implementation = REGISTRY["logprob_entropy_fwdbwd", "torch-ce"]
    result = check(implementation, case, inputs, implementation.make(case, inputs).call())
    assert result.passed and result.errors["logprob (nats)"] > 1e-3


def test_strict_for_ours_loose_for_peers_and_never_nan() -> None:
    case = Case(LogitsShape(8, 4001), torch.float32, CPU)
    inputs = make_inputs(case)
    exact = _exact(inputs)
    coarse = (exact["logprob"].float() + 1e-2, exact["entropy"].float())
    assert not _check("logprob_entropy", case, inputs, "ours", coarse).passed
    result = _check("logprob_entropy", case, inputs, "peer", coarse)
    assert result.passed and result.errors["logprob (nats)"] == pytest.approx(1e-2, rel=0.01)
    nan = (exact["logprob"].float() * math.nan, exact["entropy"].float())
    assert not _check("logprob_entropy", case, inputs, "peer", nan).passed


def test_selection_check_counts_and_looks_at_the_band() -> None:
    case = Case(TokensShape(20000), torch.float32, CPU)
    inputs = make_inputs(case)
    right = peers.eager_clip_cov_mask(inputs["covariance"])
    outside = (inputs["covariance"] < 0).nonzero()[0]
    more = right.clone()
    more[outside] = True
    swapped = more.clone()
    swapped[right.nonzero()[0]] = False
    passed = [_check("clip_cov_mask", case, inputs, "ours", mask).passed for mask in (right, more, swapped)]
    assert passed == [True, False, False]


def test_ties_of_kl_cov_are_determined_for_ours_only() -> None:
    case = Case(TokensShape(5000, "equal"), torch.float32, CPU)
    inputs = make_inputs(case)
    last = torch.zeros(5000, dtype=torch.bool)
    last[-10:] = True
    assert _check("kl_cov_mask", case, inputs, "peer", last).passed
    assert not _check("kl_cov_mask", case, inputs, "ours", last).passed
    assert _check("kl_cov_mask", case, inputs, "ours", last.flip(0)).passed


@pytest.mark.parametrize("op", ["policy_loss", "clip_cov_loss", "kl_cov_loss"])
def test_loss_checks_accept_the_definition_and_refuse_a_neighbour(op: str) -> None:
    """The surrogate by hand in float32, right, and with its gradient's sign turned."""
    case = Case(BatchShape(32, 128), torch.float32, CPU)
    inputs = make_inputs(case)
    leaf, mask = inputs["logprob"].clone().requires_grad_(), inputs["mask"]
    difference = leaf - inputs["old_logprob"]
    ratio, advantages = difference.exp(), inputs["advantages"]
    covariance = (leaf - leaf[mask].mean()) * (advantages - advantages[mask].mean())
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens = torch.maximum(plain, clipped)
    if op == "policy_loss":
        tokens = torch.where(advantages < 0, torch.minimum(tokens, -3 * advantages), tokens)
    elif op == "clip_cov_loss":
        band = mask & (clipped <= plain) & (covariance > 1) & (covariance < 5)
        drop = torch.zeros_like(mask)
        drop.view(-1)[band.view(-1).nonzero()[: max(1, int(2e-4 * int(mask.sum())))]] = True
        tokens = torch.where(drop, 0.0, tokens)
    else:
        chosen = covariance.detach().masked_fill(~mask, -torch.inf).view(-1).topk(int(2e-3 * int(mask.sum()))).indices
        penalty = torch.zeros_like(tokens).view(-1).index_fill(0, chosen, 1.0).view_as(tokens)
        tokens = plain + penalty * difference.abs()
    loss = (tokens * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert _check(op, case, inputs, "ours", (loss.detach(), gradient)).passed
    assert not _check(op, case, inputs, "peer", (loss.detach(), -gradient)).passed
