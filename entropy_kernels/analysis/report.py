"""What ``entropy-kernels fit`` computes and prints: the law of a trainer's log, how well it extrapolates, a plot."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from entropy_kernels._console import print_table
from entropy_kernels.analysis.entropy_law import MIN_POINTS, EntropyLaw, fit_entropy_law
from entropy_kernels.analysis.logs import pairs, read_log
from entropy_kernels.analysis.metric_names import LogError, Quantity, find_entropy, find_performance

if TYPE_CHECKING:
    from pandas import DataFrame

#: In the metadata of every plot: others under its name are not replaced.
_MADE_BY = "entropy-kernels fit"
#: The field of an Exif record that says which program made a picture.
_SOFTWARE = 0x0131


@dataclasses.dataclass(frozen=True)
class LogFit:
    """The law of one log."""

    path: Path
    entropy: Quantity
    performance: Quantity
    points: DataFrame
    """``step``, ``entropy``, ``performance``: a row per evaluation."""
    law: EntropyLaw
    """Fitted on all points."""
    extrapolated: EntropyLaw | None
    """Fitted on the first share of them, with its error on the rest; None where that share is too small."""
    fit_fraction: float
    notes: list[str]
    """What a reader should know: rows left out, a training reward instead of a validation metric, doubts."""


def fit_log(
    path: str | Path,
    *,
    entropy: str | None = None,
    performance: str | None = None,
    fit_fraction: float = 0.15,
    align: Literal["last", "mean"] = "last",
    confidence: float = 0.95,
    standard_errors: Literal["ols", "hac"] = "ols",
) -> LogFit:
    """Read a log, find its entropy and performance, fit the law.

    ``entropy`` and ``performance`` name columns, or are patterns (``val-core/*/acc/mean@32``) of columns to average;
    None finds the names that verl, TRL, SkyRL and this package's trainer write. The other arguments are those of
    :func:`~entropy_kernels.analysis.logs.pairs` and :func:`~entropy_kernels.analysis.entropy_law.fit_entropy_law`.

    Raises ValueError (:class:`LogError` for the log itself) or OSError with a message of one line.
    """
    if not 0 < fit_fraction < 1:
        raise ValueError(f"fit_fraction: expected a number in (0, 1), got {fit_fraction:g}")
    log = read_log(path)
    notes = list(log.attrs["notes"])
    columns = [str(column) for column in log.columns if column != "step"]
    h, r = find_entropy(columns, entropy), find_performance(columns, performance)
    if r.training:
        notes.append(
            f"no known validation metric in the log: {r.name} is measured on the training prompts; "
            "name a validation metric with --performance if there is one"
        )
    points = pairs(log, h.values(log), r.values(log), align=align)
    if points.attrs["unpaired"]:
        notes.append(f"{points.attrs['unpaired']} evaluations have no entropy near them and were left out")
    if len(points) < MIN_POINTS:
        raise LogError(
            f"{path}: expected at least {MIN_POINTS} steps with both {h.name} and {r.name}, got {len(points)}"
        )
    values = points["entropy"], points["performance"]
    law = fit_entropy_law(*values, confidence=confidence, standard_errors=standard_errors)
    extrapolated = None
    if math.floor(fit_fraction * len(points) + 1e-9) >= MIN_POINTS:
        extrapolated = fit_entropy_law(
            *values, fit_fraction=fit_fraction, confidence=confidence, standard_errors=standard_errors
        )
    notes += _doubts(law, points)
    return LogFit(Path(path), h, r, points, law, extrapolated, fit_fraction, notes)


def save_plot(fit: LogFit, output: Path) -> None:
    """Write the figure of ``fit`` to ``output``; its suffix chooses the format.

    FileExistsError for a file that is there and is no earlier plot: these say in their metadata what made them. In a
    format that has none, no file is replaced.
    """
    if output.exists() and not (output.is_file() and _maker(output) == _MADE_BY):
        raise FileExistsError(
            f"output: expected a new file or an earlier plot, got {output}, which is something else or does not say "
            "what made it; name another file or remove it"
        )
    from entropy_kernels.analysis.plots import fit_figure

    figure = fit_figure(
        fit.points["entropy"],
        fit.points["performance"],
        fit.law,
        steps=fit.points["step"],
        extrapolated=fit.extrapolated,
        entropy_name=f"{_short(fit.entropy)} (nats)",
        performance_name=_short(fit.performance),
        title=f"Entropy law of {fit.path.name}",
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


def _maker(plot: Path) -> str | None:
    """The program that a file's metadata name, in the field that :func:`save_plot` writes; None if there is none."""
    data, kind = plot.read_bytes(), plot.suffix.lower()
    made_by = re.escape(_MADE_BY.encode())
    if kind in (".ps", ".eps"):
        head = data.partition(b"%%EndComments")[0]
        return _MADE_BY if re.search(rb"^%%Creator: " + made_by + rb"\r?$", head, re.MULTILINE) else None
    if kind == ".pdf":
        # of the dictionary of the document, as matplotlib writes it
        field = (
            rb"\nendobj\n\d+ 0 obj\n<<[^<>]*/Creator \(" + made_by + rb"\)[^<>]*/Producer \(Matplotlib [^<>]*>>\nend"
        )
        return _MADE_BY if data.startswith(b"%PDF") and re.search(field, data) else None
    try:
        if kind in (".svg", ".svgz"):
            root = ElementTree.fromstring(gzip.decompress(data) if kind == ".svgz" else data)
            return root.findtext("./{*}metadata/{*}RDF/{*}Work/{*}creator/{*}Agent/{*}title")
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            return image.info.get("Software") if kind == ".png" else image.getexif().get(_SOFTWARE)
    except Exception:  # a file that is not what its name says
        return None


def default_plot(path: Path) -> Path:
    """Beside the log: ``metrics.jsonl`` → ``metrics.entropy-law.png``; in a directory, ``entropy-law.png``."""
    return path / "entropy-law.png" if path.is_dir() else path.with_name(f"{path.stem}.entropy-law.png")


def print_report(fit: LogFit) -> None:
    """The law, what is left to gain, and the extrapolation, as tables on stdout."""
    law, points = fit.law, fit.points
    level = f"{law.confidence:.0%}"
    steps = points["step"].to_numpy()
    first, last = (float(points["performance"].iloc[i]) for i in (0, -1))
    low, high = law.ceiling_interval
    errors = "Newey–West" if law.standard_errors == "hac" else "OLS"
    print_table(
        f"Entropy law of {fit.path}",
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
            ("ceiling (H = 0)", f"{law.ceiling:.4g}, {level} interval [{low:.4g}, {high:.4g}]"),
            ("reached", _reached(law, first, last)),
        ],
    )  # fmt: skip
    print_table(f"Extrapolation from the first {fit.fit_fraction:.0%} of the points", _extrapolation_rows(fit))
    for note in fit.notes:
        print(f"note: {note}")


def as_dict(fit: LogFit) -> dict[str, Any]:
    """Everything in ``fit`` as plain numbers, strings and lists, for ``--json``; NaN as None."""
    last = float(fit.points["performance"].iloc[-1])
    return {
        "log": str(fit.path),
        "entropy": list(fit.entropy.columns),
        "performance": list(fit.performance.columns),
        "steps": [float(step) for step in fit.points["step"]],
        "law": _law_dict(fit.law),
        "last_performance": last,
        "fraction_of_ceiling": fit.law.fraction_of_ceiling(last) if fit.law.ceiling > 0 else None,
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


def _extrapolation_rows(fit: LogFit) -> list[tuple[str, str]]:
    if fit.extrapolated is None or fit.extrapolated.extrapolation is None:
        need = math.ceil(MIN_POINTS / len(fit.points) * 100)
        return [
            ("skipped", f"{fit.fit_fraction:.0%} of {len(fit.points)} points are fewer than {MIN_POINTS}: "
                        f"--fit-fraction {need / 100:g} or more would do"),
        ]  # fmt: skip
    law, error = fit.extrapolated, fit.extrapolated.extrapolation
    return [
        ("fitted on", f"{law.n} points, a = {law.a:.4g} ± {law.a_se:.2g}, b = {law.b:.4g} ± {law.b_se:.2g}"),
        ("error on the rest", f"RMSE {error.rmse:.4g}, mean absolute {error.mae:.4g} over {error.n} points"),
        ("final step", f"measured {error.final_measured:.4g}, predicted {error.final_predicted:.4g}, "
                       f"error {error.final_error:+.4g}"),
        ("straight line in H", f"RMSE {error.rmse_linear:.4g}, final error {error.final_error_linear:+.4g}"),
    ]  # fmt: skip


def _doubts(law: EntropyLaw, points: DataFrame) -> list[str]:
    """Reasons to read the fit with care."""
    doubts = []
    if law.a < 0:
        doubts.append("a is negative: performance falls as entropy falls, so R at H = 0 is no ceiling")
    if points["performance"].max() > 1:
        doubts.append("performance exceeds 1: taken as it is, and a, b, the ceiling and the errors are in its unit")
    if law.durbin_watson < 1 and law.standard_errors == "ols":
        doubts.append(
            f"the residuals are correlated (Durbin–Watson {law.durbin_watson:.2f}, 2 = independent): standard errors "
            "and intervals are too small; --standard-errors hac allows for it"
        )
    if points["performance"].iloc[-1] > law.ceiling_interval[1]:
        doubts.append("the last performance is above the ceiling's interval: the law does not describe this run's end")
    return doubts


def _short(metric: Quantity) -> str:
    return metric.name if len(metric.columns) == 1 else f"mean of {len(metric.columns)} metrics"
