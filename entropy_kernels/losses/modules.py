"""The losses as modules: what stays the same is given once, what changes is given in each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from entropy_kernels._arguments import keywords
from entropy_kernels._selection_request import SeedCounter
from entropy_kernels.losses import functional, surrogates
from entropy_kernels.losses.functional import PolicyLoss


class _LossModule(nn.Module):
    """Holds keyword arguments of a loss function. A module has no parameters."""

    _function: Callable[..., PolicyLoss]

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
        """The loss; ``options`` of this call go before those of the module."""
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
    """

    _function = staticmethod(functional.policy_loss)


class ClipCovLoss(_LossModule):
    """:func:`entropy_kernels.clip_cov_loss` with fixed options, and with seeds that need no step number.

        criterion = ClipCovLoss(preset="verl", ratio=2e-4)
        criterion(logprob, old_logprob, advantages, mask).loss.backward()

    Args:
        seed: of the first call; each later one draws with the next (:class:`SeedCounter`), the count being part of
            ``state_dict()``. A call that is given ``seed`` or ``dropped`` uses that and is not counted.
        options, raises: as :class:`PolicyLossModule`.
    """

    _function = staticmethod(functional.clip_cov_loss)

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.seeds = SeedCounter(seed)

    def forward(
        self, logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor | None, **options: Any
    ) -> PolicyLoss:
        """The loss; ``options`` of this call go before those of the module."""
        if all({**self.options, **options}.get(name) is None for name in ("seed", "dropped")):
            options["seed"] = self.seeds
        return super().forward(logprob, old_logprob, advantages, mask, **options)


class KlCovLoss(_LossModule):
    """:func:`entropy_kernels.kl_cov_loss` with fixed options.

        criterion = KlCovLoss(preset="paper", kl_coef=1.0)
        criterion(logprob, old_logprob, advantages, mask).loss.backward()

    Args, raises: as :class:`PolicyLossModule`.
    """

    _function = staticmethod(functional.kl_cov_loss)
