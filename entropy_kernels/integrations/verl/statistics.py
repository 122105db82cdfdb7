"""verl's log-probs, entropies and Σp² from our kernels, each micro-batch from one read of its logits.

verl asks for entropy and Σp² first, without labels, then for log-probs, each by a function of its own. What knows all
that will be asked, and the labels, is the engine's ``prepare_model_outputs``: ours opens a :class:`_MicroBatch` around
it, and the first of the functions called inside makes the one read that serves all. With fused kernels there are no
logits: the head makes the read, in ``forward_step``. Read from the end: :data:`PATCHES`, what is replaced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels._dtensor import MeanOfGradients
from entropy_kernels.integrations import _reads
from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.verl.versions import patch

__all__ = ["PATCHES", "enable", "enabled", "install"]

STATISTICS = ("collision", "vocab_covariance")  # what a micro-batch's "ek_statistics" may name
_on = False


def enabled() -> bool:
    """Whether our statistics serve verl in this process."""
    return _on


def install() -> None:
    """Put our functions in verl's places, where verl's go on serving until :func:`enable`.

    Done when verl is imported, so that who imports one by name, or keeps it, has ours. The methods of the engine are
    found through its class at each call, and come with :func:`enable`. Errors: :meth:`Patch.apply`.
    """
    for each in FUNCTIONS:
        each.apply()


def enable(on: bool = True) -> None:
    """Serve verl's log-probs, entropies and Σp² by our kernels in this process, or (``on=False``) by verl's own again.

    The plugin puts ours in place when verl is imported, and verl's serve until this is called: from the configuration
    (docs/integrations.md), or by hand before an engine is built. PatchRefused, and nothing is enabled, where verl's
    version or a signature is not what ours was made for.
    """
    global _on
    if on:
        for each in PATCHES:
            each.apply()
    _on = on


class _Read(NamedTuple):
    """The statistics of one tensor of logits, as it was when they were read."""

    logits: Tensor
    version: int
    statistics: dict[str, Tensor]

    def of(self, logits: Tensor) -> bool:
        return self.logits is logits and self.version == _version(logits)


class _MicroBatch:
    """What a micro-batch asks of its logits, and what was read of them; it lives as long as verl holds them.

    Args:
        labels: those that verl will ask log-probs of.
        unlabelled: statistics that verl will ask for without labels.
        shared: whether a loss reads the logits, too, so that no gradient may take their place.
    """

    def __init__(self, labels: Tensor, unlabelled: tuple[str, ...], shared: bool = False) -> None:
        self.labels = labels
        self.shared = shared
        self.unlabelled: tuple[str, ...] = unlabelled
        self.labelled: tuple[str, ...] = ("logprob",)
        self.grad = torch.is_grad_enabled()
        self.reads: list[_Read] = []

    def statistics(self, logits: Tensor, inplace: bool) -> dict[str, Tensor]:
        """All that is still to be asked of these logits; log-probs of a padded batch are asked of an unpadded copy."""
        for read in self.reads:
            if read.of(logits):
                return read.statistics
        fits = logits.shape[:-1] == self.labels.shape
        collect = _reads.wanted() if fits and self.labelled else ()
        names = tuple(dict.fromkeys((*self.unlabelled, *(self.labelled if fits else ()), *collect)))
        if not names:
            return {}
        self.unlabelled, self.labelled = (), () if fits else self.labelled
        inplace = inplace and not self.shared
        # of the micro-batch's gradient: a checkpoint calls without one first
        with torch.set_grad_enabled(self.grad), _kept_from_checkpoints(not inplace):
            found = ek.token_stats(
                logits, self.labels if fits else None, statistics=names, inplace_backward=inplace
            )._asdict()
        if collect:
            _reads.leave(**found)
        self.reads.append(_Read(logits, _version(logits), found))
        return found


_micro_batch: ContextVar[_MicroBatch | None] = ContextVar("entropy_kernels_verl_micro_batch", default=None)


def _version(logits: Tensor) -> int:
    return 0 if logits.is_inference() else logits._version


def _kept_from_checkpoints(yes: bool) -> contextlib.AbstractContextManager[Any]:
    """What the read saves is no checkpoint's to drop and make again: log-probs depend on it, too.

    It saves the logits and some numbers a token: what checkpointing an entropy is to save is never made.
    """
    if not yes:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


@contextlib.contextmanager
def _reading(micro_batch: _MicroBatch) -> Iterator[None]:
    token = _micro_batch.set(micro_batch)
    try:
        yield
    finally:
        _micro_batch.reset(token)


def _statistic(name: str, logits: Tensor, labels: Tensor | None = None, inplace: bool = False) -> Tensor:
    """One statistic, fp32 (fp64 for fp64): from the micro-batch's read, or from one of its own."""
    open_batch = _micro_batch.get()
    if open_batch is not None and (labels is None or labels is open_batch.labels):
        found = open_batch.statistics(logits, inplace).get(name)
        if found is not None:
            return found if torch.is_grad_enabled() else found.detach()
    if labels is not None:
        labels = labels.reshape(logits.shape[:-1])  # as verl with flash-attn, which flattens both
    return ek.token_stats(logits, labels, statistics=(name,), inplace_backward=inplace)[0]


# ---- in the place of verl's functions --------------------------------------------------------------------------------


def _logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    # verl's default is True, for logits that are an operator's output; a leaf is somebody's own
    inplace = inplace_backward and logits.requires_grad and not logits.is_leaf
    return _statistic("logprob", logits, labels, inplace)


def _entropy_from_logits(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return _statistic("entropy", logits)  # there are no V-sized temporaries that chunks would bound


def _sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    return _statistic("collision", logits)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any, group: Any = None) -> tuple[Tensor, Tensor]:
    """Of logits that are not rounded, as verl's kernel has them."""
    names = tuple(dict.fromkeys(("logprob", "entropy", *_reads.wanted())))
    exact = None if hidden.dtype == torch.float64 else torch.float32
    found = ek.linear_token_stats(
        hidden, weight, labels, statistics=names, temperature=temperature, vocab_group=group, logits_dtype=exact
    )._asdict()
    _reads.leave(**found)
    return found["logprob"], found["entropy"]


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    if not isinstance(reduction, str) or reduction.lower() != "none":
        raise ValueError(
            f"reduction: expected 'none', which all of verl asks for, got {reduction!r}; reduce the result"
        )
    if dist_process_group is not None:
        # our gradient is whole on each rank, and verl's callers add up what the ranks give
        hidden = MeanOfGradients.apply(hidden, torch.distributed.get_world_size(dist_process_group))
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return _head(hidden, weight, labels, temperature, dist_process_group)


def _fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    return _head(hidden_states, vocab_weights, input_ids.to(torch.int64), temperature)


class _Asked(NamedTuple):
    """What the non-tensor data of a micro-batch ask for."""

    entropy: bool
    sum_pi_squared: bool
    fused: bool
    distillation: bool  # its loss gets the logits
    statistics: tuple[str, ...]  # whose values go into the output as "ek_" + name

    @classmethod
    def of(cls, micro_batch: Any) -> _Asked:
        from verl.utils.tensordict_utils import get_non_tensor_data

        def of(key: str) -> bool:
            return bool(get_non_tensor_data(micro_batch, key, False))

        statistics = tuple(get_non_tensor_data(micro_batch, "ek_statistics", ()))
        for name in statistics:
            if name not in STATISTICS:
                raise ValueError(f"ek_statistics: expected of {', '.join(STATISTICS)}, got {name!r}")
        return cls(
            of("calculate_entropy"), of("calculate_sum_pi_squared"), of("use_fused_kernels"),
            of("distillation_use_topk"), statistics,
        )  # fmt: skip

    @property
    def collected(self) -> tuple[str, ...]:
        """What has no function of verl's: the read leaves it."""
        of_head = ("collision",) if self.sum_pi_squared and self.fused else ()
        return tuple(dict.fromkeys((*of_head, *self.statistics)))

    @property
    def unlabelled(self) -> tuple[str, ...]:
        wanted = {"entropy": self.entropy, "collision": self.sum_pi_squared}
        return tuple(name for name, asked in wanted.items() if asked)


def _forward_step(original: Any) -> Callable[..., Any]:
    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: Any) -> Any:
        names = _Asked.of(micro_batch).collected
        with _reads.collect(*names) if names else contextlib.nullcontext():
            return original(self, micro_batch, loss_function, forward_only)

    return forward_step


def _prepare_model_outputs(original: Any) -> Callable[..., dict[str, Any]]:
    def prepare_model_outputs(
        self: Any, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        asked = _Asked.of(micro_batch)
        of_head = asked.sum_pi_squared and asked.fused
        theirs = _without_sum_pi_squared(micro_batch) if of_head else micro_batch
        labels = output_args["input_ids_rmpad_rolled"]
        with _reading(_MicroBatch(labels, asked.unlabelled, asked.distillation)):
            found = original(self, output, output_args, theirs, logits_processor_func)
        if names := asked.collected:
            collected = _reads.collected()
            if collected is None:
                raise RuntimeError(
                    f"{', '.join(names)}: expected to be collected in forward_step, got a call of "
                    "prepare_model_outputs outside of it"
                )
            kept = {name: _packed(self, collected[name], output_args, micro_batch) for name in names}
            found |= {f"ek_{name}": kept[name] for name in asked.statistics}
            found |= {"sum_pi_squared": kept["collision"]} if of_head else {}
        return found

    return prepare_model_outputs


def _without_sum_pi_squared(micro_batch: Any) -> Any:
    """verl refuses Σp² of fused kernels; a shallow copy."""
    from verl.utils.tensordict_utils import assign_non_tensor

    return assign_non_tensor(micro_batch.copy(), calculate_sum_pi_squared=False)


def _packed(engine: Any, value: Tensor, output_args: dict[str, Any], micro_batch: Any) -> Tensor:
    """A statistic of a read, flat, as verl packs log-probs: nested, a sequence for each sample."""
    offsets = micro_batch["input_ids"].offsets()
    if "pad_size" in output_args:  # packed, and perhaps a rank's part of it
        value = engine._gather_and_unpad_packed(value, output_args["pad_size"])
    elif value.numel() != len(output_args["input_ids_rmpad_rolled"]):  # a head's, with padding
        value = value.view(len(offsets) - 1, -1)
        lengths = offsets.diff().unsqueeze(1)
        value = value[torch.arange(value.shape[1], device=value.device) < lengths]
    return torch.nested.nested_tensor_from_jagged(value, offsets)


_patch = functools.partial(patch, when=enabled)


def _in_place_of(target: str, ours: Callable[..., Any], signature: str, what: str, **more: Any) -> Patch:
    """A function of ours that never calls theirs."""
    return _patch(target, lambda theirs: ours, signature, what=what, **more)


_F, _KERNEL = "verl.utils.torch_functional", "verl.utils.kernel.linear_cross_entropy"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
FUNCTIONS = (
    _in_place_of(
        f"{_F}:logprobs_from_logits", _logprobs_from_logits, "(logits, labels, inplace_backward=True)",
        "log-prob, with all else that is asked of the same logits, from one read; fp32",
    ),
    _in_place_of(f"{_F}:entropy_from_logits", _entropy_from_logits, "(logits)", "entropy from that read; fp32"),
    _in_place_of(
        f"{_F}:entropy_from_logits_with_chunking", _entropy_from_logits, "(logits, chunk_size=2048)",
        "entropy from that read, without chunks",
    ),
    _in_place_of(
        f"{_F}:calculate_sum_pi_squared_from_logits", _sum_pi_squared_from_logits, "(logits)",
        "Σp² from that read; fp32",
    ),
    _in_place_of(
        f"{_KERNEL}:linear_cross_entropy", _linear_cross_entropy,
        "(ctx, hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None)",
        "fused kernels, impl_backend=triton: any width, CPUs, Σp²",
        signature_of=f"{_KERNEL}:LinearCrossEntropy.forward",
    ),
    _in_place_of(
        "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward", _fused_linear_for_ppo,
        "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
        "fused kernels, impl_backend=torch or liger: one pass, Σp²",
    ),
)  # fmt: skip
ENGINE = (
    _patch(
        f"{_ENGINE}.forward_step", _forward_step, "(self, micro_batch, loss_function, forward_only)",
        what="collects statistics that verl has no place for (FSDP)",
    ),
    _patch(
        f"{_ENGINE}.prepare_model_outputs", _prepare_model_outputs,
        "(self, output, output_args, micro_batch, logits_processor_func)",
        what="one read of a micro-batch's logits; Σp² with fused kernels (FSDP)",
    ),
)  # fmt: skip
PATCHES = FUNCTIONS + ENGINE
