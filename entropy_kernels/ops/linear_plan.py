"""How a call from hidden states is cut into tiles, and the memory that it takes; docs/linear.md has the formula."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from entropy_kernels.ops.products import BLOCK, accumulator, operand_dtype

DEFAULT_BUDGET = 1 << 30  # bytes; on a GPU the least, see default_budget
_MOST_BUDGET, _FREE_SHARE = 4 << 30, 16  # on a GPU one part in so many of the memory that is free
_GOOD_ROWS, _GOOD_COLUMNS = 64, 1024  # of a tile: below that the products are slow
_LEAST_ROWS, _LEAST_COLUMNS = 16, 64  # that a budget may force
# Elements of a tile. The fewer tiles, the less a product's set-up costs; of this size it runs at nearly full speed.
# Tiles that fit a CPU's caches, so that the statistics find them there, lose far more than they gain: on two cores,
# bf16, 1024 × 576 × 49152, 1.5 × the time of the one product at 2²² elements, 1.28 × at 2²³, 1.12 × at 2²⁵.
_TILE = {"cpu": 1 << 25}
_GPU_TILE = 1 << 27
# Rows of a tile where no gradient of the head is summed over them, so that cutting them costs nothing
_ROWS = {"cpu": 1 << 12}
_GPU_ROWS = 1 << 14
HELD_OUT = 64  # tokens of huge coefficient that linear_policy_loss holds out where it does not count them
_STATE_ROWS = 10  # of fp32 per row and chunk: the state's 6 and what their merge needs at once


@dataclass(frozen=True)
class LinearPlan:
    """How :func:`entropy_kernels.linear_logprob_entropy` computes a call; made by :func:`entropy_kernels.linear_plan`.

    Attributes:
        mode: "keep" (the logits are kept for the backward pass), "recompute" (they are made again there) or "no_grad";
            of a policy loss "in_forward" (the gradients are made in the forward pass).
        products: number of matrix products of the size tokens × H × V, forward and backward together.
        row_chunk: tokens per tile.
        vocab_chunk: vocabulary entries per tile.
        row_chunks: number of tiles along the tokens.
        vocab_chunks: number of tiles along the vocabulary.
        kept_bytes: what stays allocated from the forward pass to the backward pass, beside inputs and results; of mode
            "in_forward" the gradients, as they wait there.
        peak_bytes: most memory in use at once in either pass, beside inputs, results and gradients.

    Source:
        docs/linear.md.
    """

    mode: str
    products: int
    row_chunk: int
    vocab_chunk: int
    row_chunks: int
    vocab_chunks: int
    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Problem:
    """What a plan depends on; the dtypes are those of ``hidden``, ``weight``, the products and the logits."""

    rows: int  # N
    features: int  # H
    columns: int  # V of this rank, without padding
    hidden: torch.dtype
    weight: torch.dtype
    product: torch.dtype
    logits: torch.dtype
    device_type: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    sharded: bool  # over a vocab_group
    budget: int

    @property
    def backward(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias

    @property
    def operand(self) -> torch.dtype:
        return operand_dtype(self.product, self.logits, self.device_type)

    @property
    def whole(self) -> bool:
        """Nothing is converted on the way, so one tile of the kept logits is enough and takes no more memory."""
        return self.operand == self.logits == self.weight

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return accumulator(self.operand)


_budgets: dict[int | None, int] = {}  # by GPU


def default_budget(device: torch.device) -> int:
    """Bytes that a call may use where its caller does not say: 1 GiB, on a GPU up to 4 GiB, by the memory that is free.

    A policy loss of 8192 tokens over 128 256 entries has one part from 2.2 GiB on. With more, its head's gradient is
    summed in fp32, which takes as much memory and costs a pass over it per part. A GPU is asked once per process,
    because its driver takes up to 0.1 ms to answer, and so that the same call is cut the same way, and rounds the same
    way, every time. It does not wait for the device. A graph under capture and compiled code do not ask: they have what
    an eager call has found before, or 1 GiB.
    """
    if device.type == "cuda" and device.index not in _budgets and _may_ask():
        free = torch.cuda.mem_get_info(device)[0]
        with contextlib.suppress(RuntimeError):  # an allocator from elsewhere does not say what it holds unused
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _budgets[device.index] = min(max(DEFAULT_BUDGET, free // _FREE_SHARE), _MOST_BUDGET)
    return _budgets.get(device.index, DEFAULT_BUDGET) if device.type == "cuda" else DEFAULT_BUDGET


def _may_ask() -> bool:
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_current_stream_capturing()


def padded(columns: int) -> int:
    """Row stride of a tile: products and statistics want aligned rows."""
    return -(-columns // 64) * 64


def _bytes_per_element(p: Problem, row_tiles: bool, column_tiles: bool) -> tuple[int, int, int]:
    """Bytes that a tile takes per logit, per element of its part of the weight, and per element of ``hidden``.

    ``row_tiles``, ``column_tiles``: whether there is more than one along the tokens, the vocabulary.
    """
    operand, wide, on_cpu = p.operand.itemsize, p.wide.itemsize, p.device_type == "cpu"
    # Gradients that are summed over tiles or ranks, or are not of the operands' dtype. On a CPU torch has no product
    # of halves with an fp32 result: its operands are converted.
    apart_hidden = p.need_hidden and (column_tiles or p.sharded or p.hidden != p.operand)
    apart_weight = p.need_weight and (row_tiles or p.weight != p.operand)
    converts = on_cpu and operand < wide

    logit = p.logits.itemsize
    if p.logits != p.operand and (operand == wide or p.backward):
        logit += operand  # the tile as an operand, or the product that it was rounded from
    if converts and (apart_hidden or apart_weight or (p.need_bias and row_tiles)):
        logit += wide
    weight = operand if p.weight != p.operand else 0
    weight += wide if p.need_weight and p.weight != p.operand else 0
    weight += wide if converts and apart_hidden else 0
    if p.need_weight and row_tiles:
        weight += wide if p.weight.itemsize < wide else 0  # the sum
        weight += wide if operand < wide and not on_cpu else 0  # the product that some GPUs cannot add without
    hidden = operand if p.hidden != p.operand else 0
    hidden += p.hidden.itemsize * (1 + p.need_hidden) if on_cpu else 0  # without the rows that are dropped
    hidden += operand if p.need_weight else 0  # with zeros in the rows without a gradient
    hidden += operand if on_cpu and p.operand == torch.bfloat16 and p.features % BLOCK else 0  # with zeros behind
    hidden += wide if converts and apart_weight else 0
    if apart_hidden and p.hidden.itemsize < wide:
        hidden += wide if on_cpu else 2 * wide  # the sum, and on a GPU the product that is added to it
    return logit, weight, hidden


def _state_bytes(p: Problem, rows: int, chunks: int) -> int:
    return p.wide.itemsize * (6 * p.rows + (_STATE_ROWS * rows * chunks if chunks > 1 else 0))


def _tile_bytes(p: Problem, rows: int, columns: int) -> int:
    logit, weight, hidden = _bytes_per_element(p, rows < p.rows, columns < p.columns)
    return (
        rows * padded(columns) * logit
        + columns * p.features * weight
        + p.rows * p.features * hidden
        + _state_bytes(p, rows, -(-p.columns // max(1, columns)))
    )


def _kept_bytes(p: Problem) -> int:
    return p.rows * padded(p.columns) * p.logits.itemsize


def keeps_logits(p: Problem) -> bool:
    """Whether the logits, and what the backward pass needs beside them, fit the budget."""
    if not p.backward:
        return False
    if p.whole:
        # the one tile is the kept logits themselves
        return _tile_bytes(p, p.rows, p.columns) <= p.budget
    # beside them a tile that is worth it: a product more costs less than many small tiles
    good = _tile_bytes(p, p.rows if p.need_weight else min(p.rows, _GOOD_ROWS), min(p.columns, _GOOD_COLUMNS))
    return _kept_bytes(p) + good <= p.budget


def _least_bytes(p: Problem) -> int:
    return _tile_bytes(p, min(p.rows, _LEAST_ROWS), min(p.columns, _LEAST_COLUMNS))


def _even(total: int, most: int, step: int) -> int:
    """Size of parts of at most ``most`` that are as equal as multiples of ``step`` can be."""
    if total <= most:
        return max(1, total)
    most = most // step * step
    parts = int(-(-total // most))  # compiled code is for one number of parts, whatever the size of each
    return -(-total // (parts * step)) * step


def tile(p: Problem, budget: int) -> tuple[int, int]:
    """(rows, columns) of a tile.

    All rows, if the budget allows, because a part of the head's gradient is then one product, rounded once and never
    added to; fewer only where the tile would become too narrow, or where there is no such gradient.
    """
    if _least_bytes(p) > budget:
        needed = _least_bytes(p) + p.budget - budget
        raise ValueError(
            f"memory_budget: expected at least {needed} bytes for {p.rows} tokens, H={p.features}, V={p.columns}, "
            f"got {p.budget}"
        )
    rows = p.rows if p.need_weight else min(p.rows, _ROWS.get(p.device_type, _GPU_ROWS))
    columns = max(_GOOD_COLUMNS, _TILE.get(p.device_type, _GPU_TILE) // max(1, rows))
    columns = min(p.columns, columns)
    for least_rows, least_columns in (
        (p.rows, _GOOD_COLUMNS),
        (_GOOD_ROWS, _GOOD_COLUMNS),
        (_LEAST_ROWS, _LEAST_COLUMNS),
    ):
        while columns > least_columns and _tile_bytes(p, rows, columns) > budget:
            columns = max(least_columns, columns * 7 // 8)
        while rows > least_rows and _tile_bytes(p, rows, columns) > budget:
            rows = max(least_rows, rows * 7 // 8)
    return _even(p.rows, rows, _LEAST_ROWS), _even(p.columns, columns, _LEAST_COLUMNS)


def tiles(p: Problem, keep: bool) -> tuple[int, int]:
    """(rows, columns) of a tile where the logits are kept, or not."""
    if not keep:
        return tile(p, p.budget)
    return (max(1, p.rows), max(1, p.columns)) if p.whole else tile(p, p.budget - _kept_bytes(p))


def plan(p: Problem) -> LinearPlan:
    keep = keeps_logits(p)
    rows, columns = tiles(p, keep)
    kept = (_kept_bytes(p) if keep else 0) + (_state_bytes(p, 0, 1) if p.backward else 0)
    peak = _tile_bytes(p, min(rows, p.rows), min(columns, p.columns)) + (_kept_bytes(p) if keep and not p.whole else 0)
    mode = "keep" if keep else "recompute" if p.backward else "no_grad"
    products = 1 + p.need_hidden + p.need_weight + (mode == "recompute")
    return LinearPlan(mode, products, rows, columns, -(-p.rows // rows), -(-p.columns // columns), kept, peak)


def kept_dtype(dtype: torch.dtype, wide: torch.dtype, summed: bool) -> torch.dtype:
    """Of a gradient between the forward pass, which makes it, and the backward pass; ``summed`` over several parts.

    fp16 is rounded only there: a GradScaler may be about to scale it up.
    """
    return torch.promote_types(dtype, wide) if summed or dtype == torch.float16 else dtype


def _loss_row_bytes(p: Problem, rows: int) -> tuple[int, int]:
    """Bytes per token of a part of ``rows`` tokens of a policy loss, and per token that is made again beside it."""
    of_operand, of_sum, summed = p.operand, p.wide, rows < p.rows
    operand, wide = of_operand.itemsize, of_sum.itemsize
    logit = p.logits.itemsize + (operand if p.logits != of_operand else 0)
    if p.device_type == "cpu" and operand < wide:
        wide_hidden = p.need_hidden and (p.sharded or kept_dtype(p.hidden, of_sum, False) != of_operand)
        wide_weight = p.need_weight and kept_dtype(p.weight, of_sum, summed) != of_operand
        if wide_hidden or wide_weight or (p.need_bias and summed):
            logit += wide  # no product of halves with an fp32 result
    vector = 2 * operand + (wide if p.hidden.itemsize < wide else 0)
    return padded(p.columns) * logit + p.features * vector, padded(p.columns) * p.logits.itemsize


def loss_rows(p: Problem, changes: int | None, longest: int | None = None) -> int:
    """Tokens of a part of a policy loss, of which up to ``changes`` are made again (None: any number).

    All of them, if the budget allows; else as many parts as it asks for, of one size, with room for those in the last.
    ``longest``: a part holds whole sequences, of which this is the longest: it is a multiple of it, or 0: none fits.
    """
    if p.rows * _loss_row_bytes(p, p.rows)[0] <= p.budget:
        return max(1, p.rows)
    row, again = _loss_row_bytes(p, 1)
    most = p.budget // (row + again)  # if all of a part may have to be made again
    if changes is not None and most > changes:
        most = (p.budget - changes * again) // row
    if longest is not None:
        return _even(p.rows, most, longest) if most >= max(longest, _LEAST_ROWS) else 0
    least = min(p.rows, _LEAST_ROWS)
    if most < least:
        needed = least * row + (least if changes is None else min(least, changes)) * again
        raise ValueError(
            f"memory_budget: expected at least {needed} bytes for the logits of {least} tokens, V={p.columns}, "
            f"got {p.budget}"
        )
    room = changes if changes is not None and changes < most else 0
    return _even(p.rows + room, max(most, _LEAST_ROWS), _LEAST_ROWS)


def loss_plan(p: Problem, changes: int | None, adds_products: bool, longest: int | None = None) -> LinearPlan:
    """Of a policy loss, like :func:`plan`; ``adds_products``: see products.adds_to_fp32."""
    rows = loss_rows(p, changes, longest)
    if rows == 0:
        return plan(p)  # statistics first, then the loss
    row, again = _loss_row_bytes(p, rows)
    parts = max(1, -(-p.rows // rows))
    made_again = 0 if parts == 1 else rows if changes is None else min(rows, changes)
    operand, wide = p.operand.itemsize, p.wide.itemsize
    sums = kept_dtype(p.weight, p.wide, parts > 1).itemsize if p.need_weight else 0
    hidden = kept_dtype(p.hidden, p.wide, False).itemsize if p.need_hidden else 0
    kept = p.columns * p.features * sums + p.rows * p.features * hidden + (p.columns * wide if p.need_bias else 0)
    peak = rows * row + made_again * again + _state_bytes(p, 0, 1)
    # beside the gradients themselves
    peak += p.columns * p.features * max(0, sums - p.weight.itemsize)
    peak += p.rows * p.features * max(0, hidden - p.hidden.itemsize)
    if p.need_weight and parts > 1 and not adds_products:
        peak += p.columns * p.features * wide  # a part's product, before it is added
    # whole copies: of the head and the hidden states as operands, of the latter without the ignored tokens
    peak += p.columns * p.features * (operand if p.weight != p.operand else 0)
    peak += p.rows * p.features * (operand if p.hidden != p.operand else 0)
    if p.device_type == "cpu":
        peak += p.rows * p.features * p.hidden.itemsize * (1 + p.need_hidden)
        if p.need_weight and (operand < wide or p.weight != p.operand):  # what the product converts or rounds
            peak += p.columns * p.features * wide
    if p.sharded:
        peak += p.rows * p.features * wide
    return LinearPlan(
        "in_forward", 1 + p.need_hidden + p.need_weight, rows, max(1, p.columns), parts, 1, kept, peak
    )  # fmt: skip


def head_tile(
    rows: int, columns: int, sliced: bool, wide: torch.dtype, device_type: str, budget: int
) -> tuple[int, int]:
    """(rows, columns) of a tile of a head that is a function, with or without slices of the vocabulary.

    Three numbers per logit are planned for: itself, its gradient, and one for what the head does.
    """
    size = 3 * wide.itemsize
    elements = min(budget // size, _TILE.get(device_type, _GPU_TILE))
    if not sliced:
        if elements < min(rows, 1) * columns:
            raise ValueError(
                f"memory_budget: expected at least {size * columns} bytes for a head that gives all {columns} logits "
                f"of a token, got {budget}"
            )
        return max(1, min(rows, elements // max(1, columns))), columns
    if elements < min(rows, 1) * min(columns, _LEAST_COLUMNS):
        raise ValueError(
            f"memory_budget: expected at least {size * min(columns, _LEAST_COLUMNS)} bytes for slices of a head, "
            f"got {budget}"
        )
    width = min(columns, max(_LEAST_COLUMNS, min(_GOOD_COLUMNS, elements), elements // max(1, rows)))
    return max(1, min(rows, elements // max(1, width))), width
