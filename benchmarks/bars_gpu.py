"""The targets that the library must reach on a GPU, from the records of one run.

None depends on the card: times are compared with the rates of copies and products, and with peers, of the same run. Two
are plain times because they are latencies: what a small call may take above its floor, and a selection of 64 K tokens.
Of our implementations the fastest one counts, and the verdict names it. Times are medians. Times against the copy rate
are those with cold caches: the floor is memory's. Ratios compare hot times, which peers have too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.plans import GRID, HEADLINE, Plan
from benchmarks.records import Record
from benchmarks.shapes import HEADLINE_HIDDEN
from benchmarks.traffic import Bandwidth
from benchmarks.verdicts import Verdict, d_weight_error, find, products_beside, times, why

LARGE = 256e6  # bytes of logits from which the target is a share of the copy rate
SHARE = 92.0  # percent
LATENCY = 4.0  # µs above the floor, below LARGE
BOTH_FLOORS = 1.12  # forward + backward, times the floor of two reads and one write
SELECTION_US = 10.0  # covariance and mask
BATCH = "512×128 batch"
FEW_TOKENS, TOKENS = "65536 normal", "4194304 normal"
HIDDEN = str(HEADLINE_HIDDEN)
PASSES = {
    "logprob_entropy": "forward",
    "token_stats": "forward with four statistics",
    "logprob_entropy_bwd": "backward",
}


def judge(records: Sequence[Record], bandwidth: Bandwidth) -> list[Verdict]:
    """All targets that the records say something about."""
    verdicts = [v for op in PASSES for v in _one_pass(records, bandwidth, op)]
    verdicts += [*_both(records, bandwidth), _entropy(records), *_losses(records), *_selection(records)]
    return [*verdicts, *_hidden(records), *_habits(records)]


def at_the_stated_sizes(plan: Plan) -> bool:
    """True if the plan holds the shapes that the bars name."""
    return HEADLINE in plan.logits and set(GRID.batches[:1]) <= set(plan.batches)


def _ours(records: Iterable[Record], op: str, shape: str, dtype: str) -> Record | None:
    """Our fastest implementation, one that leaves its inputs alone."""
    mine = [
        record
        for record in records
        if (record.op, record.shape, record.dtype, record.role) == (op, shape, dtype, "ours")
        and record.summary
        and record.cache != "host"
        and not record.implementation.endswith("-inplace")
    ]
    return min(mine, key=lambda record: record.summary["median"], default=None)


def _fastest(records: Sequence[Record], op: str, names: Sequence[str], shape: str, dtype: str) -> Record | None:
    found = [find(records, op, name, shape, dtype) for name in names]
    timed = [record for record in found if record is not None and record.summary]
    if timed:
        return min(timed, key=lambda record: record.summary["median"])
    return next((record for record in found if record is not None), None)


def _missing(
    text: str, shape: str, sense: str, limit: float, unit: str, record: Record | None, op: str, name: str
) -> Verdict:
    return Verdict(text, shape, sense, limit, unit, None, None, why(record, op, name))


def _one_pass(records: Sequence[Record], bandwidth: Bandwidth, op: str) -> list[Verdict]:
    """Of every shape measured: the least bytes at the rate at which a copy moves bytes, against the time."""
    result = []
    large, small = f"{PASSES[op]}, bf16, share of the copy rate", f"{PASSES[op]}, bf16, time above the floor of"
    for shape in dict.fromkeys(r.shape for r in records if r.op == op and r.dtype == "bf16" and r.cache != "host"):
        record = _ours(records, op, shape, "bf16")
        if record is None:
            continue
        summary = record.cold or record.summary
        floor = sum(record.least_bytes.values()) / bandwidth.copy
        note = f"{record.implementation}, {'cold' if record.cold else record.cache}"
        samples = int(summary["count"])
        if record.size["rows"] * record.size["vocab"] * 2 >= LARGE:
            value, best = (100 * floor / summary[key] for key in ("median", "min"))
            result.append(Verdict(large, shape, ">=", SHARE, "%", value, best, note, samples))
        else:
            value, best = (1e6 * (summary[key] - floor) for key in ("median", "min"))
            text = f"{small} {1e6 * floor:.1f} µs"
            result.append(Verdict(text, shape, "<=", LATENCY, "µs", value, best, note, samples))
    return result or [_missing(large, str(HEADLINE), ">=", SHARE, "%", None, op, "ours")]


def _both(records: Sequence[Record], bandwidth: Bandwidth) -> list[Verdict]:
    one, both, shape = "logprob_entropy", "logprob_entropy_fwdbwd", str(HEADLINE)
    mine = _ours(records, both, shape, "bf16")
    floor = 3 * HEADLINE.rows * HEADLINE.vocab * 2 / bandwidth.copy
    text = "forward + backward, bf16, time over two reads and one write at the copy rate"
    if mine is None:
        verdicts = [_missing(text, shape, "<=", BOTH_FLOORS, "×", None, both, "ours")]
    else:
        value, best = (mine.summary[key] / floor for key in ("median", "min"))
        samples = int(mine.summary["count"])
        verdicts = [Verdict(text, shape, "<=", BOTH_FLOORS, "×", value, best, mine.implementation, samples)]
    verdicts += [
        _ratio(f"forward + backward, bf16, faster than {what}", limit, shape, records, both, names, mine)
        for what, limit, names in (
            ("torch.compile of log-prob and entropy", 2.0, ("compile",)),
            ("verl's path", 4.0, ("verl-fused-ce", "verl")),
        )
    ]
    liger = ("liger-ce-mean", "liger-ce")
    what = "forward + backward, never slower than Liger's cross-entropy, which has no entropy"
    return [
        *verdicts,
        _everywhere(what, records, both, liger),
        _everywhere("forward, faster than TRL's kernel", records, one, ("trl",)),
        _everywhere("forward + backward, faster than TRL's kernel", records, both, ("trl",)),
    ]


def _everywhere(text: str, records: Sequence[Record], op: str, names: Sequence[str]) -> Verdict:
    """At every shape and dtype at which both were timed: the one where the ratio is least."""
    found = []
    for shape, dtype in dict.fromkeys((r.shape, r.dtype) for r in records if r.op == op and r.cache != "host"):
        mine, rival = _ours(records, op, shape, dtype), _fastest(records, op, names, shape, dtype)
        if mine is not None and rival is not None and rival.summary:
            note = f"{dtype}, {mine.implementation} against {rival.implementation}"
            found.append(times(text, ">=", 1.0, rival, mine, note))
    if not found:
        return _ratio(text, 1.0, str(HEADLINE), records, op, names, _ours(records, op, str(HEADLINE), "bf16"))
    worst = min(found, key=lambda verdict: verdict.value or 0.0)
    return replace(worst, note=f"the least of {len(found)}: {worst.note}")


def _ratio(
    text: str,
    limit: float,
    shape: str,
    records: Sequence[Record],
    op: str,
    names: Sequence[str],
    mine: Record | None,
    dtype: str = "bf16",
) -> Verdict:
    rival = _fastest(records, op, names, shape, dtype)
    if mine is None:
        return _missing(text, shape, ">=", limit, "×", None, op, "ours")
    if rival is None or not rival.summary:
        return _missing(text, shape, ">=", limit, "×", rival, op, names[0])
    return times(text, ">=", limit, rival, mine, f"{mine.implementation} against {rival.implementation}")


def _entropy(records: Sequence[Record]) -> Verdict:
    text, shape, name = "entropy, bf16, smaller error than verl's path", str(HEADLINE), "entropy (nats)"
    mine = _ours(records, "logprob_entropy", shape, "bf16")
    rival = _fastest(records, "logprob_entropy", ("verl-fused-ce", "verl"), shape, "bf16")
    if mine is None or rival is None or name not in rival.errors:
        missing, who = (None, "ours") if mine is None else (rival, "verl")
        return _missing(text, shape, ">=", 100.0, "×", missing, "logprob_entropy", who)
    value = rival.errors[name] / max(mine.errors[name], 1e-12)
    note = f"{mine.errors[name]:.1e} against {rival.errors[name]:.1e} nats"
    return Verdict(text, shape, ">=", 100.0, "×", value, value, note)


def _losses(records: Sequence[Record]) -> list[Verdict]:
    result = []
    for op in ("clip_cov_loss", "kl_cov_loss"):
        mine = _ours(records, op, BATCH, "fp32")
        result.append(_ratio(f"{op}, faster than verl's path", 20.0, BATCH, records, op, ("verl",), mine, "fp32"))
    return result


def _selection(records: Sequence[Record]) -> list[Verdict]:
    result = []
    for op in ("clip_cov_mask", "kl_cov_mask"):
        text, limit = f"token_covariance and {op}, one after the other", SELECTION_US
        pair = [_ours(records, name, FEW_TOKENS, "fp32") for name in ("token_covariance", op)]
        if pair[0] is None or pair[1] is None:
            result.append(_missing(text, FEW_TOKENS, "<=", limit, "µs", None, op, "ours"))
        else:
            summaries = [record.summary for record in pair if record is not None]
            value, best = (1e6 * sum(summary[key] for summary in summaries) for key in ("median", "min"))
            note, samples = " and ".join(r.implementation for r in pair if r), int(min(s["count"] for s in summaries))
            result.append(Verdict(text, FEW_TOKENS, "<=", limit, "µs", value, best, note, samples))
        mine = _ours(records, op, TOKENS, "fp32")
        text = f"{op}, faster than torch.topk(cov, 800)"
        result.append(_ratio(text, 10.0, TOKENS, records, "tokens_floor", ("topk",), mine, "fp32"))
    return result


def _hidden(records: Sequence[Record]) -> list[Verdict]:
    """From hidden states, bf16: against the products alone of the same run, and against peers."""
    both = "linear_logprob_entropy_fwdbwd"
    verdicts = [
        _over(records, f"from hidden states, bf16, {what}, time over {floor} alone", limit, op, name, floor)
        for what, limit, op, name, floor in (
            ("forward", 1.10, "linear_logprob_entropy", "ours", "product"),
            ("forward + backward", 1.08, both, "ours", "three products"),
            ("forward + backward with recompute", 1.08, both, "ours-recompute", "four products"),
            ("linear_policy_loss with Clip-Cov", 3.15 / 3, "linear_clip_cov_loss", "ours", "three products"),
        )
    ]
    mine = find(records, both, "ours", HIDDEN, "bf16")
    mine = mine if mine is not None and mine.summary else None
    scaled = find(records, both, "liger-scaled", HIDDEN, "bf16")
    liger = ("liger-scaled",) if scaled is not None and scaled.summary else ("liger-linear-ce-mean", "liger-linear-ce")
    for limit, whose, names in (
        (1.25, "Liger's scaled cross-entropy (where there is none, its fused linear one, which has no entropy)", liger),
        (2.0, "verl's Triton op", ("verl-triton",)),
    ):
        text = f"from hidden states, bf16, forward + backward, faster than {whose}"
        verdicts.append(_ratio(text, limit, HIDDEN, records, both, names, mine))
    verdicts.append(_over_quack(records, both))
    return [*verdicts, _recompute_memory(records), d_weight_error(records, HIDDEN, "bf16")]


def _over(records: Sequence[Record], text: str, limit: float, op: str, name: str, products: str) -> Verdict:
    mine = find(records, op, name, HIDDEN, "bf16")
    if mine is None or not mine.summary:
        return _missing(text, HIDDEN, "<=", limit, "×", mine, op, name)
    floor = products_beside(mine, records, products)
    if floor is None or not floor.summary:
        return _missing(text, HIDDEN, "<=", limit, "×", floor, "linear_floor", products)
    return times(text, "<=", limit, mine, floor, "timed in turns" if products in mine.products else "")


def _over_quack(records: Sequence[Record], both: str) -> Verdict:
    """Of three products like ours, without entropy, selection or a gradient per token."""
    text = "from hidden states, bf16, linear_policy_loss with Clip-Cov, time over quack's linear cross-entropy"
    pair = []
    for op, name in (("linear_clip_cov_loss", "ours"), (both, "quack-linear-ce-mean")):
        record = find(records, op, name, HIDDEN, "bf16")
        if record is None or not record.summary:
            return _missing(text, HIDDEN, "<=", 1.05, "×", record, op, name)
        pair.append(record)
    return times(text, "<=", 1.05, pair[0], pair[1])


def _recompute_memory(records: Sequence[Record]) -> Verdict:
    """Results are log-prob, entropy and the two gradients."""
    op, name, text = "linear_logprob_entropy_fwdbwd", "ours-recompute", "from hidden states, bf16, recompute, memory"
    record = find(records, op, name, HIDDEN, "bf16")
    if record is None or record.peak_extra_bytes is None:
        return _missing(f"{text} beside gradients", HIDDEN, "<=", 1.0, "GB", record, op, name)
    shape = HEADLINE_HIDDEN
    gradients = 2 * (shape.rows + shape.vocab) * shape.features
    value = (record.peak_extra_bytes - gradients) / 1e9
    return Verdict(f"{text} beside gradients", HIDDEN, "<=", 1.0, "GB", value, value, "")


def _habits(records: Sequence[Record]) -> list[Verdict]:
    """No syncs, and graphs that replay what an eager call gives: counted over all rows of ours."""
    mine = [record for record in records if record.role == "ours" and record.summary and record.cache != "host"]
    counted = [record for record in mine if record.syncs is not None]
    text = "rows of ours that make the host wait"
    if counted:
        waiting = [record for record in counted if record.syncs]
        syncs = Verdict(text, f"{len(counted)} rows", "<=", 0, "", len(waiting), len(waiting), _some(waiting))
    else:
        syncs = _missing(text, "all rows", "<=", 0, "", None, "host syncs", "ours")
    text = "rows of ours whose CUDA graph does not replay the eager result bit for bit"
    captured = [record for record in mine if record.graph]
    if captured:
        wrong = [record for record in captured if not record.graph.get("equal")]
        graphs = Verdict(text, f"{len(captured)} rows", "<=", 0, "", len(wrong), len(wrong), _some(wrong))
    else:
        graphs = _missing(text, "all rows", "<=", 0, "", None, "CUDA graphs", "ours")
    return [syncs, graphs]


def _some(records: Sequence[Record]) -> str:
    named = list(dict.fromkeys(f"{record.implementation} of {record.op}" for record in records))
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
