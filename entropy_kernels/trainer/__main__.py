"""``python -m entropy_kernels.trainer [quickstart | reproduce | compare | from-config FILE] [flags]``."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USAGE = """usage: python -m entropy_kernels.trainer [flags]             one run; --help lists the flags
       python -m entropy_kernels.trainer quickstart [flags]  GRPO, Clip-Cov and KL-Cov from one start, and a report
       python -m entropy_kernels.trainer reproduce [flags]   three seeds with the random-token controls, and a verdict
       python -m entropy_kernels.trainer compare --config FILE [flags]  the methods and torch's own ops, any model
       python -m entropy_kernels.trainer from-config FILE [flags]  one run from the config.json of another
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors of the configuration are one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        with _stopped_by_signals():
            return _main(arguments)
    finally:
        warnings.formatwarning = before


def _main(arguments: list[str]) -> int:
    command = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        if command is None:
            return _one_run(arguments)
        if command == "quickstart":
            from entropy_kernels.trainer import quickstart

            quickstart.run(_parse(quickstart.Quickstart, arguments[1:], "quickstart"))
            return 0
        if command == "reproduce":
            from entropy_kernels.trainer import reproduce

            return reproduce.run(_parse(reproduce.Reproduce, arguments[1:], "reproduce"))
        if command == "compare":
            from entropy_kernels.trainer import compare

            compare.run(_parse(compare.Compare, arguments[1:], "compare"))
            return 0
        if command == "from-config":
            if len(arguments) < 2 or arguments[1].startswith("-"):
                raise ValueError("from-config: expected a FILE, then flags, got no file")
            return _from_config(Path(arguments[1]), arguments[2:])
        raise ValueError(f"command: expected quickstart, reproduce, compare or from-config, got {command!r}\n{USAGE}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from entropy_kernels.trainer.drivers import RunFailed

        if not isinstance(error, RunFailed):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _one_run(arguments: list[str]) -> int:
    from entropy_kernels.trainer.config import TrainerConfig

    if {"-h", "--help"} & set(arguments):
        print(USAGE)
    return _train(_parse(TrainerConfig, arguments, None))


def _from_config(path: Path, flags: list[str]) -> int:
    from entropy_kernels.trainer.config import TrainerConfig

    config = TrainerConfig.from_json(path)
    return _train(_parse(TrainerConfig, flags, f"from-config {path}", default=config) if flags else config)


def _train(config: Any) -> int:
    from entropy_kernels.trainer.ppo import train
    from entropy_kernels.trainer.progress import ProgressBoard, describe_memory, describe_row

    with ProgressBoard(enabled=config.progress) as board:

        def report(phase: str, done: int, total: int, row: dict[str, Any]) -> None:
            board.update(phase, done, total, describe_row(row))
            memory = describe_memory(row)
            if memory is not None:
                board.say(memory)

        out = train(config, report=report)
    if config.progress:
        print(f"run: {out}")
    return 0


def _parse(kind: type, arguments: list[str], command: str | None, **options: Any) -> Any:
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the trainer's command line needs tyro: pip install 'entropy_kernels[train]'") from error
    program = "python -m entropy_kernels.trainer" + (f" {command}" if command else "")
    parsed = tyro.cli(kind, args=arguments, prog=program, **options)
    for name, value in vars(parsed).items():
        if isinstance(value, Path):
            setattr(parsed, name, value.expanduser())  # a shell leaves the ~ of --out=~/runs as it is
    return parsed


class _Terminated(SystemExit):
    """Told apart from a verifier that calls exit()."""


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM becomes an exception, so that the runs a driver has started are stopped with it."""
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
