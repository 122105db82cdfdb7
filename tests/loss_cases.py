"""Random batches for the losses, the degenerate ones among them, and the comparison with the reference."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import entropy_kernels
import reference_losses as ref
from entropy_kernels.losses import AGG_MODES, PolicyLoss

MODES = tuple(AGG_MODES)
MASK_DTYPES = (torch.bool, torch.int64, torch.float32, torch.int32, torch.float64)


class OnDevice:
    """``entropy_kernels`` for tests that think in CPU tensors: its functions run on copies of them on ``device``.

    Results come back to the CPU, and gradients with them, as a copy is differentiable. Classes and modules are those
    of the package. The fixture ``loss_on`` sets the device.
    """

    device = "cpu"

    @functools.cache  # noqa: B019  (one object; a function has to stay the same one)
    def __getattr__(self, name: str) -> Any:
        function = getattr(entropy_kernels, name)
        return self.moved(function) if isinstance(function, types.FunctionType) else function

    def moved(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, or a module that is called, on the device."""

        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.device == "cpu":
                return function(*args, **kwargs)
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
            return tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

        return call


ek: Any = OnDevice()


@dataclass
class Batch:
    """The positional arguments of a loss; ``per_sequence`` advantages are (B, 1)."""

    logprob: Tensor  # (B, L)
    old_logprob: Tensor
    advantages: Tensor
    mask: Tensor
    name: str

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logprob, self.old_logprob, self.advantages, self.mask

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """float64, advantages in full; padding is 0."""
        mask = (self.mask != 0).numpy()
        advantages = self.advantages.expand(self.logprob.shape)
        values = [x.detach().double().numpy() for x in (self.logprob, self.old_logprob, advantages)]
        lp, old, adv = (np.where(mask, x, 0.0) for x in values)
        return lp, old, adv, mask


def random_batch(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Every eighth batch is a degenerate one."""
    g = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    rows, length = integer(1, 8), integer(1, 40)
    spread = (0.01, 0.2, 1.0)[seed % 3]  # of the log-ratio: on-policy, usual, far off
    kind = ("one_token", "one_sequence", "equal_advantages", "all_masked", "on_policy", "zero_advantages", "plain")
    name = kind[seed // 8 % 7] if seed % 8 == 0 else "plain"
    if name == "one_sequence":
        rows = 1
    old = -4 * torch.rand(rows, length, generator=g)
    logprob = old + spread * torch.randn(rows, length, generator=g)
    advantages = (0.5, 1.0, 3.0)[seed // 3 % 3] * torch.randn(rows, length, generator=g)
    if seed % 2 or name == "one_sequence":
        advantages = advantages[:, :1]
    mask = torch.arange(length) < torch.randint(0, length + 1, (rows, 1), generator=g)  # fully masked rows among them
    if seed % 5 == 0:
        mask = mask & (torch.rand(rows, length, generator=g) < 0.7)
    if name in ("one_token", "all_masked"):
        mask = torch.zeros_like(mask)
        mask[-1, -1] = name == "one_token"
    if name in ("equal_advantages", "zero_advantages"):
        advantages = torch.full_like(advantages, 0.7 if name == "equal_advantages" else 0.0)
    if name == "on_policy":
        logprob = old.clone()
    # what stands in padding must not matter
    poison = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])[seed % 4]
    logprob, old = (torch.where(mask, x, poison) for x in (logprob, old))
    return Batch(logprob.to(dtype), old.to(dtype), advantages, mask.to(MASK_DTYPES[seed % 5]), name)


def ragged(
    lengths: Any, width: int | None = None, dtype: torch.dtype = torch.float32, padding: float | None = None
) -> Any:
    """logprob, old_logprob, advantages and mask of sequences of these lengths, with ``padding`` behind them."""
    g = torch.Generator().manual_seed(7)
    lengths = torch.tensor(lengths)
    shape = len(lengths), int(lengths.max()) if width is None else width
    old = -3 * torch.rand(shape, generator=g, dtype=dtype)
    lp = old + 0.3 * torch.randn(shape, generator=g, dtype=dtype)
    adv = torch.randn(shape, generator=g, dtype=dtype)
    mask = torch.arange(shape[1]) < lengths[:, None]
    return *((x if padding is None else torch.where(mask, x, padding)) for x in (lp, old, adv)), mask


def random_options(seed: int, mask: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Aggregation options for ours and for the reference."""
    tokens, rows = int((mask != 0).sum()), mask.shape[0]
    mode = MODES[seed % len(MODES)]
    whole: dict[str, Any] = {}
    if seed % 4 == 1:
        whole = {"dp_size": 2, "batch_num_tokens": 2 * tokens + 1, "global_batch_size": 2 * rows}
    elif seed % 4 == 2:
        whole = {"batch_num_tokens": tokens + 7, "global_batch_size": rows + 3, "loss_scale_factor": 17}
    return {"loss_agg_mode": mode, **whole}, {"mode": mode, **whole}


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def differentiated(function: Any, logprob: Tensor, *rest: Any, **options: Any) -> tuple[PolicyLoss, Tensor]:
    """The loss after the backward pass of its sum, and the gradient of ``logprob``."""
    x = leaf(logprob)
    out = function(x, *rest, **options)
    out.loss.sum().backward()
    assert x.grad is not None and x.grad.dtype == logprob.dtype
    return out, x.grad


def assert_same(a: tuple[PolicyLoss, Tensor], b: tuple[PolicyLoss, Tensor], **tolerance: float) -> None:
    """Losses, gradients and metrics."""
    left, right = ((out.loss, gradient, dict(out.metrics)) for out, gradient in (a, b))
    torch.testing.assert_close(left, right, **tolerance)


def assert_matches(
    out: PolicyLoss, gradient: Tensor, expected: ref.Reference, entropy: Tensor | None = None, name: str = ""
) -> None:
    """Loss, gradient by logprob, that in ``entropy`` and metrics within the rounding of ``out``'s dtype.

    The bound of a token's gradient is relative to the terms it is made of; only r = e^D loses more than an ulp per
    operation, eps·|D|. The bound of the loss is relative to the sum of absolute values, in fp64 at most 1e-10 of it.
    """
    eps = torch.finfo(out.loss.dtype).eps
    input_eps = max(eps, torch.finfo(gradient.dtype).eps)
    spread = 1 + np.abs(expected.log_ratio)
    worst = float(spread.max(initial=1.0))
    loss = float(out.loss.detach())
    error = abs(loss - expected.loss)
    allowed = expected.absolute * min(8 * eps * worst * (1 + np.log2(spread.size + 1)), 1e-10 if eps < 1e-10 else 1)
    assert error <= allowed, f"{name}: loss {loss:.9g}, expected {expected.loss:.9g}, {error=:.3g} > {allowed:.3g}"
    _assert_gradient(f"{name}: gradient of logprob", gradient, expected.logprob, expected.size * spread, input_eps)
    if entropy is not None:
        assert entropy.grad is not None and expected.entropy is not None
        _assert_gradient(f"{name}: gradient of entropy", entropy.grad, expected.entropy, np.abs(expected.entropy), eps)
    for metric, value in expected.metrics.items():
        got = out.metrics[metric]
        assert got.dim() == 0 and not got.requires_grad and got.grad_fn is None, metric
        scale = abs(value) + (expected.absolute if metric == "pg_loss" else 1)
        if metric in ("cov_mean", "ratio_max", "ratio_mean", "cov_max"):
            scale = scale * worst + 100
        assert abs(float(got) - value) <= 16 * eps * worst * scale, f"{name}: {metric} {float(got)}, expected {value}"


def _assert_gradient(name: str, actual: Tensor, exact: np.ndarray, size: np.ndarray, eps: float) -> None:
    got, allowed = actual.double().numpy(), 8 * eps * size
    wrong = ~(np.abs(got - exact) <= allowed)  # NaN too
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{name}{list(at)}: got {got[at]:.9g}, expected {exact[at]:.9g} ± {allowed[at]:.3g}")
