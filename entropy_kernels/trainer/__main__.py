"""``python -m entropy_kernels.trainer [quickstart | reproduce | compare | from-config FILE | replay FILE] [flags]``.

One run is ppo.py; several, with their report, sweep.py; what is typed, flags.py.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_kernels._console import Call, did_you_mean, print_text, unless_closed
from entropy_kernels._require import missing
from entropy_kernels.trainer.flags import as_typed, parse
from entropy_kernels.trainer.signals import Terminated, stopped_at_once

if TYPE_CHECKING:
    from entropy_kernels.trainer.config import TrainerConfig

PROG = "python -m entropy_kernels.trainer"
USAGE = """Type one of
  {prog} quickstart
      the methods and a control from one start, and a report: begin here
  {prog} reproduce
      three seeds with the random-token controls, and the claims checked
  {prog} compare --config FILE
      the methods on any model and task, and once by torch's own operations
  {prog} --method {method} --out runs/mine
      one run, with any of the flags below; without flags GRPO in runs/single
  {prog} from-config FILE [flags]
      one run from the config.json of another (or from its folder), with changes
  {prog} replay FILE [flags]
      an update whose loss or gradient was not finite, once more from its batch

The first three have flags of their own: quickstart --help.

Ctrl-C stops any of them at once, SIGTERM a run after its step.

They say what is kept and what goes on from there."""


_REPLAY = """An update, or a rollout, that was not finite, from the file that its run kept. The exit code is 1 if it is
not finite again."""


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Entry point; returns the exit code. Errors of the configuration are one line on stderr, not a traceback."""
    call = Call(prog, sys.argv[1:] if argv is None else list(argv))
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        with stopped_at_once():
            return _main(call)
    except BrokenPipeError:  # `| head` closed it, which is told by who calls
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before


def _main(call: Call) -> int:
    from entropy_kernels.trainer.config import TrainerConfig
    from entropy_kernels.trainer.methods import PAPER

    words = list(call.words[1:] if call.words[:1] == ["train"] else call.words)  # as after `entropy-kernels`
    command = words[0] if words and not words[0].startswith("-") else None
    about = USAGE.format(prog=call.prog, method=PAPER[1])
    if importlib.util.find_spec("transformers") is None:
        about += f"\n\n{missing('transformers', 'training', 'train')}"
    if command is None:
        return _one_run(call, TrainerConfig(), words, call.prog, about)
    from entropy_kernels.trainer.sweep import SWEEPS

    if command == "from-config":
        if words[1:2] in (["--help"], ["-h"]):
            return _one_run(call, TrainerConfig(), words[1:], f"{call.prog} from-config FILE", about)
        if len(words) < 2 or words[1].startswith("-"):
            raise ValueError(f"from-config: expected a FILE, then flags, got {' '.join(words[1:]) or 'no file'}")
        try:
            config = TrainerConfig.from_json(Path(words[1]).expanduser())
        except (ValueError, OSError) as error:
            raise ValueError(f"from-{error}" if str(error).startswith("config: ") else str(error)) from error
        return _one_run(call, config, words[2:], f"{call.prog} from-config {words[1]}", about)
    if command == "replay":
        return _replay(call, words[1:])
    if command not in SWEEPS:
        known = (*SWEEPS, "from-config", "replay")
        raise ValueError(
            f"expected a command ({', '.join(known)}) or flags, got {command}{did_you_mean(command, known)} "
            f"({call.prog} --help explains)"
        )
    return _sweep(call, command, words[1:])


def _one_run(call: Call, default: TrainerConfig, words: list[str], prog: str, about: str) -> int:
    from entropy_kernels._progress import ProgressBoard
    from entropy_kernels.trainer.checks import idle
    from entropy_kernels.trainer.log import RunProgress, announced
    from entropy_kernels.trainer.ppo import prepared, train

    config, typed = parse(default, words, prog, about)
    with _errors_as_typed(typed):
        config.validate()
        for name, reason in idle(config).items():
            if name in typed:
                raise ValueError(f"{name}: does nothing {reason}; leave it out, or change that")
            if config.progress:  # a run that a sweep starts has what all of its runs have in common
                warnings.warn(f"{name} = {getattr(config, name)} does nothing {reason}", stacklevel=1)
        if config.data is not None and "task" in typed:
            raise ValueError(f"task: expected none beside data, got {config.task}; leave one of the two out")
        config, task = prepared(config)
        progress = RunProgress(ProgressBoard(enabled=config.progress), announced(config, task.remark))
        try:
            with progress.board:
                out = train(config, task=task, report=progress)
        except (KeyboardInterrupt, Terminated) as stop:
            print_text(_stopped(config, call, trained=progress.trained), sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    if config.progress:
        if progress.memory is not None:
            print(f"{progress.memory} --head chooses; results agree up to rounding.")
        print(f"run: {out}")
    else:  # nothing has been shown
        print(f"run: {out}  {progress.told}".rstrip())
    return 0


def _replay(call: Call, words: list[str]) -> int:
    from entropy_kernels.trainer.checkpoint import NONFINITE
    from entropy_kernels.trainer.replay import Flags, replay

    if words[:1] not in (["--help"], ["-h"]) and (not words or words[0].startswith("-")):
        raise ValueError(f"replay: expected a FILE ({NONFINITE}), then flags, got {' '.join(words) or 'no file'}")
    flags, typed = parse(Flags(), words if words[0].startswith("-") else words[1:], f"{call.prog} replay FILE", _REPLAY)
    line = ""
    with _errors_as_typed(typed):
        for line in replay(Path(words[0]).expanduser(), flags):
            print(line)
    return 0 if line.startswith("finite") else 1


def _stopped(config: TrainerConfig, call: Call, *, trained: bool) -> str:
    """What is kept of a run that was stopped, and the call that goes on."""
    from entropy_kernels.trainer.checkpoint import CHECKPOINT

    ours = trained or not config.overwrite  # else what is there may be the run that was to be replaced
    if ours and (config.out / CHECKPOINT).exists():
        kept = f"kept in {config.out}: the log and the last checkpoint. To go on from there"
        return f"stopped; {kept}:\n  {call.again('--resume', instead_of=('--overwrite', '--no-resume'))}"
    if ours and (config.out / "metrics.jsonl").exists():
        kept = f"kept in {config.out}: the log alone, as there was no checkpoint yet. To begin anew"
        return f"stopped; {kept}:\n  {call.again('--overwrite', instead_of=('--no-overwrite',))}"
    return f"stopped before the first step, and nothing is kept. To begin again:\n  {call.again()}"


def _sweep(call: Call, name: str, words: list[str]) -> int:
    from entropy_kernels.trainer.sweep import SWEEPS, RunFailed, complete, planned, run_sweep

    about = textwrap.indent(textwrap.fill(SWEEPS[name].about, 76), "  ")  # tyro joins lines that begin with a letter
    flags, typed = parse(SWEEPS[name].flags, words, f"{call.prog} {name}", about)
    goes_on = f"To go on, with what is complete as it is:\n  {call.again('--reuse', instead_of=('--no-reuse',))}"
    with _errors_as_typed(typed):
        plan = planned(name, flags)
        try:
            return run_sweep(plan)
        except RunFailed as error:
            print_text(f"{call.prog} {name}: error: {error}\n{complete(plan)}. {goes_on}", sys.stderr)
            return 2
        except (KeyboardInterrupt, Terminated) as stop:
            print_text(f"stopped; {complete(plan)}. {goes_on}", sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)


@contextmanager
def _errors_as_typed(typed: set[str]) -> Iterator[None]:
    """Errors name the flags that the user typed; what a file says keeps its name."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(as_typed(str(error), typed)) from error


if __name__ == "__main__":
    sys.exit(unless_closed(main))
