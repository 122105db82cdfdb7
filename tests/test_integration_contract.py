"""Every patch on stubs with the signatures that it was made for: it is put in place, ours serves, and what comes out.

So a slip in what we replace is seen without verl and TRL; ``tests/integrations/test_contract.py`` holds the stubs
against the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import integration_stubs
import test_verl_config
from entropy_kernels.integrations._patch import Patch, PatchRefused, patches, signature_of
from entropy_kernels.integrations.verl import statistics
from entropy_kernels.integrations.verl.config import MODES
from entropy_kernels.integrations.verl.losses import registered

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


def _takes_own_keys(target: Any) -> None:
    config = SimpleNamespace()
    target(config, loss_mode="ek_ppo", ek={"ratio": 0.1})
    assert config.ek == {"ratio": 0.1} and config.theirs == {"loss_mode": "ek_ppo"}
    with pytest.raises(TypeError, match=r"policy_loss.ek: expected keys of its own"):
        target(config, ek=3)


def _checks(target: Any) -> None:
    config = test_verl_config.config("ek_exact_cov", {"share": 0.4})
    target(config)
    assert config.theirs_ran and config.ek_settings.mode == "ek_exact_cov"
    assert all(one.active for one in patches() if one.package == "verl")
    with pytest.raises(ValueError, match="share"):
        target(test_verl_config.config("ek_exact_cov", {"shaer": 0.4}))


def _passes_on(*arguments: Any) -> Callable[[Any], None]:
    """A worker of another loss has what theirs gives."""

    def call(target: Any) -> None:
        worker = SimpleNamespace(loss_fn=None)
        assert target(worker, *arguments) == ("theirs", worker, *arguments)

    return call


def _theirs(self: Any, *arguments: Any) -> tuple[Any, ...]:
    return ("theirs", self, *arguments)


def _carries_statistics(target: Any) -> None:
    def compute_log_prob(data: Any) -> dict[str, Tensor]:
        return {"log_probs": torch.zeros(2), "ek_vocab_covariance": torch.ones(2, dtype=torch.float64)}

    trainer = SimpleNamespace(actor_rollout_wg=SimpleNamespace(compute_log_prob=compute_log_prob))
    found, rest = target(trainer, "batch")
    assert rest == "rest" and found.batch["ek_vocab_covariance"].tolist() == [1, 1]
    assert trainer.actor_rollout_wg.compute_log_prob is compute_log_prob


def _compute_old_log_prob(self: Any, batch: Any) -> tuple[Any, str]:
    output = self.actor_rollout_wg.compute_log_prob(batch)
    return SimpleNamespace(batch={"old_log_probs": output["log_probs"]}), "rest"


BEHAVIOUR = {
    "PolicyLossConfig.__init__": lambda self, **kwargs: setattr(self, "theirs", kwargs),
    "ActorConfig.__post_init__": lambda self: setattr(self, "theirs_ran", True),
    "BaseEngine.train_batch": _theirs,
    "TrainingWorker.train_mini_batch": _theirs,
    "TrainingWorker.infer_batch": _theirs,
    "TrainingWorker.save_checkpoint": _theirs,
    "TrainingWorker.load_checkpoint": _theirs,
    "RayPPOTrainer._compute_old_log_prob": _compute_old_log_prob,
    "OmegaConf.is_config": lambda obj: False,
    "no_padding_2_padding": lambda tensor, data: tensor,
    "get_non_tensor_data": lambda data, key, default: data.get(key, default),
    "assign_non_tensor": lambda tensor_dict, **kwargs: tensor_dict.update(kwargs) or tensor_dict,
    "FSDPEngineWithLMHead.forward_step": _forward_step,
    "FSDPEngineWithLMHead.prepare_model_outputs": _prepare_model_outputs,
}
#: By the end of the target: a call through what is in place. It gets that.
CALLS: dict[str, Callable[[Any], None]] = {
    ":PolicyLossConfig.__init__": _takes_own_keys,
    ":ActorConfig.__post_init__": _checks,
    ":BaseEngine.train_batch": _passes_on("data", None),
    ":TrainingWorker.train_mini_batch": _passes_on("data"),
    ":TrainingWorker.infer_batch": _passes_on("data"),
    ":TrainingWorker.save_checkpoint": _passes_on("path"),
    ":TrainingWorker.load_checkpoint": _passes_on("path"),
    ":RayPPOTrainer._compute_old_log_prob": _carries_statistics,
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
    with integration_stubs.stubs(BEHAVIOUR):
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
    """Who takes more of theirs writes down the signature that it was written for."""
    assert integration_stubs.missing() == set()


@pytest.mark.parametrize("mode", MODES)
def test_a_registered_loss_is_called_as_verls_own(mode: str) -> None:
    theirs = integration_stubs.RELIED_ON["verl.trainer.ppo.core_algos:compute_policy_loss_vanilla"]
    assert signature_of(registered(mode)) == theirs
