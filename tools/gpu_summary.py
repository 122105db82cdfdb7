"""What ``make gpu-check`` leaves: at most eight files, the smallest of which say everything.

``summary.md`` for people, ``summary.json`` for ``python -m benchmarks.auto_table --verified``, the benchmark's document
and table, up to three of its plots, and ``results.tar.gz`` with all logs, reports of tests and other plots.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
TEST_STEPS = ("tests-cuda", "tests-triton", "tests-rest")
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
#: Bytes of a file that comes back from a lent machine are limited to 16 MiB.
ARCHIVE_LIMIT = 15 << 20
#: Files beyond this are left out where the archive would be too large.
LARGE_FILE = 1 << 20
PLOTS = 3
FIRST_PLOTS = ("bandwidth", "time_statistics", "time_selection")
TAIL = 25  # lines of a failed step's log
FAILURES = 40  # of tests, in full


@dataclass(frozen=True)
class Gpu:
    """Name and compute capability."""

    name: str
    major: int
    minor: int

    @property
    def slug(self) -> str:
        """Folder of its results: h200, h100-80gb-hbm3."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower().replace("nvidia", "")).strip("-")

    @property
    def build_target(self) -> str:
        """As in TORCH_CUDA_ARCH_LIST: from Hopper on, with what only this architecture has."""
        return f"{self.major}.{self.minor}" + ("a" if self.major >= 9 else "")


@dataclass
class Result:
    """What became of a step, and its last words."""

    name: str
    command: str
    state: str
    seconds: float
    note: str = ""


def last_words(log: Path) -> str:
    """The last line that says something; of compute-sanitizer and pytest their summaries."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =\t")]
    counted = [line.strip("= ") for line in lines if "SUMMARY:" in line or re.search(r"\d+ (passed|failed)", line)]
    return (counted or lines or [""])[-1][:160]


# ---- tests -----------------------------------------------------------------------------------------------------------


def digest_tests(work: Path, results: Sequence[Result]) -> dict[str, Any]:
    """Counts per (op, backend), as the tests' markers name them, of all reports; and what failed.

    A test that names no pair counts "elsewhere"; such tests are among the "rest". ``complete``, of a pair, of elsewhere
    and of all: the steps that hold its tests ran to their end.
    """
    ended = {}
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    elsewhere, total = _zero(), _zero()
    failures = []
    for step in (result for result in results if result.name in TEST_STEPS):
        cases = _cases(work / f"{step.name}.xml")
        ended[step.name] = bool(cases) and step.state in (PASSED, FAILED)
        for case in cases:
            outcome, text = _outcome(case)
            total[outcome] += 1
            properties = {item.get("name"): item.get("value", "") for item in case.iter("property")}
            backend, ops = properties.get("gpu_backend", ""), properties.get("gpu_ops", "")
            for op in filter(None, ops.split(",")):
                counts = pairs.setdefault((op, backend), {**_zero(), "complete": True})
                counts[outcome] += 1
                counts["complete"] &= ended[step.name]
            if not ops:
                elsewhere[outcome] += 1
            if outcome == FAILED:
                failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "error": text})
    listed = [{"op": op, "backend": backend, **counts} for (op, backend), counts in sorted(pairs.items())]
    return {
        "complete": all(ended.get(name, False) for name in TEST_STEPS),
        **total,
        "pairs": listed,
        "elsewhere": {**elsewhere, "complete": ended.get("tests-rest", False)},
        "failures": failures,
    }


def _zero() -> dict[str, int]:
    return {PASSED: 0, FAILED: 0, "skipped": 0}


def _cases(report: Path) -> list[ElementTree.Element]:
    try:
        return list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    """An error, in a fixture or while collecting, is a failure."""
    for child in case:
        if child.tag in ("failure", "error"):
            return FAILED, (child.get("message") or child.text or "").strip()[:600]
    return ("skipped" if case.find("skipped") is not None else PASSED), ""


# ---- files -----------------------------------------------------------------------------------------------------------


def sources_of(work: Path) -> str | None:
    """Fingerprint of the sources that a folder's results are of; None if it holds none."""
    return _document(work / "summary.json").get("sources")


def earlier(work: Path) -> list[Result]:
    """Steps of earlier calls."""
    return [Result(**step) for step in _document(work / "summary.json").get("steps", [])]


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write(work: Path, out: Path, results: Sequence[Result], gpu: Gpu | None, head: dict[str, Any]) -> None:
    """Both summaries, and everything that comes back, into ``out``."""
    doctor = _document(work / "doctor.json")
    summary: dict[str, Any] = {
        "format": FORMAT,
        "date": None,
        "commit": None,
        "sources": None,
        **head,
        "gpu": gpu.name if gpu else None,
        "architecture": doctor.get("architecture"),
        "versions": {name: _version(doctor, name) for name in ("python", "torch", "triton")},
        "steps": [asdict(result) for result in results],
        "tests": digest_tests(work, results),
        "self_check": doctor.get("checks", []),
    }
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (work / "summary.md").write_text(markdown(summary, work))
    out.mkdir(parents=True, exist_ok=True)
    plots = sorted((work / "benchmark").glob("*.png"), key=_plot_rank)
    chosen = [work / "summary.json", work / "summary.md", *(work / "benchmark" / f"bench.{s}" for s in ("json", "md"))]
    for path in [*chosen, *plots[:PLOTS]]:
        if path.exists():
            shutil.copyfile(path, out / path.name)
    _pack(work, out / "results.tar.gz")


def _version(doctor: dict[str, Any], name: str) -> str | None:
    """Without the path that doctor tells beside it."""
    return (doctor.get("versions", {}).get(name, "").split() or [None])[0]


def _plot_rank(path: Path) -> tuple[int, str]:
    known = [number for number, name in enumerate(FIRST_PLOTS) if path.stem.startswith(name)]
    return (known[0] if known else len(FIRST_PLOTS)), path.name


def _pack(work: Path, archive: Path) -> None:
    """Everything in ``work``; without its large files, if it would be too large with them."""
    scratch = archive.with_name(".results.tmp")
    for largest in (None, LARGE_FILE):
        left_out = []
        with tarfile.open(scratch, "w:gz") as file:
            for path in sorted(work.rglob("*")):
                name = path.relative_to(work)
                if not path.is_file():
                    continue
                if largest is not None and path.stat().st_size > largest:
                    left_out.append(f"{name} ({path.stat().st_size} bytes)")
                else:
                    file.add(path, name)
        if scratch.stat().st_size <= ARCHIVE_LIMIT:
            break
    if left_out:
        print(f"left out of {archive.name}, which would be too large: {', '.join(left_out)}")
    os.replace(scratch, archive)


# ---- for people ------------------------------------------------------------------------------------------------------


def markdown(summary: dict[str, Any], work: Path) -> str:
    """The summary as a page."""
    tests, steps = summary["tests"], summary["steps"]
    commit = summary["commit"] or f"sources {str(summary['sources'])[:12]}"
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    lines = [
        f"# GPU check on {summary['gpu'] or 'no GPU'}",
        "",
        f"{summary['date']}, {commit}, {summary['architecture'] or 'architecture unknown'}, {versions}",
        "",
        "| step | state | seconds | last words |",
        "|---|---|---:|---|",
        *(f"| {s['name']} | {s['state']} | {s['seconds']:.0f} | {_cell(s['note'])} |" for s in steps),
        "",
        "## Tests on the GPU",
        "",
        f"{tests[PASSED]} passed, {tests[FAILED]} failed, {tests['skipped']} skipped"
        + ("" if tests["complete"] else "; **not all of them ran**"),
        "",
        "| op | backend | passed | failed | skipped |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {p['op']} | {p['backend']} | {p[PASSED]} | {p[FAILED]} | {p['skipped']} |"
            for p in [*tests["pairs"], {"op": "elsewhere", "backend": "", **tests["elsewhere"]}]
        ),
        "",
    ]
    if tests["failures"]:
        lines += ["### Failed", ""]
        for failure in tests["failures"][:FAILURES]:
            lines += [f"- `{failure['test']}`: {_cell(failure['error'])[:300]}"]
        more = len(tests["failures"]) - FAILURES
        lines += [f"- and {more} more, in summary.json" if more > 0 else "", ""]
    wrong = [check for check in summary["self_check"] if not check["ok"]]
    lines += [f"Self-check against float64: {len(wrong)} of {len(summary['self_check'])} failed.", ""]
    lines += [f"- {c['op']} {c['backend']} {c['device']} {c['what']}: {_cell(c['detail'])}" for c in wrong]
    for step in steps:
        log = work / f"{step['name']}.log"
        if step["state"] in (FAILED, OUT_OF_TIME) and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-TAIL:]
            lines += ["", f"## End of {step['name']}.log", "", "```", *(line[:200] for line in tail), "```"]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
