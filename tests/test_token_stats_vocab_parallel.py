"""vocab_group: shards of the vocabulary on real gloo ranks against the whole row, values and gradients."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from calls import bound, same_bits, upstream
from cases import CASES
from conftest import BackendDevice
from gloo import collectives_called, equal_shards, one_result, run_ranks, run_ranks_once, with_empty_shard
from sample import INF, NAN, Sample, normal, plain

WORLDS = (2, 3, 4)


def unequal(vocab: int, world: int) -> list[int]:
    """One column, then ever more."""
    widths = [1, *(5 * (i + 1) for i in range(world - 2))]
    return [*widths, vocab - sum(widths)]


def sample_of(name: str) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: next(case for case in CASES if case.name == name).build(dtype, "cpu")


def padded(dtype: torch.dtype) -> Sample:
    """61 ids in 96 columns: with 3 ranks the last shard has no id at all, with 4 the third has some."""
    sample = plain(dtype, "cpu", vocab=96, vocab_size=61, temperature=0.8)
    sample.logits[:, 61:] = torch.tensor([NAN, INF, -INF, 0, 5], dtype=dtype).repeat(7)
    sample.target.clamp_(max=60)
    sample.target[0] = 60
    return sample


def empty_parts(dtype: torch.dtype) -> Sample:
    """Rows in which some shards hold nothing but -inf, the label there or not; one finite entry in all."""
    sample = plain(dtype, "cpu", rows=6, vocab=96)
    sample.logits[0, :70] = -INF
    sample.logits[1, 30:] = -INF
    sample.logits[2, 1:] = -INF
    sample.logits[3, :95] = -INF
    sample.target.copy_(torch.tensor([90, 50, 0, 95, 3, 95]))
    sample.logits[5, 95] = -INF
    return sample


def poisoned(dtype: torch.dtype) -> Sample:
    """NaN, +inf and nothing at all in the shard of the first, a middle, the last rank."""
    sample = plain(dtype, "cpu", rows=9, vocab=96)
    for row, (column, value) in enumerate([(0, NAN), (50, NAN), (95, NAN), (0, INF), (50, INF), (95, INF)]):
        sample.logits[row, column] = value
    sample.logits[6] = -INF
    sample.logits[7, :48] = INF
    return sample


def far_apart(dtype: torch.dtype) -> Sample:
    """Shards whose maxima differ by more than exp can hold, and by more than the dtype can."""
    sample = plain(dtype, "cpu", rows=6, vocab=96, temperature=torch.tensor([1.0, 0.5, 0.01, 1.0, 2.0, 0.7]))
    sample.logits[0, 48:] += 1000
    sample.logits[1, :48] += 1000
    sample.logits[2, 95] = 1000
    sample.logits[3, 48:] = torch.finfo(dtype).min
    sample.logits[4, :48] = torch.finfo(dtype).min
    sample.logits[5, 0], sample.logits[5, 95] = torch.finfo(dtype).max, torch.finfo(dtype).min
    return sample


def batched(dtype: torch.dtype) -> Sample:
    """(B, L, V) seen through a transposition, ignored labels among them, int32."""
    logits = normal(3, 2, 96, dtype=dtype, device="cpu").transpose(0, 1)
    target = torch.tensor([[0, -100, 95], [48, 47, 24]], dtype=torch.int32)
    logits[0, 1] = NAN
    return Sample(logits, target, {"temperature": torch.tensor([[0.7], [1.3]])})


# name -> (sample, widths of the shards or None for the default of equal ones, dtype, function)
SCENARIOS: dict[str, tuple[Callable[[torch.dtype], Sample], Callable | None, torch.dtype, str]] = {
    "equal": (lambda d: plain(d, "cpu", vocab=96), None, torch.float32, "token_stats"),
    "equal bf16": (lambda d: plain(d, "cpu", vocab=96), None, torch.bfloat16, "token_stats"),
    "equal fp64": (lambda d: plain(d, "cpu", vocab=96, temperature=0.3), None, torch.float64, "token_stats"),
    "two statistics": (lambda d: plain(d, "cpu", vocab=96), None, torch.float32, "logprob_entropy"),
    "unequal": (lambda d: plain(d, "cpu", vocab=97), unequal, torch.float32, "token_stats"),
    "unequal fp16": (lambda d: plain(d, "cpu", vocab=1500), unequal, torch.float16, "token_stats"),
    "an empty shard": (lambda d: plain(d, "cpu", vocab=97), with_empty_shard, torch.float32, "token_stats"),
    "padded": (padded, None, torch.float32, "token_stats"),
    "padded unequal": (padded, unequal, torch.float32, "token_stats"),
    "empty parts": (empty_parts, None, torch.float32, "token_stats"),
    "poisoned": (poisoned, None, torch.float32, "token_stats"),
    "far apart": (far_apart, None, torch.float32, "token_stats"),
    "far apart bf16": (far_apart, unequal, torch.bfloat16, "token_stats"),
    "softcap": (lambda d: plain(d, "cpu", vocab=96, softcap=4.0, temperature=0.6), None, torch.float32, "token_stats"),
    "batched": (batched, None, torch.float32, "token_stats"),
    "confident": (sample_of("confident"), unequal, torch.float32, "token_stats"),
    "ignored": (sample_of("all_ignored"), unequal, torch.float32, "token_stats"),
    "no rows": (sample_of("zero_rows"), unequal, torch.float32, "token_stats"),
}  # fmt: skip


# Scenarios that the interpreter, which is slow, runs in place too
SLOW_IN_PLACE = ("equal bf16", "unequal", "poisoned", "batched")


def shard_of(sample: Sample, widths: list[int], rank: int) -> tuple[torch.Tensor, int]:
    start = sum(widths[:rank])
    return sample.logits[..., start : start + widths[rank]], start


def scenario(name: str, world: int) -> tuple[Sample, list[int], bool]:
    build, split, dtype, _ = SCENARIOS[name]
    sample = build(dtype)
    vocab = sample.logits.shape[-1]
    return sample, (split or equal_shards)(vocab, world), split is not None


def shard_results(rank: int, world: int, backend: str) -> dict[str, Any]:
    """Runs on every rank: outputs and gradient of this rank's shard, for each scenario."""
    results = {}
    for name, (_, _, _, function) in SCENARIOS.items():
        sample, widths, explicit = scenario(name, world)
        shard, start = shard_of(sample, widths, rank)
        kwargs = sample.kwargs | ({"vocab_start": start} if explicit else {})
        names = ["logprob", "entropy", "collision"][: 2 if function == "logprob_entropy" else 3]
        grads = upstream(sample, *names)
        for inplace in (False, True) if backend != "triton" or name in SLOW_IN_PLACE else (False,):
            logits = shard.clone().requires_grad_()
            outputs = getattr(ek, function)(
                logits * 1 if inplace else logits,
                sample.target,
                **kwargs,
                vocab_group=dist.group.WORLD,
                inplace_backward=inplace,
                backend=backend,
            )
            gradient = torch.autograd.grad([getattr(outputs, n) for n in names], logits, list(grads.values()))[0]
            key = f"{name} in place" if inplace else name
            results[key] = ({n: v.detach() for n, v in outputs._asdict().items()}, gradient)
    return results


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("world", WORLDS)
def test_shards_equal_the_whole(name: str, world: int, on: BackendDevice) -> None:
    if on.device != "cpu":
        pytest.skip("gloo ranks compute on the CPU")
    if on.interpreted and world != 3:
        pytest.skip("one world size is enough for the slow interpreter: the merge is the same code")
    results = run_ranks_once(world, shard_results, on.backend)
    ranks = [result[name] for result in results]
    sample, widths, _ = scenario(name, world)
    references = bound(sample)
    names = ["logprob", "entropy", "collision"][: len(ranks[0][0]) if len(ranks[0][0]) == 2 else 3]
    for outputs, gradient in ranks:
        for key, value in outputs.items():
            assert value.shape == sample.target.shape
            assert same_bits(value, ranks[0][0][key]), f"{key} differs between ranks"
        references.check_values(**outputs)
        assert gradient.dtype == sample.logits.dtype
    assert [gradient.shape[-1] for _, gradient in ranks] == widths
    whole = torch.cat([gradient for _, gradient in ranks], -1)
    references.check_gradient(whole, **upstream(sample, *names))
    for result in results:
        if f"{name} in place" in result:
            assert same_bits(result[f"{name} in place"][1], result[name][1]), "in place differs"


# ---- what is not a matter of values ---------------------------------------------------------------------------------


def collectives(rank: int, world: int, backend: str) -> dict[str, Any]:
    """Number of collectives, forward and backward; rank 0 alone runs the backward pass."""
    calls = collectives_called()
    sample = plain(torch.float32, "cpu", vocab=96)
    logits = shard_of(sample, equal_shards(96, world), rank)[0].clone().requires_grad_()
    out = ek.token_stats(logits, sample.target, vocab_group=dist.group.WORLD, backend=backend)
    forward = list(calls)
    if rank == 0:
        (out.logprob.sum() + out.collision.sum()).backward()
    return {"forward": forward, "backward": calls[len(forward) :], "gradient": logits.grad}


def test_one_collective_forward_and_none_backward(on: BackendDevice) -> None:
    if on.device != "cpu":
        pytest.skip("gloo ranks compute on the CPU")
    for result in run_ranks(2, collectives, on.backend):
        assert len(result["forward"]) == 1 and not result["backward"]


def subgroups(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two replicas (data-parallel) of two shards (tensor-parallel): ranks 0, 2 and ranks 1, 3 hold one batch each."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    replica, shard = rank % 2, rank // 2
    logits = normal(4, 96, dtype=torch.float32, device="cpu", seed=replica)[:, 48 * shard : 48 * shard + 48].clone()
    logits.requires_grad_()
    out = ek.logprob_entropy(logits, torch.tensor([0, 47, 48, 95]), vocab_group=groups[replica])
    (out.logprob + out.entropy).sum().backward()
    assert logits.grad is not None
    return torch.stack([out.logprob, out.entropy]).detach(), logits.grad


def test_a_subgroup_of_the_ranks() -> None:
    """The rank within the group, not the global one, says which shard this is."""
    results = run_ranks(4, subgroups)
    for replica in (0, 1):
        sample = Sample(normal(4, 96, dtype=torch.float32, device="cpu", seed=replica), torch.tensor([0, 47, 48, 95]))
        (values, left), (again, right) = results[replica], results[replica + 2]
        assert same_bits(values, again)
        references = bound(sample)
        references.check_values(logprob=values[0], entropy=values[1])
        ones = torch.ones(4)
        references.check_gradient(torch.cat([left, right], -1), logprob=ones, entropy=ones)


def one_rank(rank: int, world: int) -> None:
    sample = plain(torch.float32, "cpu")
    alone = ek.token_stats(sample.logits, sample.target)
    grouped = ek.token_stats(sample.logits, sample.target, vocab_group=dist.group.WORLD)
    for a, b in zip(alone, grouped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_group_of_one() -> None:
    run_ranks(1, one_rank)


def wrong_calls(rank: int, world: int) -> dict[str, str]:
    """Messages of calls that must fail on every rank alike: a rank that raised alone would leave the others waiting."""
    logits, group = torch.randn(3, 10), dist.group.WORLD
    calls: dict[str, dict[str, Any]] = {
        "label beyond all shards": {"target": torch.tensor([0, 20, 1])},
        "label beyond the last of the explicit shards": {"target": torch.tensor([0, 25, 1]), "vocab_start": 12 * rank},
        "label in the padding": {"target": torch.tensor([0, 15, 1]), "vocab_size": 15},
        "negative label": {"target": torch.tensor([0, -1, 1])},
        "negative vocab_start": {"vocab_start": -1},
        "temperature": {"temperature": 0.0},
        "vocab_size": {"vocab_size": 0},
    }
    messages = {}
    for name, kwargs in calls.items():
        target = kwargs.pop("target", torch.arange(3))
        try:
            ek.logprob_entropy(logits, target, vocab_group=group, **kwargs)
            messages[name] = "nothing was raised"
        except (ValueError, IndexError) as error:
            messages[name] = str(error)
    # the group still works
    ek.logprob_entropy(logits, torch.tensor([0, 19, 5]), vocab_group=group)
    return messages


def test_errors_are_the_same_on_every_rank() -> None:
    first = one_result(2, wrong_calls)
    for name, message in first.items():
        argument = next(a for a in ("target", "vocab_start", "temperature", "vocab_size") if message.startswith(a))
        assert "expected" in message and "got" in message, f"{name}: {message}"
        assert argument == ("target" if "label" in name else name.split()[-1])
    assert "20" in first["label beyond all shards"] and "15" in first["label in the padding"]


def disagreements(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Arguments of which the last rank has others than the rest, by the one that is to be named."""
    last = rank == world - 1
    labels = torch.tensor([0, 9, 11])
    return {
        "target": {"target": labels + int(last)},
        "target, one label": {"target": torch.tensor([0, 9, 12 if last else 11], dtype=torch.int32)},
        "target, ignored by one": {"target": torch.tensor([0, 9, -100 if last else 11])},
        "target, one that is none": {"target": torch.tensor([0, -1 if last else 9, 11])},
        "temperature": {"temperature": 0.5 if last else 1.0},
        "temperature of one token": {"temperature": torch.tensor([1.0, 2.0, 1.5 if last else 1.0])},
        "temperature, one that is none": {"temperature": torch.tensor([1.0, 2.0, -1.0 if last else 1.0])},
        "softcap": {"softcap": 20.0 if last else 30.0},
        "softcap of one": {"softcap": 20.0 if last else None},
        "ignore_index": {"ignore_index": -1 if last else -100},
        "vocab_size": {"vocab_size": 14 + last},
        "vocab_start, overlapping": {"vocab_start": 10 * rank - last},
        "vocab_start, equal": {"vocab_start": 0},
        "vocab_start, with a gap": {"vocab_start": 10 * rank + last},
        "vocab_start, with a gap and a label in it": {
            "vocab_start": 12 * rank, "target": torch.tensor([0, 10, 12]),
        },
        "vocab_start, not from 0": {"vocab_start": 10 * rank + 1},
    }  # fmt: skip


def disagreeing(rank: int, world: int) -> dict[str, str]:
    logits, group = torch.randn(3, 10), dist.group.WORLD
    hidden, weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(10, 4)
    messages = {}
    for name, kwargs in disagreements(rank, world).items():
        given = {"target": torch.tensor([0, 9, 11]), **kwargs, "vocab_group": group}
        for function, inputs in ((ek.token_stats, (logits,)), (ek.linear_logprob_entropy, (hidden, weight))):
            try:
                function(*inputs, **given)
                messages[f"{name}, {function.__name__}"] = "nothing was raised"
            except (ValueError, IndexError) as error:
                messages[f"{name}, {function.__name__}"] = str(error)
    ek.logprob_entropy(logits, torch.tensor([0, 19, 5]), vocab_group=group)  # the group still works
    # A temperature of an ignored token is nobody's, and shards need not lie in the order of the ranks
    temperature = torch.tensor([1.0, 0.5 + rank, 2.0])
    target = torch.tensor([0, -100, 5])
    out = ek.logprob_entropy(
        logits, target, temperature=temperature, vocab_start=10 * (world - 1 - rank), vocab_group=group
    )
    assert out.logprob.isfinite().all()
    # As on a GPU, where nobody looks: NaN
    for module in ("_arguments", "ops.token_stats"):
        vars(sys.modules[f"entropy_kernels.{module}"])["values_are_checked"] = lambda tensor: False
    for name, kwargs in disagreements(rank, world).items():
        given = {"target": torch.tensor([0, 9, 11]), **kwargs, "vocab_group": group}
        outputs = torch.stack(ek.token_stats(logits, **given))
        everywhere = name.startswith(("softcap", "ignore", "vocab_s"))
        assert outputs.isnan().all() if everywhere else outputs[:, -1].isnan().all() or outputs[:, 1].isnan().all(), (
            name
        )
    return messages


@pytest.mark.parametrize("world", (2, 3))
def test_ranks_that_disagree_all_raise_the_same(world: int) -> None:
    first = one_result(world, disagreeing)
    for name, message in first.items():
        argument = name.split(",")[0].split()[0]
        assert message.startswith(f"{argument}: expected") and "ranks of the vocab_group" in message, (name, message)
    assert first["target, one label, token_stats"].endswith(f"got {[11] * (world - 1) + [12]} for token 2")
    assert first["softcap, token_stats"].endswith(f"got {[30.0] * (world - 1) + [20.0]}")


def debugged(rank: int, world: int) -> str:
    os.environ["ENTROPY_KERNELS_DEBUG"] = "1"
    try:
        ek.logprob_entropy(torch.randn(3 + rank, 10), torch.arange(3 + rank), vocab_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_debugging_asks_for_the_number_of_tokens() -> None:
    first, second = run_ranks(2, debugged)
    assert first == second and "target: expected the same number of tokens" in first and "[3, 4] tokens" in first


def compiled(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    sample = plain(torch.float32, "cpu", vocab=96)
    logits = shard_of(sample, equal_shards(96, world), rank)[0].clone().requires_grad_()
    group = dist.group.WORLD

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: torch.Tensor) -> torch.Tensor:
        out = ek.logprob_entropy(z, sample.target, temperature=0.7, vocab_group=group)
        return (out.logprob + 0.1 * out.entropy).sum()

    value = loss(logits)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def test_compiled() -> None:
    results = run_ranks(2, compiled)
    sample = plain(torch.float32, "cpu", vocab=96, temperature=0.7)
    references = bound(sample)
    assert same_bits(results[0][0], results[1][0])
    whole = torch.cat([gradient for _, gradient in results], -1)
    references.check_gradient(whole, logprob=torch.ones(5), entropy=torch.full((5,), 0.1))
