"""linear_policy_loss with every surrogate and every option of the losses, in float64 against the composed path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import entropy_kernels as ek
from entropy_kernels.losses import AGG_MODES
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops.linear_plan import HELD_OUT
from linear_policy_cases import (
    BAND,
    BUDGETS,
    FEW,
    LOSSES,
    MANY,
    ONE,
    SELECT,
    VALID,
    B,
    Case,
    H,
    L,
    V,
    assert_same,
    composed,
    counted_products,
    fused,
    gradients,
    make,
    same,
    same_gradients,
)  # fmt: skip

EVERY = BUDGETS[torch.float64]
MASK = {"clip_cov": "dropped", "kl_cov": "penalized"}
NARROW: dict[str, Any] = {"clip_low": 0.03, "clip_high": 0.04}
# Flattened, (6, 30) tokens: empty sequences first, last and in between; the masked tokens are all over them
PACKED = torch.tensor([0, 0, 13, 36, 36, 65, 90, 91, 120, 149, 180, 180])

products = pytest.fixture(counted_products)


def full(case: Case) -> Case:
    """Weights with zeros, advantages of their own for covariances, a reference KL times the ratio, an entropy bonus."""
    g = torch.Generator().manual_seed(7)
    weight = torch.rand(B, L, generator=g, dtype=torch.float64)
    case.options |= {
        "token_weight": weight * (weight > 0.3), "covariance_advantages": 3 * case.advantages + weight,
        "ref_logprob": case.old_logprob + 0.1 * weight, "ref_kl_coef": 0.3, "ref_kl_importance": True,
        "entropy_coef": 0.02,
    }  # fmt: skip
    return case


@pytest.mark.parametrize("surrogate", ek.surrogates())
def test_every_surrogate(surrogate: str, products: list[int]) -> None:
    """Alone and with every term; three products of the tokens that count, or of all where parts hold sequences."""
    tokens = B * L if ek.surrogates()[surrogate].pools else len(VALID)
    options: dict[str, Any] = {"surrogate": surrogate, **NARROW}
    for case in (make("ppo", dual_clip=3.0, **options), full(make("ppo", **options))):
        expected = composed(case)
        for budget in EVERY:
            products.clear()
            same(fused(case, budget), expected)
            assert sum(products) == 3 * H * V * tokens


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("surrogate", ("ppo", "gspo", "vespo", "gmpo"))
def test_packed_sequences(surrogate: str, mode: str) -> None:
    """Of no token, of masked ones alone, cut anywhere."""
    options: dict[str, Any] = {"surrogate": surrogate, "loss_agg_mode": mode, "cu_seqlens": PACKED, **NARROW}
    for budget in EVERY:
        assert_same(make("ppo", **options), budget)
        assert_same(full(make("kl_cov", ratio=0.1, **options)), budget)


@pytest.mark.parametrize("surrogate", ("ppo", "cispo", "gspo_token", "gspo"))
@pytest.mark.parametrize("method", MASK)
def test_selections(method: str, surrogate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the call, or given; in the end without reading anything back, as on a GPU."""
    chosen = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) < 0.2
    for options in (SELECT[method], {MASK[method]: chosen}, {"preset": "paper", MASK[method]: chosen.double()}):
        case = full(make(method, surrogate=surrogate, **options))
        for budget in EVERY:
            assert assert_same(case, budget).metrics["selected_frac"] > 0
        with monkeypatch.context() as patch:
            patch.setattr(op, "_reading_back_costs", lambda device: True)
            assert_same(case, MANY)


PRODUCTS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {  # of one part, few and many
    "sequences that fit": ({"surrogate": "gspo"}, (3, 3, 3)),
    "packed ones that fit": ({"surrogate": "gspo", "cu_seqlens": PACKED}, (3, 3, 3)),
    "sequences that do not": ({"surrogate": "gspo", "cu_seqlens": torch.tensor([0, 120, 180])}, (3, 4, 4)),
    "nothing that is dropped": ({"nonfinite": "drop"}, (3, 3, 3)),
    "dropped from a mean of sums": ({"nonfinite": "drop", "loss_agg_mode": "seq-mean-token-sum"}, (3, 3, 3)),
    "dropped from a mean of means": ({"nonfinite": "drop", "loss_agg_mode": "seq-mean-token-mean"}, (3, 4, 4)),
    "a loss for each token": ({"loss_agg_mode": "none"}, (3, 4, 4)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_three_products_or_four(name: str, products: list[int]) -> None:
    options, expected = PRODUCTS[name]
    for budget, count in zip(EVERY, expected, strict=True):
        case = make("ppo", entropy_coef=0.02, **options)
        products.clear()
        fused(case, budget, upstream=torch.ones(B, L) if "loss" in name else None)
        tokens = B * L if count == 3 and "surrogate" in options else len(VALID)  # in parts, or all those that count
        assert sum(products) == count * H * V * tokens


@pytest.mark.parametrize("method", MASK)
def test_a_sequence_ratio_and_a_selection(method: str, products: list[int]) -> None:
    """A token that is dropped changes the derivatives of all its sequence; a penalty is the token's own."""
    case = make(method, surrogate="gspo", entropy_coef=0.02, **SELECT[method])
    products.clear()
    fused(case, FEW)
    if method == "clip_cov":
        assert sum(products) == 4 * H * V * len(VALID)
    else:
        assert 3 * B * L <= sum(products) / (H * V) <= 3 * (B * L + 0.1 * len(VALID))


@pytest.mark.parametrize("surrogate", ("ppo", "gspo"))
@pytest.mark.parametrize("method", LOSSES)
def test_a_loss_for_each_token(method: str, surrogate: str) -> None:
    """Its backward pass takes one factor per token."""
    case = full(make(method, surrogate=surrogate, loss_agg_mode="none", **SELECT[method]))
    upstream = torch.randn(B, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = composed(case, upstream=upstream)
    for budget in EVERY:
        assert same(fused(case, budget, upstream=upstream), expected).loss.shape == (B, L)


@pytest.mark.parametrize("mode", (*AGG_MODES, "none"))
@pytest.mark.parametrize("surrogate", ("ppo", "gspo"))
def test_what_is_not_finite_is_dropped(surrogate: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-prob of -inf, an old one that is NaN, an infinite advantage: no value and no gradient of theirs."""
    for method in LOSSES:
        options: dict[str, Any] = {"nonfinite": "drop", "surrogate": surrogate, "loss_agg_mode": mode}
        case = make(method, entropy_coef=0.02, **options, **SELECT[method])
        case.bias[case.target.view(-1)[VALID[3]]] = -float("inf")
        case.old_logprob.view(-1)[VALID[20]] = float("nan")
        case.advantages.view(-1)[VALID[50]] = float("inf")
        case.old_logprob[4] = float("nan")  # a whole sequence: of one token
        upstream = torch.ones(B, L, dtype=torch.float64) if mode == "none" else None
        expected = composed(case, upstream=upstream)
        assert expected[0].metrics["nonfinite_tokens"] >= 4 and all(x.isfinite().all() for x in expected[1])
        for budget, unread in ((ONE, False), (FEW, False), (MANY, False), (MANY, True)):
            monkeypatch.setattr(op, "_reading_back_costs", lambda device, unread=unread: unread)
            same(fused(case, budget, upstream=upstream), expected)


def test_an_infinite_advantage_is_nobody_s_measure(products: list[int]) -> None:
    """Dropped, it does not make the others' coefficients huge, or small, which would all be made again."""
    case = make("kl_cov", k=3, nonfinite="drop")
    case.advantages.view(-1)[VALID[50]] = float("inf")
    products.clear()
    fused(case, MANY)
    assert sum(products) <= 3 * H * V * (len(VALID) + 4)


def test_a_surrogate_of_your_own() -> None:
    def squared(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: Any) -> Any:
        gain = -advantages * options.power
        return gain * log_ratio.square(), 2 * gain * log_ratio, log_ratio > 0.1

    for level in ("token", "sequence"):
        own = ek.Surrogate(squared, level, defaults={"power": 1.5})
        for budget in EVERY:
            assert_same(full(make("ppo", surrogate=own, power=0.5)), budget)
            assert_same(full(make("kl_cov", surrogate=own, ratio=0.1)), budget)


def test_numbers_on_the_device() -> None:
    """As 0-d tensors, of the selection, too, which then counts what it changes."""

    def on_device(**numbers: float) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    common = on_device(clip_low=0.1, clip_high=0.2, dual_clip=3.0, entropy_coef=0.02, batch_num_tokens=120)
    for case in (
        make("ppo", surrogate="sapo", **common, **on_device(tau_pos=1.1, tau_neg=0.9)),
        make("ppo", surrogate="ce_gppo", **common, **on_device(beta_low=0.5)),
        make("clip_cov", seed=torch.tensor(3), **common, **on_device(ratio=0.1, low=0.01, high=50.0)),
        make("kl_cov", k=torch.tensor(9), **common, **on_device(kl_coef=2.0)),
    ):
        plain = {name: x.item() if isinstance(x, Tensor) else x for name, x in case.options.items()}
        for budget in EVERY:
            result = assert_same(case, budget)
            torch.testing.assert_close(result, fused(make(case.method, **plain), budget)[0], rtol=1e-12, atol=1e-12)


def test_a_counter_as_the_seed() -> None:
    """One draw per call, in whatever way it is computed."""
    counter = ek.SeedCounter(3)
    for seed in (3, 4):
        result, _ = fused(make("clip_cov", **BAND | {"seed": counter}), MANY)
        torch.testing.assert_close(result, fused(make("clip_cov", **BAND | {"seed": seed}), MANY)[0])


BUFFERED: dict[str, dict[str, Any]] = {
    "sequences": {"surrogate": "gspo"},
    "packed sequences": {"surrogate": "vespo", "cu_seqlens": PACKED},
    "weights": {"token_weight": torch.tensor([0.0, 1, 2, 0, 1, 3])[:, None], "surrogate": "sapo"},
    "what is dropped": {"nonfinite": "drop", "batch_num_tokens": 123, "dp_size": 3},
    "a mean of sums without it": {
        "nonfinite": "drop", "loss_agg_mode": "seq-mean-token-sum-norm", "global_batch_size": 9,
    },
    "a sum without what is dropped": {"nonfinite": "drop", "loss_agg_mode": "token-sum"},
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERED)
def test_into_a_buffer(name: str) -> None:
    case = make("ppo", entropy_coef=0.02, **BUFFERED[name])
    case.old_logprob.view(-1)[VALID[20]] = float("nan") if "nonfinite" in case.options else -5.0
    _, right = composed(case)
    for budget in EVERY:
        buffer = torch.ones_like(case.weight)
        _, (hidden, weight, bias) = fused(case, budget, grad_buffer=buffer)
        assert weight is None
        same_gradients([hidden, buffer - 1, bias], right)


NOT_BUFFERED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a loss for each token": ("ppo", {"loss_agg_mode": "none"}, "loss_agg_mode='none', whose factors come only with"),
    "a late count": ("ppo", {"nonfinite": "drop"}, "known only after all tokens where no batch_num_tokens gives it"),
    "late sequences": ("ppo", {"nonfinite": "drop", "loss_agg_mode": "seq-mean-token-sum"}, "no global_batch_size"),
    "late lengths": ("ppo", {"nonfinite": "drop", "loss_agg_mode": "seq-mean-token-mean"}, "lengths of sequences"),
    "a selection of sequences' tokens": ("clip_cov", {"surrogate": "gspo", **BAND}, "give the mask as `dropped`"),
    "sequences that do not fit": ("ppo", {"surrogate": "gspo", "cu_seqlens": torch.tensor([0, 180])}, "of 180 tokens"),
}


@pytest.mark.parametrize("name", NOT_BUFFERED)
def test_a_buffer_that_is_refused(name: str) -> None:
    """Before anything is added to it."""
    method, options, why = NOT_BUFFERED[name]
    buffer = torch.zeros(V, H, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"(grad_buffer|memory_budget): expected .*{why}"):
        fused(make(method, **options), FEW, grad_buffer=buffer)
    assert not buffer.any()


def test_a_buffer_with_memory_of_its_own() -> None:
    case = make("ppo")
    for buffer, words in (
        (torch.zeros(1, H, dtype=torch.float64).expand(V, H), "whose elements do not share memory"),
        (torch.zeros(H + V, dtype=torch.float64).as_strided((V, H), (1, 1)), "whose elements do not share memory"),
    ):
        with pytest.raises(ValueError, match=f"grad_buffer: expected .*{words}"):
            fused(case, FEW, grad_buffer=buffer)
    weight = case.weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="grad_buffer: expected memory of its own, got a tensor that shares weight's"):
        case.loss(case.hidden, weight, grad_buffer=weight.detach())


COMPILED: dict[str, Callable[[], Case]] = {
    "Clip-Cov": lambda: full(make("clip_cov", ratio=0.1, low=0.01, high=50.0, batch_num_tokens=123)),
    "KL-Cov": lambda: make("kl_cov", ratio=0.1, kl_coef=2.0, nonfinite="drop"),
    "weights": lambda: full(make("ppo", surrogate="ce_gppo", loss_agg_mode="seq-mean-token-sum-norm")),
    "sequences": lambda: full(make("ppo", surrogate="gspo")),
}


def step(leaves: list[Tensor], case: Case, clip: float | Tensor, bonus: float | Tensor, **more: Any) -> Any:
    hidden, weight, bias = leaves
    options = {"memory_budget": MANY, "clip_low": clip, "clip_high": None, "entropy_coef": bonus, **more}
    loss, metrics = case.loss(2.0 * (0.5 * hidden), weight, 1.0 * bias, **options)
    return loss * 1.0, metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, products: list[int]) -> None:
    """No graph more for new numbers, of floats one; what a selection may take is made again, and nothing else."""
    torch._dynamo.reset()
    case = COMPILED[name]()
    again = int(0.1 * B * L) + HELD_OUT if "ratio" in case.options else 0
    floats, buffered = name == "sequences", name in ("Clip-Cov", "weights")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    first = 0
    for i, clip in enumerate((0.2, 0.1, 0.05)):
        made = []
        # of fp32: of a 0-d fp64 tensor on a CPU the compiler takes the number, finds no use for it and begins anew
        numbers: list[Any] = [x if floats else torch.tensor(x) for x in (clip, 0.01 + clip)]
        for function in (step, compiled):
            leaves = case.leaves()
            buffer = torch.ones_like(case.weight) if buffered else None
            products.clear()
            # what is compiled grows with the parts, whose code is alike
            more: dict[str, Any] = {"grad_buffer": buffer, "memory_budget": FEW}
            more |= {"seed": torch.tensor(i)} if name == "Clip-Cov" else {}
            loss, metrics = function(leaves, case, *numbers, **more)
            loss.backward()
            made.append((loss, metrics, gradients(leaves), buffer))
        assert sum(products) == 3 * H * V * (B * L + again)
        torch.testing.assert_close(made[1], made[0], rtol=1e-12, atol=1e-14)
        first = counter.frame_count if i == 0 else first
    assert counter.frame_count - first <= floats


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_schedules_do_not_compile_anew(tensors: bool) -> None:
    """In one part; with more, a ratio or k that is a number says how many there are, and only a tensor does not."""
    torch._dynamo.reset()
    case = make("clip_cov", seed=0)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(1, 8):
        values: dict[str, Any] = {"ratio": 0.05 * i, "low": 0.001 * i, "high": 40.0 + i, "temperature": 1 + 0.1 * i}
        values |= {"batch_num_tokens": 100 + i, "clip_low": 0.1 * i, "entropy_coef": 0.01 * i, "memory_budget": ONE}
        if tensors:
            values = {name: torch.tensor(x) if name != "memory_budget" else x for name, x in values.items()}
        losses = [function(case.leaves(), case, 0.0, 0.0, **values)[0].detach() for function in (step, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
    assert counter.frame_count <= (1 if tensors else 2)


@pytest.mark.slow
def test_inductor(inductor: Callable) -> None:
    """In few parts: the code of a part is the same in many, and the compiler's time grows with it."""
    case = COMPILED["Clip-Cov"]()
    leaves = case.leaves()
    inductor(step)(leaves, case, 0.2, 0.02, seed=3, memory_budget=FEW)[0].backward()
    case.options |= {"seed": 3, "entropy_coef": 0.02, "clip_low": 0.2, "clip_high": None}
    same_gradients(gradients(leaves), composed(case)[1], 1e-11)
