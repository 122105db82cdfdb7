"""``patch_head`` beside TRL's own head and float64: every argument, values and gradients, and which of the two ran."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer import utils

import entropy_kernels as ek
from entropy_kernels.integrations import _reads
from entropy_kernels.integrations.trl import patch_head
from entropy_kernels.integrations.trl.head import HEAD

N, H, V = 37, 24, 131
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "scale and softcap": {"scale": 8.0, "softcap": 3.0, "temperature": 1.3, "bias": True},
    "all": {"scale": 1.7, "softcap": 6.0, "temperature": 0.6, "bias": True},
}


def tensors(dtype: torch.dtype, bias: bool = False, n: int = N, **_: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    draw = functools.partial(torch.randn, generator=generator)
    weight, offset = draw(V, H) / 2, draw(V) / 2
    given = {"hidden": draw(n, H), "weight": weight, "bias": offset if bias else None}
    given = {k: None if x is None else x.to(dtype).requires_grad_() for k, x in given.items()}
    return {**given, "targets": torch.randint(V, (n,), generator=generator)}


def call(given: dict[str, Any], outputs: tuple[str, ...] = OUTPUTS, **case: Any) -> tuple[Tensor | None, ...]:
    """As TRL calls it, with a vocabulary chunk that does not divide V."""
    return utils._ChunkedLogProbFunction.apply(
        given["hidden"], given["weight"], given["bias"], given["targets"], case.get("temperature", 1.0), 50,
        case.get("softcap"), case.get("scale", 1.0), outputs,
    )  # fmt: skip


def reference(given: dict[str, Any], **case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, from the logits."""
    x = given["hidden"].double() @ given["weight"].double().T
    x = (x if given["bias"] is None else x + given["bias"].double()) * case.get("scale", 1.0)
    cap = case.get("softcap")
    logp = ((x if cap is None else cap * torch.tanh(x / cap)) / case.get("temperature", 1.0)).log_softmax(-1)
    chosen = logp.gather(-1, given["targets"][:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1), (2 * logp).logsumexp(-1)


def with_gradients(
    function: Callable[..., Any], given: dict[str, Any], through: tuple[float, float], **case: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-prob, entropy, log Σp² and the gradients of a weighted sum of the first two."""
    leaves = {k: x for k, x in given.items() if x is not None and x.requires_grad}
    logprob, entropy, squares = function(given, **case)[:3]
    weights = torch.linspace(-1, 1, len(logprob)).to(logprob.dtype)
    total = through[0] * (weights * logprob).sum() + through[1] * (weights.flip(0) * entropy).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return [x.detach().double() for x in (logprob, entropy, squares)], [x.double() for x in gradients]


def test_every_argument_has_a_case() -> None:
    """A new one would be one that ours does not know."""
    names = list(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    assert HEAD.refusal() is None


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("through", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)], ids=["logprob", "entropy", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients(dtype: torch.dtype, through: tuple[float, float], case: dict[str, Any]) -> None:
    """No further from float64 than TRL's own, but for the last bits."""
    given = tensors(dtype, **case)
    exact = [torch.cat([x.flatten() for x in part]) for part in with_gradients(reference, given, through, **case)]
    theirs = with_gradients(call, given, through, **case)
    with patch_head():
        mine = with_gradients(call, given, through, **case)
    assert HEAD.calls == 1  # since it was put in place
    floor = 3e-6 if dtype == torch.float32 else 1e-3
    for part, x, y, z in zip(("values", "gradients"), mine, theirs, exact, strict=True):
        ours, trl = (torch.cat([t.flatten() for t in parts]) for parts in (x, y))
        error, allowed = (ours - z).abs().max(), (trl - z).abs().max() + floor * z.abs().max()
        assert error <= allowed, f"{part}: off by {error:.2e}, TRL's own by {(trl - z).abs().max():.2e}"


def test_the_entropy_survives_what_theirs_does_not() -> None:
    """Logits offset by 60000 (a bias), and an entry of -inf."""
    given = tensors(torch.float32, bias=True)
    offset = {**given, "bias": given["bias"].detach() + 60000}
    _, exact, _ = reference(offset)
    theirs = (call(offset)[1] - exact).abs().max()
    masked = {**given, "bias": given["bias"].detach().index_fill(0, torch.tensor([V - 1]), -math.inf)}
    masked["targets"] = masked["targets"].clamp(max=V - 2)
    with patch_head():
        mine = (call(offset)[1] - exact).abs().max()
        assert all(x.isfinite().all() for x in call(masked)[:3])
    assert mine < 0.02 < theirs or mine < theirs / 3, f"ours {mine:.1e}, TRL's {theirs:.1e}"
    assert not call(masked)[1].isfinite().all()


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", "log_sum_sq_probs"), ()])
def test_only_what_is_asked_for(outputs: tuple[str, ...]) -> None:
    given = tensors(torch.float32)
    with patch_head():
        found = call(given, outputs)
    theirs = call(given, outputs)
    assert [x is None for x in found] == [x is None for x in theirs]
    for x, y in zip(found, theirs, strict=True):
        assert x is None or (x.dtype == y.dtype and x.requires_grad == y.requires_grad)
        assert x is None or torch.allclose(x, y, atol=2e-6)


def test_entropy_that_is_only_logged_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of a call without entropy, bit for bit."""
    found = []
    for outputs in (("log_probs",), OUTPUTS):
        given = tensors(torch.float32)
        with patch_head():
            call(given, outputs)[0].sum().backward()
        found.append([given[name].grad for name in ("hidden", "weight")])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts_get_none(frozen: str) -> None:
    given = tensors(torch.float32)
    given[frozen].requires_grad_(False)
    with patch_head():
        call(given)[0].sum().backward()
    assert given[frozen].grad is None and given[{"hidden": "weight", "weight": "hidden"}[frozen]].grad is not None


def test_autocast() -> None:
    """Products in its dtype, as theirs; parameters stay fp32, and so do their gradients."""
    given = tensors(torch.float32, bias=True)
    rounded = {k: x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for k, x in given.items()}
    exact = with_gradients(reference, rounded, (1.0, 0.2))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = with_gradients(call, given, (1.0, 0.2))
        with patch_head():
            mine = with_gradients(call, given, (1.0, 0.2))
    for part, of_theirs, of_exact in zip(mine, theirs, exact, strict=True):
        for x, y, z in zip(part, of_theirs, of_exact, strict=True):
            assert 1e-5 < (x - z).abs().max() <= (y - z).abs().max() + 2e-3 * z.abs().max()  # rounded, as theirs


def test_a_head_of_another_dtype_is_cast() -> None:
    """As theirs: ``cast_lm_head_to_fp32`` beside bf16 parameters."""
    given = tensors(torch.bfloat16)
    given["hidden"] = given["hidden"].detach().float().requires_grad_()
    theirs = with_gradients(call, given, (1.0, 0.0))
    with patch_head():
        mine = with_gradients(call, given, (1.0, 0.0))
    for x, y in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
        assert torch.allclose(x, y, atol=1e-5 * max(1.0, float(y.abs().max())))


def test_no_rows() -> None:
    given = tensors(torch.float32, n=0)
    with patch_head():
        found = call(given)
        found[0].sum().backward()
    assert [x.shape for x in found[:3]] == [(0,)] * 3 and not given["weight"].grad.any()


def test_statistics_are_left_for_who_collects_them() -> None:
    given = tensors(torch.float32)
    with patch_head(), _reads.collect("vocab_covariance", "collision") as read:
        call(given, ("log_probs", "entropy"))
        call(given, ("log_probs",))
    exact = ek.linear_token_stats(given["hidden"].double(), given["weight"].double(), given["targets"])
    for name in read.names:
        assert torch.allclose(read[name].double(), getattr(exact, name).repeat(2), atol=1e-6), name


@pytest.mark.parametrize(
    ("outputs", "scale", "reason"),
    [
        (("log_probs", "is_top1"), 1.0, "ours has no is_top1, which"),
        (utils._ChunkedLogProbFunction.forward.__defaults__[-1], 1.0, "ours has no mean_logits and no is_top1"),
        (("log_probs",), 0.0, "ours needs a logit_scale > 0, got 0.0"),
    ],
)
def test_what_is_not_ours_goes_to_theirs_and_is_told(outputs: tuple[str, ...], scale: float, reason: str) -> None:
    given = tensors(torch.float32)
    theirs = call(given, outputs, scale=scale)
    with patch_head(), pytest.warns(UserWarning, match=rf"TRL's own head serves this call: {reason}"):
        mine = call(given, outputs, scale=scale)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def test_parameters_that_zero3_shards_are_refused() -> None:
    given = tensors(torch.float32)
    given["weight"].ds_id = 0
    with patch_head(), pytest.raises(NotImplementedError, match=r"weight: expected .* that DeepSpeed's ZeRO-3 shards"):
        call(given)


def test_undone_it_is_theirs_again() -> None:
    given = tensors(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch = patch_head()
        assert patch is HEAD and patch.active
        patch.undo()
        call(given)
    assert not HEAD.active and HEAD.calls == 0 and "apply" not in vars(utils._ChunkedLogProbFunction)
