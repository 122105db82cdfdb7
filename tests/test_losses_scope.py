"""One batch, micro-batches and data-parallel ranks give the same loss; compiled code too, and nothing is read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import entropy_kernels as ek
from entropy_kernels import _arguments
from gloo import one_result, run_ranks
from loss_cases import MODES, differentiated, leaf, ragged

ROWS, LENGTH = 8, 12
POSITIONAL = ("logprob", "old_logprob", "advantages", "mask")
SELECTING = {
    "policy": (ek.policy_loss, None),
    "clip_cov": (ek.clip_cov_loss, "dropped"),
    "kl_cov": (ek.kl_cov_loss, "penalized"),
}


def batch() -> dict[str, Tensor]:
    """Rows of different lengths, an empty one among them; float64, so that only the order of sums differs."""
    lp, old, adv, mask = ragged([12, 3, 0, 7, 1, 12, 5, 9], dtype=torch.float64)
    tensors = (lp, old, 2 * adv[:, :1], mask, lp.abs(), old + 0.1)
    return dict(zip((*POSITIONAL, "entropy", "ref_logprob"), tensors, strict=True))


def parts_of(data: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    rows = ROWS // count
    return [{key: value[i : i + rows] for key, value in data.items()} for i in range(0, ROWS, rows)]


TERMS: dict[str, Any] = {"entropy_coef": 0.02, "ref_kl_coef": 0.05}


def loss_of(function: Any, data: dict[str, Tensor], **options: Any) -> tuple[ek.PolicyLoss, Tensor, Tensor]:
    """The loss after backward, and the gradients of logprob and entropy."""
    entropy = leaf(data["entropy"])
    positional = [data[name] for name in POSITIONAL]
    out, gradient = differentiated(
        function, *positional, entropy=entropy, ref_logprob=data["ref_logprob"], **TERMS, **options
    )
    assert entropy.grad is not None
    return out, gradient, entropy.grad


def masks_of(parts: list[dict[str, Tensor]], argument: str, **options: Any) -> list[Tensor]:
    """Selection over the whole batch, from its parts."""
    selection = ek.SelectionBatch()
    for part in parts:
        selection.add(*(part[name] for name in ("logprob", "advantages", "mask")))
    if argument == "dropped":
        return selection.clip_cov(**{"seed": 9, "low": -9.0, "high": 9.0, **options}, ratio=0.2)
    return selection.kl_cov(ratio=0.2)


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_micro_batches_add_up_to_the_batch(name: str, mode: str, count: int) -> None:
    function, argument = SELECTING[name]
    data = batch()
    parts = parts_of(data, count)
    whole = {"batch_num_tokens": int(data["mask"].sum()), "global_batch_size": ROWS, "loss_scale_factor": 3}
    given: list[dict[str, Tensor]] = [{}] * count
    one: dict[str, Tensor] = {}
    if argument is not None:
        given = [{argument: mask} for mask in masks_of(parts, argument)]
        one = {argument: masks_of([data], argument)[0]}
        assert one[argument].any()
    expected = loss_of(function, data, loss_agg_mode=mode, **whole, **one)
    outs = [loss_of(function, p, loss_agg_mode=mode, **whole, **m) for p, m in zip(parts, given, strict=True)]
    torch.testing.assert_close(sum(out.loss for out, _, _ in outs), expected[0].loss)
    for which in (1, 2):
        torch.testing.assert_close(torch.cat([out[which] for out in outs]), expected[which])
    # pg_loss adds up as the loss does
    torch.testing.assert_close(sum(out.metrics["pg_loss"] for out, _, _ in outs), expected[0].metrics["pg_loss"])


def test_without_the_whole_batchs_numbers_micro_batches_do_not_add_up() -> None:
    """The test above can fail: per-call denominators give another loss."""
    data = batch()
    expected = loss_of(ek.policy_loss, data)[0].loss
    mean = sum(loss_of(ek.policy_loss, part)[0].loss for part in parts_of(data, 2)) / 2
    assert not torch.allclose(mean, expected, rtol=1e-3)


def test_advantages_in_fp64_are_not_rounded_before_the_selection() -> None:
    """A loss selects what SelectionBatch does, and with it every split of the batch, also where fp32 sees ties."""
    data = {key: value if value.dtype == torch.bool else value.float() for key, value in batch().items()}
    generator = torch.Generator().manual_seed(6)
    data["advantages"] = 1 + 1e-9 * torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)
    for name, options in (("clip_cov", {"seed": 3, "low": 0.0, "high": 9.0}), ("kl_cov", {})):
        function, argument = SELECTING[name]
        (mask,) = masks_of([data], argument, **options)
        clips: dict[str, Any] = {"clip_low": None, "clip_high": None}  # tokens that they hold would be no candidates
        expected = loss_of(function, data, **clips, **{argument: mask})
        out = loss_of(function, data, ratio=0.2, **clips, **options)
        assert out[0].metrics["selected_frac"] > 0 and out[0].metrics["cov_max"] > 0
        torch.testing.assert_close(out[0].loss, expected[0].loss)
        torch.testing.assert_close(out[1:], expected[1:])


def test_selecting_per_micro_batch_is_another_selection() -> None:
    """Why SelectionBatch exists (and what the docstring warns of): 4 calls drop 4 tokens, one call drops 1."""
    data = batch()
    options = {"seed": 0, "ratio": 1e-4, "low": -99.0, "high": 99.0, "clip_low": None, "clip_high": None}

    def dropped(part: dict[str, Tensor]) -> int:
        out = ek.clip_cov_loss(*(part[name] for name in POSITIONAL), **options)  # type: ignore[arg-type]
        return round(float(out.metrics["selected_frac"] * part["mask"].sum()))

    assert dropped(data) == 1 and sum(map(dropped, parts_of(data, 4))) == 4


# ---- data-parallel ranks --------------------------------------------------------------------------------------------

# Rows per rank: unequal, with a rank that has none.
SHARES = {2: [slice(0, 5), slice(5, 8)], 4: [slice(0, 3), slice(3, 4), slice(4, 4), slice(4, 8)]}


def check_rank(group: Any, size: int) -> None:
    """Runs on every rank: this rank's share of everything is what one rank computes from the whole batch."""
    rank = dist.get_rank(group)
    rows = SHARES[size][rank]
    data = batch()
    part = {key: value[rows] for key, value in data.items()}
    for name in ("policy", "clip_cov_verl", "clip_cov_quantile", "kl_cov"):
        function, selecting = CALLS[name]
        for mode in MODES if name == "policy" else ("token-mean", "seq-mean-token-mean"):
            options = {"loss_agg_mode": mode, **selecting}
            expected, grad, grad_entropy = loss_of(function, data, **options)
            for dp_size in (1, size):
                out, own, own_entropy = loss_of(function, part, batch_group=group, dp_size=dp_size, **options)
                total = out.loss.detach().clone()
                dist.all_reduce(total, group=group)
                share = [x * dp_size for x in (expected.loss.detach(), grad[rows], grad_entropy[rows])]
                torch.testing.assert_close([total, own, own_entropy], share)
                torch.testing.assert_close(out.metrics, expected.metrics)
                mine = torch.stack(list(out.metrics.values()))
                of_all = [torch.empty_like(mine) for _ in range(size)]
                dist.all_gather(of_all, mine, group=group)
                assert all(torch.equal(other, mine) for other in of_all)  # bit for bit
    # given denominators go before the group's
    out = loss_of(ek.policy_loss, part, batch_group=group, batch_num_tokens=1000)[0]
    expected = loss_of(ek.policy_loss, part, batch_num_tokens=1000)[0]
    torch.testing.assert_close(out.loss, expected.loss)


def check_compiled_rank(group: Any, size: int) -> None:
    part = {key: value[SHARES[size][dist.get_rank(group)]] for key, value in batch().items()}
    # "eager": that dynamo captures the collective is the point here; aot_eager is tested below on one rank
    compiled = torch.compile(ek.policy_loss, backend="eager", fullgraph=True, dynamic=False)
    expected, out = (loss_of(function, part, batch_group=group) for function in (ek.policy_loss, compiled))
    torch.testing.assert_close((out[0].loss, *out[1:]), (expected[0].loss, *expected[1:]))


def on_rank(rank: int, world: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    check_rank(dist.group.WORLD, 4)
    check_rank(pairs[rank // 2], 2)
    if rank < 2:
        check_compiled_rank(pairs[0], 2)


def test_ranks_share_the_loss_of_the_batch() -> None:
    """Real gloo groups of 4 and 2 ranks: loss, gradients and metrics; one of the ranks has no rows."""
    run_ranks(4, on_rank)


def _own(log_ratio: Tensor, logprob: Tensor, advantages: Tensor, options: Any) -> Any:
    return -advantages * log_ratio, -advantages, None


OWN = ek.Surrogate(_own, defaults={"on": False, "word": "a"})


def disagreeing(rank: int, world: int) -> dict[str, str]:
    """Messages of losses of which the last rank has another option than the rest."""
    last, group = rank == world - 1, dist.group.WORLD
    lp = torch.randn(3 + rank, 5)
    given: dict[str, Any] = {"entropy": lp.exp(), "ref_logprob": lp - 1, "batch_group": group}
    changes: dict[str, dict[str, Any]] = {
        "entropy_coef": {"entropy_coef": 0.1 * last},
        "ref_kl_coef, a tensor": {"ref_kl_coef": torch.tensor(0.5 + last)},
        "clip_high": {"clip_high": None if last else 0.2},
        "loss_agg_mode": {"loss_agg_mode": "token-sum" if last else "token-mean"},
        "loss_agg_mode, of sequences": {"loss_agg_mode": "seq-mean-token-sum" if last else "token-mean"},
        "surrogate": {"surrogate": "sapo" if last else "ppo"},
        "surrogate, one function": {"surrogate": "dppo_kl" if last else "dppo_tv"},
        "entropy": {"entropy": None if last else lp},
        "ref_logprob": {"ref_logprob": lp if last else None},
        "nonfinite": {"nonfinite": "drop" if last else "propagate"},
        "ref_kl_importance": {"ref_kl_importance": bool(last)},
        "on": {"surrogate": OWN, "on": bool(last)},
        "word": {"surrogate": OWN, "word": "b" if last else "a"},
        "kl_estimator": {"kl_estimator": "k2" if last else "k3"},
        "tau_pos": {"surrogate": "sapo", "tau_pos": 1.0 + last},
        "ratio": {"ratio": 0.1 + 0.1 * last, "seed": 1, "low": -9.0, "high": 9.0},
    }
    messages = {}
    for name, options in changes.items():
        function: Any = ek.clip_cov_loss if "ratio" in options else ek.policy_loss
        try:
            function(lp, lp - 0.1, lp, None, **{**given, **options})
            messages[name] = "nothing was raised"
        except ValueError as error:
            messages[name] = str(error)
    try:
        ek.aggregate(lp, None, batch_group=group, loss_agg_mode="token-sum" if last else "seq-mean-token-sum")
    except ValueError as error:
        messages["loss_agg_mode, aggregate"] = str(error)
    return messages


def test_ranks_that_disagree_all_raise_the_same() -> None:
    first = one_result(3, disagreeing)
    for name, message in first.items():
        assert message.startswith(f"{name.split(',')[0]}: expected the same on all ranks of the batch_group"), message
    assert first["entropy_coef"].endswith("got [0.0, 0.0, 0.1]") and "loss_agg_mode, aggregate" in first


def agreeing(rank: int, world: int) -> None:
    """Runs on every rank: what ranks may have differently."""
    group = dist.group.WORLD
    lp, old, adv = torch.randn(3, 2, 5 + rank, generator=torch.Generator().manual_seed(rank))

    def call(function: Any = ek.policy_loss, **options: Any) -> Tensor:
        return function(lp, old, adv, None, batch_group=group, **options).loss

    # denominators of their own, as with a mean over the ranks of each one's mean
    for function, options in ((ek.policy_loss, {}), (ek.kl_cov_loss, {"k": 2})):
        own = call(function, batch_num_tokens=lp.numel(), dp_size=1 + rank, **options)
        shared = call(function, batch_num_tokens=100, **options)
        torch.testing.assert_close(own, shared * 100 * (1 + rank) / lp.numel())
    norm = {"loss_agg_mode": "seq-mean-token-sum-norm", "global_batch_size": 2 + rank}
    own = call(loss_scale_factor=lp.shape[1], **norm)
    torch.testing.assert_close(own, call(loss_scale_factor=10, **norm) * 10 / lp.shape[1])
    assert call(batch_num_tokens=None if rank else 7).isfinite()
    # one number, of two kinds
    for name in ("clip_low", "clip_high", "entropy_coef"):
        value = torch.tensor(0.2) if rank else 0.2
        torch.testing.assert_close(call(entropy=lp, **{name: value}), call(entropy=lp, **{name: 0.2}))
    assert call(surrogate=OWN, word={"a", "b", "c"}).isfinite()  # whose order is each process's own
    # compiled on one rank, eager on the other
    torch.testing.assert_close(
        (torch.compile(call, backend="eager") if rank else call)(clip_low=0.3, entropy=lp),
        call(clip_low=0.3, entropy=lp),
    )


def test_what_ranks_may_have_differently() -> None:
    run_ranks(2, agreeing)


# ---- compiled, and without a sync -----------------------------------------------------------------------------------

WIDE = {"low": -9.0, "high": 9.0}
QUANTILE = {"seed": torch.tensor(3), "ratio": 0.2, "band": "quantile", "low": 0.2, "high": 0.9}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "policy": (ek.policy_loss, {"dual_clip": 3.0, "kl_estimator": "k3+"}),
    "clip_cov_verl": (ek.clip_cov_loss, {"seed": torch.tensor(3), "ratio": 0.2, **WIDE}),
    "clip_cov_paper": (ek.clip_cov_loss, {"preset": "paper", "seed": torch.tensor(3), "k": 4, **WIDE}),
    "clip_cov_quantile": (ek.clip_cov_loss, QUANTILE),
    "clip_cov_given": (ek.clip_cov_loss, {"dropped": torch.ones(ROWS, LENGTH)}),
    "kl_cov": (ek.kl_cov_loss, {"ratio": 0.2, "penalty_estimator": "k2"}),
    "kl_cov_given": (ek.kl_cov_loss, {"penalized": torch.ones(ROWS, LENGTH), "kl_coef": torch.tensor(0.5)}),
}
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
def test_compiled_in_one_graph(name: str) -> None:
    function, options = CALLS[name]
    mode = MODES[list(CALLS).index(name) % len(MODES)]
    torch._dynamo.reset()
    # that dynamo captures the call is the point; ahead of time each function is differentiated once
    backend = "aot_eager" if name in ("policy", "clip_cov_verl", "kl_cov") else "eager"
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    (expected, *right), (out, *own) = (
        loss_of(each, batch(), loss_agg_mode=mode, **options) for each in (function, compiled)
    )
    torch.testing.assert_close((out.loss, own, dict(out.metrics)), (expected.loss, right, expected.metrics))


def test_a_compiled_module_recompiles_for_nothing_that_changes_each_step() -> None:
    """Seed, counts and coefficients as tensors, new values: one graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    criterion = torch.compile(ek.ClipCovLoss(ratio=0.2, low=-9.0, high=9.0), backend=counter, fullgraph=True)
    data = batch()
    seen = set()
    for step in range(4):
        out = criterion(
            *(data[key] for key in POSITIONAL), seed=torch.tensor(step), batch_num_tokens=torch.tensor(50 + step),
            entropy=leaf(data["entropy"]), entropy_coef=torch.tensor(0.01 * step),
        )  # fmt: skip
        seen.add(float(out.loss.detach()))
    assert counter.frame_count == 1 and len(seen) == 4


def test_numbers_on_the_cpu_serve_every_device() -> None:
    """torch takes a 0-d tensor of the CPU beside tensors of any device."""
    tensors = [torch.empty(3, 4, device="meta")] * 3
    numbers = {name: torch.tensor(0.1) for name in ("kl_coef", "clip_low", "clip_high", "ref_kl_coef")}
    out = ek.kl_cov_loss(*tensors, None, ref_logprob=tensors[0], **numbers)  # type: ignore[arg-type]
    assert out.loss.device.type == "meta"


class NoHostSync(TorchDispatchMode):
    """Refuses every operator whose result the host must wait for."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_to_cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or name.startswith("unique"):
            raise AssertionError(f"host sync: {func}")
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise AssertionError(f"host sync (mask indexing): {func}")
        return func(*args, **(kwargs or {}))


@every_call
@pytest.mark.parametrize("mode", MODES)
def test_no_value_is_read_back_by_the_host(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, options = CALLS[name]
    data = batch()
    monkeypatch.setattr(_arguments, "values_are_checked", lambda tensor: False)  # as on a GPU
    with NoHostSync():
        loss_of(function, data, loss_agg_mode=mode, batch_num_tokens=torch.tensor(40), **options)


def test_the_guard_sees_a_sync() -> None:
    x = torch.ones(3)
    for sync in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="host sync"), NoHostSync():
            sync()
