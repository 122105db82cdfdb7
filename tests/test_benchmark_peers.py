"""The suite's peers from hidden states: they are called as their packages want it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import packages, peers
from benchmarks.cases import LINEAR_LOSSES, Case, HiddenShape, Inputs, make_inputs
from benchmarks.checks import check
from benchmarks.ours import GRADIENT, REGISTRY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = HiddenShape(96, 32, 1500)
FORWARD, BOTH = "linear_logprob_entropy", "linear_logprob_entropy_fwdbwd"


def _case(dtype: torch.dtype = torch.float32) -> tuple[Case, Inputs]:
    case = Case(SHAPE, dtype, CPU)
    return case, make_inputs(case)


def _logp(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1)


def _values(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = _logp(hidden, weight)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean()


class _Chunked:
    """trl.trainer.utils._ChunkedLogProbFunction, 1.16.0."""

    @staticmethod
    def apply(
        hidden, weight, bias, targets, temperature, chunk_size,
        final_logit_softcapping=None, logit_scale=1.0, outputs=("entropy", "log_sum_sq_probs"),
    ):  # fmt: skip
        assert bias is None and temperature == 1.0 and chunk_size > 0 and outputs == ("entropy",)
        return *_values(hidden, weight, targets), None, None, None


class _FusedLinearForPPO:
    """verl.utils.experimental.torch_functional, 0.9.1."""

    def __init__(self, chunk_size=512, impl_backend="torch"):
        assert impl_backend == "torch"

    def __call__(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        return _values(hidden_states, vocab_weights, input_ids)


def _verl_linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """verl.utils.kernel.linear_cross_entropy: an autograd function's apply, 0.9.1."""
    assert isinstance(temperature, float) and reduction == "none"
    return _values(hidden, weight, labels)


class _Scaled:
    """liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction, 0.8.5."""

    @staticmethod
    def apply(
        _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
        selected_token_ids=None,
    ):  # fmt: skip
        assert ignore_index == -100 and m_tiles_per_cluster == 1 and return_entropy is True
        logprob, entropy = _values(_input, weight, target)
        return -logprob, entropy


def _liger_linear(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None,
):  # fmt: skip
    """liger_kernel.transformers.functional.liger_fused_linear_cross_entropy, 0.8.5."""
    return _reduced(-_values(input, weight, target)[0], reduction)


class _Grpo:
    """liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss, 0.8.5: loss type dapo."""

    def __init__(self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2, epsilon_high=0.2):
        assert beta == 0.0 and use_ref_model is False
        self.chunk_size = chunk_size

    def __call__(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None,
    ):  # fmt: skip
        batch, length, _ = _input.shape
        assert selected_token_ids.shape == attention_mask.shape == (batch, length) and advantages.shape == (batch,)
        logprob = _values(_input.flatten(0, 1), lin_weight, selected_token_ids.flatten())[0].view(batch, length)
        old = logprob.detach() if old_per_token_logps is None else old_per_token_logps
        ratio = (logprob - old).exp()
        tokens = -torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return (tokens * attention_mask).sum() / attention_mask.sum(), ()


def _cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"):
    """cut_cross_entropy.linear_cross_entropy, 25.1.1."""
    assert impl in ("cce", "torch_compile") and not shift
    return _reduced(-_values(e, c, targets)[0], reduction)


def _quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None):
    """quack.linear_cross_entropy.chunked_linear_cross_entropy, 0.6.5: no reduction "none"."""
    assert reduction in ("mean", "sum")
    return _reduced(-_values(x, weight, target)[0], reduction)


# module, name, what stands in for it; where the package is installed, its signature is compared
STUBS: tuple[tuple[str, str, Any], ...] = (
    ("trl.trainer.utils", "_ChunkedLogProbFunction", _Chunked),
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO", _FusedLinearForPPO),
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", _verl_linear_cross_entropy),
    ("liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction", _Scaled),
    ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", _liger_linear),
    ("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", _Grpo),
    ("cut_cross_entropy", "linear_cross_entropy", _cut),
    ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", _quack),
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {}
    for module, name, stub in STUBS:
        modules.setdefault(module, SimpleNamespace(__name__=module)).__dict__[name] = stub
    monkeypatch.setattr(packages, "module_of", modules.__getitem__)
    monkeypatch.setattr(packages, "alone", lambda name, bare, stubbed: modules[name])
    monkeypatch.setattr(peers, "verl_kernel", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("op", [FORWARD, BOTH])
def test_every_peer_is_called_as_its_package_declares_it(op: str, installed: None) -> None:
    """Also those that run on a GPU only: functions of the same signature stand for them, and the gate judges."""
    case, inputs = _case()
    wanted = {name: computes for name, _, _, computes, _ in peers.OF_HIDDEN}
    if op == BOTH:
        wanted["liger-grpo"] = GRADIENT
    for name, computes in wanted.items():
        implementation = REGISTRY[op, name]
        if name.startswith("torch-linear") and implementation.supports(case) is not None:
            continue  # a torch before 2.13
        result = check(implementation, case, inputs, implementation.make(case, inputs).call())
        assert result.passed, (name, result.failures)
        assert implementation.computes == computes and result.errors
        assert all(error < 1e-3 for error in result.errors.values()), (name, result.errors)  # not only loosely right


def test_liger_grpo_is_a_peer_of_the_ppo_loss(installed: None) -> None:
    case, inputs = _case()
    implementation = REGISTRY["linear_policy_loss", "liger-grpo"]
    result = check(implementation, case, inputs, implementation.make(case, inputs).call())
    assert result.passed and all(error < 1e-3 for error in result.errors.values()), result.errors


def test_verls_loss_of_verls_log_prob(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_of(mode: str, **settings: Any) -> Callable[..., Any]:
        assert mode == "vanilla" or set(settings) == {"clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"}

        def loss(logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, dict]:
            assert logprob.shape == old.shape == advantages.shape == mask.shape == (1, SHAPE.rows)
            if mode == "vanilla":
                return tuple(ek.policy_loss(logprob, old, advantages, mask))
            return tuple(ek.clip_cov_loss(logprob, old, advantages, mask, seed=3, ratio=settings["clip_cov_ratio"]))

        return loss

    monkeypatch.setattr(peers, "verl_loss", loss_of)
    case, inputs = _case()
    for op in LINEAR_LOSSES:
        implementation = REGISTRY[op, "verl"]
        assert check(implementation, case, inputs, implementation.make(case, inputs).call()).passed


def _parameters(function: Any) -> list[list[str]]:
    """Names of the parameters of what is called: of a class also its constructor, of an autograd function forward."""
    function = getattr(function, "__self__", function)  # of a bound apply
    if not isinstance(function, type):
        called = [function]
    elif issubclass(function, torch.autograd.Function):
        called = [function.forward]
    elif hasattr(function, "apply") and not issubclass(function, torch.nn.Module):
        called = [function.apply]
    else:
        called = [function.__init__, function.forward if issubclass(function, torch.nn.Module) else function.__call__]
    return [[name for name in inspect.signature(f).parameters if name not in ("self", "ctx")] for f in called]


@pytest.mark.parametrize(("module", "name", "stub"), STUBS, ids=[name for _, name, _ in STUBS])
def test_the_stubs_have_the_signatures_of_the_packages(module: str, name: str, stub: Any) -> None:
    try:
        if module.startswith("verl.utils.kernel"):
            found = peers.verl_kernel(module)
        else:
            found = (
                packages.alone(module, peers.VERL_FUSED, ())
                if module.startswith("verl")
                else packages.module_of(module)
            )
    except packages.Unavailable as error:
        pytest.skip(str(error))
    ours, real = _parameters(stub), _parameters(getattr(found, name))
    assert [theirs[: len(mine)] for mine, theirs in zip(ours, real, strict=True)] == ours


def test_torchs_own_linear_cross_entropy_is_a_peer_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch-linear-ce", "torch-linear-ce-chunked", "torch-linear-ce-chunked-mean")
    rows = [REGISTRY[op, name] for op in (FORWARD, BOTH) for name in names]
    has = hasattr(torch.nn.functional, "linear_cross_entropy")
    for row in rows:
        assert (row.supports(_case()[0]) is None) == has and "no entropy" in row.computes
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert {row.supports(_case()[0]) for row in rows} == {
        "torch.nn.functional has no linear_cross_entropy in the installed version"
    }


def test_limits_of_peers_are_reasons(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(HiddenShape(8, 576, 64), torch.float32, CPU)
    assert "multiples of 128, not 576" in (REGISTRY[FORWARD, "verl-triton"].supports(case) or "")
    case = Case(HiddenShape(8, 512, 64), torch.float32, CPU)
    for name in ("verl-triton", "liger-linear-ce", "liger-linear-ce-mean", "cut-ce", "quack-linear-ce-mean"):
        assert REGISTRY[FORWARD, name].supports(case) == "runs on cuda tensors only"
    assert REGISTRY[FORWARD, "trl"].supports(case) is None

    def no_kernels(device: torch.device) -> None:
        raise ModuleNotFoundError("No module named 'cutlass'")

    scaled = SimpleNamespace(
        __name__="x", LigerFusedLinearScaledCrossEntropyFunction=_Scaled, _resolve_implementation=no_kernels
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packages, "module_of", lambda name: scaled)
    assert "No module named 'cutlass'" in (REGISTRY[FORWARD, "liger-scaled"].supports(case) or "")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that needs what is not installed, with a function that imports its kernels when it is called."""
    root = tmp_path / "fake_late"
    (root / "ops").mkdir(parents=True)
    (root / "__init__.py").write_text("import fake_cluster\n")
    (root / "ops" / "__init__.py").write_text("")
    (root / "ops" / "kernels.py").write_text("def twice(x):\n    return 2 * x\n")
    (root / "ops" / "linear.py").write_text(
        "def late(x):\n    from . import kernels\n    from ..trainer.utils import gather\n"
        "    return kernels.twice(gather(x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.startswith("fake_late")]:
        del sys.modules[name]


def test_what_a_function_imports_when_it_is_called_stays(package: Path) -> None:
    keep = {
        "fake_late.ops.kernels": {}, "fake_late.ops": {},
        "fake_late.trainer.utils": {"gather": lambda x: x + 1},
    }  # fmt: skip
    module = packages.load(
        "fake_late.ops.linear", bare=("fake_late", "fake_late.ops"), stubbed=("fake_late.trainer",), keep=keep
    )
    assert module.late(3) == 8
    assert {name for name in sys.modules if name.startswith("fake_late")} == set(keep)
