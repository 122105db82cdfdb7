"""The figures that the library must reach, judged from the records of one run; here those of a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import bars_gpu
from benchmarks.implementations import ours_for
from benchmarks.plans import BARS, Plan
from benchmarks.records import Record
from benchmarks.traffic import Bandwidth
from benchmarks.verdicts import (
    FEWEST_SAMPLES,
    PRODUCTS,
    Verdict,
    d_weight_error,
    fastest_peer,
    find,
    times,
    why,
)

__all__ = ["FEWEST_SAMPLES", "Verdict", "at_the_stated_sizes", "judge"]


class _Judge:
    def __init__(self, records: Sequence[Record], device_type: str) -> None:
        self._records = records
        self._ours = ours_for(device_type)

    def ratio(
        self, text: str, sense: str, limit: float, shape: str, above: tuple[str, str, str], below: tuple[str, str, str]
    ) -> Verdict:
        """Time of ``above`` over time of ``below``, each (op, implementation, dtype)."""
        pair = []
        for op, name, dtype in (above, below):
            record = find(self._records, op, name, shape, dtype)
            if record is None or not record.summary:
                return Verdict(text, shape, sense, limit, "×", None, None, why(record, op, name))
            pair.append(record)
        return times(text, sense, limit, pair[0], pair[1])

    def logits(self, shape: str) -> list[Verdict]:
        ours = self._ours
        one, both = "logprob_entropy", "logprob_entropy_fwdbwd"
        mine = (one, ours, "fp32")
        record = find(self._records, one, ours, shape, "fp32")
        peak = record.peak_extra_bytes / 1e6 if record is not None and record.peak_extra_bytes is not None else None
        return [
            self.ratio("forward, faster than torch eager", ">=", 8, shape, (one, "eager", "fp32"), mine),
            self.ratio("forward, faster than torch.compile", ">=", 2.5, shape, (one, "compile", "fp32"), mine),
            self.ratio("forward, time over logits.amax(-1)", "<=", 2, shape, mine, ("logits_floor", "amax", "fp32")),
            self.ratio(
                "forward + backward, faster than torch eager",
                ">=", 6, shape, (both, "eager", "fp32"), (both, ours, "fp32"),
            ),
            Verdict(
                "forward, extra memory", shape, "<=", 1.0, "MB", peak, peak,
                why(record, one, ours) if peak is None else "",
            ),
            self.ratio("forward, bf16 over fp32", "<=", 1.05, shape, (one, ours, "bf16"), mine),
            self.ratio(
                "token_stats over logprob_entropy", "<=", 1.25, shape, ("token_stats", ours, "fp32"), mine
            ),
        ]  # fmt: skip

    def hidden(self, shape: str) -> list[Verdict]:
        verdicts = []
        for dtype in ("fp32", "bf16"):
            for op, what in (
                ("linear_logprob_entropy", "forward"),
                ("linear_logprob_entropy_fwdbwd", "forward + backward"),
            ):
                mine, limit = (op, "ours", dtype), ("linear_floor", PRODUCTS[op], dtype)
                text = f"from hidden states, {dtype}, {what}"
                verdicts.append(self.ratio(f"{text}, time over its products alone", "<=", 1.25, shape, mine, limit))
                verdicts.append(self._every_peer(f"{text}, faster than every peer", op, shape, dtype))
                names = ("ours",) if op == "linear_logprob_entropy" else ("ours", "ours-recompute")
                verdicts += [self._stated_memory(f"{text}, {name}", op, name, shape, dtype) for name in names]
            verdicts.append(d_weight_error(self._records, shape, dtype))
        return verdicts

    def _every_peer(self, text: str, op: str, shape: str, dtype: str) -> Verdict:
        mine = find(self._records, op, "ours", shape, dtype)
        rival = fastest_peer(self._records, op, shape, dtype)
        if mine is None or not mine.summary or rival is None:
            absent = (mine, "ours") if mine is None or not mine.summary else (None, "a peer")
            return Verdict(text, shape, ">=", 1, "×", None, None, why(absent[0], op, absent[1]))
        part = f", {rival.computes}" if rival.computes else ""
        return times(text, ">=", 1, rival, mine, f"the fastest: {rival.implementation}{part}")

    def _stated_memory(self, text: str, op: str, name: str, shape: str, dtype: str) -> Verdict:
        """What a call takes beside its results, over what ``linear_plan`` says of it."""
        record = find(self._records, op, name, shape, dtype)
        text = f"{text}, memory over linear_plan's"
        if record is None or record.peak_extra_bytes is None or record.stated_bytes is None:
            return Verdict(text, shape, "<=", 1, "×", None, None, why(record, op, name))
        taken, stated = record.peak_extra_bytes / 1e6, record.stated_bytes / 1e6
        note = f"{taken:.0f} of {stated:.0f} MB, results included"
        return Verdict(text, shape, "<=", 1, "×", taken / stated, taken / stated, note)

    def selection(self, shape: str, distribution: str) -> list[Verdict]:
        limit = {"normal": 10.0, "band": 5.0, "equal": 1.0}[distribution]
        return [
            self.ratio(
                f"{op}, faster than torch.topk(cov, 800)",
                ">=", limit, shape, ("tokens_floor", "topk", "fp32"), (op, self._ours, "fp32"),
            )
            for op in ("clip_cov_mask", "kl_cov_mask")
        ]  # fmt: skip

    def host(self) -> list[Verdict]:
        result = []
        for op in ("logprob_entropy", "token_stats", "token_covariance", "clip_cov_mask", "kl_cov_mask"):
            record = find(self._records, op, self._ours, "", "fp32", host=True)
            summary = record.summary if record is not None else {}
            value, best = ((summary[key] * 1e6 if summary else None) for key in ("median", "min"))
            result.append(
                Verdict(
                    f"{op}, host time of a call", record.shape if record else "tiny", "<=", 50, "µs", value, best,
                    "" if summary else why(record, op, self._ours),
                )
            )  # fmt: skip
        return result


def judge(records: Sequence[Record], plan: Plan, device_type: str, bandwidth: Bandwidth) -> list[Verdict]:
    """Verdicts on what the records hold: on a CPU for every shape of the plan, on a GPU :mod:`benchmarks.bars_gpu`."""
    if device_type != "cpu":
        return bars_gpu.judge(records, bandwidth)
    judge_ = _Judge(records, device_type)
    verdicts = [verdict for shape in plan.logits for verdict in judge_.logits(str(shape))]
    hidden = [shape for shape in plan.hidden if shape in BARS.hidden] or plan.hidden
    verdicts += [verdict for shape in hidden for verdict in judge_.hidden(str(shape))]
    for tokens in plan.tokens:
        verdicts += judge_.selection(str(tokens), tokens.distribution)
    return verdicts + judge_.host()


def at_the_stated_sizes(plan: Plan, device_type: str) -> bool:
    """True if the plan holds the shapes at which the device's bars are stated."""
    if device_type != "cpu":
        return bars_gpu.at_the_stated_sizes(plan)
    stated = set(BARS.logits) <= set(plan.logits) and set(BARS.tokens) <= set(plan.tokens)
    return stated and (not plan.hidden or set(BARS.hidden) <= set(plan.hidden))
