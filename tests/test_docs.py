"""README and docs: every block of the README works when pasted, links lead somewhere, lines can be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
WRITTEN = [path for path in PAGES if path.name != "api.md"]  # that one is made from docstrings
WIDTH = 120


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# --- what is pasted ---------------------------------------------------------------------------------------------------


def test_python_works_when_pasted(tmp_path: Path) -> None:
    """Each page from top to bottom, with names of its own, in a fresh process and an empty folder."""
    code = ""
    for name in ("README.md", "docs/layers.md"):
        pasted = "\n".join(blocks((ROOT / name).read_text(), "python"))
        assert "import entropy_kernels as ek" in pasted
        code += f"exec(compile({pasted!r}, {name!r}, 'exec'), {{'__name__': '__main__'}})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def sides(diff: str) -> tuple[str, str]:
    """What stands before and after the change."""
    lines = diff.splitlines()
    return tuple("\n".join(line[1:] for line in lines if not line.startswith(sign)) for sign in "+-")  # type: ignore[return-value]


def test_before_and_after_of_a_change_give_the_same() -> None:
    """Those of the trainers are run by tests of the trainers."""
    transformers = pytest.importorskip("transformers")
    *_, loop = blocks((ROOT / "README.md").read_text(), "diff")
    (model,) = blocks((ROOT / "docs/linear.md").read_text(), "diff")
    torch.manual_seed(0)
    logits, actions = torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    names: dict[str, Any] = {"ek": ek, "torch": torch, "actions": actions, "advantages": torch.randn(4, 1)}
    names |= {"mask": torch.rand(4, 6) > 0.3, "old_logprob": -4 - torch.rand(4, 6)}
    found = []
    for side in sides(loop):
        here = {**names, "logits": logits.clone().requires_grad_()}
        exec(side, here)
        found.append([here[name] for name in ("logprob", "entropy", "loss")] + [here["logits"].grad])
    torch.testing.assert_close(*found)

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    names = {"ek": ek, "model": transformers.LlamaForCausalLM(config).eval(), "input_ids": torch.randint(50, (3, 9))}
    names["attention_mask"] = torch.ones_like(names["input_ids"])
    found = []
    for side in sides(model):
        here = dict(names)
        exec(side, here)
        found.append([here["logprob"], here["entropy"]])
    torch.testing.assert_close(*found)


def test_commands_of_readme_and_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shell line is known; what needs neither minutes nor an index is run; make only says what it would do.

    Ours in this process: test_cli.py starts the program.
    """
    lines = [
        line.partition("    #")[0].strip()
        for name in ("README.md", "docs/layers.md")
        for block in blocks((ROOT / name).read_text(), "bash")
        for line in block.splitlines()
    ]
    assert {"make train", "make test", "pip install ."} <= set(lines), "what a fresh machine needs"
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # plots go to the working folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in lines:
        program, *rest = line.split()
        if program == "make":
            done = subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        elif program == "entropy-kernels":
            assert cli.main(rest) == 0, f"{line}: {capsys.readouterr()}"
        else:
            told = f"{line}: a test has to run it, as one of tests/test_wheel.py does pip's"
            assert line in ("pip install .", "cd .."), told
    assert (tmp_path / "law.png").exists()


def tokens(vocabulary: int) -> SimpleNamespace:
    """What the blocks of the pages take for granted of a batch: two sequences of eight tokens."""
    logprob = -2 * torch.rand(2, 8)
    hidden, target = torch.randn(2, 8, 16, requires_grad=True), torch.randint(vocabulary, (2, 8))
    return SimpleNamespace(
        logprob=logprob.clone().requires_grad_(), old_logprob=logprob, advantages=torch.randn(2, 1), hidden=hidden,
        target=target, mask=torch.ones(2, 8, dtype=torch.bool),
    )  # fmt: skip


def test_python_of_the_pages_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/control.md has a test of its own, README and layers.md are pasted above."""
    transformers = pytest.importorskip("transformers")
    from torch.distributed import fsdp

    from entropy_kernels.trainer import methods

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    ids, micro_batches, entropy = torch.randint(50, (2, 8)), [tokens(50), tokens(50)], torch.linspace(0.2, 0.9, 20)
    batch = tokens(50)
    shared: dict[str, Any] = {
        "ek": ek, "torch": torch, **vars(batch), "step": 3, "log": lambda metrics: None, "n": 3, "model": model,
        "weight": torch.randn(50, 16, requires_grad=True), "micro_batches": micro_batches, "micros": micro_batches,
        "backbone": lambda micro: micro.hidden, "input_ids": ids, "packed_ids": torch.randint(50, (1, 40)),
        "LlamaForCausalLM": transformers.LlamaForCausalLM, "policy": model, "fully_shard": lambda module: module,
        "register_fsdp_forward_method": fsdp.register_fsdp_forward_method, "log_prob": batch.logprob,
        "old_log_prob": batch.old_logprob, "response_mask": batch.mask, "rollout_is_weights": torch.rand(2, 8),
        "global_batch_info": {"dp_size": 1, "batch_num_tokens": 16, "global_batch_size": 2},
        "entropy": entropy.numpy(), "performance": (0.6 - 0.2 * entropy.exp()).numpy(),
    }  # fmt: skip
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    ran = 0
    for path in WRITTEN:
        names = dict(shared)
        for block in blocks(path.read_text(), "python"):
            if path.name not in ("README.md", "layers.md", "control.md") and not block.startswith(">>>"):
                try:
                    exec(compile(block, named(path), "exec"), names)
                except Exception as error:
                    raise AssertionError(f"{named(path)}: {type(error).__name__}: {error} in\n{block}") from error
                ran += 1
    assert ran >= 12


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(next(name for i in range(99) if (name := f"{slug}-{i}" if i else slug) not in found))
    return found


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{named(path)}: {target}"
        assert not any(tracked) or there.is_dir() or named(there) in tracked, f"{target} is not in the repository"
        if anchor:
            assert there.suffix == ".md" and anchor in anchors(there), f"{named(path)}: {target} is no heading"


def test_pages_that_the_code_names_are_there() -> None:
    for path in (*(ROOT / "entropy_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")):
        for name, anchor in re.findall(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", path.read_text()):
            assert (ROOT / name).exists() and (not anchor or anchor in anchors(ROOT / name)), f"{named(path)}: {name}"


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [named(path) for path in PAGES[3:] if f"]({named(path)})" not in text] == []
    for path in (ROOT / "examples").iterdir():
        assert path.suffix not in (".py", ".ipynb") or f"](examples/{path.name})" in text, path.name


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_lines_can_be_read_in_an_editor(path: Path) -> None:
    """Tables, pictures and code are as wide as they are."""
    prose = without_code(path.read_text()).splitlines()
    assert [line for line in prose if len(line) > WIDTH and not line.startswith(("|", "![", "    "))] == []


@pytest.mark.parametrize("path", WRITTEN[1:], ids=named)
def test_a_page_says_for_whom_it_is(path: Path) -> None:
    title, opening = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL).strip().split("\n\n")[:2]
    told = re.search(r"\bfor\s+(people|readers)\b", opening, re.IGNORECASE)
    assert title.startswith("# ") and told, f"{named(path)}: {opening}"


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_training_table_is_that_of_its_report() -> None:
    rows = (ROOT / "benchmarks/results/toy/report.md").read_text().splitlines()
    table = re.search(r"^\| 240 steps.*?\n\n", (ROOT / "docs/benchmarks.md").read_text(), re.DOTALL | re.MULTILINE)
    assert table is not None
    for line in table[0].strip().splitlines()[2:]:
        found = re.findall(r"\d\.\d{3} ± \d\.\d{3}", line)
        assert len(found) == 3 and any(all(value in row for value in found) for row in rows), line
