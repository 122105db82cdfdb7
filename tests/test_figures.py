"""Every figure that the project draws: no text overlaps another and none leaves the canvas, by matplotlib's extents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import control, control_report, figure8, results
from benchmarks import plots as benchmark_plots
from entropy_kernels.analysis import plot_style, plots
from entropy_kernels.analysis.entropy_law import fit_entropy_law

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
#: Square pixels of an overlap, and pixels beyond the edge, that are rounding.
AREA, EDGE = 1.0, 0.5
TASK = "reasoning-gym:countdown?min_numbers=3&max_numbers=4&max_value=100"


def faults(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of a figure that overlap or leave it."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def record(text: Text, *arguments: Any, **keywords: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn[id(text)] = text
        draw(text, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.draw_without_rendering()  # draws none of the ticks that lie outside their axis
    # of a legend's and an axis' labels, titles and notes: the words, not the arrows of an annotation
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in drawn.values()]
    width, height = figure.get_window_extent().size
    wrong = [
        f"{text!r} leaves the canvas"
        for text, box in boxes
        if box.x0 < -EDGE or box.y0 < -EDGE or box.x1 > width + EDGE or box.y1 > height + EDGE
    ]
    for i, (text, box) in enumerate(boxes):
        for other, beside in boxes[i + 1 :]:
            across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            up = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            if across > 0 and up > 0 and across * up > AREA:
                wrong.append(f"{text!r} and {other!r} overlap")
    return wrong


def run(end: float, seed: int = 0, target: float | None = None) -> Any:
    step = np.arange(0, 241, 8)
    entropy = end + (0.95 - end) * np.exp(-step / 40)
    noise = np.random.default_rng(seed).normal(0, 0.005, len(step))
    log = {"step": step, "entropy": entropy, "val_pass1": 0.55 - 0.14 * np.exp(entropy) + noise, "val_pass8": 0.7}
    return pd.DataFrame(log if target is None else {**log, "target_entropy": target})


RUNS = {name: [run(0.1 + i / 20, i, 0.5), run(0.1, i + 9)] for i, name in enumerate([
    "GRPO", "Clip-Cov", "Random tokens penalised", "KL-Cov, torch ops", "Entropy advantage",
    "kl_cov k=0.05 on the validation prompts of another task, seed 7",
])}  # fmt: skip
CURVES = {"entropy": "policy entropy (nats)", "val_pass1": "pass@1", "val_pass8": "pass@8"}
STEPS = np.linspace(-3e-6, 2e-6, 40)
PANELS = {
    "logits as parameters": (STEPS, STEPS), f"{TASK}: logits-level prediction (unit step)": (STEPS * 1e3, -STEPS),
    "GRPO: the network's first order": (STEPS * 1e4, STEPS * 1e4 + 0.01),
}  # fmt: skip


def fit(count: int, title: str) -> Figure:
    log = run(0.1).iloc[:count]
    law = fit_entropy_law(log["entropy"], log["val_pass1"])
    first = fit_entropy_law(log["entropy"], log["val_pass1"], fit_fraction=0.5)
    return plots.fit_figure(
        log["entropy"], log["val_pass1"], law, steps=log["step"], extrapolated=first, title=title, bound=count > 9,
        performance_name="mean of val-core/openai/gsm8k/acc/mean@32 and 7 metrics",
    )  # fmt: skip


def fits(runs: dict[str, Any]) -> Figure:
    points = {name: logs[0].rename(columns={"val_pass1": "performance"}) for name, logs in runs.items()}
    laws = {name: fit_entropy_law(each["entropy"], each["performance"]) for name, each in points.items()}
    return plots.fits_figure(
        points, laws, bound={name: "Cov" not in name for name in points}, title=TASK,
        performance_name="mean of val-core/openai/gsm8k/acc/mean@32 and 7 metrics",
    )  # fmt: skip


def analysis() -> Iterator[tuple[str, Callable[[], Figure]]]:
    for size in ("wide", "narrow"):
        at: dict[str, Any] = {"narrow": size == "narrow"}
        yield f"entropy-{size}", partial(plots.entropy_figure, RUNS, **at)
        yield f"curves-{size}", partial(plots.performance_figure, RUNS, columns=CURVES, title=TASK, **at)
        yield f"law-{size}", partial(plots.law_figure, RUNS, **at)
        yield f"change-{size}", partial(plots.entropy_change_figure, PANELS, scaleless=[list(PANELS)[1]], **at)
    yield "fit", lambda: fit(31, "Entropy law of metrics.jsonl")
    yield "fit-long", lambda: fit(9, f"Entropy law of {TASK}/metrics.jsonl")
    yield "fits", lambda: fits(RUNS)
    yield "fits-many", lambda: fits({f"{name}-{seed}": logs for name, logs in RUNS.items() for seed in range(3)})


@pytest.mark.parametrize(("name", "draw"), [pytest.param(*case, id=case[0]) for case in analysis()])
def test_no_text_of_an_analysis_overlaps(
    name: str, draw: Callable[[], Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = draw()
    assert not faults(figure, monkeypatch)
    if name.endswith("narrow"):  # what test_report_page.py measures the page by
        sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()}
        assert min(sizes) >= plot_style.NOTE_SIZE and figure.get_figwidth() == plot_style.NARROW


# a folder of each kind: their pictures differ in what was measured
@pytest.mark.parametrize("folder", ["amd-epyc-25-17-avx512f-2cpu", "amd-epyc-25-17-avx512f-2cpu-hidden", "nvidia-h200"])
def test_no_text_of_a_benchmark_overlaps(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, measured = results.read(RESULTS / folder / "bench.json")
    found = {name: figure for name, figure in benchmark_plots.figures(head, measured) if figure is not None}
    assert found
    wrong = {name: faults(figure, monkeypatch) for name, figure in found.items()}
    assert not any(wrong.values()), {name: texts for name, texts in wrong.items() if texts}


def test_no_text_over_the_vocabulary_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run over many vocabularies, and rows, of which none is committed: the records of another for each."""
    head, measured = results.read(RESULTS / "nvidia-h200" / "bench.json")
    (part, *_) = [part for part in measured if not part.host and "vocab" in part.records[0].size]
    many = [
        dataclasses.replace(record, size={"rows": rows, "vocab": vocab})
        for vocab in (32000, 50257, 128256, 151936, 262144)
        for rows in (256, 4096)
        for record in part.records
    ]
    found = list(benchmark_plots.figures(head, [dataclasses.replace(part, records=many)]))
    assert {name for name, figure in found if figure} >= {"bandwidth", "time", "error_vocabulary", "bandwidth_rows"}
    wrong = {name: faults(figure, monkeypatch) for name, figure in found if figure and name in benchmark_plots.CURVES}
    assert not any(wrong.values()), {name: texts for name, texts in wrong.items() if texts}


def test_no_text_of_the_control_report_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = control.experiment(control.table(("equal", "loop"), quick=False), control.OUT)
    equal, loop = found.runs("equal"), found.runs("loop")
    for figure in (
        control_report.frontier_figure(equal, found.methods),
        control_report.differences_figure(equal, found.methods),
        control_report.loop_figure([*equal, *loop], found.loops),
    ):
        assert not faults(figure, monkeypatch)


def test_no_text_of_figure8_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not faults(figure8.figure(next(iter(figure8.load(figure8.OUT).values()))), monkeypatch)


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(4, 3))
    left, right = figure.subplots(1, 2)
    left.set_title("a title that is wider than its axes are")
    right.set_title("and that of the next one")
    left.annotate("out of the picture", (0, 1), xytext=(-200, 0), textcoords="offset points")
    found = faults(figure, monkeypatch)
    assert any("'a title" in fault and "'and that" in fault for fault in found)
    assert "'out of the picture' leaves the canvas" in found


def test_titles_are_wrapped_at_their_axes() -> None:
    figure, axes = plot_style.panels(2, (2.5, 2.5))
    plot_style.title(axes[0], "one two three four five six seven eight nine", "a note that is as long as two lines are")
    plot_style.title(axes[1], "a" * 60)
    for _ in range(2):  # a second draw wraps what was given, not what was wrapped
        figure.draw_without_rendering()
        titles = [ax.get_title(loc="left") for ax in axes]
        assert [title.count("\n") > 0 for title in titles] == [True, True]
        assert titles[0].split() == ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        assert titles[1].replace("\n", "") == "a" * 60
