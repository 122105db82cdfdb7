"""The public losses. Each is a chain of the same steps: check, say what the policy term is, evaluate, sum up."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropy_kernels.losses import presets
from entropy_kernels.losses.aggregation import Aggregation
from entropy_kernels.losses.inputs import check_coefficient, check_inputs, check_mask
from entropy_kernels.losses.kl import check_estimator
from entropy_kernels.losses.presets import Clip
from entropy_kernels.losses.total import Extras, PolicyLoss, total
from entropy_kernels.policy import Clips, Policy, Selected, Selection, evaluate


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
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
    backend: str = "auto",
) -> PolicyLoss:
    """PPO's clipped surrogate with entropy bonus and reference KL: the loss of PPO, GRPO, RLOO and DAPO.

    Per token, with r = exp(logprob - old_logprob), *not* clamped: l1 = -A·r, l2 = -A·clamp(r, 1 - clip_low,
    1 + clip_high), policy term max(l1, l2) (arXiv 1707.06347, Eq. 7); with a dual clip c and A < 0 at most -A·c
    (arXiv 1912.09729, Eq. 5). The loss is the aggregate of policy term - entropy_coef·entropy + ref_kl_coef·KL.
    Everything runs on the device of ``logprob`` without a value read back by the host, also under
    ``torch.compile(fullgraph=True)``.

    Args:
        logprob: (..., L), often (B, L): log-probs of the sampled tokens in nats under the policy that is trained,
            bf16, fp16, fp32 or fp64, any strides; differentiable. 1-D (packed tokens) where the aggregation needs no
            sequences.
        old_logprob: of the policy that sampled the tokens; ``logprob``'s shape, a constant here.
        advantages: ``logprob``'s shape, or (B,) or (B, 1): one per sequence; raw, a constant here.
        mask: ``logprob``'s shape, bool, int or float 0/1, 1 = counts; None: all tokens count. What stands in padding,
            NaN included, reaches neither value nor gradient.
        clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high; None: no clip on that side.
        dual_clip: > 1, or None for none.
        entropy: ``logprob``'s shape, nats, differentiable (:func:`entropy_kernels.logprob_entropy`); gives the metric,
            and with ``entropy_coef`` the bonus with its true gradient.
        entropy_coef: number, or 0-d tensor for a coefficient that changes on the device.
        ref_logprob: log-probs under the reference policy, ``logprob``'s shape, a constant.
        ref_kl_coef: number or 0-d tensor.
        kl_estimator: "k1", "abs", "k2", "k3", with '+' for k2's gradient; :func:`entropy_kernels.losses.kl_estimate`.
        loss_agg_mode: with L_b the sum over sequence b and m_b its length: "token-mean" ΣL_b / Σm_b; "token-sum" ΣL_b;
            "seq-mean-token-sum" and "seq-mean-token-mean" the mean of L_b, of L_b / m_b, over sequences with m_b > 0;
            "seq-mean-token-sum-norm" the former divided by ``loss_scale_factor``.
        dp_size: by how much the caller's gradient reduction divides: the loss is multiplied by it. Under DDP and FSDP,
            which average over ranks, the number of ranks; 1 where gradients are summed. Beyond 1 the loss needs a
            denominator of the whole batch: one of the next two, or ``batch_group``.
        batch_num_tokens: valid tokens of the whole batch (all micro-batches, all ranks), the denominator of
            "token-mean"; int or 0-d tensor. None: those of this call, or of ``batch_group``.
        global_batch_size: sequences of the whole batch, the denominator of the "seq-mean" modes. None: the non-empty
            ones of this call, or of ``batch_group``.
        loss_scale_factor: divisor of "seq-mean-token-sum-norm"; default: L. Give it where L changes between calls.
        batch_group: torch.distributed process group over data-parallel ranks: denominators that are not given, metrics
            and covariance are taken over all its ranks. Each rank's loss is its own share of the batch's loss: the
            shares add up to it (× dp_size). No gradient crosses ranks; all ranks make the same calls.
        backend: "auto", "torch", "triton", "cpu" or "cuda", for covariance, selection and policy term; see
            :func:`entropy_kernels.backends`. fp64 log-probs are served by "torch".

    Returns:
        ``PolicyLoss(loss, metrics)``: a 0-d loss in fp32 (fp64 for fp64 log-probs), and a dict of 0-d tensors
        (:data:`entropy_kernels.losses.METRICS`), which nothing has read back. Without a valid token the loss is a
        differentiable 0. A non-finite input at a valid token makes loss and gradient of that token NaN and is counted
        in ``nonfinite_tokens``; so is a ratio that overflows where no clip holds it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range, or one that another
            argument requires.
        NotImplementedError: forward-mode differentiation, torch.func's derivatives.
    """
    clips = Clips(clip_low, clip_high, dual_clip)
    clips.check()
    extras = Extras(entropy_coef, ref_kl_coef, check_estimator("kl_estimator", kl_estimator))
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, batch_group
    )
    inputs = check_inputs(logprob, old_logprob, advantages, mask, entropy, entropy_coef, ref_logprob, ref_kl_coef)
    aggregation.check(inputs.logprob)
    policy = Policy(clips)
    return total(inputs, policy, evaluate(*inputs[:4], policy, batch_group, backend), extras, aggregation)


def clip_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: Clip = "preset",
    clip_high: Clip = "preset",
    dual_clip: float | None = None,
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
    backend: str = "auto",
    preset: str = "verl",
    seed: int | Tensor | None = None,
    ratio: float | None = None,
    k: int | None = None,
    low: float | None = None,
    high: float | None = None,
    band: str | None = None,
    token_index: Tensor | None = None,
    dropped: Tensor | None = None,
) -> PolicyLoss:
    """Clip-Cov: of the tokens whose covariance lies in a band, a few drawn at random lose their gradient.

    Eq. 12 of arXiv 2505.22617 on top of :func:`policy_loss`, which has the arguments not listed here, returns and
    errors. Without ``dropped`` the selection is made in this call, among the tokens of this call (of all ranks with
    ``batch_group``): a batch split into micro-batches then drops more tokens the finer the split. To select over the
    whole batch use :class:`entropy_kernels.SelectionBatch` and hand each micro-batch its mask.

    Args:
        preset: "verl": PPO clip at .2, strict band, tokens that the PPO clip holds are no candidates (but count in
            means and N), at least one token, a dropped token is 0 in value and gradient while the denominator counts
            it. "paper": no PPO clip, closed band, ⌊ratio·N⌋ without a minimum, all valid tokens are candidates, a
            dropped token keeps its value. Both: ratio 2e-4, band [1, 5]. :data:`entropy_kernels.losses.CLIP_COV`.
        clip_low, clip_high: as in :func:`policy_loss`, or "preset" (the default) for the preset's; None: no clip.
        seed: int or 0-d int64 tensor, another one for every update; required unless ``dropped`` is given.
        ratio: share of the valid tokens to drop, a fraction (2e-4 is .02 %); None: the preset's.
        k: number of tokens to drop instead.
        low, high: bounds of the band; None: the preset's.
        band: "absolute": bounds are covariances; "quantile": shares in [0, 1] of the candidates' covariances, and
            ``low`` and ``high`` must be given. None: the preset's.
        token_index: int64, ``logprob``'s shape: makes the draw independent of padding and order; unused with
            ``dropped``. See :func:`entropy_kernels.clip_cov_mask`.
        dropped: ``logprob``'s shape, bool, int or float 0/1: 1 = this token's gradient is removed, and nothing is
            selected here. Not together with seed, ratio, k, low, high or band.
    """
    chosen = presets.find(presets.CLIP_COV, preset)
    clip_low = presets.clip_or("clip_low", clip_low, chosen.clip_low)
    clip_high = presets.clip_or("clip_high", clip_high, chosen.clip_high)
    clips = Clips(clip_low, clip_high, dual_clip)
    clips.check()
    _check_selection("dropped", dropped, seed=seed, ratio=ratio, k=k, low=low, high=high, band=band)
    if dropped is None and seed is None:
        raise ValueError("seed: expected an int or a 0-d int64 tensor (or a mask as `dropped`), got None")
    if band == "quantile" and (low is None or high is None):
        raise ValueError(f"low, high: expected shares in [0, 1] with band='quantile', got low={low}, high={high}")
    extras = Extras(entropy_coef, ref_kl_coef, check_estimator("kl_estimator", kl_estimator))
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, batch_group
    )
    inputs = check_inputs(logprob, old_logprob, advantages, mask, entropy, entropy_coef, ref_logprob, ref_kl_coef)
    aggregation.check(inputs.logprob)
    given = check_mask("dropped", dropped, logprob)
    selection = None
    if given is None:
        selection = Selection(
            ratio=chosen.ratio if ratio is None and k is None else ratio,
            k=k,
            at_least_one=chosen.at_least_one,
            token_index=token_index,
            seed=seed,
            low=presets.given_or(low, chosen.low),
            high=presets.given_or(high, chosen.high),
            band=presets.given_or(band, chosen.band),
            closed=chosen.closed,
            exclude_clipped=chosen.exclude_clipped,
        )
    selected_as = Selected.DROPPED if chosen.dropped_value == "zero" else Selected.DETACHED
    policy = Policy(clips, selected_as, selection, given)
    return total(inputs, policy, evaluate(*inputs[:4], policy, batch_group, backend), extras, aggregation)


def kl_cov_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: Clip = "preset",
    clip_high: Clip = "preset",
    dual_clip: float | None = None,
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
    backend: str = "auto",
    preset: str = "verl",
    ratio: float | None = None,
    k: int | None = None,
    kl_coef: float | Tensor = 1.0,
    penalty_estimator: str | None = None,
    token_index: Tensor | None = None,
    penalized: Tensor | None = None,
) -> PolicyLoss:
    """KL-Cov: the tokens of largest covariance are held near the policy that sampled them.

    Eq. 13 of arXiv 2505.22617: -A·r, plus kl_coef·|logprob - old_logprob| at the selected tokens; no PPO clip in either
    preset. The penalty has no effect where logprob equals old_logprob, as in the first update after a rollout.
    Arguments not listed here, returns, errors: :func:`policy_loss`; the scope of the selection: as in
    :func:`clip_cov_loss`.

    Args:
        preset: "verl": ratio 2e-4, at least one token. "paper": ratio 2e-3, ⌊ratio·N⌋ without a minimum.
            :data:`entropy_kernels.losses.KL_COV`.
        clip_low, clip_high: "preset" (the default) and None: no PPO clip; a number adds one.
        ratio: share of the valid tokens to penalise, a fraction; None: the preset's.
        k: number of tokens to penalise instead.
        kl_coef: β, number or 0-d tensor.
        penalty_estimator: "abs" (|logprob - old_logprob|, None: the preset's, which is this), "k2", "k3", "k1", each
            with '+' for k2's gradient.
        token_index: int64, ``logprob``'s shape: decides ties; unused with ``penalized``.
        penalized: ``logprob``'s shape, bool, int or float 0/1: 1 = the penalty is added, and nothing is selected here.
            Not together with ratio or k.
    """
    chosen = presets.find(presets.KL_COV, preset)
    clip_low = presets.clip_or("clip_low", clip_low, chosen.clip_low)
    clip_high = presets.clip_or("clip_high", clip_high, chosen.clip_high)
    clips = Clips(clip_low, clip_high, dual_clip)
    clips.check()
    check_coefficient("kl_coef", kl_coef)
    if isinstance(kl_coef, Tensor) and kl_coef.requires_grad:
        raise ValueError("kl_coef: expected a constant, got a tensor that requires grad")
    estimator = check_estimator("penalty_estimator", presets.given_or(penalty_estimator, chosen.penalty))
    _check_selection("penalized", penalized, ratio=ratio, k=k)
    extras = Extras(entropy_coef, ref_kl_coef, check_estimator("kl_estimator", kl_estimator))
    aggregation = Aggregation(
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor, batch_group
    )
    inputs = check_inputs(logprob, old_logprob, advantages, mask, entropy, entropy_coef, ref_logprob, ref_kl_coef)
    aggregation.check(inputs.logprob)
    given = check_mask("penalized", penalized, logprob)
    selection = None
    if given is None:
        selection = Selection(
            ratio=chosen.ratio if ratio is None and k is None else ratio,
            k=k,
            at_least_one=chosen.at_least_one,
            token_index=token_index,
        )
    policy = Policy(clips, Selected.PENALISED, selection, given, estimator, kl_coef)
    return total(inputs, policy, evaluate(*inputs[:4], policy, batch_group, backend), extras, aggregation)


def _check_selection(name: str, mask: Tensor | None, **options: Any) -> None:
    given = [option for option, value in options.items() if value is not None]
    if mask is not None and given:
        raise ValueError(
            f"{name}: expected no {', '.join(options)} beside it, because a given mask means that nothing is selected "
            f"here; got {', '.join(given)}"
        )
