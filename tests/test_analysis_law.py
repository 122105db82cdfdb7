"""The entropy law against OLS written out by hand in Python's exact fractions of float64, and its refusals."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import entropy_kernels as ek
from entropy_kernels.analysis.entropy_law import LawError

H = [0.95, 0.71, 0.52, 0.40, 0.33, 0.24, 0.19, 0.15]
R = [0.171, 0.262, 0.301, 0.322, 0.339, 0.371, 0.362, 0.379]


def by_hand(h, r):
    """Textbook simple regression of r on x = e^h: r = intercept + slope·x; a = -slope, b = intercept."""
    x = [math.exp(v) for v in h]
    n = len(x)
    mx, mr = math.fsum(x) / n, math.fsum(r) / n
    sxx = math.fsum((v - mx) ** 2 for v in x)
    sxr = math.fsum((v - mx) * (w - mr) for v, w in zip(x, r, strict=True))
    srr = math.fsum((w - mr) ** 2 for w in r)
    slope = sxr / sxx
    intercept = mr - slope * mx
    sse = math.fsum((w - intercept - slope * v) ** 2 for v, w in zip(x, r, strict=True))
    s2 = sse / (n - 2)
    return {
        "a": -slope,
        "b": intercept,
        "a_se": math.sqrt(s2 / sxx),
        "b_se": math.sqrt(s2 * (1 / n + mx * mx / sxx)),
        "r2": 1 - sse / srr,
        "rmse": math.sqrt(sse / n),
        "residual_sd": math.sqrt(s2),
        "ceiling": intercept + slope,
        # R at x = e^0 = 1: the variance of a fitted mean there
        "ceiling_se": math.sqrt(s2 * (1 / n + (1 - mx) ** 2 / sxx)),
        "mx": mx,
        "sxx": sxx,
    }


def test_equals_the_hand_written_regression():
    law, hand = ek.fit_entropy_law(H, R), by_hand(H, R)
    for name in ("a", "b", "a_se", "b_se", "r2", "rmse", "residual_sd", "ceiling", "ceiling_se"):
        assert getattr(law, name) == pytest.approx(hand[name], rel=1e-9), name
    assert (law.n, law.dropped) == (8, 0)
    half = stats.t.ppf(0.975, 6) * hand["ceiling_se"]
    assert law.ceiling_interval == pytest.approx((hand["ceiling"] - half, hand["ceiling"] + half), rel=1e-9)


def test_golden_numbers_from_an_exact_fit():
    # numbers that a person can check: e^H = 1, 2, 3, 4 and R = 0.5 - 0.1·e^H, one point moved by +0.04 and -0.04
    law = ek.fit_entropy_law([0.0, math.log(2), math.log(3), math.log(4)], [0.44, 0.26, 0.16, 0.14])
    # slope = Σ(x-2.5)(r) / 5 = (-1.5·0.44 - 0.5·0.26 + 0.5·0.16 + 1.5·0.14)/5 = -0.1; mean r = 0.25
    assert law.a == pytest.approx(0.1)
    assert law.b == pytest.approx(0.5)
    assert law.ceiling == pytest.approx(0.4)
    # residuals 0.04, -0.04, -0.04, 0.04: sse 0.0064
    assert law.rmse == pytest.approx(0.04)
    assert law.residual_sd == pytest.approx(math.sqrt(0.0032))
    assert law.a_se == pytest.approx(math.sqrt(0.0032 / 5))
    assert law.b_se == pytest.approx(math.sqrt(0.0032 * (1 / 4 + 2.5**2 / 5)))
    assert law.r2 == pytest.approx(1 - 0.0064 / (0.0064 + 0.1**2 * 5))
    assert law.durbin_watson == pytest.approx((0.08**2 + 0 + 0.08**2) / 0.0064)


def test_straight_line_is_that_of_polyfit():
    law = ek.fit_entropy_law(H, R)
    slope, intercept = np.polyfit(H, R, 1)
    residual = np.array(R) - slope * np.array(H) - intercept
    assert (law.slope_linear, law.intercept_linear) == pytest.approx((slope, intercept))
    assert law.rmse_linear == pytest.approx(math.sqrt(np.mean(residual**2)))
    assert law.r2_linear == pytest.approx(1 - np.sum(residual**2) / np.sum((np.array(R) - np.mean(R)) ** 2))
    assert law.predict_linear(0.3) == pytest.approx(slope * 0.3 + intercept)


def test_recovers_a_noiseless_law():
    h = np.linspace(0.05, 2.0, 40)
    law = ek.fit_entropy_law(h, -0.085 * np.exp(h) + 0.61)
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.085, 0.61, 0.525), abs=1e-12)
    assert law.r2 == pytest.approx(1.0)
    assert law.rmse < 1e-12
    assert law.r2_linear < law.r2


def test_ceiling_interval_covers_at_its_level():
    # 400 data sets with independent noise: the 90 % interval holds the true ceiling in 90 % of them (± 4 sd of that)
    rng = np.random.default_rng(3)
    h = np.linspace(0.1, 1.2, 15)
    hits = 0
    for _ in range(400):
        law = ek.fit_entropy_law(h, 0.5 - 0.1 * np.exp(h) + rng.normal(0, 0.01, len(h)), confidence=0.9)
        hits += law.ceiling_interval[0] <= 0.4 <= law.ceiling_interval[1]
    assert abs(hits / 400 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 400)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda v: np.array(v, dtype=np.float32).astype(np.float64),
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: torch.tensor(v, dtype=torch.float64, requires_grad=True),
        lambda v: [torch.tensor(x, dtype=torch.float64) for x in v],
        lambda v: pd.Series(v, index=range(100, 100 + len(v))),
    ],
)
def test_every_kind_of_input_gives_the_same_law(convert):
    law, expected = ek.fit_entropy_law(convert(H), convert(R)), ek.fit_entropy_law(H, R)
    assert law.a == pytest.approx(expected.a, rel=1e-6)
    assert law.b == pytest.approx(expected.b, rel=1e-6)


def test_low_precision_tensors_are_read():
    law = ek.fit_entropy_law(torch.tensor(H, dtype=torch.bfloat16), torch.tensor(R, dtype=torch.float16))
    assert law.a == pytest.approx(ek.fit_entropy_law(H, R).a, rel=0.05)


def test_predict_returns_the_kind_it_was_given():
    law = ek.fit_entropy_law(H, R)
    value = -law.a * math.exp(0.3) + law.b
    assert isinstance(law.predict(0.3), float)
    assert law.predict(0.3) == pytest.approx(value)
    assert law.predict(0.0) == pytest.approx(law.ceiling)
    array = law.predict([[0.3, 0.0], [0.0, 0.3]])
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 2)
    tensor = law.predict(torch.tensor([0.3, 0.0]))
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.tensor([value, law.ceiling], dtype=torch.float32))
    assert law.predict(torch.tensor([1])).dtype == torch.float32
    assert law.predict(torch.tensor(0.3, dtype=torch.bfloat16)).shape == ()
    series = law.predict(pd.Series([0.3], index=[7]))
    assert list(series.index) == [7]
    assert law.slope(0.3) == pytest.approx(-law.a * math.exp(0.3))


def test_intervals_are_those_of_simple_regression():
    law, hand = ek.fit_entropy_law(H, R), by_hand(H, R)
    x, n = math.exp(0.6), len(H)
    mean_se = hand["residual_sd"] * math.sqrt(1 / n + (x - hand["mx"]) ** 2 / hand["sxx"])
    new_se = hand["residual_sd"] * math.sqrt(1 + 1 / n + (x - hand["mx"]) ** 2 / hand["sxx"])
    for kind, se in (("mean", mean_se), ("prediction", new_se)):
        low, high = law.interval(0.6, kind=kind, confidence=0.8)
        assert high - law.predict(0.6) == pytest.approx(stats.t.ppf(0.9, n - 2) * se, rel=1e-8)
        assert law.predict(0.6) - low == pytest.approx(high - law.predict(0.6))
    assert law.interval(0.0, kind="mean") == pytest.approx(law.ceiling_interval)
    with pytest.raises(ValueError, match="kind: expected one of 'prediction', 'mean', got 'both'"):
        law.interval(0.1, kind="both")


def test_shares_of_the_ceiling():
    law = ek.fit_entropy_law(H, R)
    assert law.fraction_of_ceiling(0.3) == pytest.approx(0.3 / law.ceiling)
    assert law.fraction_of_gain(0.3, 0.2) == pytest.approx(0.1 / (law.ceiling - 0.2))
    np.testing.assert_allclose(law.fraction_of_ceiling(np.array(R)), np.array(R) / law.ceiling)
    with pytest.raises(ValueError, match="start: expected a performance below the ceiling"):
        law.fraction_of_gain(0.3, 0.9)
    negative = ek.fit_entropy_law(H, [v - 1 for v in R])
    with pytest.raises(ValueError, match="positive ceiling"):
        negative.fraction_of_ceiling(0.3)


@settings(max_examples=40, deadline=None)
@given(
    h=st.lists(st.floats(0.0, 12.0), min_size=4, max_size=30, unique_by=lambda v: round(v, 2)),
    scale=st.floats(0.01, 100.0),
    shift=st.floats(-5.0, 5.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_equivariant_in_performance_and_blind_to_order(h, scale, shift, seed):
    rng = np.random.default_rng(seed)
    h, r = np.array(h), rng.uniform(0, 1, len(h))
    order = rng.permutation(len(h))
    law, moved = ek.fit_entropy_law(h, r), ek.fit_entropy_law(h[order], scale * r[order] + shift)
    assert moved.a == pytest.approx(scale * law.a, rel=1e-6, abs=1e-9 * scale)
    assert moved.b == pytest.approx(scale * law.b + shift, rel=1e-6, abs=1e-9)
    assert moved.rmse == pytest.approx(scale * law.rmse, rel=1e-6, abs=1e-9)
    assert moved.ceiling == pytest.approx(moved.predict(0.0))
    assert moved.ceiling_interval[0] <= moved.ceiling <= moved.ceiling_interval[1]
    # least squares: residuals are orthogonal to the design
    residual = r - law.predict(h)
    assert abs(residual.sum()) < 1e-8 * len(h)
    assert abs(residual @ np.exp(h)) < 1e-8 * np.exp(h).sum()


def test_the_law_scales_with_the_unit_of_performance():
    fraction, percent = ek.fit_entropy_law(H, R), ek.fit_entropy_law(H, [100 * v for v in R])
    for name in ("a", "b", "a_se", "b_se", "rmse", "ceiling", "ceiling_se"):
        assert getattr(percent, name) == pytest.approx(100 * getattr(fraction, name)), name
    assert percent.r2 == pytest.approx(fraction.r2)


def test_nan_pairs_are_left_out_and_counted():
    law = ek.fit_entropy_law([*H, math.nan, 0.5, math.nan], [*R, 0.2, math.nan, math.nan])
    assert law.dropped == 3
    assert law.n == len(H)
    assert law.a == pytest.approx(ek.fit_entropy_law(H, R).a)


def test_extrapolation_is_the_error_on_the_rest():
    law = ek.fit_entropy_law(H, R, fit_fraction=0.5)
    head = ek.fit_entropy_law(H[:4], R[:4])
    assert (law.a, law.b, law.n) == (head.a, head.b, 4)
    rest = np.array(R[4:]) - head.predict(np.array(H[4:]))
    error = law.extrapolation
    assert isinstance(error, LawError)
    assert error.n == 4
    assert error.rmse == pytest.approx(math.sqrt(np.mean(rest**2)))
    assert error.mae == pytest.approx(np.mean(np.abs(rest)))
    assert error.final_error == pytest.approx(rest[-1])
    assert error.final_measured == R[-1]
    assert error.final_predicted == pytest.approx(head.predict(H[-1]))
    linear = np.array(R[4:]) - head.predict_linear(np.array(H[4:]))
    assert error.rmse_linear == pytest.approx(math.sqrt(np.mean(linear**2)))
    assert error.final_error_linear == pytest.approx(linear[-1])
    assert head.extrapolation is None


def test_fraction_of_points_is_not_lost_to_rounding():
    # 0.15·20 is 2.9999999999999996 in float64
    h = np.linspace(1, 0.1, 20)
    assert ek.fit_entropy_law(h, 0.5 - 0.1 * np.exp(h), fit_fraction=0.15).n == 3


def test_hac_standard_errors_grow_with_serial_correlation():
    rng = np.random.default_rng(0)
    h = np.linspace(1.0, 0.1, 200)
    noise = np.zeros(200)
    for i in range(1, 200):
        noise[i] = 0.9 * noise[i - 1] + rng.normal(0, 0.005)
    r = 0.5 - 0.1 * np.exp(h) + noise
    ols, hac = ek.fit_entropy_law(h, r), ek.fit_entropy_law(h, r, standard_errors="hac")
    assert (hac.a, hac.b, hac.rmse) == pytest.approx((ols.a, ols.b, ols.rmse))
    assert hac.a_se > 1.3 * ols.a_se
    assert ols.durbin_watson < 0.6
    assert hac.standard_errors == "hac"


def test_hac_covariance_is_newey_and_wests():
    """Summed over pairs of points: of residuals that are up to two apart, with weights of thirds."""
    x, law = np.exp(H), ek.fit_entropy_law(H, R, standard_errors="hac")
    design, residual = np.column_stack([-x, np.ones(8)]), np.asarray(R) - law.predict(H)
    bread = np.linalg.inv(design.T @ design)
    meat = sum(
        max(0, 1 - abs(i - j) / 3) * residual[i] * residual[j] * np.outer(design[i], design[j])
        for i in range(8)
        for j in range(8)
    )
    assert law.covariance == pytest.approx(bread @ meat @ bread * 8 / 6, rel=1e-9)
    assert (law.a_se, law.b_se) == pytest.approx(tuple(np.sqrt(np.diag(law.covariance))))


def test_performance_whose_squares_underflow_has_a_law():
    law, tiny = (ek.fit_entropy_law(H, np.asarray(R) * scale) for scale in (1.0, 1e-200))
    assert tiny.a == pytest.approx(1e-200 * law.a, rel=1e-6) and math.isnan(tiny.r2)


def test_equal_performance_has_no_r2_but_a_law():
    law = ek.fit_entropy_law(H, [0.4] * 8)
    assert law.a == pytest.approx(0, abs=1e-12)
    assert law.ceiling == pytest.approx(0.4)
    assert math.isnan(law.r2)
    assert math.isnan(law.r2_linear)


def test_three_points_are_enough_and_string_names_the_law():
    law = ek.fit_entropy_law(H[:3], R[:3])
    assert law.n == 3
    assert "e^H" in str(law)
    assert "ceiling" in str(law)
    assert str(ek.fit_entropy_law(H, [-v for v in R])).startswith("R = 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.5], [0.1, 0.2]), "expected at least 3 points, got 2"),
        (([], []), "expected at least 3 points, got 0"),
        (([1.0, 0.5, math.nan], [0.1, 0.2, 0.3]), r"expected at least 3 points, got 2 \(1 pairs with NaN left out\)"),
        (([1.0, 0.5, 0.2], [0.1, 0.2]), "expected equal lengths, got 3 and 2"),
        (([0.5] * 4, [0.1, 0.2, 0.3, 0.4]), "entropy: expected values that differ, got 4 times 0.5"),
        (([0.5, 1.0, 800.0], [0.1, 0.2, 0.3]), "entropy: expected nats per token.*got 800"),
        (([0.5, 1.0, math.inf], [0.1, 0.2, 0.3]), "entropy: expected finite values, got inf at position 2"),
        (([0.5, 1.0, 0.2], [0.1, -math.inf, 0.3]), "performance: expected finite values"),
        (
            ([0.5, 1.0, 0.2], [0.1, -1e160, 0.3]),
            "performance: expected values within .1e.100.*got -1e.160 at position 1",
        ),
        (([0.5, 1.0, 0.2], [0.1, 10**400, 0.3]), "performance: expected numbers, got list"),
        (([-0.9, -0.5, -0.3], [0.1, 0.2, 0.3]), "entropy: expected nats >= 0.*negated"),
        ((np.ones((3, 2)), [0.1, 0.2, 0.3]), r"entropy: expected one dimension, got shape \(3, 2\)"),
        ((["a", "b", "c"], [0.1, 0.2, 0.3]), "entropy: expected numbers, got list"),
        (([0.5, 1.0, 0.2], None), "performance"),
    ],
)
def test_clear_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ek.fit_entropy_law(*arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"fit_fraction": 0.0}, r"fit_fraction: expected a number in \(0, 1\), got 0.0"),
        ({"fit_fraction": 15}, r"fit_fraction: expected a number in \(0, 1\), got 15"),
        ({"fit_fraction": 0.15}, "fit_fraction: expected at least 3 points in the first part, got 1"),
        ({"confidence": 95}, r"confidence: expected a number in \(0, 1\), got 95"),
        ({"standard_errors": "white"}, "standard_errors: expected one of 'ols', 'hac', got 'white'"),
    ],
)
def test_clear_errors_of_options(keywords, message):
    with pytest.raises(ValueError, match=message):
        ek.fit_entropy_law(H, R, **keywords)


def test_predict_refuses_what_would_overflow():
    with pytest.raises(ValueError, match=r"entropy: expected nats per token.*got 710"):
        ek.fit_entropy_law(H, R).predict(710.0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.regression.linear_model", None)
    with pytest.raises(ImportError, match="fit_entropy_law needs statsmodels, which is not installed: pip install "):
        ek.fit_entropy_law(H, R)


def test_importing_the_package_imports_none_of_the_analysis_packages():
    code = (
        "import sys, entropy_kernels, entropy_kernels.cli\n"
        "heavy = ('scipy', 'statsmodels', 'pandas', 'matplotlib', 'tensorboard', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
