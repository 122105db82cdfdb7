"""``entropy-kernels verify``: are our kernels right on this GPU? ``backend="auto"`` follows what it finds.

Each family of kernels (:mod:`.smoke_matrix`) runs in a process of its own, several at a time. One that dies, or hangs
in a call, is named, and the others go on. The verdict, by op and backend, is kept in the user's cache folder
(:mod:`.backends.verdict`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from entropy_kernels._console import print_table
from entropy_kernels.backends import registry, verdict
from entropy_kernels.backends.verdict import Pair, Verdict
from entropy_kernels.smoke_matrix import FAMILIES, Family

CALL_LIMIT = 25.0  # seconds without a word in which a call counts as hanging: compiling a Triton kernel takes a few
START_LIMIT = 60.0  # the same for a process that has not begun its first call: it imports torch
AT_ONCE = 8  # processes: each has its own context on the GPU, some 500 MB
PASSED, WRONG, RAISED, DIED, HUNG = "passed", "wrong", "raised", "died", "hung"
OUT_OF_TIME, NOT_RUN = "out of time", "not run"  # in a run that may take only so long
#: What CUDA says where the GPU is another's, or full: nothing of the kernels.
_OF_THE_MOMENT = ("out of memory", "busy or unavailable")
# `python -m` would find another entropy_kernels, if one lies in the working directory.
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from entropy_kernels.smoke_matrix import main; sys.exit(main())"
)


@dataclass
class Outcome:
    """Of one family's process: ``calls`` were right; ``detail`` says what happened in the first that was not."""

    family: Family
    state: str = NOT_RUN
    calls: int = 0
    detail: str = ""
    seconds: float = 0.0
    between: bool = False  # its process ended in no call, and after right ones

    @property
    def passed(self) -> bool:
        return self.state == PASSED

    @property
    def judged(self) -> bool:
        """Whether it says something of the kernels, and not of the time or of the memory that there was."""
        spoiled = any(words in self.detail for words in _OF_THE_MOMENT)
        return self.state not in (OUT_OF_TIME, NOT_RUN) and not (self.state == RAISED and spoiled)

    @property
    def doubtful(self) -> bool:
        """Whether a second run, with the GPU to itself, may pass: another context's memory, an end of the process."""
        return self.state == RAISED or (self.state == DIED and self.between)

    def __str__(self) -> str:
        told = self.detail or f"{self.calls} calls"
        return f"{self.state:11} {self.family.name:24} {self.seconds:5.1f} s  {told}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "state": self.state,
            "calls": self.calls,
            "detail": self.detail,
            "seconds": round(self.seconds, 2),
        }


def run_families(
    families: Sequence[Family],
    device: torch.device,
    *,
    ended: Callable[[Outcome], None] = lambda _: None,
    at_once: int = AT_ONCE,
    seconds: float | None = None,
    prefix: Sequence[str] = (),
    needed: str = "",
    variables: Mapping[str, str] | None = None,
    patience: float = 1.0,
) -> list[Outcome]:
    """Run families, each in a process of its own, and return what became of them, in their order.

    Args:
        ended: called with each outcome as it is known.
        at_once: processes at a time.
        seconds: for all of them; what has not ended by then is ended, what has not begun is "not run".
        prefix: a program that runs the process, such as compute-sanitizer with its options.
        needed: a regular expression that one of the prefix's lines has to match: it was there, and found nothing.
        variables: of the environment, beside this process's.
        patience: factor on the limits, for a prefix that makes calls slow.
    """
    end = None if seconds is None else time.monotonic() + seconds
    waiting = [_Process(Outcome(family), device, prefix, needed, variables or {}, patience) for family in families]
    every, running = list(waiting), list[_Process]()
    try:
        while waiting or running:
            late = end is not None and time.monotonic() > end
            while waiting and len(running) < at_once and not late:
                waiting[0].start()
                running.append(waiting.pop(0))
            for process in [process for process in running if process.ended(late)]:
                running.remove(process)
                ended(process.outcome)
            if late:
                for process in waiting:
                    process.outcome.detail = "no time left"
                    ended(process.outcome)
                waiting.clear()
            time.sleep(0.02)
    finally:  # also when interrupted
        for process in running:
            process.kill()
        for process in running:
            process.stop()
    return [process.outcome for process in every]


@dataclass
class _Process:
    """A family's process, its output, and when it was last heard of."""

    outcome: Outcome
    device: torch.device
    prefix: Sequence[str]
    needed: str
    variables: Mapping[str, str]
    patience: float
    _call: str = ""  # that was begun
    _words: list[str] = field(default_factory=list)  # its last lines that are no JSON
    _seen: bool = False  # a line that matches ``needed``
    _rest: str = ""

    def start(self) -> None:
        package = str(Path(__file__).resolve().parent.parent)
        command = [*self.prefix, sys.executable, "-c", _CHILD, package, self.outcome.family.name]
        # a launch that fails is then told by the call that made it; kernels are compiled, whatever this process does
        variables = {"CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "2", "TRITON_INTERPRET": "0"}
        variables |= {"ENTROPY_KERNELS_TRITON_TUNE": "0"}  # what serves unless somebody asks for more
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self._began = self._heard = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--device", str(self.device)],
            stdout=self._output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **variables, **self.variables},
        )  # fmt: skip
        self._position = 0

    def ended(self, late: bool) -> bool:
        """Whether it is over; ends it if it hangs, or if it is late."""
        code = self._process.poll()
        self._read()
        now = time.monotonic()
        limit = self.patience * (CALL_LIMIT if self._call or self.outcome.calls else START_LIMIT)
        hung = now - self._heard > limit
        if code is None and not hung and not late:
            return False
        outcome = self.outcome
        outcome.seconds = now - self._began
        outcome.between = not self._call and outcome.calls > 0
        at_rest = " after its calls" if outcome.between else " before its first call"
        where = f" in {self._call!r}" if self._call else at_rest
        if code is None:
            outcome.state = HUNG if hung else OUT_OF_TIME
            outcome.detail = f"nothing heard for {limit:.0f} s{where}" if hung else f"ended{where}"
        elif outcome.state == WRONG:
            pass
        elif code == 0 and outcome.calls and (not self.needed or self._seen):
            outcome.state = PASSED
        else:
            outcome.state = DIED if code < 0 else RAISED
            outcome.detail = f"{self._last_words(code)}{where}"
        self.stop()
        return True

    def _read(self) -> None:
        """What has come since the last time."""
        size = os.fstat(self._output.fileno()).st_size
        if size == self._position:
            return
        data = os.pread(self._output.fileno(), size - self._position, self._position)
        self._position, self._heard = size, time.monotonic()
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        for line in filter(str.strip, lines):
            self._heed(line)

    def _heed(self, line: str) -> None:
        try:
            told = json.loads(line) if line.startswith("{") else None
        except ValueError:
            told = None
        if not isinstance(told, dict):
            self._seen |= bool(self.needed and re.search(self.needed, line))
            self._words = [*self._words[-20:], line.strip()]
        elif "begin" in told:
            self._call = told["begin"]
            return
        elif told.get("wrong"):
            if self.outcome.state != WRONG:
                self.outcome.state, self.outcome.detail = WRONG, f"{told['call']}: {told['wrong']}"
        else:
            self.outcome.calls += 1
        if isinstance(told, dict):
            self._call = ""

    def _last_words(self, code: int) -> str:
        """The line that says most: of a sanitizer its summary, of Python the exception."""
        if code < 0:
            return ": ".join([f"signal {-code}, {signal.strsignal(-code)}", *self._words[-1:]])[:300]
        telling = [w for w in self._words if "SUMMARY: " in w or "Error" in w] or self._words
        return (telling[-1] if telling else f"exit code {code}")[:300]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it with all its processes. One that waits inside the driver may not go at once: it is not waited for."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._output.close()


def families_here(device: torch.device) -> list[Family]:
    """Those whose backend can run all their ops on a GPU."""
    return [
        family
        for family in FAMILIES.values()
        if all(registry.unavailable(op, family.backend, device) is None for op in family.ops)
    ]


def pairs_of(outcomes: Sequence[Outcome]) -> list[Pair]:
    """By op and backend: right calls of its families, and those that did not pass."""
    found: dict[tuple[str, str], Pair] = {}
    for outcome in outcomes:
        failed = {} if outcome.passed else {outcome.family.name: f"{outcome.state}, {outcome.detail}"}
        for op in outcome.family.ops:
            key = (op, outcome.family.backend)
            before = found.get(key, Pair(*key, 0, {}))
            found[key] = Pair(*key, before.calls + outcome.calls, {**before.failed, **failed})
    return list(found.values())


def verify(
    device: torch.device, *, seconds: float | None = None, ended: Callable[[Outcome], None] = lambda _: None,
    at_once: int = AT_ONCE,
) -> tuple[Verdict, str, list[Outcome]]:  # fmt: skip
    """Run the whole matrix on a GPU and keep the verdict.

    Families that raised, or died when their calls had been right, run once more, one at a time: several contexts may
    not have fitted the GPU. What was not judged, because there was no time or no memory, is not kept, so that it counts
    as not verified yet.

    Args:
        device: with its index.
        seconds, ended, at_once: as in :func:`run_families`; ``ended`` may hear of a family twice.

    Returns:
        The verdict, where it is kept or why it is not, and the outcomes.

    Raises:
        ValueError: there is no kernel to verify.
    """
    begin = time.monotonic()
    families = families_here(device)
    if not families:
        reasons = [
            f"{b}, {op}: {r}"
            for b in ("cuda", "triton")
            for op in registry.OPS
            if (r := registry.unavailable(op, b, device))
        ]
        raise ValueError(f"expected kernels to verify on {device}, got none: {'; '.join(reasons)}")
    outcomes = {o.family: o for o in run_families(families, device, ended=ended, at_once=at_once, seconds=seconds)}
    again = [family for family, outcome in outcomes.items() if outcome.doubtful]
    left = None if seconds is None else seconds - (time.monotonic() - begin)
    if again and (left is None or left > 0):
        outcomes |= {o.family: o for o in run_families(again, device, ended=ended, at_once=1, seconds=left)}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    unjudged = {(op, o.family.backend) for o in outcomes.values() if not o.judged for op in o.family.ops}
    pairs = pairs_of(list(outcomes.values()))
    found = Verdict(verdict.machine(device), date, pairs)
    kept = Verdict(found.machine, date, [pair for pair in pairs if (pair.op, pair.backend) not in unjudged])
    try:
        where = f"kept in {verdict.write(kept)}"
    except OSError as error:
        where = f"not kept, so that backend='auto' does not follow it: {error}"
    return found, where, list(outcomes.values())


def main(*, at_once: int = AT_ONCE, as_json: bool = False) -> int:
    """The command: verify each model of GPU that is here; 0, or 1 if a kernel is wrong, dies or hangs.

    Raises:
        ValueError: no GPU, or one without a kernel.
    """
    gpus = registry.gpus()
    if not gpus:
        raise ValueError("expected a GPU, on which the kernels are to run, got none that torch can use")
    end_when_told()
    code = 0
    documents: list[dict[str, Any]] = []
    for device in gpus:
        name = torch.cuda.get_device_properties(device).name
        count = len(families_here(device))
        begin = time.monotonic()
        done: set[str] = set()

        def show(outcome: Outcome, done: set[str] = done, count: int = count) -> None:
            done.add(outcome.family.name)
            print(f"[{len(done):2}/{count}] {outcome}", file=sys.stderr, flush=True)

        print(f"{device}, {name}: {count} families of kernels, {at_once} at a time", file=sys.stderr, flush=True)
        try:
            found, where, outcomes = verify(device, ended=show, at_once=at_once)
        except ValueError as error:
            if len(gpus) == 1:
                raise
            print(error, file=sys.stderr)
            code = 1
            continue
        code |= not all(outcome.passed for outcome in outcomes)
        documents.append({"gpu": name, "kept": where, "pairs": [vars(pair) for pair in found.pairs]})
        if not as_json:
            rows = [
                (pair.op, pair.backend, "OK" if pair.verified else "FAIL", _told(pair))
                for pair in sorted(found.pairs, key=lambda pair: pair.op)
            ]
            print_table(f"{name}, {time.monotonic() - begin:.0f} s", rows, ("op", "backend", "result", "what was seen"))
            print(f"{where}; backend='auto' takes what is OK (entropy-kernels doctor shows what it chooses)")
    if as_json:
        print(json.dumps(documents, indent=1))
    return code


def end_when_told() -> None:
    """By SIGTERM or a closed terminal as by Ctrl-C: the processes that were started are ended first."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def _told(pair: Pair) -> str:
    return "; ".join(f"{name}: {text}" for name, text in pair.failed.items()) or f"{pair.calls} calls right"
