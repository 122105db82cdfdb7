"""Tests on a GPU: which of them run, their log, and guards so that a hang or a lost device ends one test only."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GROUPS = ("cuda", "triton", "torch", "none")
SYNC_SECONDS = 20  # how long a device may take to answer after a test has failed


def _groups(text: str) -> list[str]:
    groups = text.split(",")
    if not set(groups) <= set(GROUPS):
        raise argparse.ArgumentTypeError(f"expected a list out of {','.join(GROUPS)}, got {text!r}")
    return groups


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("gpu", "tests marked gpu").addoption
    add("--gpu-backend", type=_groups, metavar="LIST", help=f"only tests marked gpu of these: {','.join(GROUPS)}")
    add("--gpu-log", type=Path, metavar="FILE", help="what was begun and how it ended, a JSON line each (overwritten)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write into the report what a test marked gpu is about; leave out those that --gpu-backend does not ask for."""
    wanted = config.getoption("--gpu-backend")
    kept, left_out = [], []
    for item in items:
        marks = list(item.iter_markers("gpu"))
        # the nearest one that names a backend: a parameter's goes before that of the module
        named = next((mark.kwargs for mark in marks if mark.kwargs), {})
        backend = named.get("backend", "")
        if marks:
            item.user_properties.append(("gpu_backend", backend))
            item.user_properties.append(("gpu_ops", ",".join(named.get("ops", ()))))
        (kept if wanted is None or (marks and (backend or "none") in wanted) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-log") and getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "100"  # xdist would stop after four crashes per worker
    config.pluginmanager.register(Guard(config), "gpu-guard-of-the-run")


def _subject(properties: list[tuple[str, object]]) -> dict[str, Any]:
    """What pytest_collection_modifyitems wrote."""
    known: dict[str, Any] = dict(properties)
    ops = known.get("gpu_ops")
    return {"backend": known.get("gpu_backend", ""), "ops": ops.split(",") if ops else []}


class Guard:
    """In every process of a run. The one that runs a test logs its begin; the controller logs its end, crash or not."""

    def __init__(self, config: pytest.Config) -> None:
        self.log: Path | None = config.getoption("--gpu-log")
        self.is_worker = hasattr(config, "workerinput")
        self.stderr = os.dup(2)  # the true one: pytest captures only while tests run
        self.collected = False
        self.started: dict[str, float] = {}
        self.reports: dict[str, list[pytest.TestReport]] = {}
        if self.log and not self.is_worker:
            self.log.write_text("")

    def write(self, event: str, **fields: Any) -> None:
        """One write per line, to the end of the file: processes do not mix theirs, and none is lost with its writer."""
        if self.log:
            with self.log.open("ab", buffering=0) as file:
                file.write(json.dumps({"event": event, **fields}).encode() + b"\n")

    def read(self, event: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    # ---- a test that hangs -------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """A signal's handler would wait until the call in C returns. A thread ends the process, if it gets the GIL."""
        if item.get_closest_marker("gpu") is None:
            return None
        import pytest_timeout

        faulthandler.dump_traceback_later(settings.timeout + 5, exit=True, file=self.stderr)  # needs no GIL
        return pytest_timeout.pytest_timeout_set_timer(item, settings._replace(method="thread"))

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> None:
        if item.get_closest_marker("gpu") is not None:
            faulthandler.cancel_dump_traceback_later()

    # ---- a device that is lost ---------------------------------------------------------------------------------------

    def check_device(self, test: str) -> None:
        """After a sticky error every later test of the process fails: leave, and xdist starts another process."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return
        faulthandler.dump_traceback_later(SYNC_SECONDS, exit=True, file=self.stderr)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            lost = str(error)[:600]
        else:
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.write("device_lost", test=test, error=lost)
        os.write(self.stderr, f"\ndevice lost in {test}: {lost}\n".encode())
        if self.is_worker:
            os._exit(1)
        self.end(test)
        pytest.exit(f"device lost in {test}: {lost}", returncode=1)

    # ---- the log -----------------------------------------------------------------------------------------------------

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.count(len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """With xdist the others run all the same: nothing else would tell that these tests did not."""
        if report.failed:
            self.write("collect_failed", file=report.nodeid, error=report.longreprtext[-600:])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.count(len(ids))

    def count(self, tests: int) -> None:
        if not self.is_worker and not self.collected:
            self.collected = True
            self.write("collected", tests=tests)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.write("begin", test=item.nodeid, **_subject(item.user_properties))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started[nodeid] = time.monotonic()

    @pytest.hookimpl(trylast=True)  # in a worker, xdist has sent the report
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when == "???":  # xdist's report of a crash, after which nothing comes
            self.end(report.nodeid)
        elif report.failed and not hasattr(report, "node") and "gpu_backend" in dict(report.user_properties):
            self.check_device(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.end(nodeid)

    def end(self, test: str) -> None:
        reports = self.reports.pop(test, [])
        if self.is_worker or not reports:
            return
        by_outcome = {report.outcome: report for report in reversed(reports)}  # the first of each
        outcome = next(name for name in ("failed", "skipped", "passed") if name in by_outcome)
        crash = getattr(by_outcome[outcome].longrepr, "reprcrash", None)
        error = crash.message if crash else by_outcome[outcome].longreprtext
        subject = _subject(reports[0].user_properties)
        if reports[0].when == "???":  # it names the test alone
            begun = next((entry for entry in self.read("begin") if entry["test"] == test), {})
            subject |= {name: begun[name] for name in subject if name in begun}
        self.write(
            "end", test=test, outcome=outcome, **subject,
            seconds=round(time.monotonic() - self.started.get(test, time.monotonic()), 3),
            error=error[:600] if outcome == "failed" else "",
        )  # fmt: skip

    @pytest.hookimpl(tryfirst=True)  # xdist waits here for workers, which may hang
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.is_worker:
            self.write("finish", exit=int(exitstatus))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        ended = {entry["test"] for entry in self.read("end")}
        for entry in self.read("device_lost"):
            terminalreporter.write_line(f"device lost in {entry['test']}: {entry['error']}", red=True)
        for entry in self.read("begin"):
            if entry["test"] not in ended:
                terminalreporter.write_line(f"begun and not ended: {entry['test']}", red=True)
