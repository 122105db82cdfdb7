"""The wheel: what is in it, and that one file serves another environment, Python and torch.

That environment has torch and numpy alone. It is of this Python, and of what ENTROPY_KERNELS_OTHER_PYTHON names,
where ``make test-wheel`` has put another torch.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import build_backend
import typed_user

ROOT = Path(build_backend.__file__).parent.parent
OTHER = os.environ.get("ENTROPY_KERNELS_OTHER_PYTHON", "")
BUILD = "import sys; sys.path.insert(0, 'tools'); import build_backend as b; b.build_{what}(sys.argv[1])"


def build(what: str, folder: Path, root: Path = ROOT, **switches: str) -> Path:
    """The file that the build backend leaves; one build at a time, as they share object files."""
    with (ROOT / "setup.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-c", BUILD.format(what=what), str(folder)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, **switches})
    assert done.returncode == 0, done.stdout + done.stderr
    return next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sources() -> set[str]:
    """What belongs into a wheel."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / "entropy_kernels").rglob("*.py")} | {
        "entropy_kernels/py.typed"
    }


@pytest.mark.slow
def test_contents_and_tag(wheel: Path) -> None:
    pure = build_backend.skip_reason()
    assert re.fullmatch(r".*-py3-none-any" if pure else r".*-cp310-abi3-\w+", wheel.stem)
    inside = {name for name in contents(wheel) if ".dist-info/" not in name}
    libraries = {"entropy_kernels/_ops.so", "entropy_kernels/_ops_cuda.so"}
    assert inside - libraries == sources()
    assert pure or "entropy_kernels/_ops.so" in inside


@pytest.mark.slow
def test_a_source_archive_is_whole(tmp_path: Path) -> None:
    """All that git tracks of the sources is in it, and a wheel can be built from it, here a pure one."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    archive = build("sdist", tmp_path / "sdist", ENTROPY_KERNELS_SKIP_CPP="1")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path)
    folder = next(path for path in tmp_path.iterdir() if path.name.startswith("entropy_kernels-"))
    wanted = [name for name in tracked if name.split("/")[0] in ("csrc", "entropy_kernels", "tools", "tests", "docs")]
    assert [name for name in wanted if not (folder / name).exists()] == []
    wheel = build("wheel", tmp_path / "wheel", folder, ENTROPY_KERNELS_SKIP_CPP="1")
    assert wheel.stem.endswith("-py3-none-any") and sources() <= contents(wheel)


def needs(*names: str) -> set[str]:
    """Distributions and what they require, as installed here."""
    found, wanted = set(), list(names)
    while wanted:
        name = re.sub("[-_.]+", "-", wanted.pop()).lower()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        if name not in found:
            found.add(name)
            wanted += [re.split(r"[^\w.-]", line)[0] for line in requires if "extra ==" not in line]
    return found


def torch_and_numpy_alone(folder: Path) -> Path:
    """A folder of packages with links to this environment's torch, numpy and what they need."""
    folder.mkdir()
    for name in needs("torch", "numpy"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


@pytest.fixture(scope="module", params=["this Python", "another Python"])
def python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment with the wheel, torch and numpy."""
    folder = tmp_path_factory.mktemp("environment")
    interpreter = sys.executable
    if request.param == "this Python":
        others = [torch_and_numpy_alone(folder / "packages")]
    elif not OTHER:
        pytest.skip("ENTROPY_KERNELS_OTHER_PYTHON names no other Python; make test-wheel does")
    else:
        interpreter = OTHER
        others = [Path(path) for path in run(OTHER, "-c", "import sys; print(*sys.path[1:], sep='\\n')").splitlines()]
    run(interpreter, "-m", "venv", "--without-pip", str(folder / "venv"))
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    found = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(found)]
    run(*pip, "install", "-q", "--no-index", "--no-deps", str(wheel))
    return found


def run(*command: str, code: int = 0) -> str:
    """Standard output of a program that sees no checkout; on a failure that is expected, its standard error."""
    hidden = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=hidden)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.slow
def test_it_runs_elsewhere(python: Path) -> None:
    """The console script, doctor on the C++ kernels, every public function."""
    script = str(python.with_name("entropy-kernels"))
    both = (
        f"import runpy, sys; runpy.run_path({typed_user.__file__!r}, run_name='__main__'); sys.argv[1:] = ['--version']"
    )
    ran, version = run(str(python), "-c", f"{both}; runpy.run_module('entropy_kernels', run_name='__main__')").split(
        "\n", 1
    )
    report = json.loads(run(script, "doctor", "--json"))
    where = report["versions"]
    assert where["python"].endswith(f"({python})") and f"torch {where['torch']}" in version
    states = {state["cpu"] for state in report["backends"].values()}
    if not build_backend.skip_reason():
        assert states == {"available"}
        assert "available:" in report["hardware"]["CPU capability, ours"]
    assert report["checks"] and all(check["ok"] for check in report["checks"])
    assert ran == "every public function runs"


ALL = {
    "analysis": ["scipy", "statsmodels", "pandas", "matplotlib", "tensorboard", "rich"],
    "train": ["matplotlib", "'transformers>=4.56'", "'tyro>=1.0'", "jinja2"],
}
HINTS = """
import sys, entropy_kernels as ek
from entropy_kernels import cli
for words in (["train", "--help"], ["train", "quickstart"], ["fit", sys.argv[1]], ["bench"], ["tune"], ["verify"]):
    assert cli.main(words) == 2, words
for call in (lambda: ek.fit_entropy_law([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), lambda: ek.entropy("no tensor")):
    try:
        call()
    except (ImportError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
if ek.backends()["token_stats"]["triton"].startswith("triton is not installed"):
    print(ek.backends()["token_stats"]["triton"], file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.slow
def test_one_line_says_all_that_is_missing(python: Path, tmp_path: Path) -> None:
    (tmp_path / "hints.py").write_text(HINTS)
    (tmp_path / "log.csv").write_text("step,entropy,reward\n0,0.5,0.1\n")
    lines = run(str(python), str(tmp_path / "hints.py"), str(tmp_path / "log.csv"), code=3).splitlines()
    train, quickstart, fit, bench, tune, verify, law, *others = lines
    for line, extra in ((train, "train"), (quickstart, "train"), (fit, "analysis"), (law, "analysis")):
        assert "is not installed: pip install " in line and "entropy_kernels[" not in line
        assert all(f" {name}" in line for name in ALL[extra]), line
    assert "run this in the root of a source checkout" in bench
    assert "GPU" in tune and "GPU" in verify
    assert others[0].startswith("TypeError: logits") and all("pip install 'triton>=3.6'" in line for line in others[1:])


def test_no_text_of_the_product_names_an_extra_as_an_index_would() -> None:
    """Anybody may register a name that no index holds."""
    texts = [*(ROOT / "entropy_kernels").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    texts += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    assert [str(path) for path in texts if re.search(r"entropy[_-]kernels\[", path.read_text())] == []
