"""Control over micro-batches and over ranks of real gloo groups: bit-equal to the whole batch, metrics included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import entropy_kernels as ek
from calls import same_bits
from control_cases import Micro, added, micro
from gloo import one_result, run_ranks

ROWS, LENGTH = 24, 30
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_cov": ("clip_cov", {"seed": 3, "ratio": 0.05, "low": 0.1, "high": 3.0}),
    "clip_cov, quantile": ("clip_cov", {"seed": 4, "k": 9, "low": 0.3, "high": 0.9, "band": "quantile"}),
    "kl_cov": ("kl_cov", {"preset": "paper", "ratio": 0.04}),
    "exact_cov": ("exact_cov", {}),
    "exact_cov, weight": ("exact_cov", {"effect": "token_weight", "weight": 0.3}),
    "exact_cov, budget": ("exact_cov", {"limit": -0.1}),
    "random": ("random", {"seed": -7, "k": 30}),
    "clip_b": ("clip_b", {"mu": 1.0}),
    "clip_v": ("clip_v", {"mu": 0.7, "k": 11}),
    "steer": ("steer", {}),
    "steer, linear": ("steer", {"map": "linear", "form": "theorem"}),
    "top_entropy": ("top_entropy", {}),
    "erc": ("erc", {}),
    "entropy_advantage": ("entropy_advantage", {}),
    "repo": ("repo", {"zeta": 0.2, "center": True}),
    "adaptive_entropy": ("adaptive_entropy", {"coef": 0.25, "target": 0.9}),
    "entrocraft": ("entrocraft", {"low": 0.2, "high": 0.4}),
}
Found = dict[str, dict[str, Tensor]]


def whole(ties: bool = False, indexed: bool = False) -> Micro:
    given = micro(ROWS, LENGTH, 11, ties=ties)
    g = torch.Generator().manual_seed(1)
    given["exclude"] = torch.rand(ROWS, LENGTH, generator=g) < 0.1
    given["temperature"] = 0.5 + torch.rand(ROWS, LENGTH, generator=g)
    if indexed:
        given["token_index"] = torch.randperm(ROWS * LENGTH, generator=g).view(ROWS, LENGTH) * 2**40 - 2**50
    return given


def parts(given: Micro, sizes: list[int]) -> list[Micro]:
    split = {name: x.split(sizes) for name, x in given.items()}
    return [{name: x[i] for name, x in split.items()} for i in range(len(sizes))]


def decide(micros: list[Micro], group: Any = None) -> Found:
    """Of each case what the control says of all tokens, flat, and its metrics."""
    batch = added(micros, group)
    found: Found = {}
    for name, (method, options) in CASES.items():
        decided = batch.control(method, **options)
        told: dict[str, list[Tensor]] = {}
        for each in decided:
            for key, x in each._asdict().items():
                if isinstance(x, Tensor):
                    told.setdefault(key, []).append(x.reshape(-1))
        found[name] = {key: torch.cat(x) for key, x in told.items() if key != "entropy_coef"}
        numbers = [*decided[0].metrics.values()] if decided else []
        if decided and decided[0].entropy_coef is not None:
            numbers.append(decided[0].entropy_coef)
        found[name]["numbers"] = torch.stack(numbers) if numbers else torch.zeros(0)
        assert all(x is decided[0].metrics[name] for each in decided for name, x in each.metrics.items())
    return found


def assert_same(found: Found, expected: Found) -> None:
    for name, right in expected.items():
        assert {*found[name]} == {*right}, name
        for key, x in right.items():
            assert same_bits(found[name][key], x), (name, key)


@pytest.mark.parametrize("indexed", (False, True))
@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("sizes", ([1] * 24, [5, 0, 19], [12, 12], [23, 1]), ids=str)
def test_any_split_into_micro_batches(sizes: list[int], ties: bool, indexed: bool) -> None:
    given = whole(ties, indexed)
    expected = decide([given])
    assert_same(decide(parts(given, sizes)), expected)
    masks = {name: int(found[key].sum()) for name, found in expected.items()
             for key in ("dropped", "detached", "penalized") if key in found}  # fmt: skip
    assert len(masks) == 10 and all(masks.values())


def test_any_order_with_token_indices() -> None:
    """Sequences in another order, padded otherwise: the same control of each token."""
    given = whole(ties=True, indexed=True)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    moved = {name: torch.cat([x[order], x[:1]]) for name, x in given.items()}
    moved = {name: torch.nn.functional.pad(x, (3, 0)) for name, x in moved.items()}
    moved["mask"][-1] = False
    expected, found = decide([given]), decide(parts(moved, [7, 18]))
    for name, right in expected.items():
        assert same_bits(found[name]["numbers"], right["numbers"]), name
        for key, x in right.items():
            if key != "numbers":
                ours = found[name][key].view(ROWS + 1, -1)[:-1, 3:]
                there = given["mask"][order]
                assert same_bits(ours[there], x.view(ROWS, LENGTH)[order][there]), (name, key)


# Rows of each rank's micro-batches: unequal, a rank without micro-batches, one with an empty one
SHARDS = {1: [[[10, 14]]], 2: [[[5, 4], [15]], [[], [24]]], 4: [[[6], [6], [6], [6]], [[1, 0], [], [20], [3]]]}


def on_rank(rank: int, world: int, indexed: bool) -> list[Found]:
    found = []
    for sizes in SHARDS[world]:
        every = parts(whole(ties=indexed, indexed=indexed), [size for of_rank in sizes for size in of_rank])
        before = sum(map(len, sizes[:rank]))
        found.append(decide(every[before : before + len(sizes[rank])], dist.group.WORLD))
    return found


@pytest.mark.parametrize("indexed", (False, True), ids=("", "token_index and ties"))
@pytest.mark.parametrize("world", SHARDS)
def test_any_ranks(world: int, indexed: bool) -> None:
    expected = decide([whole(ties=indexed, indexed=indexed)])
    by_rank = run_ranks(world, on_rank, indexed)
    for number, sizes in enumerate(SHARDS[world]):
        for name, right in expected.items():
            for key, x in right.items():
                there = [found[number][name] for found, own in zip(by_rank, sizes, strict=True) if own]
                if key == "numbers":
                    assert all(same_bits(found[key], x) for found in there), name
                else:
                    assert same_bits(torch.cat([found[key] for found in there]), x), (name, key, sizes)


def of_unlike_ranks(rank: int, world: int) -> dict[str, Any]:
    """Fields that one rank has and another has not; a rank that adds later; masks of the covariance."""
    group = dist.group.WORLD
    given = parts(whole(), [10, 14])[rank]
    found: dict[str, Any] = {}
    for name in ("coefficient", "vocab_covariance"):
        own = dict(given)
        own.pop("vocab_covariance")
        if rank and name == "coefficient":
            own["coefficient"] = torch.full((14,), 0.5)
        if rank and name == "vocab_covariance":
            own["vocab_covariance"] = given["vocab_covariance"]
        (decided,) = added([own], group).control("top_entropy")
        found[name] = sorted(decided.metrics)
        if rank and name == "vocab_covariance":  # of which the other rank's are not known
            assert decided.metrics["predicted_change"].isnan() and decided.metrics["decrease_share"].isnan()
    given["coefficient"] = torch.full(given["logprob"].shape[:1], 0.5) if rank else None
    batch = added([] if rank else [given], group)
    batch.control("exact_cov")
    batch.covariance()
    if rank:
        known = dict(given)
        batch.add(known.pop("logprob"), known.pop("advantages"), known.pop("mask"), **known)
    (decided,) = batch.control("exact_cov")
    (covariance,) = batch.covariance()
    found["dropped"], found["covariance"] = decided.dropped, covariance
    return found


def test_ranks_that_have_other_fields_and_add_at_other_times() -> None:
    """No rank waits for another."""
    found = run_ranks(2, of_unlike_ranks)
    assert found[0]["coefficient"] == found[1]["coefficient"] == ["touched", "touched_frac"]
    assert found[0]["vocab_covariance"] == ["touched", "touched_frac"] and len(found[1]["vocab_covariance"]) == 5
    every = parts(whole(), [10, 14])
    every[1]["coefficient"] = torch.full((14,), 0.5)
    batch = added(every)
    right = [decided.dropped for decided in batch.control("exact_cov")]
    for ours, dropped, covariance in zip(found, right, batch.covariance(), strict=True):
        assert torch.equal(ours["dropped"], dropped) and same_bits(ours["covariance"], covariance)


def in_one_batch(rank: int, world: int) -> dict[str, list[float]]:
    """ek.control and Controller with a batch_group; memory is the same on all ranks."""
    group, found = dist.group.WORLD, {}
    given = parts(whole(), [4] * 6)[rank::world][0]
    positional = [given.pop(name) for name in ("logprob", "old_logprob", "advantages", "mask")]
    batch = ek.TokenBatch(*positional, **given)
    for name, (method, options) in CASES.items():
        decided = ek.control(method, batch, batch_group=group, **options)
        found[name] = [float(x) for x in decided.metrics.values()]
    for method, options in (("adaptive_entropy", {}), ("repo", {"target": "initial"}), ("random", {"ratio": 0.2})):
        controller = ek.Controller(method, batch_group=group, **options)
        numbers = [float(controller.step(batch).metrics["touched"]) for _ in range(2)]
        found[method + ", 2 steps"] = [*numbers, *controller.state_dict()["memory"].values()]
    try:
        other = ek.SelectionBatch()
        other.add(*positional[:1], positional[2], None)
        ek.Controller("random", batch_group=group).step(other)
    except ValueError as error:
        assert "batch_group: expected that of the SelectionBatch" in str(error)
    else:
        raise AssertionError("expected an error")
    return found


def test_ranks_see_the_same_figures() -> None:
    found = one_result(2, in_one_batch)
    assert len(found) == len(CASES) + 3 and all(found.values())


def test_loss_ranks_of_which_one_is_controlled() -> None:
    message = one_result(2, with_one_controlled)
    assert message.startswith("control: expected the same on all ranks of the batch_group"), message


def with_one_controlled(rank: int, world: int) -> str:
    x = torch.randn(3, 4)
    control = ek.Control(dropped=torch.zeros(3, 4, dtype=torch.bool)) if rank else None
    try:
        ek.policy_loss(x, x, x, None, control=control, batch_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


OTHER_ON_ONE_RANK = {
    "mu": ("clip_b", {"mu": 1.0}, {"mu": 1.5}),
    "weight": ("exact_cov", {"effect": "token_weight"}, {"weight": 0.25}),
    "target": ("adaptive_entropy", {}, {"target": 0.3}),
    "map": ("steer", {}, {"map": "linear"}),
    "method": ("clip_b", {}, {}),
}


def with_other_options(rank: int, world: int) -> dict[str, str]:
    """Of each case the error, and whether the next call goes on."""
    group, found = dist.group.WORLD, {}
    given = parts(whole(), [12] * 2)[rank]
    positional = [given.pop(name) for name in ("logprob", "old_logprob", "advantages", "mask")]
    batch = ek.TokenBatch(*positional, **given)
    for name, (method, options, other) in OTHER_ON_ONE_RANK.items():
        chosen = "clip_v" if name == "method" and rank else method
        with pytest.raises(ValueError, match=rf"^{name}: expected the same on all ranks of the batch_group") as caught:
            ek.control(chosen, batch, batch_group=group, **(options | other if rank else options))
        found[name] = str(caught.value)
        ek.control(method, batch, batch_group=group, **options)
    return found


def test_ranks_that_ask_for_other_things_all_hear_of_it() -> None:
    found = one_result(2, with_other_options)
    assert "got [1.0, 1.5]" in found["mu"]
