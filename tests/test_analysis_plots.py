"""Figures: what is drawn, where, in which colour; that pyplot is not needed; that bad input is refused."""

import math
import sys

import numpy as np
import pandas as pd
import pytest

from entropy_kernels.analysis import plot_style, plots
from entropy_kernels.analysis.entropy_law import fit_entropy_law

FRACTIONS = {0.0002: "cov_a", 0.02: "cov_b", 1.0: "cov_c"}


def run(end=0.1, seed=0, steps=81):
    rng = np.random.default_rng(seed)
    s = np.arange(steps)
    h = end + (0.95 - end) * np.exp(-s / 20)
    r = 0.55 - 0.14 * np.exp(h) + rng.normal(0, 0.005, steps)
    evaluated = s % 8 == 0
    return pd.DataFrame(
        {
            "step": s,
            "entropy": h,
            "val_pass1": np.where(evaluated, r, np.nan),
            "val_pass8": np.where(evaluated, 0.7 + 0 * r, np.nan),
            "cov_a": np.where(s == 0, np.nan, 4.0 + seed),
            "cov_b": 1.0,
            "cov_c": -0.002,
        }
    )


RUNS = {"baseline": run(), "clip_cov": run(0.35), "kl_cov": run(0.3), "kl_cov_random": run(0.12)}
SEEDS = {name: [run(0.1 + i / 10, seed) for seed in range(3)] for i, name in enumerate(RUNS)}


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_one_colour_per_method_and_dashes_for_controls():
    style = plot_style.method_style
    assert (
        style("clip_cov").color == style("Clip-Cov").color == style("clipcov").color == style("clip_cov_random").color
    )
    assert len({style(n).color for n in ("baseline", "clip_cov", "kl_cov", "clip_higher", "entropy_bonus")}) == 5
    assert style("grpo").color == style("baseline").color
    assert style("grpo").label == "GRPO"
    assert style("kl_cov_random").control
    assert style("random_control_kl-cov").control
    assert not style("kl_cov").control
    assert (style("random_dropped").color, style("random_dropped").control) == (style("clip_cov").color, True)
    assert (style("random_penalized").color, style("random_penalized").control) == (style("kl_cov").color, True)
    assert style("kl_cov").line()["linestyle"] != style("kl_cov_random").line()["linestyle"]
    assert [style(n).label for n in ("clip_cov", "KL_COV", "baseline")] == ["Clip-Cov", "KL-Cov", "Baseline"]
    assert style("kl_cov k=.05").label == "kl_cov k=.05"
    unknown = plot_style.styles(["x", "y", "kl_cov"])
    assert unknown["x"].color != unknown["y"].color


def test_a_target_is_drawn_beside_what_it_is_of():
    held = {"grpo": run(), "target": run(0.4).assign(target_entropy=0.4), "x": run(0.3).assign(target_entropy=0.3)}
    figure = plots.entropy_figure(held)
    ax = figure.axes[0]
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [0.4, 0.3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GRPO", "Target", "target", "x"]
    assert dashed[0].get_color() == plot_style.method_style("target").color
    other = ("grpo", "clip_cov", "kl_cov", "clip_higher", "entropy_bonus")
    assert dashed[0].get_color() not in {plot_style.method_style(name).color for name in other}
    assert len(plots.performance_figure(held).axes[0].get_lines()) == 3


def test_curve_is_the_mean_and_range_over_seeds_on_common_steps():
    logs = [pd.DataFrame({"step": [0, 1, 2], "v": [1.0, 2.0, np.nan]}), pd.DataFrame({"step": [0, 1], "v": [3.0, 6.0]})]
    curve = plot_style.curve(logs, "v")
    assert curve.index.tolist() == [0, 1]
    assert curve["mean"].tolist() == [2.0, 4.0]
    assert curve["low"].tolist() == [1.0, 2.0]
    assert curve["high"].tolist() == [3.0, 6.0]
    assert len(plot_style.curve(logs, "absent")) == 0


def test_entropy_figure_draws_every_run_at_its_values():
    ax = plots.entropy_figure(RUNS).axes[0]
    drawn = lines(ax)
    assert set(drawn) == {"Baseline", "Clip-Cov", "KL-Cov", "KL-Cov, random tokens"}
    np.testing.assert_allclose(drawn["Clip-Cov"].get_ydata(), RUNS["clip_cov"]["entropy"])
    assert ax.get_ylim()[0] == 0
    assert "nats" in ax.get_ylabel()
    assert plots.entropy_figure(RUNS, log_scale=True).axes[0].get_yscale() == "log"


def test_seeds_are_drawn_as_mean_and_band():
    ax = plots.entropy_figure(SEEDS).axes[0]
    expected = np.mean([log["entropy"] for log in SEEDS["baseline"]], axis=0)
    np.testing.assert_allclose(lines(ax)["Baseline"].get_ydata(), expected)
    assert len(ax.collections) == len(SEEDS)
    assert any("mean of 3 seeds" in text.get_text() for text in ax.texts)


def test_performance_figure_has_a_panel_per_column_that_exists():
    figure = plots.performance_figure(SEEDS)
    assert [ax.get_ylabel() for ax in figure.axes] == ["pass@1", "pass@8"]
    one = plots.performance_figure(RUNS, columns={"val_pass1": "accuracy", "absent": "?"})
    assert [ax.get_ylabel() for ax in one.axes] == ["accuracy"]
    assert lines(one.axes[0])["KL-Cov"].get_xdata().tolist() == list(range(0, 81, 8))


def test_law_figure_draws_the_law_the_line_and_the_ceiling():
    figure = plots.law_figure(RUNS)
    assert len(figure.axes) == len(RUNS)
    points = RUNS["baseline"].dropna(subset=["val_pass1"])
    law = fit_entropy_law(points["entropy"], points["val_pass1"])
    ax = figure.axes[0]
    curve = next(line for label, line in lines(ax).items() if label.startswith("law"))
    np.testing.assert_allclose(curve.get_ydata(), law.predict(curve.get_xdata()))
    straight = lines(ax)["straight line in H"]
    np.testing.assert_allclose(straight.get_ydata(), law.predict_linear(straight.get_xdata()))
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 0], points["entropy"])
    texts = " ".join(text.get_text() for text in ax.texts)
    assert f"ceiling {law.ceiling:.3g}" in texts
    assert f"R² {law.r2:.3f}" in texts


def test_law_figure_takes_given_laws_and_runs_too_short_to_fit():
    law = fit_entropy_law([0.1, 0.5, 1.0], [0.4, 0.3, 0.2])
    figure = plots.law_figure({"baseline": run(), "kl_cov": run(steps=9)}, laws={"baseline": law})
    texts = [" ".join(text.get_text() for text in ax.texts) for ax in figure.axes]
    assert f"RMSE {law.rmse:.3f}" in texts[0]
    assert "too few points" in texts[1]
    assert len(figure.axes[1].collections[0].get_offsets()) == 2
    assert len(plots.law_figure(SEEDS).axes[0].collections[0].get_offsets()) == 33


def test_fit_figure_has_band_points_and_ceiling():
    points = run().dropna(subset=["val_pass1"])
    h, r = points["entropy"], points["val_pass1"]
    law, head = fit_entropy_law(h, r), fit_entropy_law(h, r, fit_fraction=0.5)
    figure = plots.fit_figure(h, r, law, steps=points["step"], extrapolated=head, performance_name="accuracy")
    ax = figure.axes[0]
    labels = ax.get_legend_handles_labels()[1]
    assert "95% prediction band" in labels
    assert f"law of the first {head.n} points" in labels
    assert any(label.startswith(f"ceiling {law.ceiling:.3g}") for label in labels)
    assert ax.get_ylabel() == "accuracy"
    assert len(figure.axes) == 2  # the colour bar of steps
    # NaN pairs are left out, without steps and without a first part
    assert plots.fit_figure([*h, math.nan], [*r, 0.1], law).axes[0].get_legend_handles_labels()[1] == [
        label for label in labels if not label.startswith("law of the first")
    ]


def test_entropy_change_figure_states_correlation_and_slope():
    x = np.linspace(-0.004, 0.002, 50)
    log = pd.DataFrame({"predicted_dh": x, "measured_dh": 0.5 * x})
    figure = plots.entropy_change_figure({"exact": (x, x), "half": log, "with nan": ([*x, math.nan], [*-x, 1.0])})
    texts = [" ".join(text.get_text() for text in ax.texts) for ax in figure.axes]
    assert "correlation 1.0000, same sign 100%, n 50" in texts[0]
    assert "correlation -1.0000, same sign 0%, n 50" in texts[2]
    assert [next(k for k in lines(ax) if k.startswith("slope")) for ax in figure.axes] == [
        "slope 1",
        "slope 0.5",
        "slope -1",
    ]
    assert "10$^{-3}$ nats" in figure.axes[0].get_xlabel()
    assert "(nats)" in plots.entropy_change_figure({"large": (x * 1e3, x * 1e3)}).axes[0].get_xlabel()
    plots.png(plots.entropy_change_figure({"nothing": ([], []), "zero": ([0.0], [0.0])}))


def test_covariance_table():
    table = plots.covariance_table(SEEDS, FRACTIONS)
    # the first row that has the columns is step 1; seeds are averaged: (4 + 5 + 6) / 3
    assert table.loc["Baseline"].tolist() == [5.0, 1.0, -0.002]
    assert list(table.columns) == ["0.02 %", "2 %", "all"]
    assert table.loc["Qwen2.5-7B (paper)"].tolist() == [5.654, 1.385, 0.003]
    assert plots.covariance_table(RUNS, FRACTIONS, step=8, paper=False).shape == (4, 3)
    log = pd.DataFrame({"step": [0, 1, 2], "c": [3.0, 2.0, math.nan]})
    for step, value in (("first", 3.0), ("last", 2.0), (1, 2.0)):
        assert plots.covariance_table({"x": log}, {1.0: "c"}, step=step).loc["x"].tolist() == [value]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.entropy_figure({}), "runs: expected at least one run"),
        (
            lambda: plots.entropy_figure(RUNS, column="nope"),
            r"runs: expected a column among \['nope'\], got .*'entropy'",
        ),
        (lambda: plots.performance_figure(RUNS, columns={"nope": ""}), "runs: expected a column"),
        (lambda: plots.law_figure(RUNS, performance="nope"), "runs: expected a column"),
        (lambda: plots.entropy_change_figure({}), "panels: expected at least one"),
        (lambda: plots.entropy_change_figure({"a": ([1.0], [1.0, 2.0])}), r"panels\['a'\]: expected equal shapes"),
        (lambda: plots.covariance_table(RUNS, {0.5: "nope"}), r"columns: expected columns of the log, got \['nope'\]"),
        (
            lambda: plots.covariance_table(RUNS, FRACTIONS, step=999),
            "step: expected one with covariance values, got 999",
        ),
        (lambda: plots.covariance_table(RUNS, FRACTIONS, step="end"), "step: expected a number, 'first' or 'last'"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_not_needed(monkeypatch):
    # its figures are global and want a display; None makes any import of it an error
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for figure in (plots.entropy_figure(RUNS), plots.performance_figure(SEEDS), plots.law_figure(RUNS)):
        assert plots.png(figure).startswith(b"\x89PNG")
