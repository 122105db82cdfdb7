"""Losses with control=: as with the same masks, weights, advantages and coefficient given by hand; its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from control_cases import Micro, added, micro, one
from linear_policy_cases import BUDGETS, VALID, B, H, L, V, counted_products, make
from linear_policy_cases import gradients as gradients_of
from loss_cases import assert_same, differentiated, leaf

pytestmark = pytest.mark.filterwarnings("ignore:entropy. expected a tensor that requires grad")
products = pytest.fixture(counted_products)
EXACT = {"rtol": 0.0, "atol": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dropped": ("top_entropy", {}),
    "detached": ("erc", {"effect": "detached"}),
    "penalized": ("kl_cov", {"ratio": 0.2, "kl_coef": 0.7}),
    "token_weight": ("steer", {}),
    "weight of masks": ("exact_cov", {"effect": "token_weight"}),
    "advantages": ("repo", {"zeta": 0.3}),
    "entropy_coef": ("adaptive_entropy", {"coef": 0.1, "target": 9.0}),
    "closed": ("adaptive_entropy", {"coef": 0.1, "target": 0.0}),
}
every_case = pytest.mark.parametrize("name", CASES)
LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "policy": (ek.policy_loss, {"surrogate": "gspo", "loss_agg_mode": "seq-mean-token-mean"}),
    "clip_cov": (ek.clip_cov_loss, {"preset": "verl"}),
    "kl_cov": (ek.kl_cov_loss, {}),
}
GIVEN = {"clip_cov": "dropped", "kl_cov": "penalized"}


def by_hand(method: str, decided: ek.Control, advantages: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Advantages and options that say the same, of the loss that has such an option."""
    told: dict[str, Any] = {}
    for name in ("token_weight", "dropped", "penalized", "entropy_coef"):
        if getattr(decided, name) is not None:
            told[name] = getattr(decided, name)
    if decided.penalized is not None:
        told["kl_coef"] = decided.penalty_coef
    if decided.detached is not None:  # which is what the preset "paper" makes of dropped tokens
        told |= {"dropped": decided.detached, "preset": "paper"}
    if decided.advantages is not None:
        told["covariance_advantages"], advantages = advantages, decided.advantages
    return advantages, told


@every_case
def test_policy_loss(name: str) -> None:
    """Bit-equal in value, gradients and metrics."""
    method, options = CASES[name]
    for seed, more in enumerate(({}, {"loss_agg_mode": "none"}, {"nonfinite": "drop", "dual_clip": 3.0})):
        given = micro(5, 20, seed)
        batch, old, mask = one(given), given["old_logprob"], given["mask"]
        decided = ek.control(method, batch, **options)
        advantages, told = by_hand(method, decided, given["advantages"])
        function = ek.clip_cov_loss if "dropped" in told else ek.kl_cov_loss if "penalized" in told else ek.policy_loss
        clips = {"clip_low": 0.2, "clip_high": 0.2}
        entropies = [leaf(given["entropy"]), leaf(given["entropy"])]
        right = differentiated(function, given["logprob"], old, advantages, mask, entropy=entropies[0],
                               **{**clips, **more, **told})  # fmt: skip
        found = differentiated(ek.policy_loss, given["logprob"], old, given["advantages"], mask, entropy=entropies[1],
                               control=decided, **clips, **more)  # fmt: skip
        assert_same(found, right, **EXACT)
        assert (entropies[0].grad is None) == (entropies[1].grad is None)
        if entropies[0].grad is not None:
            assert torch.equal(*(x.grad for x in entropies)) and entropies[0].grad.any() == (name != "closed")
        plain = differentiated(ek.policy_loss, given["logprob"], old, given["advantages"], mask, **clips, **more)
        assert name in ("closed", "entropy_coef") or not torch.equal(found[1], plain[1])


@every_case
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_and_other_options(kind: str, name: str) -> None:
    """Beside a mask given in the call, weights per sequence, coefficients, a reference and another surrogate."""
    function, more = LOSSES[kind]
    method, options = CASES[name]
    given = micro(5, 20, 4)
    decided = ek.control(method, one(given), **options)
    mask = torch.rand(5, 20) < 0.3
    more = {**more, **({GIVEN[kind]: mask} if kind in GIVEN else {})}
    more |= {"ref_logprob": given["logprob"] + 0.1, "ref_kl_coef": 0.2, "token_weight": torch.rand(5)}
    tokens = given["old_logprob"], given["advantages"], given["mask"]
    if kind in GIVEN and getattr(decided, GIVEN[kind]) is not None:
        with pytest.raises(ValueError, match=f"{GIVEN[kind]}: expected None beside a control that has such tokens"):
            function(given["logprob"], *tokens, control=decided, **more)
        return
    found = differentiated(function, given["logprob"], *tokens, control=decided, entropy=given["entropy"], **more)
    weight = more.pop("token_weight")[:, None].expand(5, 20)
    weight = weight if decided.token_weight is None else weight * decided.token_weight
    told = {"dropped": decided.dropped, "detached": decided.detached, "penalized": decided.penalized}
    told = {effect: x for effect, x in told.items() if x is not None}
    bare = ek.Control(**told, penalty_coef=decided.penalty_coef) if told else None
    advantages = tokens[1] if decided.advantages is None else decided.advantages
    coef = 0.0 if decided.entropy_coef is None else decided.entropy_coef
    right = differentiated(
        function, given["logprob"], tokens[0], advantages, tokens[2], entropy=given["entropy"], control=bare,
        token_weight=weight, covariance_advantages=tokens[1], entropy_coef=coef, **more,
    )  # fmt: skip
    assert_same(found, right, **EXACT)


def test_weights_multiply_per_sequence_also_where_rows_are_as_many_as_columns_and_packed() -> None:
    given = micro(6, 6, 1)
    tokens = [given[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    decided = ek.control("steer", one(given))
    weight = torch.rand(6)
    expected = ek.policy_loss(*tokens, token_weight=weight[:, None] * decided.token_weight)
    for each in (weight, weight[:, None], weight[:, None].expand(6, 6)):
        assert torch.equal(ek.policy_loss(*tokens, token_weight=each, control=decided).loss, expected.loss)
    ends = torch.tensor([0, 6, 12, 18, 24, 30, 36])
    flat = [x.reshape(-1) for x in tokens]
    packed = decided._replace(token_weight=decided.token_weight.reshape(-1))
    torch.testing.assert_close(
        ek.policy_loss(*flat, token_weight=weight, control=packed, cu_seqlens=ends).loss, expected.loss
    )
    whole = ek.policy_loss(*tokens, token_weight=torch.ones(6, 6, dtype=torch.bool), control=decided)
    assert torch.equal(whole.loss, ek.policy_loss(*tokens, control=decided).loss)


@pytest.mark.parametrize("method", ek.methods())
def test_micro_batches_under_control_add_up(method: str) -> None:
    whole: Micro = micro(8, 15, 3, dtype=torch.float64)
    options: dict[str, Any] = {"seed": 2} if ek.methods()[method].draws else {}
    options |= {"coef": 0.1} if method == "adaptive_entropy" else {}
    parts = [{name: x[i : i + 2] for name, x in whole.items()} for i in range(0, 8, 2)]
    count = {"batch_num_tokens": int(whole["mask"].sum())}

    def loss(given: Micro, decided: ek.Control) -> tuple[ek.PolicyLoss, Tensor]:
        tokens = [given[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
        return differentiated(ek.policy_loss, *tokens, entropy=leaf(given["entropy"]), control=decided, **count)

    expected = loss(whole, added([whole]).control(method, **options)[0])
    found = [loss(part, decided) for part, decided in zip(parts, added(parts).control(method, **options), strict=True)]
    torch.testing.assert_close(sum(out.loss for out, _ in found), expected[0].loss)
    torch.testing.assert_close(torch.cat([grad for _, grad in found]), expected[1])


@pytest.mark.parametrize("field", ("logprob", "old_logprob", "advantages"))
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_no_control_hides_a_token_that_is_not_finite(field: str, value: float) -> None:
    given = micro(3, 12, 1)
    given["mask"][1, 3] = True
    for name in ("logprob", "old_logprob", "advantages", "entropy", "old_entropy", "vocab_covariance"):
        given[name][1, 3] = -0.5
    given[field][1, 3] = value
    tokens = [given[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    for method, row in ek.methods().items():
        decided = ek.control(method, one(given), **({"seed": 1} if row.draws else {}))
        out, gradient = differentiated(ek.policy_loss, *tokens, entropy=given["entropy"], control=decided)
        assert not out.loss.isfinite() and out.metrics["nonfinite_tokens"] == 1, method
        assert not gradient[1, 3].isfinite() or value == -math.inf, method


# ---- from hidden states ------------------------------------------------------------------------------------------


def composed_with(case: Any, decided: ek.Control) -> tuple[ek.PolicyLoss, list[Tensor | None]]:
    hidden, weight, bias = leaves = case.leaves()
    logprob, entropy = ek.linear_logprob_entropy(hidden, weight, case.target, bias)
    tokens = case.old_logprob, case.advantages, case.mask
    loss = ek.policy_loss(logprob, *tokens, entropy=entropy, control=decided, **case.options)
    loss.loss.backward()
    return loss, gradients_of(leaves)


@every_case
def test_from_hidden_states_in_three_products(name: str, products: list[int]) -> None:
    """Decided from the rollout's statistics: the loss is that of the composed path, and makes no logits again."""
    method, options = CASES[name]
    case = make("ppo")
    stats = ek.linear_token_stats(
        case.hidden, case.weight, case.target, case.bias, statistics=("logprob", "entropy", "vocab_covariance")
    )
    g = torch.Generator().manual_seed(1)
    batch = ek.TokenBatch(
        stats.logprob, case.old_logprob, case.advantages, case.mask, entropy=stats.entropy,
        old_entropy=stats.entropy * (1 + 0.1 * torch.randn(B, L, generator=g).double()),
        vocab_covariance=stats.vocab_covariance,
    )  # fmt: skip
    decided = ek.control(method, batch, **options)
    expected, right = composed_with(case, decided)
    for budget in BUDGETS[torch.float64]:
        products.clear()
        leaves = case.leaves()
        found = case.loss(*leaves, memory_budget=budget, control=decided)
        found.loss.backward()
        assert sum(products) == 3 * len(VALID) * H * V, name
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-11, atol=1e-11)
        for ours, theirs in zip(gradients_of(leaves), right, strict=True):
            assert ours is not None and theirs is not None
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


# ---- errors --------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)
WEIGHT = ek.Control(token_weight=torch.ones(2, 3))
DROPS = ek.Control(dropped=torch.zeros(2, 3, dtype=torch.bool))
COEF = ek.Control(entropy_coef=torch.tensor(0.1))
ERRORS: list[tuple[Any, type[Exception], str, dict[str, Any]]] = [
    (ek.policy_loss, TypeError, "control: expected an ek.Control, got dict", {"control": {"dropped": X}}),
    (ek.policy_loss, TypeError, "control: .* got Tensor", {"control": X}),
    (ek.policy_loss, TypeError, "control: .* got str", {"control": "clip_cov"}),
    (ek.policy_loss, TypeError, "got list; a SelectionBatch gives one per micro-batch", {"control": [WEIGHT]}),
    (ek.clip_cov_loss, ValueError, "control: expected no selection made in the call beside it, got clip_cov_loss "
     "without dropped", {"control": WEIGHT, "seed": 1}),
    (ek.kl_cov_loss, ValueError, "control: .*kl_cov_loss without penalized.*policy_loss", {"control": WEIGHT}),
    (ek.policy_loss, ValueError, "entropy_coef: expected 0 beside a control that sets it, got 0.1",
     {"control": COEF, "entropy": X, "entropy_coef": 0.1}),
    (ek.policy_loss, ValueError, "entropy_coef: expected 0 beside a control",
     {"control": COEF, "entropy": X, "entropy_coef": torch.tensor(0.0)}),
    (ek.policy_loss, ValueError, "entropy: expected a tensor with entropy_coef=", {"control": COEF}),
    (ek.clip_cov_loss, ValueError, "dropped: expected None beside a control", {"control": DROPS, "dropped": X}),
    (ek.clip_cov_loss, TypeError, "dropped: expected a torch.Tensor, got list", {"control": WEIGHT, "dropped": [1]}),
    (ek.policy_loss, ValueError, r"token_weight: expected logprob's shape \(2, 3\)",
     {"control": ek.Control(token_weight=torch.ones(3, 2))}),
    (ek.policy_loss, ValueError, r"token_weight of control: expected logprob's shape \(2, 3\), got \(3, 2\)",
     {"control": ek.Control(token_weight=torch.ones(3, 2)), "token_weight": X}),
    (ek.policy_loss, TypeError, "token_weight of control: expected a torch.Tensor, got float",
     {"control": ek.Control(token_weight=0.5), "token_weight": X}),
    (ek.policy_loss, ValueError, "penalty_coef: expected a number in a control with penalized tokens, got None",
     {"control": ek.Control(penalized=torch.ones(2, 3, dtype=torch.bool))}),
    (ek.policy_loss, ValueError, r"token_weight: expected logprob's shape \(2, 3\).*got \(4,\)",
     {"control": WEIGHT, "token_weight": torch.ones(4)}),
    (ek.policy_loss, TypeError, "token_weight: expected a torch.Tensor, got float",
     {"control": WEIGHT, "token_weight": 2.0}),
    (ek.policy_loss, ValueError, r"dropped: expected logprob's shape \(2, 3\), got \(6,\)",
     {"control": ek.Control(dropped=torch.zeros(6, dtype=torch.bool))}),
    (ek.policy_loss, ValueError, r"advantages: expected logprob's shape", {"control": ek.Control(advantages=X.t())}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "message", "options"), ERRORS)
def test_errors(function: Any, error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        function(X, X, X, None, **options)


def test_errors_from_hidden_states() -> None:
    case = make("ppo")
    wrong = ek.Control(dropped=torch.zeros(6, dtype=torch.bool))
    for control, error, message in (
        (3, TypeError, "control: expected an ek.Control, got int"),
        (wrong, ValueError, r"dropped: expected logprob's shape"),
    ):
        with pytest.raises(error, match=message):
            case.loss(case.hidden, case.weight, control=control)
    with pytest.raises(ValueError, match="control: expected no selection made in the call"):
        case.loss(case.hidden, case.weight, method="kl_cov", control=WEIGHT)


def test_modules_take_a_control_in_the_call() -> None:
    given = micro(4, 9, 1)
    tokens = [given[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    decided = ek.control("exact_cov", one(given), ratio=0.2)
    assert torch.equal(
        ek.PolicyLossModule(clip_high=0.3)(*tokens, control=decided).loss,
        ek.policy_loss(*tokens, clip_high=0.3, control=decided).loss,
    )
