"""``entropy-kernels doctor | verify | tune | train | bench | fit``: arguments here, each command in a file of its own.

Read doctor.py and verify.py with the calls that both make, smoke_matrix.py, and what these are held against,
reference.py; then tune.py; trainer/__main__.py, benchmarks/run.py and analysis/report.py are the others.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_kernels._console import Parser, one_line, print_text, unless_closed
from entropy_kernels._require import missing
from entropy_kernels._version import __version__

_BEGIN = """Fused log-prob, entropy and covariance kernels for RL on language models.
Type one of

  {prog} doctor
      is everything right here, and what is used?
  {prog} train quickstart
      a picture of entropy collapse and what holds it
  {prog} fit LOG
      the entropy law in the log of a run of yours

or another command below; each explains itself with --help."""
_TRAIN_COMMANDS = ("quickstart", "reproduce", "compare", "from-config")

# Commands whose options belong to another program: command -> (module, extra with its dependencies).
_DISPATCH = {"train": ("entropy_kernels.trainer.__main__", "train"), "bench": ("benchmarks.run", "analysis")}


def main(argv: list[str] | None = None, prog: str = "entropy-kernels") -> int:
    """Entry point of the ``entropy-kernels`` command; returns the exit code: 0, 1 (a check failed) or 2 (usage)."""
    given = sys.argv[1:] if argv is None else argv
    try:
        if given and given[0] in _DISPATCH:
            return unless_closed(lambda: _dispatch(given[0], given[1:], prog))
        return unless_closed(lambda: _run(_parser(prog).parse_args(given), prog))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace, prog: str) -> int:
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        # Expected failures (a wrong path, a column that is not there) are one line; a bug keeps its traceback.
        print_text(f"{prog} {arguments.command}: error: {one_line(error)}", sys.stderr)
        return 2


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=_BEGIN.format(prog=prog),
        usage="%(prog)s COMMAND [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.elsewhere = {name: f"train {name}" for name in _TRAIN_COMMANDS}
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands", prog=prog)

    doctor = commands.add_parser(
        "doctor",
        help="versions, CPU and GPU, available backends and why others are not, a self-check of a few seconds",
        description="Print versions, hardware, the backends of each op with the reason where one is not available, "
        "what backend='auto' chooses, and compare each available backend with float64 on small random data. "
        "Exit code 1 if a check fails.",
    )
    doctor.add_argument("--no-check", action="store_true", help="only print, do not run the self-check")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser(
        "verify",
        help="check every kernel on this machine's GPU; backend='auto' then takes those that are right",
        description="Run small calls of every kernel on each model of GPU here, compare the results with their "
        "definitions in float64, and keep the verdict in the user's cache folder, where backend='auto' finds it. Each "
        "family of kernels has a process of its own, so that one that dies or hangs is named and the others go on. "
        "Exit code 1 if one is wrong, 2 without a GPU.",
    )
    verify.add_argument(
        "--at-once", type=int, default=8, metavar="N", help="processes at a time (default: %(default)s)"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    verify.set_defaults(run=_verify)

    _add_tune(commands)

    for name, text in (
        ("train", "train a small language model under GRPO, Clip-Cov, KL-Cov and others, and report on them"),
        ("bench", "measure ours and others' implementations (in a clone)"),
    ):
        commands.add_parser(name, help=text, add_help=False)

    _add_fit(commands)
    return parser


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="time the tilings of the Triton kernels on this machine's GPU, and keep the fastest",
        description="Time the few ways in which each Triton kernel can cut its work, for the shapes given, on each "
        "model of GPU here, on tensors of its own: logits and gradient of --rows by --vocab have to fit the free "
        "memory. The fastest is kept in the user's cache folder, where calls with ENTROPY_KERNELS_TRITON_TUNE=1 find "
        "it; all processes of a run have to read the same file, as two tilings differ by rounding. "
        "Exit code 1 if something could not be measured, 2 without a GPU.",
        epilog="Sizes stand for a class: up to the next power of two, 8192 and more rows all the same.",
    )
    sizes: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    tune.add_argument("--vocab", **sizes, default=[151_936], help="sizes of the vocabulary (default: %(default)s)")
    tune.add_argument("--rows", **sizes, default=[8192], help="tokens per call (default: %(default)s)")
    tune.add_argument(
        "--dtype",
        nargs="+",
        choices=("bfloat16", "float16", "float32"),
        default=["bfloat16"],
        help="of the logits or hidden states (default: bfloat16)",
    )
    tune.add_argument(
        "--hidden", **sizes, default=[], help="widths of hidden states: the kernel from hidden states, too"
    )
    tune.add_argument("--second-order", action="store_true", help="collision and vocabulary covariance, too")
    tune.add_argument("--softcap", action="store_true", help="logits with a softcap")
    tune.set_defaults(run=_tune)


def _add_fit(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit the entropy law R = -a·e^H + b to trainers' logs",
        description="Fit the entropy law R = -a·e^H + b (arXiv 2505.22617) to the runs in logs: print a and b with "
        "standard errors, R², RMSE, the ceiling R(H=0) with its interval and the share of it that is reached, the "
        "straight line in H beside it, and how well the first part of the run predicts the rest; say where the law "
        "means less; save a plot. Several runs are fitted apart, into one table and one plot.",
        epilog="Names of metrics that verl, TRL, SkyRL, OpenRLHF, slime, NeMo-RL, prime-rl, ms-swift, AReaL, "
        "torchtitan and this package's trainer write are found by themselves: docs/entropy-law.md lists them.",
    )
    fit.add_argument(
        "log",
        type=Path,
        nargs="+",
        metavar="LOG",
        help="CSV (also W&B exports, one metric per file), JSON lines (also verl's file logger), trainer_state.json, "
        "console output of verl, TRL, slime or prime-rl, a TensorBoard event file, or a folder with some of these, of "
        "an MLflow run, of TRL's checkpoints, or of several runs; - reads text from stdin",
    )
    # "run" is what every command calls
    fit.add_argument(
        "--run", dest="chosen", metavar="NAME", help="only this run, or those of a pattern with * (default: all, apart)"
    )
    fit.add_argument(
        "--entropy", metavar="NAME", help="entropy column (nats per token), or a pattern with * to average within a run"
    )
    fit.add_argument("--performance", metavar="NAME", help="performance column, or a pattern with * to average")
    fit.add_argument(
        "--fit-fraction",
        type=_share,
        default=0.15,
        metavar="X",
        help="share of the points, from the start, that the extrapolation is fitted on; never fewer than 3 points "
        "(default: %(default)s)",
    )
    fit.add_argument(
        "--align",
        choices=("last", "mean"),
        default="last",
        help="pair an evaluation with the latest entropy, or with the mean of those since the evaluation before it "
        "(default: %(default)s)",
    )
    fit.add_argument(
        "--confidence", type=_share, default=0.95, metavar="X", help="level of the intervals (default: %(default)s)"
    )
    fit.add_argument(
        "--standard-errors",
        choices=("ols", "hac"),
        default="ols",
        help="ols: independent residuals; hac: Newey-West, allows for serial correlation (default: %(default)s)",
    )
    fit.add_argument("--output", type=Path, metavar="PLOT", help="where the plot goes (default: beside the log)")
    fit.add_argument("--no-plot", action="store_true", help="do not save a plot")
    fit.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    fit.set_defaults(run=_fit)


def _share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        hint = f"; for {word} % type {value / 100:g}" if 1 < value < 100 else ""
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {word}{hint}")
    return value


def _fit(arguments: argparse.Namespace) -> int:
    from entropy_kernels._arguments import keywords
    from entropy_kernels._progress import ProgressBoard
    from entropy_kernels.analysis import report

    logs, values = arguments.log, {**vars(arguments), "run": arguments.chosen}
    options = {name: values[name] for name in keywords(report.fit_logs)}
    plot = None if arguments.no_plot else arguments.output or report.default_plot(logs)
    if plot is not None:
        plot = report.plot_path(plot)  # before a long read
    reading = f"reading {logs[0].name}" + (f" and {len(logs) - 1} more" if len(logs) > 1 else "")
    with ProgressBoard(enabled=sys.stderr.isatty(), file=sys.stderr, brief=True) as board:
        fits = report.fit_logs(
            logs, lambda done, total: board.update(reading, done >> 20, total >> 20, "MB"), **options
        )
    if plot is not None:
        report.save_plot(fits, plot)
    if arguments.json:
        print(json.dumps({**report.as_dict(fits), "plot": None if plot is None else str(plot)}, indent=2))
        return 0
    report.print_report(fits)
    if plot is not None:
        print(f"plot: {plot}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from entropy_kernels import doctor

    return doctor.run(check=not arguments.no_check, as_json=arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    from entropy_kernels import verify

    if arguments.at_once < 1:
        raise ValueError(f"argument --at-once: expected 1 or more, got {arguments.at_once}")
    return verify.main(at_once=arguments.at_once, as_json=arguments.json)


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    from entropy_kernels import tune

    kinds = itertools.product(
        [getattr(torch, name) for name in arguments.dtype],
        arguments.vocab,
        arguments.rows,
        (0, *arguments.hidden),
        sorted({False, arguments.second_order}),
        [arguments.softcap],
    )
    return tune.main([tune.Case(*kind) for kind in kinds])


def _version() -> str:
    """Of the package, and of what its answers depend on."""
    import torch

    return f"entropy_kernels {__version__} (torch {torch.__version__}, Python {platform.python_version()})"


def _dispatch(command: str, argv: list[str], prog: str) -> int:
    """Hand ``argv`` to the program behind ``command``, or say in one line why it is not there."""
    module, extra = _DISPATCH[command]
    if command == "bench":
        # The console script's path holds its own directory, not the working directory as that of `python -m` does.
        sys.path.insert(0, str(Path.cwd()))
    try:
        entry: Callable[[list[str], str], int | None] = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            reason = f"{module} is not part of the installed package"
            if command == "bench":
                reason += ": run this in the root of a source checkout"
        else:
            reason = str(missing(error.name or module, command, extra))
        print(f"{prog} {command}: error: {reason}", file=sys.stderr)
        return 2
    return entry(argv, f"{prog} {command}") or 0


if __name__ == "__main__":
    sys.exit(main(prog="python -m entropy_kernels.cli"))
