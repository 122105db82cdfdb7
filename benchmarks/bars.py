"""The figures that the library must reach on a CPU, judged from the records of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.implementations import ours_for
from benchmarks.measure import Record
from benchmarks.shapes import BARS, Plan

_NOT_ASKED = "was not part of this run"
FEWEST_SAMPLES = 7


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured. ``value`` is the one that counts (of medians), ``best`` that of the minima."""

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


class _Judge:
    def __init__(self, records: Sequence[Record], device_type: str) -> None:
        self._records = records
        self._ours = ours_for(device_type)

    def find(self, op: str, name: str, shape: str, dtype: str, *, host: bool = False) -> Record | None:
        for record in self._records:
            place = (record.op, record.implementation, record.dtype, record.cache == "host")
            if place == (op, name, dtype, host) and (host or record.shape == shape):
                return record
        return None

    def ratio(
        self, text: str, sense: str, limit: float, shape: str, above: tuple[str, str, str], below: tuple[str, str, str]
    ) -> Verdict:
        """Time of ``above`` over time of ``below``, each (op, implementation, dtype)."""
        pair = []
        for op, name, dtype in (above, below):
            record = self.find(op, name, shape, dtype)
            if record is None or not record.summary:
                return Verdict(text, shape, sense, limit, "×", None, None, _why(record, op, name))
            pair.append(record.summary)
        value, best = (pair[0][key] / pair[1][key] for key in ("median", "min"))
        samples = min(summary["count"] for summary in pair)
        return Verdict(text, shape, sense, limit, "×", value, best, "", int(samples))

    def logits(self, shape: str) -> list[Verdict]:
        ours = self._ours
        one, both = "logprob_entropy", "logprob_entropy_fwdbwd"
        mine = (one, ours, "fp32")
        record = self.find(one, ours, shape, "fp32")
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
                _why(record, one, ours) if peak is None else "",
            ),
            self.ratio("forward, bf16 over fp32", "<=", 1.05, shape, (one, ours, "bf16"), mine),
            self.ratio(
                "token_stats over logprob_entropy", "<=", 1.25, shape, ("token_stats", ours, "fp32"), mine
            ),
        ]  # fmt: skip

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
            record = self.find(op, self._ours, "", "fp32", host=True)
            summary = record.summary if record is not None else {}
            value, best = ((summary[key] * 1e6 if summary else None) for key in ("median", "min"))
            result.append(
                Verdict(
                    f"{op}, host time of a call", record.shape if record else "tiny", "<=", 50, "µs", value, best,
                    "" if summary else _why(record, op, self._ours),
                )
            )  # fmt: skip
        return result


def _why(record: Record | None, op: str, name: str) -> str:
    if record is None:
        return f"{name} of {op} {_NOT_ASKED}"
    return f"{name} of {op}: {record.reason or record.status}"


def judge(records: Sequence[Record], plan: Plan, device_type: str) -> list[Verdict]:
    """Verdicts for every shape of the plan; none for a GPU, whose bars are stated against its own floors."""
    if device_type != "cpu":
        return []
    judge_ = _Judge(records, device_type)
    verdicts = [verdict for shape in plan.logits for verdict in judge_.logits(str(shape))]
    for tokens in plan.tokens:
        verdicts += judge_.selection(str(tokens), tokens.distribution)
    return verdicts + judge_.host()


def at_the_stated_sizes(plan: Plan) -> bool:
    """True if the plan holds the shapes at which the bars are stated."""
    return set(BARS.logits) <= set(plan.logits) and set(BARS.tokens) <= set(plan.tokens)
