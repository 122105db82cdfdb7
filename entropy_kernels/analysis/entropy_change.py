"""First-order entropy change of a policy-gradient step, from the vocabulary covariance of one read of the logits."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from entropy_kernels._arguments import check_tensor, divisor_range, number, recorded, refuse_mapped, traced


def predicted_entropy_change(
    vocab_covariance: Tensor,
    advantages: Tensor | float,
    *,
    step_size: Tensor | float,
    temperature: Tensor | float = 1.0,
    ratio: Tensor | float | None = None,
) -> Tensor:
    """ΔH ≈ -(η·g/T²)·C of each row, to first order in the step size η.

    The step is that of the logits themselves, Δz = (η·g/T)·(e_y - p), with g = advantage × ratio: one gradient-descent
    step on -g·log p(y), as if the row's logits were free parameters. H is the entropy of softmax(z/T), and C the
    covariance that ``token_stats`` returns, Cov_{a~p}(log p(a), 1[a=y] - p(a)). Averaged over y ~ p with advantages of
    mean 0 this is the paper's Theorem 1, -η·Cov_{a~p}(log p, p·A). Through a network the rows share parameters, and
    the prediction is a trend rather than a value.

    With a softcap the identity holds for a step in the *capped* logits only, softcap·tanh(z/softcap): C does not hold
    the weights (1 - tanh²)² that a step in the raw logits would need, and no raw-logit prediction is offered.

    Args:
        vocab_covariance: any shape, floating point: C at the same temperature, nats.
        advantages: broadcastable to it, any real dtype: the A of each sampled token, as the loss uses it.
        step_size: η > 0, a number or broadcastable: the learning rate times *everything the loss multiplies a token's
            -g·log p by*, so 1/N for a token mean over N tokens. 0 and negative values are taken as they are.
        temperature: T > 0 of the softmax, a number or broadcastable.
        ratio: p_new/p_old of each token, broadcastable; None is 1 (the first update after a rollout). A token whose
            gradient the PPO clip or Clip-Cov removes has ratio 0 here.

    Returns:
        Nats, shape of ``vocab_covariance``, float32 (float64 if that is float64), on its device. Differentiable in
        ``advantages`` and ``ratio``.

    Raises:
        ValueError: an argument does not broadcast to the shape of ``vocab_covariance``; a temperature that is not
            positive (checked for numbers and CPU tensors; on an accelerator it gives inf or NaN without a sync).
        TypeError: ``vocab_covariance`` is not a floating-point tensor, or another argument no number or tensor.

    Source:
        arXiv 2505.22617, Lemma 1 and Theorem 1; docs/entropy-law.md.
    """
    if isinstance(vocab_covariance, Tensor):
        check_tensor("vocab_covariance", vocab_covariance)
    if not isinstance(vocab_covariance, Tensor) or not vocab_covariance.is_floating_point():
        got = vocab_covariance.dtype if isinstance(vocab_covariance, Tensor) else type(vocab_covariance).__name__
        raise TypeError(f"vocab_covariance: expected a floating-point tensor, got {got}")
    refuse_mapped({"temperature": temperature})  # it is looked at
    shape, device = vocab_covariance.shape, vocab_covariance.device
    dtype = torch.float64 if vocab_covariance.dtype == torch.float64 else torch.float32

    def operand(value: Tensor | float, name: str) -> Tensor:
        if isinstance(value, Tensor):
            check_tensor(name, value)
            if value.is_complex():
                raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
            if value.is_meta and device.type != "meta":
                raise ValueError(f"{name}: expected on the device of vocab_covariance, {device}, got {value.device}")
            (tensor,) = recorded(value.to(device, dtype))
        elif torch.compiler.is_compiling() and isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            # a number that multiplies a tensor stays symbolic; one that fills it would recompile for every value
            tensor = torch.ones((), dtype=dtype, device=device) * value
        elif isinstance(value, numbers.Real):
            value = number(name, value, dtype)
            # straight into dtype: through the default float32 a number would lose half its digits; and a fill, because
            # a copy from the host would wait for the device
            tensor = torch.full((), value, dtype=dtype, device=device)
        else:
            try:
                tensor = torch.as_tensor(value, dtype=dtype, device=device)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(value).__name__}") from None
        try:
            return tensor.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(tensor.shape)}"
            ) from None

    t = operand(temperature, "temperature")
    # On an accelerator, and in a compiled graph, reading the values would be a host sync or a graph break.
    lowest: Any = temperature
    if not isinstance(temperature, (int, float, torch.SymInt, torch.SymFloat)):
        values = torch.as_tensor(temperature)
        readable = values.device.type == "cpu" and values.numel() > 0 and not traced()
        lowest = values.double().amin().item() if readable else 1.0
    if not lowest > 0:
        raise ValueError(f"temperature: expected > 0, got {lowest:g}")
    least, most = divisor_range(dtype)
    if not torch.compiler.is_compiling() and isinstance(temperature, numbers.Real) and not least <= temperature <= most:
        raise ValueError(f"temperature: expected within [{least:.2g}, {most:.2g}], got {temperature}")
    g = operand(advantages, "advantages")
    if ratio is not None:
        g = g * operand(ratio, "ratio")
    # T² might be 0 or infinite where T is not
    return -(operand(step_size, "step_size") * g / t / t) * operand(vocab_covariance, "vocab_covariance")
