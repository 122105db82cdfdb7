"""The op layer of linear_policy_loss with losses of its own, against autograd on all logits; eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import entropy_kernels as ek
from entropy_kernels._rows import RowArguments
from entropy_kernels.linear import LinearArguments, linear_loss
from entropy_kernels.ops import linear_policy_loss as op
from entropy_kernels.ops.linear_tiles import parts_of_sequences
from gloo import run_ranks

L, H, V = 10, 12, 203
Batch = tuple[Tensor, ...]  # hidden, weight, bias, target, old log-probs, advantages


@dataclass
class Loss:
    """(-Σ A r - 0.03 Σ entropy + 0.5 Σ log-prob of the ``k`` least likely tokens) / N.

    r is a token's ratio, or with ``sequences`` that of the mean log-ratio of its L tokens.
    """

    old: Tensor
    advantages: Tensor
    k: int = 0
    counted: bool = False  # it is not said how many tokens change
    sequences: bool = False
    late: bool = False  # N is given as the factor
    cuts: int | Sequence[int] | None = None
    seen: list[Any] = field(default_factory=list)  # the parts, in eager mode

    @property
    def changes(self) -> int | None:
        return None if self.counted else min(self.k + 64, self.old.shape[0]) if self.k else 0

    @property
    def scale(self) -> Tensor:
        return torch.full((), 0.25 if self.late else 64.0)

    def of_sequence(self, x: Tensor) -> Tensor:
        return x.view(-1, L).mean(1, keepdim=True).expand(-1, L).reshape(-1) if self.sequences else x

    def predicted(self, rows: Any, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if not torch.compiler.is_compiling():
            self.seen.append(rows)
        ratio = self.of_sequence(logprob - self.old[rows]).exp()
        over = 1 if self.late else self.old.shape[0]
        c = -self.of_sequence(self.advantages[rows]) * ratio / over
        return c, torch.full_like(c, -0.03 / over), c.abs() > 8

    def final(self, logprob: Tensor, entropy: Tensor) -> op.Final:
        c, e, _ = self.predicted(slice(None), logprob, entropy)
        chosen = torch.zeros_like(c)
        if self.k:
            size = 0.5 if self.late else 0.5 / self.old.shape[0]
            chosen = chosen.scatter(0, logprob.topk(self.k, largest=False).indices, size)
        loss = (c + e * entropy + chosen * logprob).sum()
        factor = torch.ones_like(loss) / self.old.shape[0] if self.late else None
        loss = loss if factor is None else loss * factor
        return op.Final(loss, torch.stack([logprob.mean(), entropy.mean()]), c + chosen, e, factor)


def make(n: int, dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(n)
    hidden, weight, bias, noise, advantages = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((n, H), (V, H), (V,), (n,), (n,))
    )
    target = torch.arange(n) % V
    logs = torch.log_softmax((hidden.double() @ weight.double().t()) + bias.double(), 1)
    wide = torch.promote_types(dtype, torch.float32)
    old = logs.gather(1, target[:, None])[:, 0] + 0.1 * noise.double()
    return hidden, weight, bias, target, old.to(wide), advantages.to(wide)


def expected(batch: Batch, **kind: Any) -> Batch:
    """The loss, and the gradients of hidden, weight and bias, in float64."""
    leaves = [x.double().clone().requires_grad_() for x in batch[:3]]
    logs = torch.log_softmax(leaves[0] @ leaves[1].t() + leaves[2], 1)
    logprob, entropy = logs.gather(1, batch[3][:, None])[:, 0], -(logs.exp() * logs).sum(1)
    loss = Loss(batch[4].double(), batch[5].double(), **kind).final(logprob, entropy).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def step(batch: Batch, budget: int, buffer: Tensor | None, kind: dict[str, Any], head: dict[str, Any]) -> Any:
    hidden, weight, bias, target, *tokens = batch
    given = LinearArguments(RowArguments(**head), None, budget)
    made = linear_loss(1.0 * hidden, weight, target, 1.0 * bias, given, Loss(*tokens, **kind), grad_buffer=buffer)
    return None if made is None else (made[0] * 1.0, made[1])


def found(
    run: Callable, batch: Batch, budget: int, buffered: bool = False, head: dict[str, Any] | None = None, **kind: Any
) -> Batch:
    """As :func:`expected`, by ``run``: :func:`step` or what it compiles to; what was added to a buffer of ones."""
    leaves = [x.clone().requires_grad_() for x in batch[:3]]
    buffer = torch.ones_like(batch[1], dtype=batch[4].dtype) if buffered else None
    loss, metrics = run((*leaves, *batch[3:]), budget, buffer, kind, head or {})
    loss.backward()
    assert metrics.shape == (2,) and not metrics.requires_grad
    hidden, weight, bias = (x.grad for x in leaves)
    assert (weight is None) == buffered
    return loss.detach(), hidden, weight if buffer is None else buffer - 1, bias  # type: ignore[return-value]


same = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


ONE, FEW = 1 << 30, 150_000  # one part, 2 to 5
RAGGED = [7, 30, 52, 60, 85, 88, 110, 120]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "selection": {"k": 5},
    "selection, counted": {"k": 5, "counted": True},
    "late factor": {"k": 5, "late": True},
    "sequences": {"k": 5, "sequences": True, "cuts": L},
    "ragged": {"k": 5, "cuts": RAGGED},
}


compile_eager = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


# a buffer takes no factor
@pytest.mark.parametrize(
    ("name", "buffered"), [(name, at) for name in KINDS for at in (False, True) if not at or name != "late factor"]
)
def test_equal_to_autograd(name: str, buffered: bool) -> None:
    """Eager in one part and in a few, compiled, which reads nothing back: kinds with and without a buffer in turn."""
    kind, batch = KINDS[name], make(120)
    right = expected(batch, **kind)
    for budget in (ONE, FEW):
        same(found(step, batch, budget, buffered, **kind), right)
    if buffered == (name in ("plain", "selection", "ragged")):
        same(found(compile_eager(step), batch, FEW, buffered, **kind), right)


@pytest.mark.slow
def test_inductor(inductor: Callable) -> None:
    """With a buffer, which the graph writes to."""
    batch = make(120)
    same(found(inductor(step), batch, FEW, True, **KINDS["selection"]), expected(batch, **KINDS["selection"]))


# without a selection 2 3 2 2 3 parts; with one 4 5 4 4 5 of them, which takes twice as long to compile
@pytest.mark.parametrize(
    ("name", "budget", "counts"), [("plain", FEW, (1, 2, 3, 3, 3)), ("selection", ONE, (1, 2, 2, 2, 2))]
)
def test_a_new_number_of_tokens_recompiles_where_it_has_other_parts(
    name: str, budget: int, counts: tuple[int, ...]
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n, count in zip((120, 130, 110, 100, 150), counts, strict=True):
        batch = make(n)
        same(found(compiled, batch, budget, **KINDS[name]), expected(batch, **KINDS[name]))
        assert counter.frame_count == count, n


def test_parts_hold_whole_sequences() -> None:
    batch, (hidden, weight, bias, *_) = make(120), make(120)
    for cuts in (L, RAGGED):
        seen: list[Any] = []
        found(step, batch, 100_000, cuts=cuts, seen=seen)
        ends = set(range(0, 121, L)) if cuts == L else {0, *RAGGED}
        assert len(seen) > 2 and all({r.start, r.stop} <= ends for r in seen[:-1])
    assert [r.stop for r in parts_of_sequences(120, 40, RAGGED)] == [30, 60, 88, 120]
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for budget, length, mode in ((FEW, L, "in_forward"), (FEW, 60, "recompute"), (400_000, 60, "in_forward")):
        plan = ek.linear_plan(*leaves, memory_budget=budget, policy_loss=True, sequence_length=length)
        assert plan.mode == mode and plan.products == (4 if mode == "recompute" else 3)
        made = step((*leaves, *batch[3:]), budget, None, {"k": 1, "cuts": length}, {})
        assert (made is None) == (mode != "in_forward")
    assert plan.row_chunks == 1
    with pytest.raises(ValueError, match=r"memory_budget: expected more .* beside a grad_buffer, .* of 60 tokens"):
        step((*leaves, *batch[3:]), FEW, torch.zeros_like(weight), {"k": 1, "cuts": 60}, {})
    for length, loss in ((3, False), (0, True)):
        with pytest.raises(ValueError, match="sequence_length: expected None or, for a policy loss, an int >= 1"):
            ek.linear_plan(*leaves, policy_loss=loss, sequence_length=length)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_halves(dtype: torch.dtype) -> None:
    """A factor beside the scale that fp16 needs, and a buffer, compiled as eager."""
    batch = make(120, dtype)
    for name, buffered in (("late factor", False), ("selection", True)):
        right = expected(batch, **KINDS[name])
        for run in (step, compile_eager(step)) if dtype == torch.float16 else (step,):
            for a, b in zip(found(run, batch, 80_000, buffered, **KINDS[name]), right, strict=True):
                assert (a.double() - b).norm() <= 2e-2 * b.norm()


def test_compiled_under_autocast() -> None:
    batch = make(120, torch.float32)

    def run(*inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(*inputs)

    for a, b in zip(found(compile_eager(run), batch, 80_000), found(run, batch, 80_000), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, weight, bias, target, old, advantages = make(9, dtype)
    ops, numbers = torch.ops.entropy_kernels, (0.0, -100, 0, V, dtype, dtype, 1 << 30, "", "auto")
    tile = (torch.zeros(12, 256, dtype=dtype), hidden, weight, bias, target, torch.ones(1), *numbers)
    torch.library.opcheck(ops.linear_tile_stats.default, (*tile, V))
    _, state = ops.linear_tile_stats.default(*tile, V)
    tokens = (state, advantages, old, torch.tensor([1, 0]), torch.tensor([0.5, 0.0]), 2)
    for d_hidden, d_weight, d_bias in ((9, V, V), (9, None, None), (None, V, None)):
        sums = [None if n is None else torch.zeros(n, *more) for n, *more in ((d_hidden, H), (d_weight, H), (d_bias,))]
        torch.library.opcheck(ops.linear_tile_grads.default, (*tile, *tokens, *sums, True, True))


def sharded(rank: int, world: int) -> dict[str, Any]:
    """Runs on every rank, compiled: shards of one width, of several; eager: a sequence that fits one of them."""
    batch = make(120)
    results: dict[str, Any] = {}
    for name, cut, given in (("equal", 102, False), ("unequal", 180, True)):
        shard = slice(0, cut) if rank == 0 else slice(cut, V)
        width = 102 if name == "equal" else shard.stop - shard.start
        weight, bias = (torch.cat([x[shard], x[:1]])[:width] for x in batch[1:3])
        head = {"vocab_group": dist.group.WORLD, "vocab_size": V}
        head |= {"vocab_start": shard.start} if given else {}
        mine = (batch[0], weight, bias, *batch[3:])
        results[name] = found(compile_eager(step), mine, FEW, head=head, **KINDS["selection"])
    hidden = batch[0].requires_grad_()
    # rank 1 alone would say so
    results["fits"] = step((hidden, *mine[1:]), 80_000, None, {"cuts": 60}, head) is not None
    return results


@pytest.mark.slow
def test_a_sharded_vocabulary() -> None:
    ranks = run_ranks(2, sharded)
    right = expected(make(120), **KINDS["selection"])
    assert [rank.pop("fits") for rank in ranks] == [False, False]
    for name in ranks[0]:
        heads = [torch.cat([rank[name][i] for rank in ranks])[:V] for i in (2, 3)]
        for rank in ranks:
            same((*rank[name][:2], *heads), right)
