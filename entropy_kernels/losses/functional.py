"""The public losses, as functions and modules: keywords, one record made of them, one evaluation.

Read on in this order: options.py (the record), tokens.py (the tensors of a call), evaluate.py (values, derivatives and
metrics) with surrogates.py (the closed forms), aggregation.py and kl.py; linear.py does the same between the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_kernels import _torch
from entropy_kernels._arguments import keywords, recorded, refuse_mapped, refuse_transforms
from entropy_kernels._selection_request import SeedCounter
from entropy_kernels.control import Control
from entropy_kernels.losses import options, surrogates, tokens
from entropy_kernels.losses.evaluate import Loss, metric_names
from entropy_kernels.losses.options import Clip
from entropy_kernels.losses.surrogates import Surrogate


class PolicyLoss(NamedTuple):
    """A loss to call backward on, and its metrics.

    Attributes:
        loss: 0-d, fp32 (fp64 for fp64 log-probs), in the unit of the advantages; of the mask's shape with
            ``loss_agg_mode="none"``.
        metrics: 0-d tensors of the loss's dtype, detached, on the device; :data:`entropy_kernels.losses.METRICS`
            has their definitions.

    Source:
        docs/losses.md.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: float | Tensor | None = 0.2,
    clip_high: float | Tensor | None = 0.2,
    dual_clip: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    ref_logprob: Tensor | None = None,
    ref_kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k3",
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    batch_group: Any = None,
    surrogate: str | Surrogate = "ppo",
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    covariance_advantages: Tensor | None = None,
    ref_kl_importance: bool = False,
    nonfinite: str = "propagate",
    control: Control | None = None,
    **surrogate_options: Any,
) -> PolicyLoss:
    """A policy loss with entropy bonus and reference KL: of PPO, GRPO, RLOO, DAPO, GSPO, CISPO and more.

    Per token, with r = exp(logprob - old_logprob), *not* clamped: l1 = -A·r, l2 = -A·clamp(r, 1 - clip_low,
    1 + clip_high), surrogate max(l1, l2) (arXiv 1707.06347, Eq. 7); with a dual clip c and A < 0 at most -A·c
    (arXiv 1912.09729, Eq. 5); or another ``surrogate``. The loss is the aggregate of
    token_weight·surrogate - entropy_coef·entropy + ref_kl_coef·KL.
    Everything runs on the device of ``logprob`` without a value read back by the host, also under
    ``torch.compile(fullgraph=True)``.

    Args:
        logprob: (..., L), often (B, L): log-probs of the sampled tokens in nats under the policy that is trained,
            bf16, fp16, fp32 or fp64, any strides; differentiable. 1-D (packed tokens) where the aggregation needs no
            sequences.
        old_logprob: of the policy that sampled the tokens, nats; ``logprob``'s shape, any floating-point dtype, a
            constant here.
        advantages: ``logprob``'s shape, or (B,) or (B, 1): one per sequence; floating point or integers, raw, a
            constant here.
        mask: ``logprob``'s shape, bool, int or float 0/1, 1 = counts; None: all tokens count. What stands in padding,
            NaN included, reaches neither value nor gradient. Another value, in any mask, is an error on the CPU (in
            compiled code a RuntimeError) and with ENTROPY_KERNELS_DEBUG=1; else its token counts as NaN.
        clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high; None: no clip on that side. These
            and all other numbers may be 0-d tensors, which are not read back; under torch.compile no value of theirs
            compiles anew. Python numbers have to be finite in fp32.
        dual_clip: a number > 1 or a 0-d tensor, or None for none.
        entropy: ``logprob``'s shape, any floating-point dtype, nats, differentiable
            (:func:`entropy_kernels.logprob_entropy`); gives the metric, and with ``entropy_coef`` the bonus with its
            true gradient.
        entropy_coef: number, or 0-d tensor for a coefficient that changes on the device.
        ref_logprob: log-probs under the reference policy, nats; ``logprob``'s shape, any floating-point dtype, a
            constant.
        ref_kl_coef: number or 0-d tensor.
        kl_estimator: "k1", "abs", "k2", "k3", with '+' for k2's gradient; :func:`entropy_kernels.losses.kl_estimate`.
        loss_agg_mode: with L_b the sum over sequence b and m_b its length: "token-mean" ΣL_b / Σm_b; "token-sum" ΣL_b;
            "seq-mean-token-sum" and "seq-mean-token-mean" the mean of L_b, of L_b / m_b, over sequences with m_b > 0;
            "seq-mean-token-sum-norm" the former divided by ``loss_scale_factor``; "none": the loss of each token, for
            callers that sum up themselves (:func:`entropy_kernels.aggregate`).
        dp_size: by how much the caller's gradient reduction divides: the loss is multiplied by it. Under DDP and FSDP,
            which average over ranks, the number of ranks; 1 where gradients are summed. Beyond 1 the loss needs a
            denominator of the whole batch: one of the next two, or ``batch_group``.
        batch_num_tokens: valid tokens of the whole batch (all micro-batches, all ranks), the denominator of
            "token-mean"; int or 0-d tensor. None: those of this call, or of ``batch_group``.
        global_batch_size: sequences of the whole batch, the denominator of the "seq-mean" modes; int or 0-d tensor.
            None: the non-empty ones of this call, or of ``batch_group``.
        loss_scale_factor: divisor of "seq-mean-token-sum-norm", a number or a 0-d tensor; None: L. Give it where L
            changes between calls.
        batch_group: torch.distributed process group over data-parallel ranks: denominators that are not given, metrics
            and covariance are taken over all its ranks. Each rank's loss is its own share of the batch's loss: the
            shares add up to it (× dp_size). No gradient crosses ranks; all ranks make the same calls, with the same
            options: else all of them raise the same error, or, on a GPU, the loss is NaN; compiled code does not look.
            Denominators that are given, and ``dp_size``, may be each rank's own.
        surrogate: a name of :func:`entropy_kernels.surrogates` ("ppo", "gspo", "gspo_token", "cispo", "sapo", ...;
            docs/losses.md has their formulas), or an :class:`entropy_kernels.Surrogate` of your own.
        token_weight: a constant factor of each token's surrogate (importance weights of the rollout, masks of
            sequences); ``logprob``'s shape, or one per sequence, any real dtype. Not of entropy bonus, reference KL,
            covariance or metrics; a token of weight 0 stays in all counts.
        cu_seqlens: (S + 1,) int32 or int64, for packed rows: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
            of the flattened batch. Sequences are otherwise the rows.
        covariance_advantages: shape and dtype as of ``advantages``: what covariances (the metrics', the selection's)
            are computed from, where ``advantages`` have been scaled, as by 1/N.
        ref_kl_importance: multiply the reference KL by the ratio that the surrogate uses (the token's, where that is
            a product over the sequence), differentiated, as TRL does by default (``use_bias_correction_kl``).
        nonfinite: "propagate": a valid token whose log-prob, old log-prob or advantage (of either kind) is not finite
            makes the loss NaN; "drop": it counts as masked. The metric ``nonfinite_tokens`` counts it either way.
        control: what :func:`entropy_kernels.control` lets the tokens do: its masks, its factor of ``token_weight``, its
            advantages (covariances keep ``advantages``), its coefficient of the entropy bonus. Not beside a selection
            made in the call.
        surrogate_options: options of the surrogate, such as ``tau_pos`` of "sapo" or ``delta`` of "ppo".

    Returns:
        ``PolicyLoss(loss, metrics)``: a 0-d loss in fp32 (fp64 for fp64 log-probs), in the unit of the advantages, and
        a dict of 0-d tensors (:data:`entropy_kernels.losses.METRICS`), which nothing has read back. Without a valid
        token the loss is a differentiable 0. A non-finite input at a valid token makes loss and gradient of that token
        NaN and is counted in ``nonfinite_tokens``; so is a ratio that overflows where no clip holds it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or one that another
            argument requires.
        NotImplementedError: forward-mode differentiation, torch.func's transforms (vmap, grad, ...).

    Source:
        arXiv 1707.06347, Eq. 7; arXiv 1912.09729, Eq. 5; docs/losses.md has those of the other surrogates.
    """
    return _loss("ppo", {
        "logprob": logprob, "old_logprob": old_logprob, "advantages": advantages, "mask": mask, "clip_low": clip_low,
        "clip_high": clip_high, "dual_clip": dual_clip, "entropy": entropy, "entropy_coef": entropy_coef,
        "ref_logprob": ref_logprob, "ref_kl_coef": ref_kl_coef, "kl_estimator": kl_estimator,
        "loss_agg_mode": loss_agg_mode, "dp_size": dp_size, "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size, "loss_scale_factor": loss_scale_factor, "batch_group": batch_group,
        "surrogate": surrogate, "token_weight": token_weight, "cu_seqlens": cu_seqlens,
        "covariance_advantages": covariance_advantages, "ref_kl_importance": ref_kl_importance, "nonfinite": nonfinite,
        "control": control,
        "surrogate_options": surrogate_options,
    })  # fmt: skip


def clip_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: Clip = "preset",
    clip_high: Clip = "preset",
    dual_clip: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    ref_logprob: Tensor | None = None,
    ref_kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k3",
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    batch_group: Any = None,
    surrogate: str | Surrogate = "ppo",
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    covariance_advantages: Tensor | None = None,
    ref_kl_importance: bool = False,
    nonfinite: str = "propagate",
    control: Control | None = None,
    backend: str = "auto",
    preset: str = "verl",
    seed: Any = None,
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    band: str | None = None,
    token_index: Tensor | None = None,
    dropped: Tensor | None = None,
    **surrogate_options: Any,
) -> PolicyLoss:
    """Clip-Cov: of the tokens whose covariance lies in a range, a few drawn at random lose their gradient.

    :func:`policy_loss`, but ratio·N of the N valid tokens, drawn with ``seed`` among those whose covariance
    (lp - mean lp)·(A - mean A) lies within low..high, have no gradient. Without ``dropped`` the selection is made in
    this call, among the tokens of this call (of all ranks with ``batch_group``): a batch split into micro-batches then
    drops more tokens the finer the split. To select over the whole batch use :class:`entropy_kernels.SelectionBatch`
    and hand each micro-batch its mask.

        ek.clip_cov_loss(logprob, old_logprob, advantages, mask, seed=step).loss.backward()

    Args:
        logprob: (B, L) log-probs of the sampled tokens under the policy that is trained, nats, bf16 to fp64;
            differentiable. Or (N,), and what else :func:`policy_loss` takes.
        old_logprob: those of the policy that sampled the tokens: the same shape, any floating-point dtype, constant.
        advantages: the same shape, or (B,) or (B, 1), one per sequence; floating point or integers, raw, constant.
        mask: ``logprob``'s shape, bool, int or float 0/1, 1 = counts; None: all tokens count.
        preset: "verl": PPO clip at 0.2, strict range, tokens that the PPO clip stops are no candidates (but count in
            means and N), at least one token, a dropped token is 0 in value and gradient while the denominator counts
            it. "paper": no PPO clip, closed range, ⌊ratio·N⌋ without a minimum, all valid tokens are candidates, a
            dropped token keeps its value. Both: ratio 2e-4, range [1, 5]. :data:`entropy_kernels.losses.CLIP_COV`.
        clip_low, clip_high: PPO's clip, the ratio within 1 - clip_low .. 1 + clip_high: a number, a 0-d tensor, None
            (no clip) or "preset" for the preset's.
        seed: int or 0-d int64 tensor, another one for every update, or an :class:`entropy_kernels.SeedCounter`, which
            counts the calls; required unless ``dropped`` is given.
        ratio: share of the valid tokens to drop, a fraction (2e-4 is 0.02 %) or a 0-d tensor; None: the preset's.
        k: number of tokens to drop instead, an int or a 0-d tensor.
        low, high: bounds of the covariance range, numbers or 0-d tensors; None: the preset's.
        band: "absolute": bounds are covariances; "quantile": shares in [0, 1] of the candidates' covariances, and
            ``low`` and ``high`` must be given. None: the preset's.
        token_index: int64, ``logprob``'s shape: makes the draw independent of padding and order; unused with
            ``dropped``. See :func:`entropy_kernels.clip_cov_mask`.
        dropped: ``logprob``'s shape, bool, int or float 0/1: 1 = this token's gradient is removed, and nothing is
            selected here. Not together with seed, ratio, k, low, high or band. With a sequence's ratio it is the
            gradient of this token's loss: its log-prob is part of the ratio of the others.
        backend: "auto", "torch", "triton", "cpu" or "cuda", of covariance and selection.
        others: as in :func:`policy_loss`. Entropy bonus, reference KL, aggregation over tokens and
            ranks, surrogate, token weights, packed sequences.

    Returns:
        ``PolicyLoss(loss, metrics)``, as :func:`policy_loss`: 0-d, fp32 (fp64 for fp64), in the unit of the advantages.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`policy_loss`; no seed; a seed, ratio, k, low, high or
            band beside ``dropped``.

    Source:
        arXiv 2505.22617, Eq. 12; docs/losses.md.
    """
    return _loss("clip_cov", {
        "logprob": logprob, "old_logprob": old_logprob, "advantages": advantages, "mask": mask, "clip_low": clip_low,
        "clip_high": clip_high, "dual_clip": dual_clip, "entropy": entropy, "entropy_coef": entropy_coef,
        "ref_logprob": ref_logprob, "ref_kl_coef": ref_kl_coef, "kl_estimator": kl_estimator,
        "loss_agg_mode": loss_agg_mode, "dp_size": dp_size, "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size, "loss_scale_factor": loss_scale_factor, "batch_group": batch_group,
        "surrogate": surrogate, "token_weight": token_weight, "cu_seqlens": cu_seqlens,
        "covariance_advantages": covariance_advantages, "ref_kl_importance": ref_kl_importance, "nonfinite": nonfinite,
        "control": control,
        "backend": backend, "preset": preset, "seed": seed, "ratio": ratio, "k": k, "low": low, "high": high,
        "band": band, "token_index": token_index, "dropped": dropped, "surrogate_options": surrogate_options,
    })  # fmt: skip


def kl_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: Clip = "preset",
    clip_high: Clip = "preset",
    dual_clip: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    ref_logprob: Tensor | None = None,
    ref_kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k3",
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    batch_group: Any = None,
    surrogate: str | Surrogate = "ppo",
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    covariance_advantages: Tensor | None = None,
    ref_kl_importance: bool = False,
    nonfinite: str = "propagate",
    control: Control | None = None,
    backend: str = "auto",
    preset: str = "verl",
    ratio: float | Tensor | None = None,
    k: int | Tensor | None = None,
    kl_coef: float | Tensor = 1.0,
    penalty_estimator: str | None = None,
    token_index: Tensor | None = None,
    penalized: Tensor | None = None,
    **surrogate_options: Any,
) -> PolicyLoss:
    """KL-Cov: the tokens of largest covariance are held near the policy that sampled them.

    -A·r, plus kl_coef·|logprob - old_logprob| at the selected tokens; no PPO clip in either preset. The penalty has no
    effect where logprob equals old_logprob, as in the first update after a rollout. The selection is made in this call,
    unless ``penalized`` is given, as that of :func:`clip_cov_loss`.

        ek.kl_cov_loss(logprob, old_logprob, advantages, mask, ratio=2e-3).loss.backward()

    Args:
        logprob, old_logprob, advantages, mask: as in :func:`clip_cov_loss`.
        preset: "verl": ratio 2e-4, at least one token. "paper": ratio 2e-3, ⌊ratio·N⌋ without a minimum.
            :data:`entropy_kernels.losses.KL_COV`.
        clip_low, clip_high: "preset" (the default) and None: no PPO clip; a number or a 0-d tensor adds one.
        ratio: share of the valid tokens to penalise, a fraction or a 0-d tensor; None: the preset's
            (:func:`entropy_kernels.kl_cov_mask`, which knows no preset, has the paper's 2e-3).
        k: number of tokens to penalise instead, an int or a 0-d tensor.
        kl_coef: β, number or 0-d tensor.
        penalty_estimator: "abs" (|logprob - old_logprob|, None: the preset's, which is this), "k2", "k3", "k1", each
            with '+' for k2's gradient.
        token_index: int64, ``logprob``'s shape: decides ties; unused with ``penalized``.
        penalized: ``logprob``'s shape, bool, int or float 0/1: 1 = the penalty is added, and nothing is selected here.
            Not together with ratio or k.
        backend: as in :func:`clip_cov_loss`.
        others: as in :func:`policy_loss`. Entropy bonus, reference KL, aggregation over tokens and
            ranks, surrogate, token weights, packed sequences.

    Returns:
        ``PolicyLoss(loss, metrics)``, as :func:`policy_loss`: 0-d, fp32 (fp64 for fp64), in the unit of the advantages.

    Raises:
        TypeError, ValueError, NotImplementedError: as in :func:`policy_loss`; a ratio or k beside ``penalized``.

    Source:
        arXiv 2505.22617, Eq. 13; docs/losses.md.
    """
    return _loss("kl_cov", {
        "logprob": logprob, "old_logprob": old_logprob, "advantages": advantages, "mask": mask, "clip_low": clip_low,
        "clip_high": clip_high, "dual_clip": dual_clip, "entropy": entropy, "entropy_coef": entropy_coef,
        "ref_logprob": ref_logprob, "ref_kl_coef": ref_kl_coef, "kl_estimator": kl_estimator,
        "loss_agg_mode": loss_agg_mode, "dp_size": dp_size, "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size, "loss_scale_factor": loss_scale_factor, "batch_group": batch_group,
        "surrogate": surrogate, "token_weight": token_weight, "cu_seqlens": cu_seqlens,
        "covariance_advantages": covariance_advantages, "ref_kl_importance": ref_kl_importance, "nonfinite": nonfinite,
        "control": control,
        "backend": backend, "preset": preset, "ratio": ratio, "k": k, "kl_coef": kl_coef,
        "penalty_estimator": penalty_estimator, "token_index": token_index, "penalized": penalized,
        "surrogate_options": surrogate_options,
    })  # fmt: skip


def _loss(method: str, given: dict[str, Any]) -> PolicyLoss:
    """``given``: every argument by its name, written out above because torch 2.11 cannot compile ``locals()``."""
    if not torch.compiler.is_compiling() and _torch.in_transform():
        refuse_mapped(given)
    if given["control"] is not None:
        given = options.controlled(method, given)
    chosen = options.make(method, given, getattr(given["logprob"], "device", None))
    found = tokens.checked(given, chosen)
    return apply(*found, chosen if chosen.seeds is None else options.seeded(chosen))


def apply(
    logprob: Tensor, entropy: Tensor | None, batch: tokens.Tokens, shape: torch.Size, chosen: options.LossOptions
) -> PolicyLoss:
    """The loss of checked tensors; ``shape``: of the loss per token."""
    if not torch.compiler.is_compiling() and (_torch.in_forward_mode() or _torch.in_transform()):
        refuse_transforms("policy_loss", logprob, logprob if entropy is None else entropy)
    loss, *values = Loss.apply(logprob, entropy, chosen.entropy_coef, chosen.ref_kl_coef, batch, chosen)
    names = metric_names(chosen, entropy is not None, batch.ref_logprob is not None)
    if chosen.aggregation.mode == "none":
        loss = loss.view(shape)
    return PolicyLoss(loss, dict(zip(names, values, strict=True)))


def aggregate(
    term: Tensor,
    mask: Tensor | None,
    *,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: float | Tensor | None = None,
    batch_group: Any = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What the losses make of their tokens' losses: the aggregate of a per-token term of your own.

    Args:
        term: (..., L), floating point, differentiable. What stands where the mask is 0 reaches nothing.
        mask: ``term``'s shape, bool, int or float 0/1; None: all tokens count.
        others: as in :func:`policy_loss`; ``loss_agg_mode="none"`` returns the term with 0 where masked.

    Returns:
        0-d (``term``'s shape for "none"), fp32, or fp64 for fp64, in the unit of ``term``.

    Raises:
        TypeError, ValueError: as in :func:`policy_loss`.

    Source:
        docs/losses.md.
    """
    given = {
        "loss_agg_mode": loss_agg_mode, "dp_size": dp_size, "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size, "loss_scale_factor": loss_scale_factor, "batch_group": batch_group,
    }  # fmt: skip
    refuse_mapped({"cu_seqlens": cu_seqlens})
    aggregation = options.aggregation(given, getattr(term, "device", None))
    values, valid, sequences = tokens.check_summand(term, mask, cu_seqlens, aggregation)
    if valid is not None:
        (valid,) = recorded(valid)
        values = torch.where(valid, values, 0)
    if aggregation.mode == "none":
        return values.view(term.shape)
    counts, weight = aggregation.counted(
        torch.ones_like(values, dtype=torch.bool) if valid is None else valid, sequences
    )
    counts = aggregation.whole(counts, aggregation.in_common())
    total = aggregation.weighted_sum(values, weight, sequences)
    return (total * aggregation.dp_size / aggregation.denominator(counts, sequences.width or values.shape[-1])).to(
        values.dtype
    )


# ---- as modules: what stays the same is given once, what changes is given in each call -------------------------------


class _LossModule(nn.Module):
    """Holds keyword arguments of a loss function. A module has no parameters."""

    _function: Callable[..., PolicyLoss]
    __call__: Callable[..., PolicyLoss]  # nn.Module says Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [*keywords(self._function), *surrogates.find(options.get("surrogate", "ppo")).defaults]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: expected keyword arguments of {self._function.__name__} "
                f"({', '.join(known)}), got {', '.join(unknown)}"
            )
        self.options = options

    def forward(
        self, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor | None, **options: Any
    ) -> PolicyLoss:
        """The loss of a batch.

        Args:
            logprob, old_logprob, advantages, mask: as in :func:`policy_loss`.
            options: keyword arguments of the function; those of this call go before those of the module.

        Returns:
            As :func:`policy_loss`.

        Raises:
            TypeError, ValueError, NotImplementedError: as in :func:`policy_loss`.
        """
        return self._function(logprob, old_logprob, advantages, mask, **{**self.options, **options})

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class PolicyLossModule(_LossModule):
    """:func:`entropy_kernels.policy_loss` with fixed options.

        criterion = PolicyLossModule(clip_high=0.28, entropy_coef=0.01)
        criterion(logprob, old_logprob, advantages, mask, entropy=entropy).loss.backward()

    Args:
        options: keyword arguments of the function; those that change (``entropy``, ``ref_logprob``,
            ``batch_num_tokens``, ...) are given in the call, with the same names.

    Raises:
        TypeError: an option that the function does not have.
        ValueError: a surrogate that there is not.

    Source:
        docs/losses.md.
    """

    _function = staticmethod(policy_loss)


class ClipCovLoss(_LossModule):
    """:func:`entropy_kernels.clip_cov_loss` with fixed options, and with seeds that need no step number.

        criterion = ClipCovLoss(preset="verl", ratio=2e-4)
        criterion(logprob, old_logprob, advantages, mask).loss.backward()

    Args:
        seed: of the first call; each later one draws with the next (:class:`SeedCounter`), the count being part of
            ``state_dict()``. A call that is given ``seed`` or ``dropped`` uses that and is not counted.
        options: as in :class:`PolicyLossModule`.

    Attributes:
        seeds: the :class:`SeedCounter`.

    Raises:
        TypeError, ValueError: as in :class:`PolicyLossModule`; a seed of more than 62 bits.

    Source:
        arXiv 2505.22617, Eq. 12; docs/losses.md.
    """

    _function = staticmethod(clip_cov_loss)

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seeds = SeedCounter(seed)

    def forward(
        self, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor | None, **options: Any
    ) -> PolicyLoss:
        if all({**self.options, **options}.get(name) is None for name in ("seed", "dropped")):
            options["seed"] = self.seeds
        return super().forward(logprob, old_logprob, advantages, mask, **options)


class KlCovLoss(_LossModule):
    """:func:`entropy_kernels.kl_cov_loss` with fixed options.

        criterion = KlCovLoss(preset="paper", kl_coef=1.0)
        criterion(logprob, old_logprob, advantages, mask).loss.backward()

    Args:
        options: as in :class:`PolicyLossModule`.

    Raises:
        TypeError, ValueError: as in :class:`PolicyLossModule`.

    Source:
        arXiv 2505.22617, Eq. 13; docs/losses.md.
    """

    _function = staticmethod(kl_cov_loss)
