"""What a user's type checker sees: the package is typed (py.typed), and every public name passes under --strict."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import entropy_kernels as ek
import typed_user

ROOT = Path(ek.__file__).parents[1]
FILE = Path(typed_user.__file__)
#: What public names speak of; the rest of torch, and others, take longer to read than all else, and are skipped.
READ = [f"torch{name}" for name in (
    "", "._C.*", "._tensor", ".autograd.*", ".nn", ".nn.modules", ".nn.modules.module", ".nn.parameter", ".types",
)]  # fmt: skip
SKIPPED = [f"{name}.*" for name in ("torch", "matplotlib", "pandas", "PIL", "sympy")]


def test_the_users_file_calls_every_public_name() -> None:
    tree = ast.parse(FILE.read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = [f"ek.{name}" for name in ek.__all__] + [f"ek.hf.{name}" for name in ek.hf.__all__]
    assert [name for name in names if name not in used] == []


def test_the_users_file_runs() -> None:
    typed_user.main()
    typed_user.law([0.9, 0.7, 0.5, 0.4, 0.3, 0.25], [0.1, 0.2, 0.31, 0.38, 0.42, 0.46])


def test_the_users_file_with_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    logprob = typed_user.hugging_face(transformers.LlamaForCausalLM(config), torch.randint(50, (2, 5)))
    assert logprob.shape == (2, 5)


@pytest.mark.slow
def test_mypy_strict_as_a_user_runs_it(tmp_path: Path) -> None:
    """Against the package in an environment's packages, where a checker reads it because of py.typed."""
    pytest.importorskip("mypy", reason="mypy comes with the extra dev")
    venv.create(tmp_path / "environment")
    site = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(f"{ROOT}\n{Path(torch.__file__).parents[1]}\n")
    file = tmp_path / "user.py"
    wrong = "\n\ndef wrong() -> str:\n    return ek.PolicyLossModule()(*[torch.zeros(1)] * 4).loss\n"
    file.write_text(FILE.read_text() + wrong)
    parts = (
        f"[mypy-{','.join(names)}]\nfollow_imports = {how}\n" for names, how in ((SKIPPED, "skip"), (READ, "normal"))
    )
    (tmp_path / "mypy.ini").write_text("[mypy]\n" + "".join(parts))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(site.parents[2] / "bin" / "python"),
         "--cache-dir", str(tmp_path / "cache"), str(file)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1 and 'got "Tensor", expected "str"' in errors[0], done.stdout + done.stderr
