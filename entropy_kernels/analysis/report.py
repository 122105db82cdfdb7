"""What ``entropy-kernels fit`` computes and prints: the law of each run in trainers' logs, how well it extrapolates,
when it means less or nothing, a plot."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from entropy_kernels._console import print_table, print_text
from entropy_kernels._require import require
from entropy_kernels.analysis.entropy_law import MIN_POINTS, EntropyLaw, LawError, fit_entropy_law
from entropy_kernels.analysis.log_text import listed
from entropy_kernels.analysis.logs import Run, pairs, read_logs
from entropy_kernels.analysis.metric_names import LogError, Quantity, find_entropy, find_performance, held_by, kl_terms

if TYPE_CHECKING:
    from pandas import DataFrame

#: Nats; no distribution over a vocabulary of 262 144 tokens has more.
_MOST_ENTROPY = 12.5
#: H = 0 that lies further below the entropies of a run than this multiple of their range is far.
_FAR = 2.0
_NOT_SEEN = "performance is not seen to follow entropy"
#: In the metadata of every plot, and in nothing that others write: other files under its name are not replaced.
_MADE_BY = "entropy-kernels fit, plot 9c41d7e2"
#: The field of an Exif record that says which program made a picture.
_SOFTWARE = 0x0131


@dataclasses.dataclass(frozen=True)
class LogFit:
    """The law of one run."""

    run: str
    """Its name."""
    title: str
    """The name, with its folder's where it says nothing."""
    paths: tuple[Path, ...]
    """The logs that it was read from."""
    entropy: Quantity
    performance: Quantity
    points: DataFrame
    """``step``, ``entropy``, ``performance``: a row per evaluation."""
    law: EntropyLaw
    """Fitted on all points."""
    extrapolated: EntropyLaw | None
    """Fitted on the first share of them, at least 3, with its error on the rest; None where they have
    one entropy, or there is no rest."""
    fit_fraction: float
    no_bound: list[str]
    """Why R at H = 0 is no ceiling of this run; empty if it is one."""
    notes: list[str]
    """What a reader should know: rows left out, a training reward instead of a validation metric, doubts."""

    @property
    def logs(self) -> str:
        """The paths, as text."""
        return ", ".join(map(str, self.paths))


def fit_logs(
    paths: Sequence[str | Path],
    progress: Callable[[int, int], None] | None = None,
    *,
    run: str | None = None,
    entropy: str | None = None,
    performance: str | None = None,
    fit_fraction: float = 0.15,
    align: Literal["last", "mean"] = "last",
    confidence: float = 0.95,
    standard_errors: Literal["ols", "hac"] = "ols",
) -> list[LogFit]:
    """Read logs, find the entropy and the performance of each run in them, fit the law to each.

    Args:
        paths, progress, run: as of :func:`~entropy_kernels.analysis.logs.read_logs`.
        entropy, performance: columns, or patterns (``val-core/*/acc/mean@32``) of columns to average within a run; None
            finds the names of :mod:`~entropy_kernels.analysis.metric_names`.
        fit_fraction: as of :func:`~entropy_kernels.analysis.entropy_law.fit_entropy_law`, and so are ``confidence`` and
            ``standard_errors``; but at least 3 points.
        align: as of :func:`~entropy_kernels.analysis.logs.pairs`.

    A run that cannot be fitted is left out with a note, unless it is the only one. Raises ValueError
    (:class:`LogError` for the logs themselves) or OSError with a message of one line.
    """
    if not 0 < fit_fraction < 1:
        raise ValueError(f"fit_fraction: expected a number in (0, 1), got {fit_fraction:g}")
    fits, failed = [], []
    for each in read_logs(paths, run=run, progress=progress):
        try:
            fits.append(_fit(each, entropy, performance, fit_fraction, align, confidence, standard_errors))
        except ValueError as error:
            failed.append((each.name, error))
    if not fits:
        name, first = failed[0]
        raise first if len(failed) == 1 else LogError(f"none of {len(failed)} runs can be fitted; {name}: {first}")
    left_out = [f"run {name} is left out: {why}" for name, why in failed]
    return [dataclasses.replace(fit, notes=fit.notes + left_out) for fit in fits]


def _fit(
    run: Run,
    entropy: str | None,
    performance: str | None,
    fit_fraction: float,
    align: Literal["last", "mean"],
    confidence: float,
    standard_errors: Literal["ols", "hac"],
) -> LogFit:
    log, notes = run.frame, list(run.notes)
    columns = [str(column) for column in log.columns if column != "step"]
    try:
        h, r = find_entropy(columns, entropy), find_performance(columns, performance)
    except LogError as error:
        never = [column for column in run.not_finite if column not in columns]
        raise LogError(f"{error}; never finite: {', '.join(never[:5])}" if never else str(error)) from None
    for quantity in (h, r):
        for column in quantity.columns:
            if steps := run.not_finite.get(column):
                notes.append(f"{column} is infinite or NaN at step {listed(steps)}: left out there")
    if h.note:
        notes.append(f"{h.name}: {h.note}")
    if r.training:
        notes.append(
            f"{r.name} is measured on the training prompts, which change with the steps and are trained on: the law is "
            "about validation; name a validation metric with --performance if there is one"
        )
    points = pairs(log, h.values(log), r.values(log), align=align)
    if points.attrs["unpaired"]:
        notes.append(f"{points.attrs['unpaired']} evaluations have no entropy near them and were left out")
    if len(points) < MIN_POINTS:
        where = ", ".join(str(path) for path in run.paths)
        raise LogError(
            f"{where}: expected at least {MIN_POINTS} steps with both {h.name} and {r.name}, got {len(points)}"
        )
    values = points["entropy"], points["performance"]
    law = fit_entropy_law(*values, confidence=confidence, standard_errors=standard_errors)
    extrapolated = None
    if len(points) > MIN_POINTS and np.ptp(values[1]) > 0:
        share = max(fit_fraction, MIN_POINTS / len(points))
        with contextlib.suppress(ValueError):  # one entropy in all of the first points
            extrapolated = fit_entropy_law(
                *values, fit_fraction=share, confidence=confidence, standard_errors=standard_errors
            )
    no_bound = _no_bound(run, h, law)
    notes += [*no_bound.values(), *_doubts(run, law, points, bound=not no_bound)]
    reasons = list(no_bound)
    return LogFit(run.name, run.full_name, run.paths, h, r, points, law, extrapolated, fit_fraction, reasons, notes)


def save_plot(fits: Sequence[LogFit], output: Path) -> None:
    """Write the figure of ``fits`` to ``output``; its suffix chooses the format.

    Errors as of :func:`plot_path`.
    """
    output = plot_path(output)
    from entropy_kernels.analysis.plots import fit_figure, fits_figure

    fit = fits[0]
    if len(fits) == 1:
        figure = fit_figure(
            fit.points["entropy"],
            fit.points["performance"],
            fit.law,
            steps=fit.points["step"],
            extrapolated=fit.extrapolated,
            bound=not fit.no_bound,
            entropy_name=f"{_short(fit.entropy)} (nats)",
            performance_name=_short(fit.performance),
            title=f"Entropy law of {fit.title}",
        )
    else:
        figure = fits_figure(
            {each.run: each.points for each in fits},
            {each.run: each.law for each in fits},
            bound={each.run: not each.no_bound for each in fits},
            entropy_name=f"{_common(each.entropy for each in fits) or 'policy entropy H'} (nats)",
            performance_name=_common(each.performance for each in fits) or "performance R",
        )
    kind = output.suffix.lower()
    keywords: dict[str, Any] = {}
    if kind in (".png", ".svg", ".svgz", ".pdf", ".ps", ".eps"):
        keywords["metadata"] = {"Software" if kind == ".png" else "Creator": _MADE_BY}
    elif kind in (".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".avif"):
        from PIL import Image

        exif = Image.Exif()
        exif[_SOFTWARE] = _MADE_BY
        keywords["pil_kwargs"] = {"exif": exif}
    figure.savefig(output, dpi=150, **keywords)


def plot_path(output: Path) -> Path:
    """Where a plot that is asked for under this name goes: ``.png`` where it has no suffix.

    FileNotFoundError for a folder that is not there. ValueError for a format that matplotlib does not write.
    FileExistsError for a file that is there and is no earlier plot: these say in their metadata what made them. In a
    format that has none, no file is replaced.
    """
    figure = require("matplotlib.figure", "the plot").Figure()
    if not output.suffix and not output.is_dir():
        output = output.with_suffix(".png")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: folder {output.parent} does not exist")
    if output.exists() and not (output.is_file() and _is_ours(output)):
        raise FileExistsError(
            f"--output: expected a new file or an earlier plot, got {output}, which is something else or does not say "
            "what made it; name another file or remove it"
        )
    kinds = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in kinds:
        raise ValueError(f"--output: expected a name that ends in one of {', '.join(sorted(kinds))}, got {output.name}")
    return output


def _is_ours(plot: Path) -> bool:
    """Whether :func:`save_plot` has made a file: no other has its mark, and all formats with metadata show them."""
    data = plot.read_bytes()
    if plot.suffix.lower() == ".svgz":
        with contextlib.suppress(OSError, EOFError, zlib.error):  # a file that is not what its name says
            data = gzip.decompress(data)
    return _MADE_BY.encode() in data


def default_plot(paths: Sequence[Path]) -> Path:
    """Beside the log: ``metrics.jsonl`` → ``metrics.entropy-law.png``; ``entropy-law.png`` in a folder, and beside the
    first of several logs; in the working folder for a pipe."""
    path = paths[0]
    if path == Path("-") or path.is_relative_to("/dev"):  # a pipe
        return Path("entropy-law.png")
    if path.is_dir():
        return path / "entropy-law.png"
    return path.with_name("entropy-law.png" if len(paths) > 1 else f"{path.stem}.entropy-law.png")


def print_report(fits: Sequence[LogFit]) -> None:
    """The law, what is left to gain, and the extrapolation, as tables on stdout; of several runs a row each."""
    if len(fits) == 1:
        _print_one(fits[0])
    else:
        _print_several(fits)
    runs: dict[str, list[str]] = {}
    for fit in fits:
        for note in fit.notes:
            runs.setdefault(note, []).append(fit.run)
    for note, names in sorted(runs.items(), key=lambda entry: -len(entry[1])):
        print_text(f"note{'' if len(names) == len(fits) else ', ' + ', '.join(names)}: {note}")


def _print_one(fit: LogFit) -> None:
    law, points = fit.law, fit.points
    level = f"{law.confidence:.0%}"
    steps = points["step"].to_numpy()
    first, last = (float(points["performance"].iloc[i]) for i in (0, -1))
    low, high = law.ceiling_interval
    errors = "Newey–West" if law.standard_errors == "hac" else "OLS"
    at_zero = f"{law.ceiling:.4g}, {level} interval [{low:.4g}, {high:.4g}]"
    ending = (
        [("R at H = 0", f"{at_zero}: no bound of this run, see the notes"), ("last performance", f"{last:.4g}")]
        if fit.no_bound
        else [("ceiling (H = 0)", at_zero), ("reached", _reached(law, first, last))]
    )
    print_table(
        f"Entropy law of {fit.logs}" + ("" if fit.run in fit.logs else f", run {fit.run}"),
        [
            ("entropy", f"{fit.entropy.name}, {law.entropy_range[0]:.4g} to {law.entropy_range[1]:.4g} nats"),
            ("performance", f"{fit.performance.name}, {points['performance'].min():.4g} to "
                            f"{points['performance'].max():.4g}"),
            ("points", f"{law.n}, steps {steps[0]:g} to {steps[-1]:g}"),
            ("law", f"R = {-law.a:.5g}·e^H {'+' if law.b >= 0 else '-'} {abs(law.b):.5g}"),
            ("a", f"{law.a:.5g} ± {law.a_se:.2g} (standard error, {errors})"),
            ("b", f"{law.b:.5g} ± {law.b_se:.2g}"),
            ("R²", f"{law.r2:.4f}"),
            ("RMSE", f"{law.rmse:.4g}"),
            ("straight line in H", f"R² {law.r2_linear:.4f}, RMSE {law.rmse_linear:.4g}: "
                                   f"R = {law.slope_linear:.4g}·H + {law.intercept_linear:.4g}"),
            *ending,
        ],
    )  # fmt: skip
    if fit.extrapolated is not None and (error := fit.extrapolated.extrapolation) is not None:
        n = fit.extrapolated.n
        print_table(f"Extrapolation from the first {n} points of {law.n}", _extrapolation_rows(fit.extrapolated, error))


def _print_several(fits: Sequence[LogFit]) -> None:
    entropy, performance = _common(f.entropy for f in fits), _common(f.performance for f in fits)
    about = f": {performance or 'performance'} against {entropy or 'entropy'}"
    level = f"{fits[0].law.confidence:.0%}"
    rows: list[tuple[str, ...]] = []
    for fit in fits:
        law, last = fit.law, float(fit.points["performance"].iloc[-1])
        low, high = law.ceiling_interval
        error = fit.extrapolated.extrapolation if fit.extrapolated is not None else None
        rows.append(
            (
                fit.run,
                f"{law.n}",
                f"{law.entropy_range[0]:.3g} to {law.entropy_range[1]:.3g}",
                f"{law.a:.3g} ± {law.a_se:.1g}",
                f"{law.b:.3g}",
                f"{law.r2:.3f} ({law.r2_linear:.3f})",
                f"{law.ceiling:.3g} ({low:.3g} to {high:.3g})",
                f"{last:.3g}",
                "no bound" if fit.no_bound else "–" if law.ceiling <= 0 else f"{law.fraction_of_ceiling(last):.1%}",
                f"{error.rmse:.3g} (after {fit.extrapolated.n})" if fit.extrapolated and error else "–",
            )
        )
    header = ["run", "points", "H (nats)", "a", "b", "R² (line)", f"R at H = 0 ({level})", "last R", "of ceiling",
              "RMSE of rest"]  # fmt: skip
    told = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    table = [[row[i] for i in told] for row in rows]
    print_table(f"Entropy laws of {len(fits)} runs{about}", table, [header[i] for i in told], whole=True)


def as_dict(fits: Sequence[LogFit]) -> dict[str, Any]:
    """Everything in ``fits`` as plain numbers, strings and lists, for ``--json``; NaN as None.

    One run is an object; several are ``{"runs": [one object each]}``.
    """
    return {"runs": [_fit_dict(fit) for fit in fits]} if len(fits) > 1 else _fit_dict(fits[0])


def _fit_dict(fit: LogFit) -> dict[str, Any]:
    last = float(fit.points["performance"].iloc[-1])
    bound = not fit.no_bound and fit.law.ceiling > 0
    return {
        "log": fit.logs,
        "run": fit.run,
        "entropy": list(fit.entropy.columns),
        "performance": list(fit.performance.columns),
        "steps": [float(step) for step in fit.points["step"]],
        "law": _law_dict(fit.law),
        "no_bound": fit.no_bound,
        "last_performance": last,
        "fraction_of_ceiling": fit.law.fraction_of_ceiling(last) if bound else None,
        "fit_fraction": fit.fit_fraction,
        "law_of_first_part": None if fit.extrapolated is None else _law_dict(fit.extrapolated),
        "notes": fit.notes,
    }


def _law_dict(law: EntropyLaw) -> dict[str, Any]:
    fields = {f.name: getattr(law, f.name) for f in dataclasses.fields(law)}
    fields["covariance"] = law.covariance.tolist()
    if law.extrapolation is not None:
        fields["extrapolation"] = dataclasses.asdict(law.extrapolation)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _reached(law: EntropyLaw, first: float, last: float) -> str:
    if law.ceiling <= 0:
        return f"last {last:.4g}; the ceiling is not positive, so there is no share of it"
    text = f"{law.fraction_of_ceiling(last):.1%} of the ceiling (last {last:.4g})"
    if law.ceiling > first:
        text += f", {law.fraction_of_gain(last, first):.1%} of the gain from the first ({first:.4g})"
    return text


def _extrapolation_rows(law: EntropyLaw, error: LawError) -> list[tuple[str, str]]:
    return [
        ("law", f"a = {law.a:.4g} ± {law.a_se:.2g}, b = {law.b:.4g} ± {law.b_se:.2g}"),
        ("error on the rest", f"RMSE {error.rmse:.4g}, mean absolute {error.mae:.4g} over {error.n} points"),
        ("final step", f"measured {error.final_measured:.4g}, predicted {error.final_predicted:.4g}, "
                       f"error {error.final_error:+.4g}"),
        ("straight line in H", f"RMSE {error.rmse_linear:.4g}, final error {error.final_error_linear:+.4g}"),
    ]  # fmt: skip


def _no_bound(run: Run, entropy: Quantity, law: EntropyLaw) -> dict[str, str]:
    """Why R at H = 0 bounds nothing, and what a reader should know of it."""
    reasons: dict[str, str] = {}
    if holds := held_by(run.frame, run.full_name, run.settings):
        reason = f"entropy is held by {', '.join(holds)}"
        reasons[reason] = (
            f"{reason}: the law was found on runs in which nothing holds it; R at H = 0 is not what this run can "
            "reach, fit a run without it for a ceiling"
        )
    if law.entropy_range[1] > _MOST_ENTROPY:
        reasons[f"{entropy.name} is not nats per token"] = (
            f"entropies reach {law.entropy_range[1]:.4g} nats, more than ln V of any vocabulary ({_MOST_ENTROPY} at "
            "262144 tokens): a sum over tokens or a perplexity; log the mean over tokens (verl: loss_agg_mode="
            "token-mean) or name another column with --entropy"
        )
    if math.isnan(law.r2):
        reasons[_NOT_SEEN] = "every performance is the same: there is no law to fit, and R at H = 0 is no ceiling"
    elif _unrelated(law):
        reasons[_NOT_SEEN] = (
            f"a = {law.a:.2g} ± {law.a_se:.2g} does not differ from 0 at the level of {law.confidence:.0%}: nothing "
            "says that performance follows entropy in this run, so R at H = 0 is no ceiling"
        )
    elif law.a < 0:
        reasons["performance falls as entropy falls"] = (
            "a is negative: performance falls as entropy falls, so R at H = 0 is no ceiling"
        )
    return reasons


def _unrelated(law: EntropyLaw) -> bool:
    """Whether a = 0 lies within its interval, at the level of the fit: then R at H = 0 is a mean of performances."""
    low, high = law.ceiling_interval
    half = law.a_se * ((high - low) / (2 * law.ceiling_se) if law.ceiling_se > 0 else 0.0)
    return abs(law.a) <= half


def _doubts(run: Run, law: EntropyLaw, points: DataFrame, *, bound: bool) -> list[str]:
    """Further reasons to read the fit with care, and what to do about each."""
    steps, h, r = (points[name].to_numpy() for name in ("step", "entropy", "performance"))
    doubts = [
        f"the run has {term}, and the law was found without one: take the ceiling as a trend"
        for term in kl_terms(run.frame)
    ]
    doubts += _course(steps, h)
    x = np.exp(np.array(law.entropy_range))
    far = (x[0] - 1) / (x[1] - x[0])
    if far > _FAR:
        doubts.append(
            f"entropy moved from {h[0]:.4g} to {h[-1]:.4g} nats only: in e^H, H = 0 lies {far:.2g} times as far below "
            "as the whole range; R at H = 0 is an extrapolation that more steps may change"
        )
    if r.max() > 1:
        doubts.append("performance exceeds 1: taken as it is, and a, b, the ceiling and the errors are in its unit")
    if r.min() < 0:
        doubts.append(
            "performance is negative at times: a reward with penalties, not a share of right answers; a share of the "
            "ceiling says little, and an accuracy with --performance more"
        )
    if law.durbin_watson < 1 and law.standard_errors == "ols":
        doubts.append(
            f"the residuals are correlated (Durbin–Watson {law.durbin_watson:.2f}, 2 = independent): standard errors "
            "and intervals are too small; --standard-errors hac allows for it"
        )
    if r[-1] > law.ceiling_interval[1] and bound:
        doubts.append("the last performance is above the ceiling's interval: the law does not describe this run's end")
    return doubts


def _course(steps: np.ndarray, h: np.ndarray) -> list[str]:
    """Whether the entropy falls, by the means of up to eight blocks of neighbouring points."""
    if len(h) < 6:
        return []
    blocks = np.array_split(np.arange(len(h)), min(8, len(h) // 3))
    means = np.array([h[block].mean() for block in blocks])
    noise = np.sqrt(np.mean([h[block].var() / len(block) for block in blocks]))
    lowest = int(means.argmin())
    rise = float(means[-1] - means[lowest])
    if rise < max(0.25 * np.ptp(means), 3 * noise):
        return []
    if lowest == 0:
        return ["entropy rises over the run: the law is about entropy that is spent; look for what raises it"]
    return [
        f"entropy rises again by {rise:.3g} nats after about step {steps[blocks[lowest]].mean():g}: the law is about "
        "entropy that is spent; fit the log up to there, and look for what raised it"
    ]


def _common(metrics: Any) -> str:
    """The name that all of ``metrics`` have, or ""."""
    names = {_short(metric) for metric in metrics}
    return names.pop() if len(names) == 1 else ""


def _short(metric: Quantity) -> str:
    return metric.name if len(metric.columns) == 1 else f"mean of {len(metric.columns)} metrics"
