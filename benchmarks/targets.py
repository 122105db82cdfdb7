"""The targets that the library must reach, one table for CPUs and GPUs: a ratio of the same run, and its limit.

Times are medians. Nothing in the table depends on the card: times are compared with peers, with copies and with matrix
products of the same run. Three kinds are plain numbers: latencies (the host's time of a call; what a small call takes
above the copy rate; a selection of 64 K tokens), bytes, and counts of what must not happen.

On a CPU "ours" is what ``backend="auto"`` serves, on a GPU the fastest of ours that leaves its inputs alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec

from benchmarks.cases import GRID, HEADLINE, HEADLINE_HIDDEN, STATED, Plan
from benchmarks.ours import ours_for
from benchmarks.results import Record, fastest, find, products_beside
from benchmarks.timing import Bandwidth

LARGE = 256e6  # bytes of logits from which a GPU's target is a share of the copy rate
OURS, PEERS = ("ours",), ("a peer",)  # the one that counts of ours, the fastest of all peers
_NOT_ASKED = "was not part of this run"


@dataclass(frozen=True)
class Outcome:
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
        """True if what the target compares was not asked for in this run."""
        return self.value is None and self.note.endswith(_NOT_ASKED)

    @property
    def passed(self) -> bool | None:
        """None: not measured in this run."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.sense == ">=" else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class Missing(Exception):
    """There is nothing to judge; the message says why."""


class Found(NamedTuple):
    """``shape``: where it was measured, if the target does not say."""

    value: float
    best: float
    note: str = ""
    samples: int | None = None
    shape: str = ""


class Time(NamedTuple):
    """Of an op: of the fastest of ``names``, or, where none of them was timed, of the fastest of ``otherwise``."""

    op: str
    names: tuple[str, ...] = OURS
    dtype: str = "bf16"
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a run measured, and what it set out to measure."""

    records: Sequence[Record]
    plan: Plan
    device: str
    bandwidth: Bandwidth

    def ours(self, op: str, shape: str, dtype: str, role: str = "ours") -> list[Record]:
        rows = (r for r in self.records if (r.op, r.shape, r.dtype, r.role) == (op, shape, dtype, role))
        return [row for row in rows if row.cache != "host" and not row.implementation.endswith("-inplace")]

    def row(self, time: Time, shape: str) -> Record:
        """The record that counts: the fastest, or the first of what was not timed."""
        op, names, dtype, otherwise = time
        of_tiles = op.startswith("linear")  # a CPU's and a GPU's, whose rows are named after what they keep
        if names == PEERS or (names == OURS and self.device == "cuda" and not of_tiles):
            found = fastest(self.ours(op, shape, dtype, "peer" if names == PEERS else "ours"))
            rows: list[Record] = [found] if found is not None else []
        else:
            if names == OURS and not of_tiles:
                names = (ours_for(self.device),)
            rows = [r for name in names if (r := find(self.records, op, name, shape, dtype)) is not None]
        found = fastest(rows)
        if found is None and otherwise:
            return self.row(Time(op, otherwise, dtype), shape)
        if not rows:
            raise Missing(f"{names[0]} of {op} {_NOT_ASKED}")
        return found or rows[0]

    def timed(self, time: Time, shape: str) -> Record:
        found = self.row(time, shape)
        return found if found.summary else self.untimed(found)

    def untimed(self, row: Record) -> Record:
        raise Missing(f"{row.implementation} of {row.op}: {row.reason or row.status}")


Measure = Callable[[Run, str], Found]
Arguments = ParamSpec("Arguments")


def _of_a_row(function: Callable[Concatenate[Run, str, Arguments], Found]) -> Callable[Arguments, Measure]:
    """A row of the table gives the function its arguments; :func:`judge` then gives it the run and the shape."""
    return lambda *given, **options: lambda run, shape: function(run, shape, *given, **options)


# --- ratios -----------------------------------------------------------------------------------------------------------


def _over(above: Record, below: Record, note: str = "") -> Found:
    value, best = (above.summary[key] / below.summary[key] for key in ("median", "min"))
    return Found(value, best, note, int(min(above.summary["count"], below.summary["count"])), above.shape)


@_of_a_row
def ratio(run: Run, shape: str, above: Time, below: Time) -> Found:
    """Time over time."""
    one, other = run.timed(above, shape), run.timed(below, shape)
    part = f", {one.computes}" if one.computes else ""
    chosen = run.device == "cuda" or above.names == PEERS
    return _over(one, other, f"{one.implementation}{part} against {other.implementation}" if chosen else "")


@_of_a_row
def everywhere(run: Run, shape: str, above: Time, below: Time) -> Found:
    """The least ratio over all shapes and dtypes at which both were timed."""
    found = []
    for where, dtype in dict.fromkeys((r.shape, r.dtype) for r in run.records if r.op == above.op):
        with contextlib.suppress(Missing):
            there = ratio(above._replace(dtype=dtype), below._replace(dtype=dtype))(run, where)
            found.append(there._replace(note=f"{dtype}, {there.note}"))
    if not found:
        return ratio(above, below)(run, shape)
    worst = min(found, key=lambda there: there.value)
    return worst._replace(note=f"the least of {len(found)}: {worst.note}")


@_of_a_row
def over_products(run: Run, shape: str, mine: Time, products: str) -> Found:
    """Time over that of the matrix products alone, in turns with it where they were timed so."""
    row = run.timed(mine, shape)
    beside = products_beside(row, run.records, products)
    if beside is None or not beside.summary:
        beside = run.timed(Time("linear_roofline", (products,), mine.dtype), shape)  # says why
    return _over(row, beside, "timed in turns" if products in row.products else "")


@_of_a_row
def errors(run: Run, shape: str, name: str, above: Time, below: Time) -> Found:
    """Error over error."""
    rows = [run.row(above, shape), run.row(below, shape)]
    one, other = (row.errors[name] if name in row.errors else run.untimed(row).errors[name] for row in rows)
    value = one / max(other, 1e-12)
    return Found(value, value, f"{one:.1e} against {other:.1e}")


# --- numbers ----------------------------------------------------------------------------------------------------------


@_of_a_row
def copy_rate(run: Run, shape: str, op: str, of: Callable[[float, float], float]) -> Found:
    """``of`` the time, caches cold, and what the least bytes take at the rate of a copy."""
    mine = run.timed(Time(op), shape)
    summary, least = mine.cold or mine.summary, sum(mine.least_bytes.values()) / run.bandwidth.copy
    note = f"{mine.implementation}, {'cold' if mine.cold else mine.cache}; {1e6 * least:.1f} µs at that rate"
    return Found(of(summary["median"], least), of(summary["min"], least), note, int(summary["count"]))


def _both_passes(run: Run, shape: str) -> Found:
    mine = run.timed(Time(BOTH), shape)
    least = 3 * HEADLINE.rows * HEADLINE.vocab * 2 / run.bandwidth.copy
    value, best = (mine.summary[key] / least for key in ("median", "min"))
    return Found(value, best, mine.implementation, int(mine.summary["count"]))


@_of_a_row
def memory(run: Run, shape: str, of: Time, less: float = 0.0, unit: float | None = None) -> Found:
    """Extra memory at the peak but for ``less``, in bytes of a ``unit``; without one over what the row states."""
    row = run.row(of, shape)
    taken, stated = row.peak_extra_bytes, unit or row.stated_bytes
    if taken is None or not stated:
        taken, stated = 0, run.untimed(row).stated_bytes or 1
    note = "" if unit else f"{taken / 1e6:.0f} of {stated / 1e6:.0f} MB, results included"
    return Found((taken - less) / stated, (taken - less) / stated, note)


@_of_a_row
def host_time(run: Run, shape: str, op: str) -> Found:
    """Microseconds that the host spends on a call at a tiny size."""
    row = find(run.records, op, ours_for(run.device), "", "fp32", host=True)
    if row is None:
        raise Missing(f"{ours_for(run.device)} of {op} {_NOT_ASKED}")
    row = row if row.summary else run.untimed(row)
    return Found(row.summary["median"] * 1e6, row.summary["min"] * 1e6, shape=row.shape)


@_of_a_row
def one_after_the_other(run: Run, shape: str, *ops: str) -> Found:
    """The sum of their times, in microseconds."""
    rows = [run.timed(Time(op, dtype="fp32"), shape) for op in ops]
    value, best = (1e6 * sum(row.summary[key] for row in rows) for key in ("median", "min"))
    samples = int(min(row.summary["count"] for row in rows))
    return Found(value, best, " and ".join(row.implementation for row in rows), samples)


@_of_a_row
def count(run: Run, shape: str, what: str, seen: Callable[[Record], bool], wrong: Callable[[Record], bool]) -> Found:
    """Over all rows of ours of which something was ``seen``."""
    mine = [r for r in run.records if r.role == "ours" and r.summary and r.cache != "host" and seen(r)]
    if not mine:
        raise Missing(f"ours of {what} {_NOT_ASKED}")
    named = list(dict.fromkeys(f"{row.implementation} of {row.op}" for row in mine if wrong(row)))
    note = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    number = sum(map(wrong, mine))
    return Found(number, number, note, shape=f"{len(mine)} rows")


# --- where ------------------------------------------------------------------------------------------------------------

Where = Callable[[Run], Iterable[str]]
BATCH, FEW_TOKENS, TOKENS, HIDDEN = "512×128 batch", "65536 normal", "4194304 normal", str(HEADLINE_HIDDEN)


def _at(shape: object) -> Where:
    return lambda run: (str(shape),)


def _all_logits(run: Run) -> Iterable[str]:
    return map(str, run.plan.logits)


def _stated_hidden(run: Run) -> Iterable[str]:
    return map(str, [shape for shape in run.plan.hidden if shape in STATED.hidden] or run.plan.hidden)


def _tokens(distribution: str) -> Where:
    return lambda run: [str(tokens) for tokens in run.plan.tokens if tokens.distribution == distribution]


def _of_size(op: str, *, large: bool) -> Where:
    """Every shape at which ours was timed in bf16, of one size; of nothing timed at all the headline."""

    def where(run: Run) -> Iterable[str]:
        rows = [r for r in run.records if r.op == op and r.dtype == "bf16" and r.cache != "host"]
        sizes = {r.shape: 2 * r.size["rows"] * r.size["vocab"] for r in rows if fastest(run.ours(op, r.shape, "bf16"))}
        if not sizes:
            return (str(HEADLINE),) if large else ()
        return [shape for shape, size in sizes.items() if (size >= LARGE) == large]

    return where


# --- the table --------------------------------------------------------------------------------------------------------

ONE, STATS, BACK, BOTH = "logprob_entropy", "token_stats", "logprob_entropy_bwd", "logprob_entropy_fwdbwd"
LINEAR, LINEAR_BOTH = "linear_logprob_entropy", "linear_logprob_entropy_fwdbwd"
ONE32 = Time(ONE, dtype="fp32")
SELECTIONS = ("clip_cov_mask", "kl_cov_mask")
VERL = ("verl-fused-ce", "verl")
LIGER = "Liger's scaled cross-entropy (where there is none, its fused linear one, which has no entropy)"
GRADIENTS = 2 * (HEADLINE_HIDDEN.rows + HEADLINE_HIDDEN.vocab) * HEADLINE_HIDDEN.features  # bytes, in bf16


class Target(NamedTuple):
    """What must hold at some shapes: ``measure`` is at least (">= 8 ×") or at most ("<= 1 MB") its limit."""

    where: Where
    text: str
    measure: Measure
    limit: str


def _d_weight(where: Where, dtype: str) -> Target:
    """Both from logits in fp32, accumulated in fp32 and rounded once: what bf16 logits lose is ten times as much."""
    text = f"from hidden states, {dtype}, d_weight of many tiles, its error over that of one product"
    pair = (("ours-tiles",), ("one-product" if dtype == "bf16" else "eager",))
    measure = errors("d_weight (relative)", *(Time(LINEAR_BOTH, names, dtype) for names in pair))
    return Target(where, text, measure, "<= 1.5 ×")


def _from_hidden(dtype: str, op: str, what: str, products: str) -> Iterable[Target]:
    text, mine = f"from hidden states, {dtype}, {what}", Time(op, OURS, dtype)
    yield Target(_stated_hidden, f"{text}, time over its products alone", over_products(mine, products), "<= 1.25 ×")
    yield Target(_stated_hidden, f"{text}, faster than every peer", ratio(Time(op, PEERS, dtype), mine), ">= 1 ×")
    for name in ("ours",) if op == LINEAR else ("ours", "ours-recompute"):
        measure = memory(Time(op, (name,), dtype))
        yield Target(_stated_hidden, f"{text}, {name}, memory over linear_plan's", measure, "<= 1 ×")


def _torch(op: str, name: str) -> Time:
    return Time(op, (name,), "fp32")


CPU = (
    Target(_all_logits, "forward, faster than torch eager", ratio(_torch(ONE, "eager"), ONE32), ">= 8 ×"),
    Target(_all_logits, "forward, faster than torch.compile", ratio(_torch(ONE, "compile"), ONE32), ">= 2.5 ×"),
    Target(_all_logits, "forward, time over logits.amax(-1)",
           ratio(ONE32, _torch("logits_roofline", "amax")), "<= 2 ×"),
    Target(_all_logits, "forward + backward, faster than torch eager",
           ratio(_torch(BOTH, "eager"), Time(BOTH, dtype="fp32")), ">= 6 ×"),
    Target(_all_logits, "forward, extra memory", memory(ONE32, unit=1e6), "<= 1 MB"),
    Target(_all_logits, "forward, bf16 over fp32", ratio(Time(ONE), ONE32), "<= 1.05 ×"),
    Target(_all_logits, "token_stats over logprob_entropy", ratio(Time(STATS, dtype="fp32"), ONE32), "<= 1.25 ×"),
    *(row for dtype in ("fp32", "bf16") for row in (
        *_from_hidden(dtype, LINEAR, "forward", "product"),
        *_from_hidden(dtype, LINEAR_BOTH, "forward + backward", "three products"),
        _d_weight(_stated_hidden, dtype),
    )),
    *(Target(_tokens(distribution), f"{op}, faster than torch.topk(cov, 800)",
             ratio(_torch("tokens_roofline", "topk"), Time(op, dtype="fp32")), f">= {least} ×")
      for distribution, least in (("normal", 10), ("band", 5), ("equal", 1)) for op in SELECTIONS),
    *(Target(_at("tiny"), f"{op}, host time of a call", host_time(op), "<= 50 µs")
      for op in (ONE, STATS, "token_covariance", *SELECTIONS)),
)  # fmt: skip
GPU = (
    # one pass over the logits, by the rate of a copy
    *(row for op, what in ((ONE, "forward"), (STATS, "forward with four statistics"), (BACK, "backward")) for row in (
        Target(_of_size(op, large=True), f"{what}, bf16, share of the copy rate",
               copy_rate(op, lambda time, least: 100 * least / time), ">= 92 %"),
        Target(_of_size(op, large=False), f"{what}, bf16, time above the copy rate's",
               copy_rate(op, lambda time, least: 1e6 * (time - least)), "<= 4 µs"),
    )),
    Target(_at(HEADLINE), "forward + backward, bf16, time over two reads and one write at the copy rate",
           _both_passes, "<= 1.12 ×"),
    Target(_at(HEADLINE), "forward + backward, bf16, faster than torch.compile of log-prob and entropy",
           ratio(Time(BOTH, ("compile",)), Time(BOTH)), ">= 2 ×"),
    Target(_at(HEADLINE), "forward + backward, bf16, faster than verl's path",
           ratio(Time(BOTH, VERL), Time(BOTH)), ">= 4 ×"),
    Target(_at(HEADLINE), "forward + backward, never slower than Liger's cross-entropy, which has no entropy",
           everywhere(Time(BOTH, ("liger-ce-mean", "liger-ce")), Time(BOTH)), ">= 1 ×"),
    *(Target(_at(HEADLINE), f"{what}, faster than TRL's kernel", everywhere(Time(op, ("trl",)), Time(op)), ">= 1 ×")
      for op, what in ((ONE, "forward"), (BOTH, "forward + backward"))),
    Target(_at(HEADLINE), "entropy, bf16, smaller error than verl's path",
           errors("entropy (nats)", Time(ONE, VERL), Time(ONE)), ">= 100 ×"),
    # losses and selection
    *(Target(_at(BATCH), f"{op}, faster than verl's path", ratio(_torch(op, "verl"), Time(op, dtype="fp32")), ">= 20 ×")
      for op in ("clip_cov_loss", "kl_cov_loss")),
    *(Target(_at(FEW_TOKENS), f"token_covariance and {op}, one after the other",
             one_after_the_other("token_covariance", op), "<= 10 µs") for op in SELECTIONS),
    *(Target(_at(TOKENS), f"{op}, faster than torch.topk(cov, 800)",
             ratio(_torch("tokens_roofline", "topk"), Time(op, dtype="fp32")), ">= 10 ×") for op in SELECTIONS),
    # from hidden states, in bf16
    *(Target(_at(HIDDEN), f"from hidden states, bf16, {what}, time over {products} alone",
             over_products(Time(op, (name,)), products), f"<= {most} ×")
      for what, most, op, name, products in (
          ("forward", 1.10, LINEAR, "ours", "product"),
          ("forward + backward", 1.08, LINEAR_BOTH, "ours", "three products"),
          ("forward + backward with recompute", 1.08, LINEAR_BOTH, "ours-recompute", "four products"),
          ("linear_policy_loss with Clip-Cov", 1.05, "linear_clip_cov_loss", "ours", "three products"),
    )),
    Target(_at(HIDDEN), f"from hidden states, bf16, forward + backward, faster than {LIGER}",
           ratio(Time(LINEAR_BOTH, ("liger-scaled",), otherwise=("liger-linear-ce-mean", "liger-linear-ce")),
                 Time(LINEAR_BOTH)), ">= 1.25 ×"),
    Target(_at(HIDDEN), "from hidden states, bf16, forward + backward, faster than verl's Triton op",
           ratio(Time(LINEAR_BOTH, ("verl-triton",)), Time(LINEAR_BOTH)), ">= 2 ×"),
    # of three products like ours, without entropy, selection or a gradient per token
    Target(_at(HIDDEN), "from hidden states, bf16, linear_policy_loss with Clip-Cov, time over quack's linear "
           "cross-entropy",
           ratio(Time("linear_clip_cov_loss"),
                 Time(LINEAR_BOTH, ("quack-linear-ce-mean",), otherwise=("quack-linear-ce-mean-default",))),
           "<= 1.05 ×"),
    Target(_at(HIDDEN), "from hidden states, bf16, recompute, memory beside gradients",
           memory(Time(LINEAR_BOTH, ("ours-recompute",)), GRADIENTS, 1e9), "<= 1 GB"),
    _d_weight(_at(HIDDEN), "bf16"),
    # what must not happen
    Target(_at("all rows"), "rows of ours that make the host wait",
           count("host syncs", lambda row: row.syncs is not None, lambda row: bool(row.syncs)), "<= 0"),
    Target(_at("all rows"), "rows of ours whose CUDA graph does not replay the eager result bit for bit",
           count("CUDA graphs", lambda row: bool(row.graph), lambda row: not row.graph.get("equal")), "<= 0"),
)  # fmt: skip
TARGETS = {"cpu": CPU, "cuda": GPU}


def judge(records: Sequence[Record], plan: Plan, device_type: str, bandwidth: Bandwidth) -> list[Outcome]:
    """What a run says of its device's targets, those included that it did not measure."""
    run, outcomes = Run(records, plan, device_type, bandwidth), []
    for target in TARGETS[device_type]:
        sense, limit, *unit = target.limit.split()
        for shape in target.where(run):
            value = best = samples = None
            try:
                value, best, note, samples, where = target.measure(run, shape)
            except Missing as missing:
                note, where = str(missing), ""
            place = (target.text, where or shape, sense, float(limit), "".join(unit))
            outcomes.append(Outcome(*place, value, best, note, samples))
    return outcomes


def at_the_stated_sizes(plan: Plan, device_type: str) -> bool:
    """True if the plan holds the shapes at which the device's targets are stated."""
    if device_type != "cpu":
        return HEADLINE in plan.logits and set(GRID.batches[:1]) <= set(plan.batches)
    stated = set(STATED.logits) <= set(plan.logits) and set(STATED.tokens) <= set(plan.tokens)
    return stated and (not plan.hidden or set(STATED.hidden) <= set(plan.hidden))
