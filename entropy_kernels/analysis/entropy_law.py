"""The entropy law R = -a·e^H + b, fitted by ordinary least squares on e^H.

Source: *The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models*, arXiv 2505.22617, Eq. 6
and section 2. The derivations of the intervals are in ``docs/entropy-law.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from entropy_kernels._arguments import number, word
from entropy_kernels._require import require

MIN_POINTS = 3
# A token's entropy is at most log V (12.5 nats at V = 262144). Beyond this the column is something else (a sum over a
# response, a perplexity), and e^H would swamp or overflow the fit long before float64 does.
MAX_ENTROPY = 100.0
MAX_PERFORMANCE = 1e100
# Chains that evaluate lse - Σp·z in bf16 log entropies that are off by up to 0.15 nats, so a collapsed policy can be
# logged a little below zero. Anything lower is a negated loss term, not an entropy.
MIN_ENTROPY = -0.2


@dataclass(frozen=True)
class LawError:
    """How far a law is from points that it was not fitted on, in the units of performance.

    Attributes:
        n: number of points.
        rmse, mae: root of the mean squared error, mean absolute error.
        final_error: measured minus predicted at the last point (the paper's "final-step" error, signed).
        final_measured, final_predicted: the two.
        rmse_linear, final_error_linear: those of the straight line in H.

    Source:
        arXiv 2505.22617; docs/entropy-law.md.
    """

    n: int
    rmse: float
    mae: float
    final_error: float
    final_measured: float
    final_predicted: float
    rmse_linear: float
    final_error_linear: float


@dataclass(frozen=True)
class EntropyLaw:
    """R = -a·e^H + b with its uncertainty; made by :func:`fit_entropy_law`.

    H is in nats, R in whatever unit the performance had (``a``, ``b``, ``ceiling`` and every error scale with it: a
    fraction gives fractions, per cent gives per cent).

    Source:
        arXiv 2505.22617, Eq. 6; docs/entropy-law.md.
    """

    a: float
    """Coefficient of -e^H: what a unit of e^H is worth. Positive where performance rises while entropy falls."""
    b: float
    """Intercept."""
    a_se: float
    """Standard error of ``a``."""
    b_se: float
    """Standard error of ``b``."""
    r2: float
    """Coefficient of determination; NaN where every performance is the same."""
    rmse: float
    """Root of the mean squared residual over the n points of the fit (n in the denominator, as in the paper)."""
    ceiling: float
    """R at H = 0: b - a, the performance left when all entropy is spent."""
    ceiling_se: float
    """Standard error of ``ceiling``."""
    ceiling_interval: tuple[float, float]
    """Two-sided interval of ``ceiling`` at level ``confidence``; Student's t with n - 2 degrees of freedom."""
    n: int
    """Points in the fit."""
    dropped: int
    """Pairs left out because one of the two was NaN."""
    r2_linear: float
    """R² of the straight line R = slope·H + intercept on the same points."""
    rmse_linear: float
    """RMSE of that straight line."""
    slope_linear: float
    """Slope of the straight line, per nat."""
    intercept_linear: float
    """Value of the straight line at H = 0."""
    covariance: np.ndarray = field(repr=False, compare=False)
    """(2, 2) float64 covariance of (a, b)."""
    residual_sd: float
    """Standard deviation of the residuals, n - 2 in the denominator."""
    durbin_watson: float
    """Near 2 for independent residuals; towards 0 they are correlated, and OLS standard errors are too small."""
    entropy_range: tuple[float, float]
    """Smallest and largest H of the fit: predictions outside are extrapolations."""
    confidence: float = 0.95
    """Level of the intervals."""
    standard_errors: Literal["ols", "hac"] = "ols"
    """How ``covariance`` was estimated."""
    extrapolation: LawError | None = None
    """With ``fit_fraction``: the error on the points after the first fraction; else None."""

    def predict(self, entropy: Any) -> Any:
        """R = -a·e^H + b.

        Args:
            entropy: H in nats: a number, sequence, array, tensor or Series, any shape.

        Returns:
            A float for a number; for a tensor one of its shape, dtype (float32 for integers) and device; for a pandas
            Series one with the same index; for anything else a float64 array. In the unit of performance.

        Raises:
            ValueError: an H above 100 nats, or what is no numbers.
        """
        return _like(entropy, -self.a * np.exp(_entropy_array(entropy)) + self.b)

    def predict_linear(self, entropy: Any) -> Any:
        """The straight line in H fitted to the same points.

        Args:
            entropy: as in :meth:`predict`.

        Returns:
            As :meth:`predict`.

        Raises:
            ValueError: as in :meth:`predict`.
        """
        return _like(entropy, self.slope_linear * _entropy_array(entropy) + self.intercept_linear)

    def interval(
        self, entropy: Any, *, confidence: float | None = None, kind: Literal["prediction", "mean"] = "prediction"
    ) -> tuple[Any, Any]:
        """Lower and upper bound of R at H.

        Args:
            entropy: as in :meth:`predict`.
            confidence: level in (0, 1); None: that of the fit.
            kind: "prediction" bounds one further measurement (it adds the residual variance), "mean" the law's own
                value.

        Returns:
            Two of the kind that :meth:`predict` returns.

        Raises:
            ValueError: as in :meth:`predict`; another kind, a level outside (0, 1).
            ImportError: scipy is missing (extra ``analysis``).
        """
        word("kind", kind, ("prediction", "mean"))
        h = _entropy_array(entropy)
        x = -np.exp(h)
        # Var(a·x + b) for the row (x, 1) of the design
        variance = x * x * self.covariance[0, 0] + 2 * x * self.covariance[0, 1] + self.covariance[1, 1]
        if kind == "prediction":
            variance = variance + self.residual_sd**2
        half = _quantile(self.confidence if confidence is None else confidence, self.n - 2) * np.sqrt(
            np.maximum(variance, 0.0)
        )
        centre = self.a * x + self.b
        return _like(entropy, centre - half), _like(entropy, centre + half)

    def slope(self, entropy: Any) -> Any:
        """dR/dH = -a·e^H.

        Args:
            entropy: as in :meth:`predict`.

        Returns:
            As :meth:`predict`, in performance per nat.

        Raises:
            ValueError: as in :meth:`predict`.
        """
        return _like(entropy, -self.a * np.exp(_entropy_array(entropy)))

    def fraction_of_ceiling(self, performance: Any) -> Any:
        """performance / ceiling: the share of what the law allows that is already reached.

        Args:
            performance: in the unit of the fit; a number, sequence, array, tensor or Series.

        Returns:
            A share, of the kind that :meth:`predict` returns.

        Raises:
            ValueError: a law whose ceiling is not positive; what is no numbers.
        """
        if self.ceiling <= 0:
            raise ValueError(f"fraction_of_ceiling: expected a law with a positive ceiling, got {self.ceiling:.4g}")
        return _like(performance, _array(performance, "performance") / self.ceiling)

    def fraction_of_gain(self, performance: Any, start: float) -> Any:
        """(performance - start) / (ceiling - start): the share of the way from ``start`` to the ceiling.

        Args:
            performance: as in :meth:`fraction_of_ceiling`.
            start: performance before training, below the ceiling.

        Returns:
            A share, of the kind that :meth:`predict` returns.

        Raises:
            ValueError: a start that is not below the ceiling; what is no numbers.
        """
        if not self.ceiling > start:
            raise ValueError(
                f"start: expected a performance below the ceiling {self.ceiling:.4g}, got {float(start):.4g}"
            )
        return _like(performance, (_array(performance, "performance") - start) / (self.ceiling - start))

    def error(self, entropy: Any, performance: Any) -> LawError:
        """RMSE, mean absolute and final-point error on other points; pairs with NaN are left out.

        Args:
            entropy, performance: as in :func:`fit_entropy_law`.

        Returns:
            :class:`LawError`.

        Raises:
            ValueError: lengths differ; no pair is left; an infinite value; an entropy above 100 or below -0.2 nats.
        """
        h, r, _ = _pairs(entropy, performance)
        if len(h) == 0:
            raise ValueError("entropy, performance: expected at least 1 pair without NaN, got 0")
        predicted = -self.a * np.exp(h) + self.b
        linear = self.slope_linear * h + self.intercept_linear
        return LawError(
            n=len(h),
            rmse=_rms(r - predicted),
            mae=float(np.mean(np.abs(r - predicted))),
            final_error=float(r[-1] - predicted[-1]),
            final_measured=float(r[-1]),
            final_predicted=float(predicted[-1]),
            rmse_linear=_rms(r - linear),
            final_error_linear=float(r[-1] - linear[-1]),
        )

    def __str__(self) -> str:
        low, high = self.ceiling_interval
        return (
            f"R = {-self.a:.4g}·e^H + {self.b:.4g} (a ± {self.a_se:.2g}, b ± {self.b_se:.2g}, R² {self.r2:.3f}, "
            f"RMSE {self.rmse:.3g}, n {self.n}; ceiling {self.ceiling:.4g} [{low:.4g}, {high:.4g}])"
        )


def fit_entropy_law(
    entropy: Any,
    performance: Any,
    *,
    fit_fraction: float | None = None,
    confidence: float = 0.95,
    standard_errors: Literal["ols", "hac"] = "ols",
) -> EntropyLaw:
    """Fit R = -a·e^H + b by least squares on e^H.

        >>> law = fit_entropy_law([0.0, 0.5, 1.0, 1.5], [0.50, 0.435, 0.328, 0.152])
        >>> round(law.a, 3), round(law.ceiling, 3)
        (0.1, 0.5)

    Args:
        entropy: policy entropy in nats, one value per measurement, in the order of training: a sequence, array,
            tensor (any dtype and device) or Series of n numbers.
        performance: validation performance at the same measurements, n numbers. A fraction in the paper; any other
            unit is as good (the fit is equivariant), and a, b, the ceiling and the errors come out in it.
        fit_fraction: fit on the first share of the points only, ``floor(fit_fraction·n)`` of them, and report the
            error on the rest as ``law.extrapolation`` (the paper's 15 % → rest).
        confidence: level of the ceiling's interval and the default of ``law.interval``.
        standard_errors: "ols" takes the residuals for independent; "hac" (Newey–West, lag ⌊4·(n/100)^(2/9)⌋)
            allows for the serial correlation that neighbouring steps of one run have.

    Returns:
        :class:`EntropyLaw`. Pairs in which either value is NaN are left out and counted in ``dropped``.

    Raises:
        ValueError: lengths differ; fewer than 3 points are left; an infinite value; an entropy above 100 or below
            -0.2 nats; the same entropy everywhere; a fraction or level outside (0, 1).
        ImportError: statsmodels or scipy is missing (extra ``analysis``).

    Source:
        arXiv 2505.22617, Eq. 6; docs/entropy-law.md.
    """
    word("standard_errors", standard_errors, ("ols", "hac"))
    _quantile(confidence, 1)  # validates the level before anything is computed
    h, r, dropped = _pairs(entropy, performance)
    note = f" ({dropped} pairs with NaN left out)" if dropped else ""
    if len(h) < MIN_POINTS:
        raise ValueError(f"entropy, performance: expected at least {MIN_POINTS} points, got {len(h)}{note}")
    if fit_fraction is None:
        return _fit(h, r, dropped, confidence, standard_errors)

    if not 0 < number("fit_fraction", fit_fraction, torch.float64) < 1:
        raise ValueError(f"fit_fraction: expected a number in (0, 1), got {fit_fraction!r}")
    # the 1e-9 keeps 0.15·20 = 2.9999999999999996 at 3 points
    n_fit = math.floor(fit_fraction * len(h) + 1e-9)
    if n_fit < MIN_POINTS:
        raise ValueError(
            f"fit_fraction: expected at least {MIN_POINTS} points in the first part, "
            f"got {n_fit} ({fit_fraction:g} of {len(h)}{note})"
        )
    law = _fit(h[:n_fit], r[:n_fit], dropped, confidence, standard_errors)
    return replace(law, extrapolation=law.error(h[n_fit:], r[n_fit:]))


def _fit(h: np.ndarray, r: np.ndarray, dropped: int, confidence: float, standard_errors: str) -> EntropyLaw:
    linear_model = require("statsmodels.regression.linear_model", "fit_entropy_law")
    x = np.exp(h)
    if np.ptp(x) <= 1e-9 * np.max(x):
        raise ValueError(f"entropy: expected values that differ, got {len(h)} times {h[0]:.6g}")
    # design (-e^H, 1), scaled: e^H of a sum over tokens would leave the 1 below rounding
    scale = np.array([np.max(x), 1.0])
    model = linear_model.OLS(r, np.column_stack([-x, np.ones_like(x)]) / scale)
    if standard_errors == "hac":
        lags = int(4 * (len(h) / 100) ** (2 / 9))
        result = model.fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": True})
    else:
        result = model.fit()
    a, b = (float(v) for v in result.params / scale)
    covariance = np.asarray(result.cov_params(), dtype=np.float64) / np.outer(scale, scale)
    straight = linear_model.OLS(r, np.column_stack([h, np.ones_like(h)])).fit()
    residual = np.asarray(result.resid)

    ceiling = b - a
    # the ceiling is the linear form (-1, 1)·(a, b), so the delta method is exact
    ceiling_se = math.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0.0))
    half = _quantile(confidence, len(h) - 2) * ceiling_se
    squares = float(residual @ residual)
    return EntropyLaw(
        a=a,
        b=b,
        a_se=math.sqrt(covariance[0, 0]),
        b_se=math.sqrt(covariance[1, 1]),
        r2=_r2(residual, r),
        rmse=_rms(residual),
        ceiling=ceiling,
        ceiling_se=ceiling_se,
        ceiling_interval=(ceiling - half, ceiling + half),
        n=len(h),
        dropped=dropped,
        r2_linear=_r2(np.asarray(straight.resid), r),
        rmse_linear=_rms(np.asarray(straight.resid)),
        slope_linear=float(straight.params[0]),
        intercept_linear=float(straight.params[1]),
        covariance=covariance,
        residual_sd=math.sqrt(squares / (len(h) - 2)),
        durbin_watson=float(np.sum(np.diff(residual) ** 2) / squares) if squares > 0 else math.nan,
        entropy_range=(float(h.min()), float(h.max())),
        confidence=confidence,
        standard_errors="hac" if standard_errors == "hac" else "ols",
    )


def _r2(residual: np.ndarray, r: np.ndarray) -> float:
    spread = float(np.sum((r - r.mean()) ** 2))
    # a mean that rounds leaves a spread of eps² even where all values are equal: 0/0, not a perfect or a bad fit
    return 1.0 - float(residual @ residual) / spread if np.ptp(r) > 0 and spread > 0 else math.nan


def _rms(residual: np.ndarray) -> float:
    return float(np.sqrt(np.mean(residual**2)))


def _quantile(confidence: float, degrees: int) -> float:
    if not 0 < number("confidence", confidence, torch.float64) < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence!r}")
    stats = require("scipy.stats", "an interval of the entropy law")
    return float(stats.t.ppf(0.5 + confidence / 2, degrees))


def _array(values: Any, name: str) -> np.ndarray:
    """float64 array of a number, sequence, array, tensor or Series; ValueError naming the argument if it is none."""
    if isinstance(values, torch.Tensor):
        # float() first: numpy has no bfloat16
        return values.detach().to("cpu", torch.float64).numpy()
    if isinstance(values, Sequence) and any(isinstance(v, torch.Tensor) for v in values):
        values = [v.item() if isinstance(v, torch.Tensor) else v for v in values]
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers, got {type(values).__name__} ({error})") from None


def _entropy_array(entropy: Any) -> np.ndarray:
    """float64 H, refused where e^H would overflow or swamp."""
    h = _array(entropy, "entropy")
    if np.any(h > MAX_ENTROPY):
        raise ValueError(
            f"entropy: expected nats per token, at most log(vocabulary) (about 12), got {np.nanmax(h):.6g}: "
            "e^H would overflow; is this a sum over tokens or a perplexity?"
        )
    return h


def _pairs(entropy: Any, performance: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Flat float64 (H, R) without the pairs that hold a NaN, and how many those were."""
    h, r = _array(entropy, "entropy"), _array(performance, "performance")
    for name, values in (("entropy", h), ("performance", r)):
        if values.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(values.shape)}")
        if np.any(np.isinf(values)):
            raise ValueError(f"{name}: expected finite values, got inf at position {int(np.argmax(np.isinf(values)))}")
    if np.any(np.abs(r) > MAX_PERFORMANCE):
        raise ValueError(
            f"performance: expected values within ±{MAX_PERFORMANCE:g}, whose squares are finite, got "
            f"{r[np.nanargmax(np.abs(r))]:.6g} at position {int(np.nanargmax(np.abs(r)))}"
        )
    if len(h) != len(r):
        raise ValueError(f"entropy, performance: expected equal lengths, got {len(h)} and {len(r)}")
    keep = ~(np.isnan(h) | np.isnan(r))
    h, r = h[keep], r[keep]
    _entropy_array(h)
    if np.any(h < MIN_ENTROPY):
        raise ValueError(
            f"entropy: expected nats >= 0 (a little below for rounding), got {h.min():.6g}: "
            "is this a negated entropy loss?"
        )
    return h, r, int(np.sum(~keep))


def _like(template: Any, values: np.ndarray) -> Any:
    """``values`` as the kind of object that ``template`` is."""
    if isinstance(template, torch.Tensor):
        dtype = template.dtype if template.dtype.is_floating_point else torch.float32
        return torch.from_numpy(np.asarray(values)).to(template.device, dtype)
    if values.ndim == 0:
        return float(values)
    if type(template).__module__.partition(".")[0] == "pandas" and hasattr(template, "index"):
        return type(template)(values, index=template.index)
    return values
