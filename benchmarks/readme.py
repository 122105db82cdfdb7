"""``python -m benchmarks.readme``: the tables of README.md from result files, so that no figure in it is typed.

A table stands between ``<!-- bench: FOLDER -->`` and ``<!-- /bench -->``, with FOLDER below benchmarks/results; that of
the functions on hidden states behind ``<!-- bench: FOLDER hidden -->``. ``--check`` changes nothing and fails if a
table is not what its ``bench.json`` gives.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine, records, tables
from benchmarks.plans import BARS
from benchmarks.records import Record
from benchmarks.shapes import HEADLINE_HIDDEN
from benchmarks.verdicts import over_products

_BLOCK = re.compile(
    r"(<!-- bench: (?P<folder>[\w.-]+)(?P<hidden> hidden)? -->\n).*?(?P<end><!-- /bench -->)", re.DOTALL
)
TELLING = 1e-3  # nats from which an error is said beside a time


@dataclass(frozen=True)
class Row:
    """A line of the table: the fastest of ours, and the peers, on one case."""

    label: str
    op: str
    shape: str
    dtype: str
    inplace: bool = False


@dataclass(frozen=True)
class Layout:
    """Lines, and columns with the implementations whose fastest stands in them."""

    rows: tuple[Row, ...]
    columns: dict[str, tuple[str, ...]]


_CPU, _GPU = "512×151936", "8192×128256"
_BATCH, _TOKENS = "512×128 batch", "4194304 normal"
LAYOUTS = {
    "cpu": Layout(
        (
            Row("log-prob + entropy", "logprob_entropy", _CPU, "fp32"),
            Row("the same, bf16", "logprob_entropy", _CPU, "bf16"),
            Row("all four statistics", "token_stats", _CPU, "fp32"),
            Row("forward + backward", "logprob_entropy_fwdbwd", _CPU, "fp32"),
            Row("forward + backward, in place", "logprob_entropy_fwdbwd", _CPU, "fp32", inplace=True),
        ),
        {"torch eager": ("eager",), "torch.compile": ("compile",)},
    ),
    "cuda": Layout(
        (
            Row("log-prob + entropy, bf16", "logprob_entropy", _GPU, "bf16"),
            Row("all four statistics, bf16", "token_stats", _GPU, "bf16"),
            Row("backward alone, bf16", "logprob_entropy_bwd", _GPU, "bf16"),
            Row("forward + backward, bf16", "logprob_entropy_fwdbwd", _GPU, "bf16"),
            Row("forward + backward, bf16, in place", "logprob_entropy_fwdbwd", _GPU, "bf16", inplace=True),
            Row("Clip-Cov loss and gradient, 64 K tokens", "clip_cov_loss", _BATCH, "fp32"),
            Row("KL-Cov loss and gradient, 64 K tokens", "kl_cov_loss", _BATCH, "fp32"),
        ),
        {
            "torch.compile": ("compile",),
            "verl": ("verl", "verl-fused-ce"),
            "TRL": ("trl",),
            "Liger CE, no entropy": ("liger-ce", "liger-ce-mean"),
        },
    ),
}


def table(found: Sequence[Record]) -> str:
    """The table of a run's records.

    Raises:
        ValueError: records without a time.
    """
    timed = [record for record in found if record.summary and record.cache != "host"]
    if not timed:
        raise ValueError("records: expected at least one with a time, got none")
    layout = LAYOUTS[timed[0].device]
    rows = []
    for row in layout.rows:
        here = [r for r in timed if (r.op, r.shape, r.dtype) == (row.op, row.shape, row.dtype)]
        mine = _fastest([r for r in here if r.role == "ours" and r.implementation.endswith("-inplace") == row.inplace])
        if mine is None:
            continue
        cells = [row.label, f"**{tables.seconds(mine.summary['median'])}**"]
        for peers in layout.columns.values():
            rival = None if row.inplace else _fastest([r for r in here if r.implementation in peers])
            cells.append("" if rival is None else _against(rival, mine))
        rows.append(cells)
    first = layout.rows[0]
    here = [r for r in timed if (r.op, r.shape, r.dtype) == (first.op, first.shape, first.dtype)]
    groups = [
        [r for r in here if r.role == "ours"],
        *([r for r in here if r.implementation in p] for p in layout.columns.values()),
    ]
    rows.append(["extra memory of the forward", *(_memory(_fastest(group)) for group in groups)])
    return tables.table(rows, ["", "ours", *layout.columns])


# where the bars on hidden states are stated; the ops, and ours that are shown
_HIDDEN = {"cpu": str(BARS.hidden[0]), "cuda": str(HEADLINE_HIDDEN)}
_HIDDEN_OPS = {
    "linear_logprob_entropy": "log-prob + entropy",
    "linear_logprob_entropy_fwdbwd": "the same with both gradients",
    "linear_clip_cov_loss": "Clip-Cov loss with both gradients",
}
_HIDDEN_OURS = ("ours", "ours-fp32-logits", "ours-recompute", "ours-composed", "ours-parts")


def hidden_table(found: Sequence[Record]) -> str:
    """From hidden states, in bf16 where that was timed: time, also over the products alone, and memory; ours first.

    Raises:
        ValueError: none of these was timed.
    """
    here = [r for r in found if r.shape == _HIDDEN.get(r.device) and r.summary]
    rows = []
    for op, label in _HIDDEN_OPS.items():
        dtypes = {record.dtype for record in here if record.op == op}
        dtype = "bf16" if "bf16" in dtypes else min(dtypes, default="")
        label = f"{label}, {dtype}"
        timed = sorted((r for r in here if (r.op, r.dtype) == (op, dtype)), key=lambda r: r.summary["median"])
        mine = [r for r in timed if r.implementation in _HIDDEN_OURS]
        for record in [*mine, *(r for r in timed if r.role == "peer")]:
            name = f"**{record.implementation}**" if record.role == "ours" else record.implementation
            cells = [tables.seconds(record.summary["median"]), tables.times(over_products(record, here))]
            error = record.errors.get("entropy (nats)")
            rows.append(
                [label, name, *cells, _memory(record), "" if error is None else f"{error:.1e}", record.computes]
            )
            label = ""
    if not rows:
        raise ValueError("records: expected some from hidden states where the bars are stated, got none")
    return tables.table(rows, ["", "", "time", "over products", "extra memory", "entropy error (nats)", "computes"])


def _fastest(found: Sequence[Record]) -> Record | None:
    return min(found, key=lambda record: record.summary["median"], default=None)


def _against(rival: Record, mine: Record) -> str:
    ratio = rival.summary["median"] / mine.summary["median"]
    text = f"{tables.seconds(rival.summary['median'])} ({ratio:.2g}×)" if ratio < 100 else None
    text = text or f"{tables.seconds(rival.summary['median'])} ({ratio:.0f}×)"
    error = rival.errors.get("entropy (nats)", 0.0)
    return f"{text}, entropy off by {error:.2g} nats" if error >= TELLING else text


def _memory(record: Record | None) -> str:
    return "" if record is None or record.peak_extra_bytes is None else tables.size(record.peak_extra_bytes)


def filled(text: str, results: Path) -> str:
    """The text with its tables made anew.

    Raises:
        ValueError: a folder without a result.
    """

    def block(match: re.Match[str]) -> str:
        path = results / match["folder"] / "bench.json"
        if not path.is_file():
            raise ValueError(f"README.md: <!-- bench: {match['folder']} --> names no result, {path} is not there")
        _, measured = records.read(path)
        found = [record for group in measured for record in group.records]
        made = hidden_table(found) if match["hidden"] else table(found)
        return f"{match[1]}\n{made}\n\n{match['end']}"

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill README.md, or check it."""
    parser = argparse.ArgumentParser(prog="benchmarks.readme", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is not up to date")
    check = parser.parse_args(argv).check
    readme = machine.ROOT / "README.md"
    before = readme.read_text()
    after = filled(before, machine.ROOT / "benchmarks" / "results")
    if check and after != before:
        print("README.md: a table is not what its results give: python -m benchmarks.readme", file=sys.stderr)
        return 1
    if after != before:
        readme.write_text(after)
        print(f"{readme}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
