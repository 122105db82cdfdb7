"""``python -m entropy_kernels.trainer [quickstart | reproduce | compare | from-config FILE] [flags]``.

One run is ppo.py; several, with their report, sweep.py.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entropy_kernels._require import require

USAGE = """usage: python -m entropy_kernels.trainer [flags]             one run; --help lists the flags
       python -m entropy_kernels.trainer quickstart [flags]  the methods and a control from one start, and a report
       python -m entropy_kernels.trainer reproduce [flags]   three seeds with the random-token controls, claims checked
       python -m entropy_kernels.trainer compare --config FILE [flags]  the methods and torch's own ops, any model
       python -m entropy_kernels.trainer from-config FILE [flags]  one run from the config.json of another
"""


class _Terminated(SystemExit):
    """Told apart from a verifier that calls exit()."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors of the configuration are one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        with _stopped_by_signals():
            return _main(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before


def _main(arguments: list[str]) -> int:
    from entropy_kernels.trainer.config import TrainerConfig

    command = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if command is None:
        if {"-h", "--help"} & set(arguments):
            print(USAGE)
        return _train(_parse(TrainerConfig, arguments))
    if command == "from-config":
        if len(arguments) < 2 or arguments[1].startswith("-"):
            raise ValueError("from-config: expected a FILE, then flags, got no file")
        config, flags = TrainerConfig.from_json(Path(arguments[1])), arguments[2:]
        return _train(_parse(TrainerConfig, flags, f" from-config {arguments[1]}", default=config) if flags else config)
    from entropy_kernels.trainer.sweep import SWEEPS, Flags, RunFailed, run_sweep

    if command not in SWEEPS:
        raise ValueError(f"command: expected {', '.join(SWEEPS)} or from-config, got {command!r}\n{USAGE}")
    sweep = SWEEPS[command]
    flags = _parse(Flags, arguments[1:], f" {command}", default=sweep.flags, description=sweep.about)
    try:
        return run_sweep(command, flags)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(config: Any) -> int:
    from entropy_kernels._progress import ProgressBoard
    from entropy_kernels.trainer.log import RunProgress
    from entropy_kernels.trainer.ppo import train

    with ProgressBoard(enabled=config.progress) as board:
        progress = RunProgress(board)
        out = train(config, report=progress)
    if config.progress:
        if progress.memory is not None:
            print(progress.memory)
        print(f"run: {out}")
    return 0


def _parse(kind: type, arguments: list[str], command: str = "", **options: Any) -> Any:
    tyro: Any = require("tyro", "the trainer's command line", "train")
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_method_options)
    prog = f"python -m entropy_kernels.trainer{command}"
    parsed = tyro.cli(kind, args=arguments, prog=prog, registry=registry, **options)
    for name, value in vars(parsed).items():
        if isinstance(value, Path):
            setattr(parsed, name, value.expanduser())  # a shell leaves the ~ of --out=~/runs as it is
    return parsed


def _method_options(field: Any) -> Any:
    """How tyro reads options of a method: OPTION=VALUE, the value as in JSON, or a word."""
    from tyro.constructors import PrimitiveConstructorSpec

    if field.type != dict[str, Any]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="OPTION=VALUE ...",
        instance_from_str=lambda words: dict(map(_option, words)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={json.dumps(x).strip(chr(34))}" for name, x in value.items()],
    )


def _option(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise ValueError(f"method_options: expected OPTION=VALUE, got {word!r}")
    if value in ("inf", "-inf"):
        return name, float(value)
    try:
        return name, json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError:
        return name, value


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM becomes an exception, so that the runs that a sweep has started are stopped with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def terminated(number: int, frame: Any) -> None:
        raise _Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
