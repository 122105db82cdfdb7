"""The examples run on a CPU, as their text says, and show what it says."""

from __future__ import annotations

import base64
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import entropy_kernels as ek
import notebook

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the numbers below are those of a CPU
    return importlib.import_module(name)


def call(module: ModuleType, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> list[str]:
    """What a command line prints."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *line.split()])
    module.main()
    return capsys.readouterr().out.splitlines()


def test_each_says_what_it_shows_and_how_to_run_it() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 3 and len(NOTEBOOKS) == 1
    for path in scripts:
        text = path.read_text().split('"""')[1]
        assert f"python examples/{path.name}" in text and "You see" in text, path.name


# --- a plain loop -----------------------------------------------------------------------------------------------------


def test_grpo_collapses_and_a_target_is_held(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = example("pytorch_loop", monkeypatch)
    rows = {}
    for line in ("--steps 80", "--steps 80 --target-entropy 0.8"):
        printed = call(module, line, monkeypatch, capsys)
        assert re.fullmatch(r"entropy at the end: \d\.\d{3} nats of at most 2\.303", printed[-1])
        rows[line] = [float(x.rstrip("%")) for x in printed[-2].split()]
    (_, reward, free, answers, treated), (_, held_reward, held, more, dropped) = rows.values()
    assert free < 0.4 and 0.6 < held < 1.0, "collapses; is held at 0.8"
    assert reward > held_reward > 0.3 and more > answers and treated == 0 < dropped


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov", "exact_cov"])
def test_every_method_of_the_loop(method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = example("pytorch_loop", monkeypatch)
    printed = call(module, f"--method {method} --steps 20", monkeypatch, capsys)
    assert float(printed[-2].split()[-1].rstrip("%")) > 0, "tokens are treated"
    with pytest.raises(SystemExit):
        call(module, f"--method {method} --target-entropy 1", monkeypatch, capsys)
    assert "expected without --method" in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("hf_model", monkeypatch)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["hf_model.py"])
    wanted = re.search(r'"(transformers>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    with pytest.raises(SystemExit, match=rf"^hf_model\.py needs transformers.*: pip install '{wanted[1]}'$"):
        module.main()


# --- a Hugging Face model ---------------------------------------------------------------------------------------------


def test_log_probs_and_hidden_states_train_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("transformers")
    module = example("hf_model", monkeypatch)
    with pytest.raises(SystemExit):
        call(module, "--rollouts 0", monkeypatch, capsys)
    found = [call(module, line, monkeypatch, capsys) for line in ("--rollouts 4", "--rollouts 2 --fused")]
    assert found[0][:5] == found[1][:5], "the same numbers in the first four updates"
    rows = [[float(x.rstrip("%")) for x in line.split()] for line in found[0][1:-1]]
    assert len(rows) == 8 and all(row[5] > 0 for row in rows), "Clip-Cov drops some in each update"
    assert rows[0][6] == 0 < rows[1][6] and rows[-1][2] > rows[0][2] + 0.02, "it moves, and the reward rises"


def test_a_model_of_yours_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Prompts of different lengths, padded on the left, and answers that end early."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<end>", "<unk>", "times", "is", *map(str, range(12))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    module = example("hf_model", monkeypatch)
    model, prompts, attention = module.pretrained(str(tmp_path))
    batch = module.rollout(model.eval(), prompts, attention)
    assert attention.sum(1).unique().numel() > 1, "prompts of different lengths"
    assert batch.mask.sum(1).unique().numel() > 1, "answers of different lengths"
    logprob, entropy = ek.hf.causal_lm_logprob_entropy(
        model, batch.ids, attention_mask=batch.attention, position_ids=batch.positions
    )
    logits = model(batch.ids, attention_mask=batch.attention, position_ids=batch.positions).logits[:, :-1]
    wanted = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    here = batch.mask[:, :-1]
    torch.testing.assert_close(logprob[:, :-1][here], wanted[here], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[:, :-1][here], torch.distributions.Categorical(logits=logits).entropy()[here])
    printed = [
        call(module, f"--model {tmp_path} --rollouts 2 --lr 1e-3 {more}", monkeypatch, capsys)
        for more in ("", "--fused")
    ]
    assert printed[0][:5] == printed[1][:5] and printed[0][-1].startswith("reward 0.")


def test_the_lines_that_are_replaced_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    module = example("hf_model", monkeypatch)
    torch.manual_seed(0)
    model, prompts, attention = module.tiny()
    names = {"model": model.eval(), "ids": prompts, "attention": attention, "temperature": 0.7, "ek": ek}
    names["positions"] = torch.arange(prompts.shape[1]).expand_as(prompts)
    lines = [line.strip() for line in (module.__doc__ or "").splitlines()]
    before, after = dict(names), dict(names)
    exec("\n".join(line[2:] for line in lines if line.startswith("- ")), before)
    exec("\n".join(line[2:] for line in lines if line.startswith("+ ")), after)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(after[name][:, :-1], before[name])


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_small(path: Path) -> None:
    """What nbformat 4.5 asks for, and nothing of the machine that ran it."""
    book = json.loads(path.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and set(book) == {
        "cells", "metadata", "nbformat", "nbformat_minor",
    }  # fmt: skip
    assert book["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert book["cells"][0]["cell_type"] == "markdown"
    identities = [cell["id"] for cell in book["cells"]]
    assert len(set(identities)) == len(identities) and all(re.fullmatch(r"[\w-]{1,64}", x) for x in identities)
    numbers = [cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1)), "run in order, all of it"
    for cell in book["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (keys | {"execution_count", "outputs"} if cell["cell_type"] == "code" else keys)
        assert cell["metadata"] == {} and all(isinstance(line, str) for line in cell["source"])
        for output in cell.get("outputs", ()):
            assert output["output_type"] in ("stream", "display_data")
    assert path.stat().st_size < 150_000 and all(len(data) < 100_000 for data in pictures(book))
    assert str(Path.home()) not in path.read_text() and "/tmp" not in path.read_text()


def pictures(book: dict[str, Any]) -> list[bytes]:
    found = [
        output["data"]["image/png"] for cell in book["cells"] for output in cell.get("outputs", ()) if "data" in output
    ]
    return [base64.b64decode(data) for data in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_prints_what_is_stored(path: Path, tmp_path: Path) -> None:
    """All code cells, in order, in a process of their own, where a user opens it: beside the notebook."""
    for module in ("matplotlib", "pandas", "scipy"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, str(Path(notebook.__file__)), path.name], cwd=path.parent, capture_output=True, text=True,
        env={**notebook.os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    stored = notebook.printed([cell["outputs"] for cell in cells])
    for number, (now, before) in enumerate(zip(json.loads(done.stdout), stored, strict=True), 1):
        assert words(now) == words(before), f"cell {number}"
        assert numbers(now) == pytest.approx(numbers(before), rel=0.05, abs=0.02), f"cell {number}"


NUMBER = r"-?\d+(?:\.\d+)?"


def words(text: str) -> str:
    return re.sub(NUMBER, "#", text)


def numbers(text: str) -> list[float]:
    """Those printed; another CPU may round the last digit otherwise."""
    return [float(x) for x in re.findall(NUMBER, text)]
