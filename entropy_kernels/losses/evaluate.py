"""A loss from the log-probs: values and derivatives per token, their aggregate, and the metrics.

Read in this order: ``surrogate_losses`` (the closed form of each token), ``token_losses`` (selection's effect, weight,
entropy bonus, reference KL), ``evaluate`` (selection, aggregate, metrics), ``Loss`` (autograd). Nothing here is
differentiated by autograd: derivatives come with the values, so the losses from hidden states use the same functions
between their matrix products (losses/linear.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_kernels._arguments import recorded
from entropy_kernels._sequences import Sequences
from entropy_kernels.losses.aggregation import Counts, over_group
from entropy_kernels.losses.kl import kl_and_grad
from entropy_kernels.losses.options import LossOptions, used
from entropy_kernels.losses.surrogates import keep, mask_bits, masked_max, product, unless
from entropy_kernels.losses.tokens import Tokens, Treated
from entropy_kernels.selection import covariance_of


class Pullback(NamedTuple):
    """How the tokens' losses x_t depend on the log-probs: what a backward pass keeps."""

    grad: Tensor  # d x_t / d own log-prob, the ratio of the sequence kept fixed
    pooled: Tensor | None  # d x_t / d the log-ratio of its sequence
    part: Tensor | None  # d the sum of the sequence / d own log-prob; None: 1 at valid tokens
    divisor: Tensor | None  # per sequence, of its sum
    mask: Tensor | None  # as mask_bits makes it; None: all tokens count
    lengths: Tensor | None  # of Sequences
    ids: Tensor | None

    def __call__(self, weight: Tensor) -> Tensor:
        """d Σ weight_t x_t / d log-prob, of the tokens' shape, for weights that broadcast to it."""
        gradient = self.grad * weight
        if self.pooled is None:
            return gradient
        sequences = Sequences(self.lengths, self.ids)
        pulled = sequences.sum(self.pooled * weight)
        if self.divisor is not None:
            pulled = pulled / self.divisor
        pulled = sequences.spread(pulled.to(gradient.dtype)).expand_as(gradient)
        return gradient + (keep(self.mask, pulled.contiguous())[0] if self.part is None else pulled * self.part)


class SurrogateLosses(NamedTuple):
    """Per token; 0, False or None in padding."""

    value: Tensor
    grad: Tensor  # by the log-ratio that the surrogate was given
    clipped: Tensor | None  # bool, or 0 and 1 under a compiler
    clipped_lower: Tensor | None
    log_ratio: Tensor  # of the token
    level: Tensor  # the log-ratio that the surrogate was given
    part: Tensor | None
    divisor: Tensor | None
    bad: Tensor  # NaN at a valid token with an input that is not finite, else 0
    valid: Tensor | None  # bool
    mask: Tensor | None


class TokenLosses(NamedTuple):
    """Per token, 0 in padding."""

    loss: Tensor
    policy: Tensor  # without entropy bonus and reference KL
    pullback: Pullback
    nonfinite: Tensor  # NaN where something is not finite, used or not; else 0
    entropy: Tensor | None
    ref_kl: Tensor | None
    ref_penalty: Tensor | None  # what ref_kl_coef multiplies: ref_kl, or ref_kl times the ratio


def surrogate_losses(logprob: Tensor, tokens: Tokens, options: LossOptions) -> SurrogateLosses:
    """The surrogate of each token; ``logprob`` fp32 or fp64, without gradient."""
    dtype, surrogate = logprob.dtype, options.surrogate
    old, advantages, valid = tokens.old_logprob.to(dtype), tokens.advantages.to(dtype), tokens.mask
    log_ratio = logprob - old
    if options.drop_nonfinite:
        finite = torch.isfinite(log_ratio) & torch.isfinite(advantages)
        if tokens.covariance_advantages is not None:
            finite = finite & torch.isfinite(tokens.covariance_advantages.to(dtype))
        valid = finite if valid is None else valid & finite
    mask = None if valid is None else mask_bits(valid, dtype)
    log_ratio, advantages, logprob = keep(mask, log_ratio, advantages, logprob)
    level, part, divisor = log_ratio, None, None
    clipped: list[Tensor | None] = []
    bad = torch.add(log_ratio - log_ratio, advantages, alpha=0)  # 0, or NaN for what is not finite
    if tokens.covariance_advantages is not None:
        (scored,) = keep(mask, tokens.covariance_advantages.to(dtype))
        bad = bad + (scored - scored)
    if surrogate.level == "sequence":
        total = log_ratio
        if surrogate.contribution is not None:
            result = surrogate.contribution(log_ratio, advantages, options.clips)
            _check_returned(result, log_ratio, "contribution")
            total, part, *clipped = result
            total, part = keep(mask, total, part)
        level = tokens.sequences.sum(total)
        if surrogate.reduce == "mean":
            divisor = tokens.sequences.sum(torch.ones_like(log_ratio) if valid is None else valid).clamp(min=1)
            level = level / divisor
        (level,) = keep(mask, tokens.sequences.spread(level.to(dtype)).expand_as(log_ratio).contiguous())
        bad = bad + (level - level)
    result = surrogate.fn(level, logprob, advantages, options.clips)
    _check_returned(result, level, "fn")
    value, grad, *stopped = result
    stops = stopped[0] if clipped == [] or clipped[0] is None else clipped[0]
    lower = stopped[1] if len(stopped) > 1 else clipped[1] if len(clipped) > 1 else None
    if stops is not None and stops.dtype != torch.bool:
        stops = stops != 0
    if valid is not None:
        stops, lower = None if stops is None else stops & valid, None if lower is None else lower & valid
    if torch.compiler.is_compiling():  # which writes and adds floats several times as fast as bool
        stops, lower = None if stops is None else stops.to(dtype), None if lower is None else lower.to(dtype)
    value, grad = keep(mask, value, grad)
    return SurrogateLosses(value, grad, stops, lower, log_ratio, level, part, divisor, bad, valid, mask)


def _check_returned(result: Any, like: Tensor, name: str) -> None:
    """What the function ``name`` of a surrogate returned is of the tokens' dtype and shape."""
    right = isinstance(result, (tuple, list)) and len(result) in (3, 4)
    for i, x in enumerate(result if right else ()):
        if i > 1:
            right = right and (x is None or (isinstance(x, Tensor) and x.shape == like.shape))
        else:
            right = right and isinstance(x, Tensor) and x.dtype == like.dtype and x.shape == like.shape
    if not right:
        many = result if isinstance(result, (tuple, list)) else (result,)
        got = [f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in many]
        raise TypeError(
            f"surrogate: expected {name} to return (value, grad, clipped), value and grad {like.dtype} of shape "
            f"{tuple(like.shape)}, clipped of that shape or None; got ({', '.join(got)})"
        )


def token_losses(
    logprob: Tensor,
    entropy: Tensor | None,
    found: SurrogateLosses,
    tokens: Tokens,
    options: LossOptions,
    treated: Treated,
) -> TokenLosses:
    """The loss of each token."""
    value, grad, mask = found.value, found.grad, found.mask
    dtype = value.dtype
    if treated.dropped is not None:
        value, grad = unless(treated.dropped, value, grad)
    if treated.detached is not None:
        (grad,) = unless(treated.detached, grad)
    # What acts on the ratio that the surrogate was given; the penalty and the KL act on the token's own
    pools = options.surrogate.level == "sequence" and not options.surrogate.local
    own, pooled = (torch.zeros_like(grad), grad) if pools else (grad, None)
    if treated.penalized is not None:
        penalty, kl_grad = kl_and_grad(found.log_ratio, options.penalty)
        factor = treated.penalized.to(dtype)
        factor = factor if type(options.kl_coef) is float else factor * options.kl_coef
        scale = options.kl_coef if type(options.kl_coef) is float else 1
        value, own = value.addcmul(penalty, factor, value=scale), own.addcmul(kl_grad, factor, value=scale)
    if tokens.weight is not None:
        (weight,) = keep(mask, tokens.weight.to(dtype))
        nothing = torch.zeros_like(weight)
        value, own = (torch.where(weight == 0, nothing, x * weight) for x in (value, own))
        pooled = None if pooled is None else torch.where(weight == 0, nothing, pooled * weight)
        found = found._replace(bad=found.bad + (weight - weight))
    value, own = value + found.bad, own + found.bad
    policy = loss = value
    unused: list[Tensor] = []  # what is not finite is counted also where it does not enter the loss
    ref_kl = ref_penalty = None
    if tokens.ref_logprob is not None:
        (distance,) = keep(mask, logprob - tokens.ref_logprob.to(dtype))
        wrong = distance - distance  # k3 clamps, and would show an infinite ratio as a small divergence
        estimate, kl_grad = kl_and_grad(distance, options.kl_estimator)
        ref_kl = ref_penalty = estimate + wrong
        if not used(options.ref_kl_coef):
            unused.append(wrong)
        else:
            if options.ref_kl_importance:
                product_of_ratios = options.surrogate.reduce == "sum"  # which is none to weigh a token's KL by
                ratio = (found.log_ratio if product_of_ratios else found.level).exp()
                estimate, kl_grad = product(estimate, ratio), product(kl_grad, ratio)
                ref_penalty = estimate + wrong
                if pools and not product_of_ratios:
                    assert pooled is not None
                    pooled = pooled + options.ref_kl_coef * estimate
                else:
                    kl_grad = kl_grad + estimate
            policy = policy + wrong
            loss = policy + options.ref_kl_coef * estimate
            own = own + options.ref_kl_coef * keep(mask, kl_grad)[0] + wrong
    if entropy is not None:
        (entropy,) = keep(mask, entropy.to(dtype))
        if used(options.entropy_coef):
            loss = loss - options.entropy_coef * entropy
        else:
            unused.append(entropy)
    nonfinite = loss - loss
    for x in unused:
        nonfinite = nonfinite + (x - x)
    pullback = Pullback(own, pooled, found.part, found.divisor, mask, tokens.sequences.lengths, tokens.sequences.ids)
    return TokenLosses(loss, policy, pullback, nonfinite, entropy, ref_kl, ref_penalty)


# ---- metrics: each is defined here and nowhere else ------------------------------------------------------------------
#
# All are 0-d device tensors without gradient in the dtype of the loss; nothing is read back by the host. Means and
# shares are over the valid tokens of the call, or of all ranks with a batch_group; without a valid token a metric is 0.
# A metric that has no meaning in a call (no entropy given, nothing selected) is absent.


class LossMetric(NamedTuple):
    """A metric's definition for the reader, and when it is there."""

    definition: str
    given: str = "always"


METRICS: dict[str, LossMetric] = {
    "pg_loss": LossMetric(
        "the surrogate, token weights and KL-Cov's penalty included, without entropy bonus and reference KL, "
        'aggregated like the loss ("none": token-mean); with a batch_group that of the whole batch',
    ),
    "clipfrac": LossMetric(
        "share of tokens that the surrogate clips; ppo: l2 > l1, l1 = -A·r, "
        "l2 = -A·clamp(r, 1 - clip_low, 1 + clip_high)",
    ),
    "clipfrac_low": LossMetric("share of tokens of clipfrac with A < 0; ppo: clipped from below, r < 1 - clip_low"),
    "clipfrac_high": LossMetric(
        "share of tokens of clipfrac with A > 0; ppo: clipped from above, r > 1 + clip_high, and clipfrac is the sum of"
        " the two",
    ),
    "clipfrac_lower": LossMetric(
        "share of tokens that the dual clip stops, A < 0 and max(l1, l2) > -A·dual_clip, or the surrogate's other clip",
    ),
    "ppo_kl": LossMetric("mean of old_logprob - logprob, nats"),
    "ppo_kl_abs": LossMetric("mean of abs(logprob - old_logprob), nats"),
    "ratio_mean": LossMetric("mean of r = exp(logprob - old_logprob)"),
    "ratio_max": LossMetric("largest r"),
    "cov_mean": LossMetric("mean of token_covariance(logprob, advantages)"),
    "cov_max": LossMetric("largest token_covariance"),
    "band_frac": LossMetric(
        "share of tokens that are candidates of Clip-Cov: covariance in the range, not excluded by the preset",
        "clip_cov_loss that selects",
    ),
    "selected_frac": LossMetric(
        "share of tokens that are dropped, detached or penalised",
        "clip_cov_loss, kl_cov_loss, a control with such tokens",
    ),
    "entropy": LossMetric("mean of the entropy given, nats", "entropy given"),
    "ref_kl": LossMetric("mean of the KL estimate to the reference, nats", "ref_logprob given"),
    "nonfinite_tokens": LossMetric(
        "number of tokens at which an input or a term of the loss is NaN or infinite (an infinite ratio that a clip "
        'stops is none), or which nonfinite="drop" dropped',
    ),
}
"""The metrics of a loss, over the tokens that count: name -> (definition, when it is there)."""


def metric_names(options: LossOptions, entropy: bool, ref_logprob: bool) -> list[str]:
    """The metrics of a loss, in their order."""
    there = {
        "selected_frac": options.treats,
        "band_frac": options.selection is not None and options.selection.seed is not None,
        "entropy": entropy, "ref_kl": ref_logprob,
    }  # fmt: skip
    found = []
    for name in METRICS:
        if there.get(name, True):
            found.append(name)
    return found


def metric_table() -> str:
    """The metrics as a Markdown table, for docs/losses.md and anyone who logs them. Raises nothing.

    Returns:
        :data:`METRICS`, a line each.

    Source:
        docs/losses.md.
    """
    rows = [f"| `{name}` | {metric.definition} | {metric.given} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | definition | present |", "|---|---|---|", *rows])


# ---- the loss --------------------------------------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """A loss and what its backward pass needs."""

    loss: Tensor  # 0-d, or of the tokens' shape where nothing is aggregated
    metrics: list[Tensor]  # 0-d, by the names of metric_names
    weight: Tensor  # what a token's loss is multiplied by; broadcasts to the tokens
    by_token: TokenLosses


def evaluate(logprob: Tensor, entropy: Tensor | None, tokens: Tokens, options: LossOptions) -> Evaluated:
    """The loss of a batch; ``logprob`` (fp32 or fp64) and ``entropy`` of the tokens' shape, without gradient."""
    aggregation, sequences, dtype = options.aggregation, tokens.sequences, logprob.dtype
    found = surrogate_losses(logprob, tokens, options)
    valid, candidates, compiling = found.valid, None, torch.compiler.is_compiling()
    treated = tokens._replace(mask=valid).treated
    scored = tokens.advantages if tokens.covariance_advantages is None else tokens.covariance_advantages
    covariance = covariance_of(logprob, scored, valid, aggregation.group_name, options.backend)
    if options.selection is not None:
        exclude, score = None, covariance
        if options.exclude_clipped and found.clipped is not None:
            if compiling:  # NaN is no candidate either
                score = torch.where(found.clipped > 0, math.nan, covariance)
            else:
                exclude = found.clipped
        chosen = options.selection(score, valid, exclude, tokens.token_index)
        others = getattr(treated, options.effect)
        treated = treated._replace(**{options.effect: chosen if others is None else chosen | others})
        if options.selection.seed is not None:
            candidates = options.selection.candidates(score, valid, exclude)
    by_token = token_losses(logprob, entropy, found, tokens, options, treated)

    everything = torch.ones_like(logprob, dtype=torch.bool) if valid is None else valid
    counts, own = aggregation.counted(everything, sequences)
    (ratio,) = keep(found.mask, found.log_ratio.exp())
    shares = {
        "clipfrac": found.clipped, "clipfrac_lower": found.clipped_lower, "band_frac": candidates,
        "selected_frac": treated.any() if options.treats else None,
    }  # fmt: skip
    if found.clipped is not None:
        for name, sign in (("clipfrac_low", tokens.advantages < 0), ("clipfrac_high", tokens.advantages > 0)):
            shares[name] = torch.where(sign, found.clipped, 0) if compiling else found.clipped & sign
    means = {
        "ppo_kl": found.log_ratio, "ppo_kl_abs": found.log_ratio.abs(), "ratio_mean": ratio,
        "cov_mean": covariance, "entropy": by_token.entropy, "ref_kl": by_token.ref_kl,
    }  # fmt: skip
    zero = ratio.new_zeros(())
    sums = dict.fromkeys(("clipfrac", "clipfrac_low", "clipfrac_high", "clipfrac_lower"), zero)
    for name, condition in shares.items():
        if condition is not None:
            sums[name] = condition.sum(dtype=torch.float32) if compiling else condition.count_nonzero()
    for name, value in means.items():
        if value is not None:  # covariances nearly cancel
            sums[name] = value.sum(dtype=torch.float64 if name == "cov_mean" else None)
    sums["ppo_kl"] = torch.rsub(sums["ppo_kl"], 0)
    if compiling:
        nonfinite = torch.where(by_token.nonfinite == 0, 0.0, 1.0).sum()
    else:
        nonfinite = by_token.nonfinite.count_nonzero()
    if options.drop_nonfinite:
        nonfinite = (
            nonfinite + (logprob.numel() if tokens.mask is None else tokens.mask.count_nonzero()) - counts.tokens
        )
    maxima = {"ratio_max": ratio.amax() if ratio.numel() else ratio.sum()}
    maxima["cov_max"] = masked_max(covariance, found.mask)

    loss = policy = pg_loss = aggregation.weighted_sum(by_token.loss, own, sequences)
    if by_token.policy is not by_token.loss:
        policy = pg_loss = aggregation.weighted_sum(by_token.policy, own, sequences)
    if aggregation.group is not None:
        given = {**sums, **counts.there(), "nonfinite": nonfinite, "policy": policy}
        in_common = options.in_common(entropy is not None, tokens.ref_logprob is not None)
        totals = over_group(given, maxima, aggregation.group, in_common)
        counts = Counts.of(totals)
        sums, maxima = ({name: totals[name] for name in x} for x in (sums, maxima))
        nonfinite, pg_loss = totals["nonfinite"], totals["policy"]
    count = counts.tokens.clamp(min=1).double()
    denominator = aggregation.denominator(counts, sequences.width or logprob.shape[-1], count)
    scale = denominator.reciprocal() if aggregation.dp_size == 1 else aggregation.dp_size / denominator
    loss = loss * scale
    if aggregation.group is not None:
        pg_loss = pg_loss / denominator
    else:
        pg_loss = loss if by_token.policy is by_token.loss and not compiling else pg_loss * scale
    other = {"pg_loss": pg_loss, "nonfinite_tokens": nonfinite, "ratio_max": maxima["ratio_max"]}
    other["cov_max"] = torch.where(counts.tokens > 0, maxima["cov_max"], zero)
    if compiling:  # scalars apart fuse with the sums
        made = {**other, **{name: value / count for name, value in sums.items()}}
        made = {name: value.to(dtype) for name, value in made.items()}
    else:
        stacked = torch.stack([*sums.values(), *other.values()])  # fp64, as the covariance's sum is
        stacked.narrow(0, 0, len(sums)).div_(count)
        made = dict(zip((*sums, *other), stacked.to(dtype).unbind(), strict=True))
    named = []
    for name in METRICS:
        if name in made:
            named.append(made[name])
    if aggregation.mode == "none":
        return Evaluated(by_token.loss, named, torch.ones_like(scale, dtype=dtype), by_token)
    share = own * scale if isinstance(own, Tensor) else scale
    weight = (share if share.dim() == 0 else sequences.spread(share)).to(dtype)
    # A .to() that changes nothing is the same tensor under two names, whose gradient torch 2.11's compiler loses
    return Evaluated(loss if loss.dtype == dtype else loss.to(dtype), named, weight, by_token)


class Loss(torch.autograd.Function):
    """The loss, 0-d or per token, and its metrics; differentiable by log-prob, entropy and the two coefficients."""

    @staticmethod
    def forward(
        ctx: Any, logprob: Tensor, entropy: Tensor | None, entropy_coef: Any, ref_kl_coef: Any, tokens: Tokens,
        options: LossOptions,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # resolve_neg, here and in tokens.py: a view that negates lazily has no bits to look at
        wide = logprob.to(torch.float64 if logprob.dtype == torch.float64 else torch.float32).resolve_neg()
        found = evaluate(wide, None if entropy is None else entropy.resolve_neg(), tokens, options)
        ctx.dtypes = logprob.dtype, None if entropy is None else entropy.dtype
        ctx.entropy_coef = options.entropy_coef if entropy is not None and used(options.entropy_coef) else None
        by_token = found.by_token
        kept = (by_token.entropy, by_token.ref_penalty) if any(ctx.needs_input_grad[2:4]) else (None, None)
        coefficient = ctx.entropy_coef if isinstance(ctx.entropy_coef, Tensor) else None
        ctx.save_for_backward(*recorded(logprob, found.weight, coefficient, *kept, *by_token.pullback))
        ctx.per_token = options.aggregation.mode == "none"
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found.metrics)
        return (found.loss, *found.metrics)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if upstream is None:
            return (None,) * 6
        logprob, weight, coefficient, entropy, ref_penalty, *kept = ctx.saved_tensors
        pullback, weight = Pullback(*kept), weight * upstream
        if ctx.per_token:  # what comes in at padding is as little to count as what stands there
            (weight,) = keep(pullback.mask, weight.contiguous())
        grads: list[Tensor | None] = [None] * 6
        if ctx.needs_input_grad[0]:
            grads[0] = pullback(weight).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1] and ctx.entropy_coef is not None:
            coefficient = ctx.entropy_coef if coefficient is None else coefficient
            per_token = (-coefficient * weight).to(weight.dtype).expand_as(pullback.grad).contiguous()
            grads[1] = keep(pullback.mask, per_token)[0].to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            grads[2] = -(weight * entropy).sum()
        if ctx.needs_input_grad[3]:
            grads[3] = (weight * ref_penalty).sum()
        if torch.is_grad_enabled():
            grads = [None if x is None else _OnlyOnce.apply(x, logprob) for x in grads]
        return tuple(grads)


class _OnlyOnce(torch.autograd.Function):
    """Only there to say, instead of a silent wrong second derivative, that there is none."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logprob: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError("policy_loss: double backward (create_graph=True) is not supported")
