"""``python -m entropy_kernels.trainer [quickstart | reproduce | from-config FILE | report DIR | flags of one run]``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

USAGE = """usage: python -m entropy_kernels.trainer [flags]             one run; --help lists the flags
       python -m entropy_kernels.trainer quickstart [flags]  GRPO, Clip-Cov and KL-Cov from one start, and a report
       python -m entropy_kernels.trainer reproduce [flags]   three seeds with the random-token controls, and a verdict
       python -m entropy_kernels.trainer from-config FILE    one run from the config.json of another
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors of the configuration are one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
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
        if command == "from-config":
            if len(arguments) != 2:
                raise ValueError(f"from-config: expected one FILE, got {len(arguments) - 1} arguments")
            return _from_config(Path(arguments[1]))
        raise ValueError(f"command: expected quickstart, reproduce or from-config, got {command!r}\n{USAGE}")
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _one_run(arguments: list[str]) -> int:
    from entropy_kernels.trainer.config import TrainerConfig

    if {"-h", "--help"} & set(arguments):
        print(USAGE)
    return _train(_parse(TrainerConfig, arguments, None))


def _from_config(path: Path) -> int:
    from entropy_kernels.trainer.config import TrainerConfig

    if not path.exists():
        raise FileNotFoundError(f"from-config: expected a file, got {path}, which does not exist")
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("command", "versions"):
        values.pop(name, None)
    return _train(TrainerConfig.from_dict(values))


def _train(config: Any) -> int:
    from entropy_kernels.trainer.ppo import train
    from entropy_kernels.trainer.progress import ProgressBoard, describe_row

    with ProgressBoard(enabled=config.progress) as board:
        out = train(config, report=lambda phase, done, total, row: board.update(phase, done, total, describe_row(row)))
    if config.progress:
        print(f"run: {out}")
    return 0


def _parse(kind: type, arguments: list[str], command: str | None) -> Any:
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the trainer's command line needs tyro: pip install 'entropy_kernels[train]'") from error
    program = "python -m entropy_kernels.trainer" + (f" {command}" if command else "")
    return tyro.cli(kind, args=arguments, prog=program)


def _terminated(number: int, frame: Any) -> None:
    # as an exception, so that the runs a driver has started are stopped with it
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
