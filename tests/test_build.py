"""The build backend takes the torch of the environment, asks for one only where pip would install it, or stops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
import torch

import build_backend as backend
from entropy_kernels._version import WINDOW, __version__

ROOT = Path(backend.__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
REQUIRES = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
EDITABLE = ["pybind11>=2.13"]  # for the primitives of the tests
BUILDS = ("build_wheel", "build_editable")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # setuptools runs setup.py of the working directory
    for switch in ("ENTROPY_KERNELS_SKIP_CPP", "PIP_BUILD_TRACKER"):
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # a compiler that is there
    for name in (*REQUIRES, *BUILDS):
        monkeypatch.setattr(backend.build_meta, name, lambda *_: ["theirs"])


def test_torch_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_BUILD_TRACKER", "folder")
    assert [getattr(backend, name)() for name in REQUIRES] == [["theirs"], ["theirs", *EDITABLE]]
    assert [getattr(backend, name)("dist") for name in BUILDS] == [["theirs"]] * 2


@pytest.mark.parametrize(("tracker", "more"), [("folder", ["torch>=2.11", "numpy"]), (None, [])])
def test_only_pip_is_asked_for_a_torch(monkeypatch: pytest.MonkeyPatch, tracker: str | None, more: list[str]) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    if tracker:
        monkeypatch.setenv("PIP_BUILD_TRACKER", tracker)
    assert [getattr(backend, name)() for name in REQUIRES] == [["theirs", *more], ["theirs", *EDITABLE, *more]]


@pytest.mark.parametrize("found", (None, "2.10.0+cu128"))
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_is_built_against_no_torch_or_an_old_one(
    monkeypatch: pytest.MonkeyPatch, name: str, found: str | None
) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: found is not None)
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: found)
    with pytest.raises(SystemExit, match=f"expected torch >= 2.11 where it is built, got {re.escape(found or 'none')}"):
        getattr(backend, name)("dist")


def test_a_source_archive_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    for name in ("get_requires_for_build_sdist", "build_sdist"):
        assert getattr(backend, name) is getattr(backend.build_meta, name)


@pytest.mark.parametrize(("name", "value"), [("ENTROPY_KERNELS_SKIP_CPP", "1"), ("CXX", "/no/compiler")])
def test_pure_python_needs_no_torch(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(backend, "torch_is_there", lambda: False)
    monkeypatch.setenv("PIP_BUILD_TRACKER", "folder")
    monkeypatch.setenv(name, value)
    assert backend.skip_reason() and not backend._torch()
    assert backend.build_wheel("dist") == ["theirs"]


@pytest.mark.parametrize("value", ["", "0", "false", "No", "off", " "])
def test_a_switch_that_is_off_builds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ENTROPY_KERNELS_SKIP_CPP", value)
    assert backend.skip_reason() is None
    monkeypatch.setenv("CXX", "   ")  # as if it were not set
    monkeypatch.setattr(backend.shutil, "which", lambda name: name)
    assert backend.skip_reason() is None


def test_versions_of_torch_are_compared() -> None:
    assert backend._numbers("2.11rc1") == backend._numbers("2.11.0+cpu") == (2, 11) > backend._numbers("2.9.1")


def test_the_docs_give_the_commands_of_the_error() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    commands = [line.strip() for line in backend.NO_TORCH.splitlines() if line.startswith("    ")]
    assert len(commands) == 3 and all(line in page for line in commands)


# What pip puts in front of the environment's packages, and takes them away with (pip/_internal/build_env.py).
SITECUSTOMIZE = "import sys, sysconfig; sys.path = [p for p in sys.path if p not in {hidden!r}]"


def build_environment(folder: Path, python: str, *hidden: Path) -> subprocess.CompletedProcess:
    """What the backend does in a front end's environment: setuptools in ``folder``, first on the path."""
    folder.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (folder / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(hidden=[str(path) for path in hidden]))
    code = (
        "import build_backend as b; print(b._finds_torch(), b._torch()); b.check_torch()\n"
        "import importlib.util as u; print(u.find_spec('torch').origin, u.find_spec('sympy').origin)"
    )
    paths = os.pathsep.join((str(folder), str(ROOT / "tools")))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONNOUSERSITE": "1", "PIP_BUILD_TRACKER": "folder"}
    return subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)


def test_torch_of_the_environment_that_pip_installs_into(tmp_path: Path) -> None:
    """Its own site-packages, or those that it sees through a .pth file (also: of the system, of the user)."""
    there = Path(torch.__file__).parent.parent
    venv.create(tmp_path / "linked")
    linked = tmp_path / "linked" / "bin" / "python"
    site = next((tmp_path / "linked").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(f"{there}\n")
    for i, python in enumerate((sys.executable, str(linked))):
        done = build_environment(tmp_path / str(i), python, there, site)
        assert done.stdout.startswith("False []\n"), done.stderr
        assert str(there / "torch") in done.stdout and str(there / "sympy") in done.stdout


def test_the_environment_of_another_front_end(tmp_path: Path) -> None:
    venv.create(tmp_path / "isolated")
    done = build_environment(tmp_path / "packages", str(tmp_path / "isolated" / "bin" / "python"))
    assert done.returncode == 1 and done.stdout == "False ['torch>=2.11', 'numpy']\n"
    assert f"got none ({tmp_path / 'isolated'})" in done.stderr and "--no-build-isolation" in done.stderr


# ---- the support window: entropy_kernels/_version.py says it, and these have to agree -------------------------------


PROJECT = (ROOT / "pyproject.toml").read_text()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def within(version: str, name: str) -> bool:
    oldest, newest = WINDOW[name]
    return numbers(oldest) <= numbers(version) <= numbers(newest)


def test_what_pip_and_the_build_ask_for_begins_with_the_window() -> None:
    assert f'requires-python = ">={WINDOW["python"][0]}"' in PROJECT
    assert f'dependencies = ["torch>={WINDOW["torch"][0]}", "numpy"]' in PROJECT
    assert f'triton = ["triton>={WINDOW["triton"][0]}"]' in PROJECT
    assert WINDOW["torch"][0] == backend.OLDEST_TORCH
    assert f'target-version = "py{WINDOW["python"][0].replace(".", "")}"' in PROJECT
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert (pythons[0], pythons[-1]) == WINDOW["python"] and all(within(python, "python") for python in pythons)
    assert f'"py_limited_api": "cp{WINDOW["python"][0].replace(".", "")}"' in (ROOT / "setup.py").read_text()


def test_constraints_lie_within_the_window() -> None:
    """And no pin is only for a newer Python: where it has a marker, the oldest gets what pip finds."""
    pins = re.findall(r"^([\w-]+)(\S+?)(; python_version >= \"3\.11\")?$", constraints(), re.MULTILINE)
    versions = {name: version for name, version, _ in pins}
    assert within(versions["torch"].removeprefix("=="), "torch")
    oldest, newest = re.fullmatch(r">=(.+),<(.+)", versions["triton"]).groups()  # type: ignore[union-attr]
    following = f"3.{numbers(WINDOW['triton'][1])[1] + 1}"
    assert (oldest, newest) == (WINDOW["triton"][0], following)
    assert "; " not in re.findall("^torch.*$", constraints(), re.MULTILINE)[0]


def constraints() -> str:
    return (ROOT / "constraints.txt").read_text()


def test_the_docs_name_the_window_and_what_an_extra_installs() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    for label, (oldest, newest) in zip(("Python", "torch", "Triton", "transformers"), WINDOW.values(), strict=True):
        assert f"| {label} | {oldest} to {newest} |" in page
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", page, re.MULTILINE))
    extras = re.search(r"\[project\.optional-dependencies\](.*?)\n\[", PROJECT, re.DOTALL)[1]  # type: ignore[index]
    listed = dict(re.findall(r"^(\w+) = \[(.*?)\](?:$| #)", extras, re.MULTILINE | re.DOTALL))
    documented = ["triton", "analysis", "train", "lora", "trackers", "smollm2", "math", "bench"]
    assert list(listed) == [*documented, "dev"] and set(rows) == set(listed)
    for name in documented:
        for requirement in re.findall(r'"([\w-]+)', listed[name]):
            assert requirement == "entropy_kernels" or requirement in rows[name], (name, requirement)


def test_the_workflow_runs_ci_on_both_ends_of_the_window() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == list(WINDOW["python"]) and job["timeout-minutes"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]


def test_the_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == __version__
    assert {"message", "title", "authors"} <= set(cited) and cited["license"] == "Apache-2.0"
    assert cited["references"][0]["identifiers"] == [{"type": "other", "value": "arXiv:2505.22617"}]
    assert re.search(rf"^## \[(Unreleased|{__version__})\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
