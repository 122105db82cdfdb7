"""Every patch on stubs with the signatures that it was made for: it is put in place, ours serves, and what comes out.

So a slip in what we replace is seen without verl and TRL; ``tests/integrations/test_contract.py`` holds the stubs
against the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import integration_stubs
from entropy_kernels.integrations._patch import Patch, PatchRefused, patches
from entropy_kernels.integrations.verl import statistics

V, H = 37, 16


def _logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, V, generator=generator), torch.randint(0, V, (5,), generator=generator)


def _head() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, H, generator=generator), torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(0, V, (5,), generator=generator)


def _expected(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logp = logits.double().log_softmax(-1)
    p = logp.exp()
    return {
        "logprob": logp.gather(-1, labels[:, None])[:, 0],
        "entropy": -(p * logp).sum(-1),
        "collision": (p * p).sum(-1),
    }


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-5, atol=1e-6)


def _verl(name: str) -> Any:
    return getattr(importlib.import_module("verl.utils.torch_functional"), name)


def _logprobs(target: Any) -> None:
    z, y = _logits()
    _same(target(z, y), _expected(z, y)["logprob"])
    _same(target(logits=z, labels=y, inplace_backward=False), _expected(z, y)["logprob"])


def _entropy(target: Any) -> None:
    _same(target(_logits()[0]), _expected(*_logits())["entropy"])


def _chunked(target: Any) -> None:
    _same(target(_logits()[0], chunk_size=2), _expected(*_logits())["entropy"])


def _sum_pi_squared(target: Any) -> None:
    _same(target(_logits()[0]), _expected(*_logits())["collision"])


def _linear_cross_entropy(target: Any) -> None:
    hidden, weight, labels = _head()
    expected = _expected(hidden @ weight.T / 0.5, labels)
    logprob, entropy = target(hidden[None], weight, labels[None], 0.5, "none")
    assert logprob.shape == entropy.shape == (5,)
    _same(logprob, expected["logprob"])
    _same(entropy, expected["entropy"])
    with pytest.raises(ValueError, match=r"reduction: expected 'none', .* got 'mean'; reduce the result"):
        target(hidden, weight, labels, 0.5, "mean")


def _fused_linear_for_ppo(target: Any) -> None:
    hidden, weight, labels = _head()
    expected = _expected(hidden @ weight.T / 0.5, labels)
    logprob, entropy = target(None, hidden[None], weight, labels[None].int(), temperature=0.5)
    assert logprob.shape == entropy.shape == (1, 5)
    _same(logprob, expected["logprob"])
    _same(entropy, expected["entropy"])


def _trl_head(target: Any) -> None:
    hidden, weight, labels = _head()
    bias = torch.arange(V) / V
    expected = _expected((hidden @ weight.T + bias) * 0.5 / 2.0, labels)
    outputs = ("entropy", "log_sum_sq_probs")
    logprob, entropy, log_sum_sq, *others = target(hidden, weight, bias, labels, 2.0, 3, None, 0.5, outputs)
    _same(logprob, expected["logprob"])
    _same(entropy, expected["entropy"])
    _same(log_sum_sq, expected["collision"].log())
    assert others == [None, None]


class _MicroBatch(dict):
    def copy(self) -> _MicroBatch:
        return _MicroBatch(self)


def _engine(target: Any) -> None:
    """A forward step through both methods: the read that the functions share, and what is added to the output."""
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead()
    engine._gather_and_unpad_packed = lambda tensor, pad_size: tensor[: len(tensor) - pad_size]
    rows = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged)
    asked = {"input_ids": rows, "calculate_entropy": True, "ek_statistics": ("vocab_covariance",)}
    found = engine.forward_step(_MicroBatch(asked), None, True)
    expected = _expected(*_logits())
    _same(found["log_probs"], expected["logprob"])
    _same(found["entropy"], expected["entropy"])
    assert found["ek_vocab_covariance"].values().shape == (5,) and found.keys() == {
        "log_probs", "entropy", "ek_vocab_covariance",
    }  # fmt: skip


def _forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: Any) -> Any:
    z, y = _logits()
    return self.prepare_model_outputs(z, {"input_ids_rmpad_rolled": y, "pad_size": 0}, micro_batch, None)


def _prepare_model_outputs(
    self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
) -> dict[str, Any]:
    entropy = _verl("entropy_from_logits")(output)
    logprob = _verl("logprobs_from_logits")(logits=output, labels=output_args["input_ids_rmpad_rolled"])
    return {"log_probs": logprob, "entropy": entropy}


BEHAVIOUR = {
    "get_non_tensor_data": lambda data, key, default: data.get(key, default),
    "assign_non_tensor": lambda tensor_dict, **kwargs: tensor_dict.update(kwargs) or tensor_dict,
    "forward_step": _forward_step,
    "prepare_model_outputs": _prepare_model_outputs,
}
#: By the end of the target: a call through what is in place. It gets that.
CALLS: dict[str, Callable[[Any], None]] = {
    ":logprobs_from_logits": _logprobs,
    ":entropy_from_logits": _entropy,
    ":entropy_from_logits_with_chunking": _chunked,
    ":calculate_sum_pi_squared_from_logits": _sum_pi_squared,
    ":linear_cross_entropy": _linear_cross_entropy,
    ":FusedLinearForPPO.forward": _fused_linear_for_ppo,
    ":_ChunkedLogProbFunction.apply": _trl_head,
    ".forward_step": _engine,
    ".prepare_model_outputs": _engine,
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """verl and TRL in the versions that the patches know."""
    versions = {one.package: one.versions[-1] for one in patches()}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    with integration_stubs.stubs(**BEHAVIOUR):
        yield
        statistics.enable(False)
        for one in patches():
            one.undo()


def _resolved(target: str) -> Any:
    path, _, attributes = target.partition(":")
    found = importlib.import_module(path)
    for name in attributes.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.target)
@pytest.mark.usefixtures("installed")
def test_a_call_through_each_patch(patch: Patch) -> None:
    call = next((call for end, call in CALLS.items() if patch.target.endswith(end)), None)
    assert call is not None, f"{patch.target}: a new patch needs a call in CALLS"
    statistics.enable()
    patch.apply()
    before = patch.calls
    call(_resolved(patch.target))
    assert patch.calls > before, "ours has not served"


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.target)
@pytest.mark.usefixtures("installed")
def test_another_signature_is_refused(patch: Patch) -> None:
    path, _, attributes = (patch.signature_of or patch.target).partition(":")
    *classes, name = attributes.split(".")
    holder = _resolved(f"{path}:{'.'.join(classes)}") if classes else importlib.import_module(path)
    setattr(holder, name, lambda renamed: None)
    with pytest.raises(PatchRefused, match="expected the signature"):
        patch.apply()
    assert not patch.active


@pytest.mark.usefixtures("installed")
def test_what_is_not_enabled_is_theirs() -> None:
    statistics.install()
    with pytest.raises(AssertionError, match="theirs ran: logprobs_from_logits"):
        _verl("logprobs_from_logits")(*_logits())
    statistics.enable()
    _verl("logprobs_from_logits")(*_logits())


def test_the_table_has_what_is_imported() -> None:
    """Who imports more of theirs writes down the signature that it was written for."""
    known = integration_stubs.table()
    missing = {name for name in integration_stubs.imported() if name not in known and not _is_module(name, known)}
    assert not missing, f"not in RELIED_ON: {sorted(missing)}"


def _is_module(name: str, known: dict[str, str | None]) -> bool:
    return any(target.startswith(name.replace(":", ".") + ":") for target in known)
