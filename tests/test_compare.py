"""The tests of the tests: the reference agrees with autograd, and wrong results fail the comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference
from calls import upstream
from compare import Bound
from sample import Sample, plain

# V = 97 has large probabilities, 151 936 (Qwen) has ones of 1e-5, where a constant tolerance would accept anything.
VOCABULARIES = (97, 151_936)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def make(dtype: torch.dtype, vocab: int, **kwargs: object) -> tuple[Sample, Bound, dict[str, Tensor]]:
    sample = plain(dtype, "cpu", rows=3, vocab=vocab, **({"temperature": 0.7} | kwargs))
    sample.logits[:, -1] = 8.0  # the tail of a row is where a kernel forgets something, so let it matter
    grads = upstream(sample, "logprob", "entropy", "collision")
    return sample, Bound(sample.logits, sample.target, **sample.kwargs), grads


def test_closed_form_gradient_is_autograds() -> None:
    logits = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 50, (6,))
    grads = {name: torch.randn(6, dtype=torch.float64) for name in reference.DIFFERENTIABLE}
    for softcap in (None, 3.0):
        for temperature in (1.0, 0.3):
            outputs = reference.differentiable(logits, target, temperature, softcap)
            exact = reference.dense(logits.detach(), target, temperature=temperature, softcap=softcap)
            for name, output in zip(reference.DIFFERENTIABLE, outputs, strict=True):
                torch.testing.assert_close(getattr(exact, name), output.detach())
                (expected,) = torch.autograd.grad(output, logits, grads[name], retain_graph=True)
                torch.testing.assert_close(reference.gradient(exact, **{name: grads[name]}), expected)


def test_vocab_covariance_is_the_entropy_change_of_a_sampled_step() -> None:
    """ΔH = -(η g / T²) C for the raw-logit step Δz = (η g / T)(e_y - p), against a finite difference."""
    logits, target, temperature, step = torch.randn(4, 30, dtype=torch.float64), torch.arange(4), 0.7, 1e-6
    d = reference.dense(logits, target, temperature=temperature)
    moved = reference.dense(logits + step / temperature * (d.one_hot - d.p), target, temperature=temperature)
    back = reference.dense(logits - step / temperature * (d.one_hot - d.p), target, temperature=temperature)
    torch.testing.assert_close(
        -d.vocab_covariance / temperature**2, (moved.entropy - back.entropy) / (2 * step), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_pass(dtype: torch.dtype, vocab: int) -> None:
    """float64 autograd of log_softmax, rounded: the bound refuses nothing that is right."""
    sample, bound, grads = make(dtype, vocab)
    z = sample.logits.double().requires_grad_()
    outputs = dict(zip(reference.DIFFERENTIABLE, reference.differentiable(z, sample.target, 0.7, None), strict=True))
    logp = torch.log_softmax(sample.logits.double() / 0.7, -1)
    outputs |= {"p_max": logp.amax(-1).exp(), "mean_logit": (logp.exp() * sample.logits.double()).sum(-1)}
    bound.check_values(**{name: value.float() for name, value in outputs.items()})
    for names in (["logprob"], ["entropy"], ["collision"], list(grads)):
        chosen = {name: grads[name] for name in names}
        (dz,) = torch.autograd.grad([outputs[n] for n in names], z, list(chosen.values()), retain_graph=True)
        bound.check_gradient(dz.to(dtype), **chosen)


# name -> a wrong gradient, made from float64 pieces, so that nothing but the mistake is wrong
Mistake = Callable[[reference.Dense, dict[str, Tensor]], Tensor]


def _without_softmax_term(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    return reference.gradient(d, **g) + g["logprob"][:, None] * d.p / d.temperature


def _without_target_term(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    return reference.gradient(d, **g) - g["logprob"][:, None] * d.one_hot / d.temperature


def _shifted_target(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    step = g["logprob"][:, None] * (d.one_hot.roll(1, -1) - d.one_hot) / d.temperature
    return reference.gradient(d, **g) + step


def _without(name: str) -> Mistake:
    return lambda d, g: reference.gradient(d, **{k: v for k, v in g.items() if k != name})


def _entropy_without_temperature(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    return _without("entropy")(d, g) + d.temperature * reference.gradient(d, entropy=g["entropy"])


def _entropy_not_centred(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    return reference.gradient(d, **g) + g["entropy"][:, None] * d.p * d.entropy[:, None] / d.temperature


def _collision_halved(d: reference.Dense, g: dict[str, Tensor]) -> Tensor:
    return reference.gradient(d, **g) - reference.gradient(d, collision=g["collision"]) / 2


GRADIENT_MISTAKES: dict[str, Mistake] = {
    "zero": lambda d, g: torch.zeros_like(d.p),
    "negated": lambda d, g: -reference.gradient(d, **g),
    "no softmax term": _without_softmax_term,
    "no target term": _without_target_term,
    "target shifted by one": _shifted_target,
    "no logprob term": _without("logprob"),
    "no entropy term": _without("entropy"),
    "no collision term": _without("collision"),
    "entropy gradient without 1/T": _entropy_without_temperature,
    "entropy gradient without + H": _entropy_not_centred,
    "collision gradient without its factor 2": _collision_halved,
    "off by one part in a hundred": lambda d, g: 1.01 * reference.gradient(d, **g),
    "first row's gradient in all rows": lambda d, g: reference.gradient(d, **g)[:1].expand_as(d.p),
    "last column 0": lambda d, g: reference.gradient(d, **g) * (torch.arange(d.p.shape[1]) < d.p.shape[1] - 1),
}


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", GRADIENT_MISTAKES)
def test_wrong_gradients_fail(mistake: str, dtype: torch.dtype, vocab: int) -> None:
    _, bound, grads = make(dtype, vocab)
    wrong = GRADIENT_MISTAKES[mistake](bound.exact, grads).to(dtype)
    with pytest.raises(AssertionError, match="gradient"):
        bound.check_gradient(wrong, **grads)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_target_corrected_after_rounding_fails(dtype: torch.dtype) -> None:
    """Rounding p_y before the subtraction from 1 loses the gradient of a likely token (Liger#1329)."""
    sample = plain(dtype, "cpu", rows=3)
    sample.logits.scatter_(1, sample.target[:, None], 14.0)
    bound = Bound(sample.logits, sample.target)
    grads = upstream(sample, "logprob")
    rounded = (-bound.exact.p * grads["logprob"][:, None]).to(dtype)
    wrong = (rounded + bound.exact.one_hot.to(dtype) * grads["logprob"][:, None].to(dtype)).to(dtype)
    bound.check_gradient(reference.gradient(bound.exact, **grads).to(dtype), **grads)
    with pytest.raises(AssertionError, match="gradient"):
        bound.check_gradient(wrong, **grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_without_the_softcaps_derivative_fails(dtype: torch.dtype) -> None:
    _, bound, grads = make(dtype, 97, softcap=30.0)
    wrong = (reference.gradient(bound.exact, **grads) / bound.exact.cap_grad).to(dtype)
    with pytest.raises(AssertionError, match="gradient"):
        bound.check_gradient(wrong, **grads)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_entropy_accumulated_in_bf16_fails(vocab: int) -> None:
    sample, bound, _ = make(torch.bfloat16, vocab)
    logp = torch.log_softmax(sample.logits / 0.7, -1)
    with pytest.raises(AssertionError, match="entropy"):
        bound.check_values(entropy=-(logp.exp() * logp).sum(-1).float())


def test_entropy_from_unshifted_logits_fails() -> None:
    """lse - Σ p z in fp32 cancels: off by 0.05 nats at an offset of 1000 (docs/math.md §2)."""
    sample = plain(torch.float32, "cpu", rows=3, vocab=151_936)
    sample.logits += 1000
    z = sample.logits
    wrong = torch.logsumexp(z, -1) - (torch.softmax(z, -1) * z).sum(-1)
    with pytest.raises(AssertionError, match="entropy"):
        Bound(z, sample.target).check_values(entropy=wrong)


def test_scaling_before_the_maximum_is_subtracted_fails() -> None:
    sample = plain(torch.float32, "cpu", rows=3, temperature=0.7)
    sample.logits += 1000
    bound = Bound(sample.logits, sample.target, **sample.kwargs)
    logp = torch.log_softmax(sample.logits / 0.7, -1)
    with pytest.raises(AssertionError, match="logprob"):
        bound.check_values(logprob=logp.gather(1, sample.target[:, None])[:, 0])


VALUE_MISTAKES: dict[str, Callable[[reference.Dense], dict[str, Tensor]]] = {
    "logprob of the next column": lambda d: {"logprob": (d.logp * d.one_hot.roll(1, -1)).sum(-1)},
    "entropy without log s": lambda d: {"entropy": d.entropy + d.logp.amax(-1)},
    "entropy of the untempered row": lambda d: {"entropy": (d.p * d.x).sum(-1) * 0.7},
    "collision not normalised": lambda d: {"collision": d.x.exp().square().sum(-1)},
    "covariance without Q": lambda d: {
        "vocab_covariance": d.vocab_covariance + (d.p * d.p * d.logp).sum(-1) + d.entropy * d.collision
    },
    "p_max not normalised": lambda d: {"p_max": torch.ones_like(d.entropy)},
    "p_max of the target": lambda d: {"p_max": d.logprob.exp()},
    "mean_logit of the tempered row": lambda d: {"mean_logit": d.mean_logit / 0.7},
    "mean_logit from the maximum": lambda d: {"mean_logit": d.mean_logit - d.capped.amax(-1)},
    "covariance 0": lambda d: {"vocab_covariance": torch.zeros_like(d.entropy)},
}


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("mistake", VALUE_MISTAKES)
def test_wrong_values_fail(mistake: str, vocab: int) -> None:
    _, bound, _ = make(torch.float32, vocab)
    wrong = {name: value.float() for name, value in VALUE_MISTAKES[mistake](bound.exact).items()}
    with pytest.raises(AssertionError):
        bound.check_values(**wrong)


def test_nan_and_inf_are_compared_exactly() -> None:
    sample = plain(torch.float32, "cpu", rows=3)
    sample.logits[0, 3] = torch.nan
    sample.logits[1, sample.target[1]] = -torch.inf
    bound = Bound(sample.logits, sample.target)
    right = bound.exact.logprob.float()
    bound.check_values(logprob=right)
    for row, value in ((0, 0.0), (1, torch.nan), (1, -1e30), (2, torch.nan), (2, -torch.inf)):
        wrong = right.clone()
        wrong[row] = value
        with pytest.raises(AssertionError, match="logprob"):
            bound.check_values(logprob=wrong)
