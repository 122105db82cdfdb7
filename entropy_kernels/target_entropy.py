"""Entropy as a set point: the user names an entropy, feedback finds the control that holds it.

:class:`TargetEntropy` is the loop. Its plan of a step stands in :meth:`TargetEntropy._plan`, what it learns from a
step in :meth:`TargetEntropy.observe`; docs/control.md says how it works and what it cannot do.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from entropy_kernels import _torch
from entropy_kernels._arguments import (
    Options,
    check_float,
    check_scalar,
    debugging,
    integer,
    number,
    scalar_tensor,
    traced,
    word,
)
from entropy_kernels.batch import TokenBatch, WholeBatch
from entropy_kernels.control import Control, Controller, SelectionBatch, _decided, _shown_group
from entropy_kernels.methods import CLIPS, METHODS, Method, as_it_is, entropy_decrease
from entropy_kernels.selection import token_moments

Target = float | Tensor | Callable[[int], float | Tensor] | Sequence[tuple[float, float]]

#: Beside ``entropy_kernels.control.METRICS``: what a control of :class:`TargetEntropy` has in its metrics.
METRICS = {
    "target_entropy": "the target of this step, nats",
    "entropy": "H of the batch: mean over the tokens that count, nats",
    "wanted_change": "kp·(target - H) + ki·Σ, within ±max_change: what the mean entropy is to change by, nats",
    "planned_change": "what the plan is predicted to give, gain·unit·lr·updates·predicted_change, nats ('bonus': NaN)",
    "measured_change": "what the last observed step changed the mean entropy of its tokens by, nats (NaN before)",
    "gain": "the gain that the plan is made with ('bonus': NaN)",
    "saturated": "1: no control that the method can give would raise the entropy enough, or max_change holds it back; "
    "-1: even without control it would not fall enough; 0: neither",
}

# What a prediction is worth is learned in the unit of a step: without observations the decrease that a step could take
# away, Σ c·F over F > 0, is taken for so many nats.
STEP = 0.02
UNIT_FALLS, UNIT_RISES = 0.5, 1.02  # per step at most, so that one odd batch does not set it
PRIOR_WEIGHT = 1e-4  # nats²: that of a gain of 1
FORGETTING = 0.98
ODD = 16 * STEP  # nats: nothing is learned from a step of which more is predicted at a gain of 1
GAIN = (0.05, 20.0)
SIGNAL = (1e-100, 1e100)  # outside, a step has none
ROUNDING = 1e-6  # of Σ |c·F|: below what a selection by fp32 scores can tell


def _coefficient(batch: WholeBatch, options: Options) -> Tensor:
    return options.coef


# What moves the coefficient is the loop; the effect is as adaptive_entropy's.
_BONUS = Method(
    _coefficient, as_it_is, ("entropy_coef",), ("entropy",),
    {"coef": 0.0, "delta": 0.005, "coef_min": 0.0, "coef_max": 1.0},
    {"coef": (0.0, math.inf), "delta": (0.0, math.inf)},
    formula="coef ± delta, up below the target and down above, within [coef_min, coef_max]",
)  # fmt: skip

# method -> its row, what a plan fixes of the row's options, and which of them a user may set
_ACTUATORS: dict[str, tuple[Method, dict[str, Any], tuple[str, ...]]] = {
    "exact_cov": (METHODS["exact_cov"], {}, ("ratio", "k", "at_least_one", "effect", *CLIPS)),
    "weight": (METHODS["exact_cov"], {"effect": "token_weight"}, (*CLIPS,)),
    "bonus": (_BONUS, {}, ("coef", "delta", "coef_min", "coef_max", *CLIPS)),
}


_Planned = tuple[list[Control], dict[str, Tensor], dict[str, Tensor], Tensor]  # controls, metrics, memory, predicted


class _Tokens(NamedTuple):
    """The tokens of the last step, until they are observed."""

    shapes: list[torch.Size]
    device: torch.device
    mask: Tensor | None
    group: Any
    entropy: Tensor
    predicted: Tensor  # change of it, lr·updates·predicted_change; NaN: nothing to learn from


class TargetEntropy(Controller):
    """Holds the mean entropy of a policy at a target, by feedback: one plan per rollout.

        controller = ek.TargetEntropy(0.4)
        for rollout in rollouts:
            batch = ek.SelectionBatch()                  # all minibatches of the rollout, with old statistics
            for micro in rollout: batch.add(..., entropy=..., vocab_covariance=..., coefficient=...)
            controls = controller.step(batch, lr=lr)     # before the first update; one Control per micro-batch
            ...                                          # the updates, with control=
            controller.observe([...])                    # H at the same tokens after the updates

    The plan wants the mean entropy H to change by kp·(target - H) + ki·Σ(target - H), at most ±max_change, and takes
    away so much of the predicted entropy decrease, Σ c·F, that the rest gives that change. What a prediction is worth
    depends on model, optimizer and loss; this gain is learned from the steps that are observed.

    It only lets fewer tokens bring the entropy down: a target that falls faster than the entropy falls without control
    is followed late. One above the entropy that the policy starts with is reached, if at all, by what else the gradient
    does, with most of what would be learned taken away: it costs accuracy.

    Everything is in 0-d tensors on the batch's device, nothing is read back by the host; equal, bit for bit, on all
    ranks and for every split into micro-batches.

    Args:
        target: nats: a number (or a 0-d tensor, which you may move and which is not checked on a GPU), a function of
            the step (0 at first) that returns one, or points ``[(step, nats), ...]``, linear between them, constant
            outside, and of two at one step the second counts from there on. Under torch.compile no function.
        method: "exact_cov": the fewest tokens whose removal leaves no more decrease than is wanted. "weight": one
            weight in [0, 1] on the policy term of all tokens with F > 0. "bonus": the coefficient of the loss's entropy
            bonus, which moves by ``delta`` a step; it needs neither vocab_covariance nor :meth:`observe`.
        vocab_size: of the policy; makes a target above log(vocab_size) an error.
        batch_group, backend: as in :func:`entropy_kernels.control`.
        kp, ki: gains of the error and of its sum.
        max_change: nats: the most that a step is asked for.
        options: of the method: for "exact_cov" ``ratio`` or ``k`` (a cap on the tokens) and ``effect`` ("dropped" or
            "detached"), for "bonus" ``coef`` (0.0, where it starts), ``delta`` (0.005), ``coef_min`` (0.0) and
            ``coef_max`` (1.0); for all PPO's clip as the loss has it.

    Raises:
        TypeError, ValueError: a target that is negative, not finite or above log(vocab_size), points whose steps fall,
            another method, or an option that it does not have.

    Attributes:
        needs: as in :class:`Controller`.
        memory: name -> 0-d float64 tensor: what the loop has learned and summed up, and the last measured change.

    Source:
        docs/control.md.
    """

    def __init__(
        self,
        target: Target,
        *,
        method: str = "exact_cov",
        vocab_size: int | None = None,
        batch_group: Any = None,
        backend: str = "auto",
        kp: float = 0.2,
        ki: float = 0.02,
        max_change: float = 0.03,
        **options: Any,
    ) -> None:
        row, fixed, known = _ACTUATORS[word("method", method, _ACTUATORS)]
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: expected an option of TargetEntropy's {method!r} ({', '.join(known)})")
        if options.get("effect") == "token_weight":
            raise ValueError("effect: expected 'dropped' or 'detached', got 'token_weight'; method='weight' is that")
        super().__init__(row, batch_group=batch_group, backend=backend, **options, **fixed)
        self.needs = tuple(dict.fromkeys(("entropy", *self.needs)))
        self._given = options
        self._actuator = method
        self._most = None if vocab_size is None else _vocabulary(vocab_size)
        self._target = self._checked_target(target)
        constants = {"kp": kp, "ki": ki, "max_change": max_change}
        self._constants = {name: _not_negative(name, x) for name, x in constants.items()}
        start = {"measured_change": math.nan}
        if method == "bonus":
            start["coef"] = float(self.options["coef"])
        else:
            start |= {"integral": 0.0, "unit": math.nan, "squares": 0.0, "products": 0.0}
        self._start = start
        self.memory = {name: torch.tensor(x, dtype=torch.float64) for name, x in start.items()}
        self._awaited: _Tokens | None = None
        self._begins = True  # no batch was seen yet
        self._first: Any = None  # target and entropy of the first batch on their way to the host, and the event

    def __repr__(self) -> str:
        target = self._target if not callable(self._target) else getattr(self._target, "__name__", "a function")
        given = "".join(f", {name}={value!r}" for name, value in {**self._constants, **self._given}.items())
        return f"TargetEntropy({target}, method={self._actuator!r}{given}{_shown_group(self._group)})"

    @staticmethod
    def methods() -> dict[str, tuple[str, ...]]:
        """What can hold a target, for who takes its options from a configuration. Raises nothing.

        Returns:
            method -> the names of what :class:`TargetEntropy` takes with it: gains of the loop, and its options.
        """
        return {name: ("kp", "ki", "max_change", *known) for name, (_, _, known) in _ACTUATORS.items()}

    # ---- the target --------------------------------------------------------------------------------------------------

    def _checked_target(self, target: Any) -> Any:
        if callable(target):
            return target
        if not isinstance(target, Sequence) or isinstance(target, str):
            return self._checked_entropy("target", target)
        points: list[tuple[float, float]] = []
        for i, point in enumerate(target):
            if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
                raise TypeError(f"target: expected points (step, nats), got {point!r} for number {i}")
            step = float(number(f"target[{i}]", point[0], torch.float64))
            before = [at for at, _ in points[-2:]]
            if not math.isfinite(step) or (before and step < before[-1]) or before == [step, step]:
                raise ValueError(
                    "target: expected points whose steps are finite and do not fall, at most two of them at one step, "
                    f"got {list(target)!r}"
                )
            points.append((step, self._checked_entropy(f"target[{i}]", point[1])))
        if not points:
            raise ValueError("target: expected at least one point (step, nats), got none")
        return tuple(points)

    def _checked_entropy(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            check_scalar(name, value, value.device)
            if value.dim() or not value.is_floating_point():
                raise TypeError(f"{name}: expected a number or a 0-d tensor, got {value.dtype} of {tuple(value.shape)}")
            if not _readable(value):
                return value
        checked = value.item() if isinstance(value, Tensor) else number(name, value, torch.float64)
        if not 0 <= checked < math.inf:
            raise ValueError(f"{name}: expected an entropy >= 0 in nats, got {checked}")
        if self._most is not None and checked > self._most:
            raise ValueError(
                f"{name}: expected at most log(vocab_size) = {self._most:.6g}, the largest entropy there is, "
                f"got {checked}"
            )
        return value if isinstance(value, Tensor) else checked

    def _target_now(self, device: torch.device) -> Tensor:
        """0-d float64 on ``device``."""
        target, step = self._target, self._seeds.calls
        if callable(target):
            if traced():
                raise TypeError(
                    "target: expected a number, points or a 0-d tensor under torch.compile, got a function of the step"
                )
            target = self._checked_entropy(f"target({int(step)})", target(int(step)))
        elif isinstance(target, tuple):
            step = step.double()
            target = torch.full_like(step, self._target[0][1])
            for (low, before), (high, after) in itertools.pairwise(self._target):
                between = before + (after - before) * (step - low) / (high - low)
                target = torch.where(step >= high, after, torch.where(step >= low, between, target))
        else:
            target = self._checked_entropy("target", target)
        if isinstance(target, Tensor):
            return target.detach().to(device=device, dtype=torch.float64, non_blocking=True)
        return scalar_tensor(target, torch.float64, device)

    # ---- a step ------------------------------------------------------------------------------------------------------

    @overload  # type: ignore[override]  # a plan needs the learning rate, and draws nothing
    def step(self, batch: TokenBatch, *, lr: float | Tensor, updates: int = 1) -> Control: ...

    @overload
    def step(self, batch: SelectionBatch, *, lr: float | Tensor, updates: int = 1) -> list[Control]: ...

    def step(
        self, batch: TokenBatch | SelectionBatch, *, lr: float | Tensor, updates: int = 1
    ) -> Control | list[Control]:
        """Plan a rollout's updates.

        Args:
            batch: *all* tokens of the rollout, with ``entropy`` and (but for "bonus") ``vocab_covariance``;
                ``coefficient`` is the weight that the loss gives a token in its update: 1/N of its minibatch in
                token-mean. None: 1/N of all, as where the rollout is one minibatch.
            lr: of these updates, a number >= 0 or a 0-d tensor (which on a GPU is not checked).
            updates: in how many of them each token takes part: the number of epochs.

        Returns:
            A :class:`Control`; for a :class:`SelectionBatch` one per micro-batch. Its metrics are those of
            :func:`entropy_kernels.control` and more; docs/control.md has their definitions.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.control`; a function of the step that gives no target.
        """
        whole = self._whole(batch)
        lr, updates = _learning_rate(lr, whole.device), integer("updates", updates)
        if updates < 1:
            raise ValueError(f"updates: expected >= 1, got {updates}")
        for name in self.needs:
            whole.expect(name)
        target, options = self._target_now(whole.device), self._with_memory(whole.device)
        whole.agree({"target": target, "lr": lr, "updates": updates, **self._constants, **self.memory})
        entropy = whole.moments(whole["entropy"])
        # a batch without a finite entropy, or target, is planned as one on its target
        error = target - entropy.mean
        error = torch.where((entropy.tokens > 0) & error.isfinite(), error, 0.0)
        plan = self._plan_bonus if self._actuator == "bonus" else self._plan
        found, told, kept, predicted = plan(whole, options, error, lr * updates, entropy.tokens)
        told = {"target_entropy": target, "entropy": entropy.mean, **told, "measured_change": options.measured_change}
        self._warn_of_a_high_target(target, torch.where(entropy.tokens > 0, entropy.mean, math.nan))
        self.memory = {**self.memory, **kept}
        shapes = [x.shape for x in whole.split(whole.mask)]
        self._awaited = _Tokens(shapes, whole.device, whole._mask, whole._group, entropy.mean, predicted)
        self._seeds()
        found = [each._replace(metrics={**each.metrics, **told}) for each in found]
        return found if isinstance(batch, SelectionBatch) else found[0]

    def _plan(self, whole: WholeBatch, options: Options, error: Tensor, rate: Tensor, tokens: Tensor) -> _Planned:
        """The tokens, or the weight, that leave the wanted change."""
        most = self._constants["max_change"]
        raw = self._constants["kp"] * error + self._constants["ki"] * options.integral
        wanted = raw.clamp(-most, most)

        # what there is: Σ c·F over the tokens that may be treated, those of F > 0, all, and of all the size
        score = entropy_decrease(whole, options)
        score = torch.where(score.isfinite(), score, 0.0)
        above = score.clamp(min=0)
        mine, positive, free, every = whole.totals(torch.where(whole.free, above, 0.0), above, score, score.abs())

        # the unit: nats per change that is predicted from the tokens' own logits; the gain: how many of these it is
        size = rate * positive / tokens.clamp(min=1)
        now, before = STEP / size, options.unit
        followed = torch.where(before.isnan(), now, torch.clamp(now, UNIT_FALLS * before, UNIT_RISES * before))
        unit = torch.where((size > SIGNAL[0]) & (size < SIGNAL[1]), followed, before)
        nats = unit.nan_to_num(0.0)
        gain = (nats * options.products + PRIOR_WEIGHT) / (nats.square() * options.squares + PRIOR_WEIGHT)
        gain = gain.clamp(*GAIN)

        limit = -wanted * tokens / (gain * nats * rate).clamp(min=1e-200)
        if self._actuator == "weight":
            weight = ((limit - (free - mine)) / mine).clamp(0, 1)
            options["weight"] = torch.where(mine > 0, weight, 1.0)
        else:
            options["limit"] = limit
        found, metrics, _ = _decided(self._row, whole, options, None)

        left, predicted = -metrics["predicted_change"] * tokens, metrics["predicted_change"] * rate
        rounding = ROUNDING * every
        saturated = torch.where(
            (raw > most) | (left > limit + rounding), 1.0,
            torch.where((raw < -most) | (free < limit - rounding), -1.0, 0.0),
        )  # fmt: skip
        integral = torch.where(saturated * error > 0, options.integral, options.integral + error)
        told = {
            "wanted_change": wanted, "planned_change": gain * nats * predicted, "gain": gain, "saturated": saturated,
        }  # fmt: skip
        predicted = torch.where(nats * predicted.abs() <= ODD, predicted, math.nan)
        return found, told, {"integral": integral, "unit": unit}, predicted

    def _plan_bonus(self, whole: WholeBatch, options: Options, error: Tensor, rate: Any, tokens: Any) -> _Planned:
        """The coefficient, one delta further towards the target."""
        least, most = (torch.ones_like(error) * options[name] for name in ("coef_min", "coef_max"))
        coef = options["coef"] = torch.minimum(torch.maximum(options.coef + options.delta * error.sign(), least), most)
        found, *_ = _decided(self._row, whole, options, None)
        saturated = ((coef >= most) & (error > 0)).double() - ((coef <= least) & (error < 0)).double()
        unknown = torch.full_like(error, math.nan)
        wanted = (self._constants["kp"] * error).clamp(-self._constants["max_change"], self._constants["max_change"])
        told = {"wanted_change": wanted, "planned_change": unknown, "gain": unknown, "saturated": saturated}
        return found, told, {"coef": coef}, unknown

    def observe(self, entropy: Tensor | Sequence[Tensor]) -> None:
        """Learn from the last step: what its updates did to the entropy of the tokens that it was planned for.

        Of the same tokens, as the entropy of two rollouts differs by their sampling more than by the updates, and that
        noise would stand in what was asked for and in what came of it alike. It costs a forward without gradient.
        Without any observation the gain stays what the first step assumes (docs/control.md), and feedback alone has to
        make up for it: the loop is then as many times too weak or too strong.

        Args:
            entropy: H after the updates, nats, at the tokens of the last step: a floating-point tensor for a
                TokenBatch, or one per micro-batch, of their shapes and in their order. What stands in padding reaches
                nothing.

        Raises:
            RuntimeError: there is no step that was not observed yet.
            TypeError, ValueError: tensors of other shapes, of a dtype that is not floating point, elsewhere.
        """
        if self._awaited is None:
            raise RuntimeError("observe: expected a step() before, whose tokens are not observed yet, got none")
        shapes, device, mask, group, before, predicted = self._awaited
        if not isinstance(entropy, Iterable):
            raise TypeError(f"entropy: expected a tensor, or one per micro-batch, got {type(entropy).__name__}")
        given = [entropy] if isinstance(entropy, Tensor) else list(entropy)
        if len(given) != len(shapes):
            raise ValueError(f"entropy: expected a tensor for each of {len(shapes)} micro-batches, got {len(given)}")
        for i, (x, shape) in enumerate(zip(given, shapes, strict=True)):
            check_float(f"entropy[{i}]", x)
            if x.shape != shape or x.device != device:
                raise ValueError(
                    f"entropy[{i}]: expected {tuple(shape)} on {device}, as the step's tokens, got {tuple(x.shape)} on "
                    f"{x.device}"
                )
        flat = [x.detach().reshape(-1).double() for x in given]
        after = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=device)
        measured = token_moments(after, mask, batch_group=group).mean - before
        memory = {"measured_change": measured}
        if self._actuator != "bonus":
            # least squares through the origin, where older steps count less
            sums = {"squares": predicted.square(), "products": predicted * measured}
            old = {name: self.memory[name].to(device, non_blocking=True) for name in sums}
            new = {name: FORGETTING * old[name] + x for name, x in sums.items()}
            known = new["squares"].isfinite() & new["products"].isfinite()
            memory |= {name: torch.where(known, new[name], old[name]) for name in sums}
        self.memory = {**self.memory, **memory}
        self._awaited = None

    def _warn_of_a_high_target(self, target: Tensor, entropy: Tensor) -> None:
        """Once, of the first batch: when its figures have reached the host, which does not wait for them."""
        if traced() or _torch.in_transform() or target.device.type not in ("cpu", "cuda"):
            return
        on_gpu = target.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return
        if self._begins:
            self._begins = False
            self._first = (
                torch.stack([target, entropy]).to("cpu", non_blocking=True),
                torch.cuda.Event() if on_gpu else None,
            )
            if on_gpu:
                self._first[1].record()
                return
        if self._first is None or (self._first[1] is not None and not self._first[1].query()):
            return
        high, low = self._first[0].tolist()
        self._first = None
        self._begins = math.isnan(low)  # of no tokens: the next batch is the first
        if high > low:
            warnings.warn(
                f"target: {high:.4g} is above the entropy of the first batch, {low:.4g}. Control only resists the "
                "decline of the entropy, by what it takes away from learning: expect much lower accuracy than at a "
                "target below, and perhaps not the target",
                stacklevel=3,
            )

    # ---- state -------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: after a step was observed, or before the next one.

        Args:
            state: what it returned.

        Raises:
            TypeError, ValueError: what is not the state of a TargetEntropy of this method.
        """
        super().load_state_dict(state)
        self._awaited = self._first = None
        self._begins = all(x == self._start[name] or math.isnan(x) for name, x in state["memory"].items())

    def _known(self, what: str, memory: dict[str, Any]) -> dict[str, Any]:
        if {*memory} != {*self.memory}:
            raise ValueError(
                f"{what}: expected {', '.join(sorted(self.memory))}, as TargetEntropy's {self._actuator!r} has, got "
                f"{', '.join(sorted(map(str, memory))) or 'nothing'}"
            )
        for name, x in memory.items():
            x = number(name, x, torch.float64)
            unknown = name == "measured_change" or (name == "unit" and math.isnan(x))
            least = {"unit": math.ulp(0.0), "squares": 0.0, "coef": 0.0}.get(name, -math.inf)
            if not (unknown or (math.isfinite(x) and x >= least)):
                raise ValueError(f"{name}: expected a finite number >= {least}, got {x}")
        return memory


def _vocabulary(size: Any) -> float:
    """The largest entropy."""
    size = integer("vocab_size", size)
    if size < 1:
        raise ValueError(f"vocab_size: expected >= 1, got {size}")
    return math.log(size)


def _not_negative(name: str, value: Any) -> float:
    value = number(name, value, torch.float64)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def _readable(value: Tensor) -> bool:
    """Whether a tensor's value may be looked at."""
    return not traced() and not _torch.mapped(value) and (value.device.type == "cpu" or debugging())


def _learning_rate(lr: Any, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor):
        check_scalar("lr", lr, device)
        if lr.dim() or not lr.is_floating_point():
            raise TypeError(f"lr: expected a number or a 0-d tensor, got {lr.dtype} of {tuple(lr.shape)}")
        if not _readable(lr):
            return lr.detach().to(device=device, dtype=torch.float64, non_blocking=True)
    value = lr.item() if isinstance(lr, Tensor) else number("lr", lr, torch.float64)
    if not 0 <= value < math.inf:
        raise ValueError(f"lr: expected a finite number >= 0, got {value}")
    return scalar_tensor(value, torch.float64, device)
