"""Public functions on the batch: which tokens drive entropy down, and which of them Clip-Cov and KL-Cov act on.

Selection stands between the statistics and the loss: over the whole batch (all micro-batches, all ranks of a group),
without gradient and without a value read back by the host. Method: arXiv 2505.22617, §4.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from torch import Tensor

from entropy_kernels._arguments import check_float, group_name, of_type, poisoned
from entropy_kernels._selection_request import SeedCounter, boolean_of, budget_numbers, per_token, request, tokens_of
from entropy_kernels.ops import selection as op
from entropy_kernels.ops.token_moments import token_moments as moments_op

__all__ = [
    "SeedCounter",
    "TokenMoments",
    "budget_tokens",
    "clip_cov_mask",
    "kl_cov_mask",
    "random_tokens",
    "token_covariance",
    "token_moments",
    "top_tokens",
]

CLIP_COV_RATIO = 2e-4
KL_COV_RATIO = 2e-3


covariance_of = op.token_covariance  # of tensors of one shape, the mask bool or None; the group's name


def token_covariance(
    logprob: Tensor, advantages: Tensor, mask: Tensor | None = None, *, batch_group: Any = None, backend: str = "auto"
) -> Tensor:
    """Covariance of each token's log-prob with its advantage, (lp - mean lp)·(A - mean A); arXiv 2505.22617, Eq. 10.

    The means are over the tokens of ``mask``, on all ranks of ``batch_group``; advantages are raw, never scaled by
    1/N. Means and product are computed in float64, from sums that do not depend on the order of their terms: the
    result is the same, bit for bit, on every backend and for every split of the batch over ranks or micro-batches
    (:class:`SelectionBatch`).

    Args:
        logprob: log-probs of the sampled tokens in nats, any floating-point dtype, shape and strides; often (B, L).
        advantages: ``logprob``'s shape, or (B,) or (B, 1) for one per sequence, or 0-d; floats or integers.
        mask: bool, int or float 0/1, ``logprob``'s shape or size 1 per dimension; True = counts. None: all do. Another
            value is an error on the CPU and with ENTROPY_KERNELS_DEBUG=1; else all that it reaches is NaN.
        batch_group: torch.distributed process group over the ranks that share the batch; shapes may differ between
            ranks, and a rank may have no tokens.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; see :func:`entropy_kernels.backends`.

    Returns:
        fp32, ``logprob``'s shape, nats times the unit of the advantages, without gradient; 0 where masked, whatever
        stands there. A non-finite value in a token that counts makes a mean, and so the covariance of every token that
        counts, NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Source:
        arXiv 2505.22617, Eq. 10; docs/math.md §3.
    """
    check_float("logprob", logprob)
    advantages = per_token("advantages", advantages, logprob)
    mask, wrong = boolean_of("mask", mask, "logprob", logprob)
    of_type("backend", backend, str)
    return covariance_of(poisoned(logprob.detach(), wrong), advantages.detach(), mask, group_name(batch_group), backend)


class TokenMoments(NamedTuple):
    """Of the tokens that count, over the whole batch, in the values' unit; without any token all are 0.

    Attributes:
        tokens: 0-d float64, without gradient, as all of them: how many tokens count.
        total: 0-d float64: the sum.
        mean: 0-d float64.
        std: 0-d float64: that of the population, sqrt(Σ(x - mean)²/N); 0 where it was not asked for.
        largest: 0-d float64.

    Source:
        docs/math.md §3.
    """

    tokens: Tensor
    total: Tensor
    mean: Tensor
    std: Tensor
    largest: Tensor


def token_moments(
    values: Tensor, mask: Tensor | None = None, *, std: bool = False, batch_group: Any = None
) -> TokenMoments:
    """Sum, mean, standard deviation and maximum of a value per token, over the ranks that share the batch.

    Sums are made of integers: each term is rounded to a multiple of 2^-51 of the largest (coarser only where 63 bits
    could not hold the sum). The result is the same, bit for bit, for every split of the batch over ranks or
    micro-batches, and on every device; nothing is read back by the host.

    Args:
        values: floating point, any shape.
        mask: bool, int or float 0/1, ``values``'s shape or size 1 per dimension; True = counts. None: all do.
        std: whether the standard deviation is asked for, which costs a second pass and a second reduction.
        batch_group: torch.distributed process group over the ranks that share the batch.

    Returns:
        :class:`TokenMoments`. A non-finite value in a token that counts makes sum, mean and deviation NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Source:
        docs/math.md §3.
    """
    check_float("values", values)
    of_type("std", std, bool)
    mask, wrong = boolean_of("mask", mask, "values", values)
    flat = poisoned(values.detach(), wrong).double().reshape(1, -1)
    found = moments_op(flat, None if mask is None else mask.reshape(-1), std, group_name(batch_group))
    return TokenMoments(*found[0].unbind())


def totals_of(values: Tensor, mask: Tensor | None, group: str) -> tuple[Tensor, ...]:
    """Of ``values`` (K, N) float64 the K sums of :func:`token_moments`, in one reduction; ``group``: its name."""
    return moments_op(values, mask, False, group)[:, 1].unbind()


def random_tokens(
    score: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int | Tensor,
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    low: float | Tensor = -math.inf,
    high: float | Tensor = math.inf,
    band: Literal["absolute", "quantile"] = "absolute",
    closed: bool = False,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
    batch_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """n tokens drawn uniformly among those whose score lies in a range: Clip-Cov's choice, of any score.

    n = max(1, floor(float64(ratio) · N)), N the number of tokens of ``mask`` over all ranks; fewer if there are fewer
    candidates, 0 if N = 0. The draw is the n largest random keys among the candidates, the key of a token being the
    first word of Philox4x32-10 for counter (token index, 0, 0) and key ``seed``; ties go to the lower token index. It
    depends on nothing else: not on shape, padding, ranks or backend.

    A schedule gives ratio, k, low and high as 0-d tensors of a float or int dtype, on the score's device or the CPU:
    their values are never read by the host, a CUDA graph reads those on its device anew at each replay, and under
    torch.compile a new value compiles nothing again, another Python number once. ENTROPY_KERNELS_DEBUG=1 checks them in
    eager mode, at the price of a sync. Unchecked, a ratio and the shares of a range are clamped to [0, 1], k to >= 0
    and rounded down (NaN is 0), and a range whose low is not below its high is empty.

    Args:
        score: any shape, floating-point dtype and strides, compared in fp32; as from :func:`token_covariance`.
        mask: bool, int or float 0/1, ``score``'s shape or size 1 per dimension; None: all tokens count. Another value,
            in ``exclude`` too, is an error on the CPU and with ENTROPY_KERNELS_DEBUG=1; else nothing is selected.
        seed: an int of at most 64 bits, or a 0-d int64 tensor on the score's device, which a CUDA graph reads anew at
            each replay, or on the CPU.
        ratio: share of N to select, in (0, 1]; a fraction: 2e-4 is 0.02 %. It and the next three may be 0-d tensors.
        k: number of tokens to select instead of a ratio, >= 0; or a 0-d tensor.
        low, high: bounds of the range, low < high, rounded to fp32; or 0-d tensors.
        band: "absolute": bounds are scores. "quantile": they are shares in [0, 1], and stand for the scores number
            floor(share · (M - 1)) in ascending order of the M candidates of the whole group.
        closed: whether the bounds belong to the range.
        at_least_one: False: n = floor(ratio · N), which may be 0; k is taken as it is either way.
        exclude: shape and dtype as of ``mask``; True = counts in N but is no candidate.
        token_index: int64, ``score``'s shape, distinct over the batch where ``mask`` is True. Default: flat
            row-major position plus the number of positions on lower ranks. Whoever pads or splits a batch in
            different ways passes it, and the selection stays the same.
        batch_group: torch.distributed process group over the ranks that share the batch, and all arguments from seed
            to at_least_one: else every rank raises the same error (on a GPU without ENTROPY_KERNELS_DEBUG=1: nothing is
            selected). All pass ``token_index``, or none.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; see :func:`entropy_kernels.backends`.

    Returns:
        bool, ``score``'s shape. NaN is never selected.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range; ratio and k, or neither.

    Source:
        docs/math.md §3.
    """
    return _selected(
        "score", score, mask, exclude, token_index, None, batch_group, seed=seed, ratio=ratio, k=k, low=low, high=high,
        band=band, closed=closed, at_least_one=at_least_one, backend=backend,
    )  # fmt: skip


def clip_cov_mask(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int | Tensor,
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    low: float | Tensor = 1.0,
    high: float | Tensor = 5.0,
    band: Literal["absolute", "quantile"] = "absolute",
    closed: bool = False,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
    batch_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Tokens that Clip-Cov drops: n drawn uniformly among those whose covariance lies in a range.

    :func:`random_tokens` under the paper's name, with its defaults: a ratio of 2e-4 and the range (1, 5).

    Args:
        covariance: any shape and floating-point dtype, as from :func:`token_covariance`.
        others: as in :func:`random_tokens`.

    Returns:
        bool, ``covariance``'s shape. NaN is never selected.

    Raises:
        TypeError, ValueError: as in :func:`random_tokens`.

    Source:
        arXiv 2505.22617, Eq. 11; docs/math.md §3.
    """
    return _selected(
        "covariance", covariance, mask, exclude, token_index, CLIP_COV_RATIO, batch_group, seed=seed,
        ratio=ratio, k=k, low=low, high=high, band=band, closed=closed, at_least_one=at_least_one, backend=backend,
    )  # fmt: skip


def top_tokens(
    score: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
    batch_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """The n tokens of largest score, of any sign: KL-Cov's choice, of any score.

    n = max(1, floor(float64(ratio) · N)) as in :func:`random_tokens`. Scores are compared in fp32, -0 equals +0, ties
    go to the lower token index, NaN is never selected.

    Args:
        others: as in :func:`random_tokens`.

    Returns:
        bool, ``score``'s shape.

    Raises:
        TypeError, ValueError: as in :func:`random_tokens`.

    Source:
        docs/math.md §3.
    """
    return _selected(
        "score", score, mask, exclude, token_index, None, batch_group, ratio=ratio, k=k,
        at_least_one=at_least_one, backend=backend,
    )  # fmt: skip


def budget_tokens(
    score: Tensor,
    mask: Tensor | None = None,
    *,
    budget: float | Tensor | None = None,
    limit: float | Tensor | None = None,
    share: float | Tensor | None = None,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
    batch_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """The fewest tokens of largest score whose scores come to a budget.

    Candidates are the tokens of ``mask`` with a finite score above 0 that are not excluded, by score descending, ties
    to the lower token index. Selected is their shortest prefix of which one of three holds:

    - ``budget``: its scores sum to at least so much. None for a budget that is not above 0, or is NaN.
    - ``limit``: what it leaves sums to at most so much, over all tokens of ``mask`` with a finite score, excluded ones
      and those below 0 too.
    - ``share``: its scores sum to at least so large a part of those of all candidates.

    All candidates where that cannot be reached. The sums are exact, so that equal scores give equal masks on every
    backend and for every split of the batch over ranks or micro-batches: a score counts as the nearest multiple, ties
    to even, of 2^-b, b = min(1000, min(51, 62 - E(N)) - E(max)), with N the number of tokens of ``mask`` over all
    ranks, max the largest finite |score| among them and E(x) the smallest e with x < 2^e; budget and limit are not
    rounded. So a score below 2^-52 of the largest (2^-41 of it in a batch of four million tokens) counts as 0, and is
    not selected. To take at most n tokens too: ``budget_tokens(...) & top_tokens(score, k=n, ...)``, as both are
    prefixes of one order.

    0-d tensors, of a float or int dtype on the score's device or the CPU, as in :func:`random_tokens`: never read by
    the host, and a new value compiles nothing again. Unchecked, a share above 1 is 1, and one that is not above 0, or
    is NaN, selects nothing.

    Args:
        score: any shape, floating-point dtype and strides, rounded to fp32.
        mask: bool, int or float 0/1, ``score``'s shape or size 1 per dimension; None: all tokens count. Another value,
            in ``exclude`` too, is an error on the CPU and with ENTROPY_KERNELS_DEBUG=1; else nothing is selected.
        budget: in units of the score; a number or a 0-d tensor.
        limit: in units of the score, of either sign; a number or a 0-d tensor.
        share: a fraction in (0, 1], or a 0-d tensor: 0.3 is 30 %.
        exclude: shape and dtype as of ``mask``; True = counts in N, max and what is left, but is no candidate.
        token_index: as in :func:`random_tokens`.
        batch_group: torch.distributed process group over the ranks that share the batch, and the three numbers: else
            every rank raises the same error (on a GPU without ENTROPY_KERNELS_DEBUG=1: nothing is selected). All pass
            ``token_index``, or none.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; see :func:`entropy_kernels.backends`.

    Returns:
        bool, ``score``'s shape.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range; not exactly one of budget,
            limit and share.

    Source:
        docs/math.md §3.
    """
    tokens = tokens_of("score", score, mask, exclude, token_index)
    numbers = budget_numbers(score.device, budget=budget, limit=limit, share=share)
    of_type("backend", backend, str)
    return op.budget_mask(*tokens, numbers, group_name(batch_group), backend)


def kl_cov_mask(
    covariance: Tensor,
    mask: Tensor | None = None,
    *,
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    at_least_one: bool = True,
    exclude: Tensor | None = None,
    token_index: Tensor | None = None,
    batch_group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Tokens that KL-Cov penalises: the n of largest covariance, of any sign.

    :func:`top_tokens` under the paper's name, with a default ratio of 2e-3: the paper's for its 7B model, which is that
    of kl_cov_loss's preset "paper". The preset "verl" has 2e-4.

    Args:
        covariance: any shape and floating-point dtype, as from :func:`token_covariance`.
        others: as in :func:`random_tokens`.

    Returns:
        bool, ``covariance``'s shape. NaN is never selected.

    Raises:
        TypeError, ValueError: as in :func:`random_tokens`.

    Source:
        arXiv 2505.22617, KL-Cov; docs/math.md §3.
    """
    return _selected(
        "covariance", covariance, mask, exclude, token_index, KL_COV_RATIO, batch_group, ratio=ratio, k=k,
        at_least_one=at_least_one, backend=backend,
    )  # fmt: skip


def _selected(
    name: str, score: Tensor, mask: Any, exclude: Any, token_index: Any, default: float | None, group: Any, **given: Any
) -> Tensor:
    """The tokens that a function above selects by its argument ``name``; ``default``: its ratio without one."""
    tokens = tokens_of(name, score, mask, exclude, token_index)
    if given.get("seed", 0) is None:  # without the word a request is one for the largest
        raise ValueError("seed: expected an int or a 0-d int64 tensor, got None; ek.SeedCounter counts calls")
    return request(score.device, default=default, group=group, **given)(*tokens)
