"""A bar, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.records import Record

_NOT_ASKED = "was not part of this run"
FEWEST_SAMPLES = 7


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured. ``value`` is the one that counts (of medians), ``best`` that of the minima."""

    text: str
    shape: str
    sense: str  # ">=" or "<="
    limit: float
    unit: str
    value: float | None
    best: float | None
    note: str
    samples: int | None = None  # the fewest that the value rests on

    @property
    def absent(self) -> bool:
        """True if what the bar compares was not asked for in this run."""
        return self.value is None and self.note.endswith(_NOT_ASKED)

    @property
    def passed(self) -> bool | None:
        """None: not measured in this run."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.sense == ">=" else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def find(records: Sequence[Record], op: str, name: str, shape: str, dtype: str, *, host: bool = False) -> Record | None:
    """The record of one implementation; host times are looked for at whatever size they have."""
    for record in records:
        place = (record.op, record.implementation, record.dtype, record.cache == "host")
        if place == (op, name, dtype, host) and (host or record.shape == shape):
            return record
    return None


# op from hidden states -> which products of linear_floor its time is compared with, in tables too
PRODUCTS = {
    "linear_logprob_entropy": "product",
    "linear_logprob_entropy_fwdbwd": "three products",
    "linear_policy_loss": "three products",
    "linear_clip_cov_loss": "three products",
}


def over_products(record: Record, records: Sequence[Record]) -> float | None:
    """Median time over that of the matrix products alone; None for other ops, or where either was not timed."""
    floor = products_beside(record, records, PRODUCTS.get(record.op, ""))
    if floor is None or not floor.summary or not record.summary:
        return None
    return record.summary["median"] / floor.summary["median"]


def products_beside(record: Record, records: Sequence[Record], name: str) -> Record | None:
    """The products alone: as they were timed in turns with a record, or else in rounds or rows of their own."""
    if name in record.products:
        return replace(record, op="linear_floor", implementation=name, role="limit", summary=record.products[name])
    return find(records, "linear_floor", name, record.shape, record.dtype)


def fastest_peer(records: Sequence[Record], op: str, shape: str, dtype: str) -> Record | None:
    """Of those that were timed, whatever part of the op they compute."""
    peers = [r for r in records if (r.op, r.shape, r.dtype, r.role) == (op, shape, dtype, "peer") and r.summary]
    return min(peers, key=lambda record: record.summary["median"], default=None)


def times(text: str, sense: str, limit: float, above: Record, below: Record, note: str = "") -> Verdict:
    """Time of ``above`` over time of ``below``, both timed."""
    value, best = (above.summary[key] / below.summary[key] for key in ("median", "min"))
    samples = int(min(above.summary["count"], below.summary["count"]))
    return Verdict(text, above.shape, sense, limit, "×", value, best, note, samples)


def d_weight_error(records: Sequence[Record], shape: str, dtype: str) -> Verdict:
    """Of many tiles along tokens and vocabulary, over that of one product, accumulated in fp32 and rounded once.

    Both from logits in fp32: the rounding of bf16 logits is ten times what their sums could lose.
    """
    op, name = "linear_logprob_entropy_fwdbwd", "d_weight (relative)"
    text = f"from hidden states, {dtype}, d_weight of many tiles, its error over that of one product"
    errors = []
    for implementation in ("ours-tiles", "one-product" if dtype in ("bf16", "fp16") else "eager"):
        record = find(records, op, implementation, shape, dtype)
        if record is None or name not in record.errors:
            return Verdict(text, shape, "<=", 1.5, "×", None, None, why(record, op, implementation))
        errors.append(record.errors[name])
    value = errors[0] / errors[1]
    return Verdict(text, shape, "<=", 1.5, "×", value, value, f"{errors[0]:.2e} against {errors[1]:.2e}")


def why(record: Record | None, op: str, name: str) -> str:
    """Why there is no time."""
    if record is None:
        return f"{name} of {op} {_NOT_ASKED}"
    return f"{name} of {op}: {record.reason or record.status}"
