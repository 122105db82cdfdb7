"""Control: what a token's gradient may do, decided between the statistics and the loss, over the whole batch.

Read in this order: batch.py (what is known of the tokens), methods.py (the table: a score, a rule, an effect), then
here :func:`control` (a method's decision for a batch), :class:`SelectionBatch` (for one that comes in micro-batches)
and :class:`Controller` (over the steps of a run); target_entropy.py closes the loop. The losses take the
:class:`Control` as ``control=``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from entropy_kernels._arguments import Options, check_scalar, group_name, integer, number, of_type, scalar_tensor, word
from entropy_kernels._selection_request import SeedCounter, seed_tensor
from entropy_kernels.batch import TokenBatch, WholeBatch
from entropy_kernels.methods import CLIP_BOUNDS, Method, decrease_of, entropy_decrease, find
from entropy_kernels.selection import clip_cov_mask, kl_cov_mask


class Control(NamedTuple):
    """What a loss does to the tokens of a micro-batch; None: nothing of the kind. Losses take it as ``control=``.

    Attributes:
        token_weight: a factor of the policy term; fp32, the tokens' shape.
        dropped: bool, the tokens' shape: value and gradient are removed.
        detached: bool, the tokens' shape: the gradient is removed.
        penalized: bool, the tokens' shape: the penalty is added.
        penalty_coef: of the penalty, a number or a 0-d tensor.
        advantages: in the place of the loss's; fp32 or fp64, the tokens' shape.
        entropy_coef: in the place of the loss's; 0-d, fp64.
        metrics: 0-d fp64 tensors on the device, of the whole batch; docs/control.md has their definitions.

    Source:
        docs/control.md.
    """

    token_weight: Tensor | None = None
    dropped: Tensor | None = None
    detached: Tensor | None = None
    penalized: Tensor | None = None
    penalty_coef: float | Tensor | None = None
    advantages: Tensor | None = None
    entropy_coef: Tensor | None = None
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  (never written to)


_COUNTED = ("ratio", "k", "budget", "limit", "share")
_MASKS = ("dropped", "detached", "penalized", "token_weight")  # effects whose rule may return a mask
_ORDERED = (
    ("low", "high"), ("low_end", "high_end"), ("coef_min", "coef_max"), ("zeta_min", "zeta_max"), ("w_min", "w_max"),
)  # fmt: skip
_OPTIONAL = ("ratio", "clip_low", "clip_high")  # whose None means something where the default is a number

#: The metrics of a control, of the whole batch.
METRICS = {
    "touched": "number of tokens that the method treats",
    "touched_frac": "their share of the tokens that count",
    "decrease_share": "share of the predicted entropy decrease, Σ c·F over F > 0, that they carry (vocab_covariance)",
    "predicted_change": "Σ -c·F / N of the update as controlled: mean entropy change per unit learning rate, nats, to "
    "first order in each token's own logits; a penalty and a bonus of entropy are not in it (with vocab_covariance)",
    "predicted_change_free": "the same without the control (with vocab_covariance)",
    "entropy_coef": "the coefficient of the entropy bonus (methods that set it)",
}


def control(
    method: str | Method,
    batch: TokenBatch,
    *,
    seed: int | Tensor | SeedCounter | None = None,
    batch_group: Any = None,
    backend: str = "auto",
    **options: Any,
) -> Control:
    """What a method of :func:`entropy_kernels.methods` lets the tokens of a batch do.

        stats = ek.token_stats(logits, target)
        batch = ek.TokenBatch(stats.logprob, old_logprob, advantages, mask, vocab_covariance=stats.vocab_covariance)
        decided = ek.control("exact_cov", batch, ratio=0.02)
        ek.policy_loss(stats.logprob, old_logprob, advantages, mask, control=decided).loss.backward()

    Means, counts, quantiles, budgets and draws are those of the whole batch, on all ranks of ``batch_group``, and the
    same bit for bit for every split over ranks (:class:`SelectionBatch`: and micro-batches). No value is read back by
    the host, no gradient flows; under ``torch.compile(fullgraph=True)`` another 0-d tensor compiles nothing again,
    another Python number once. A method with memory (:class:`Controller`) makes its first step.

    Args:
        method: a name, or an :class:`entropy_kernels.Method` of your own.
        batch: the tokens, with the statistics that the method needs.
        seed: of methods that draw: an int, a 0-d int64 tensor or an :class:`entropy_kernels.SeedCounter`; others do
            not look at it.
        batch_group: torch.distributed process group over the ranks that share the batch; all make the same calls.
        backend: "auto", "torch", "triton", "cpu" or "cuda", of the selection.
        options: of the method (``ek.methods()[name].options``): numbers, which may be 0-d tensors, and words. All have
            ``clip_low``, ``clip_high`` and ``dual_clip``, PPO's clip as the loss has it.

    Returns:
        :class:`Control`; docs/control.md has the definitions of its metrics.

    Raises:
        TypeError, ValueError: an unknown method or option, one out of range, a statistic that the method needs and the
            batch lacks, or a method that draws without a seed.

    Source:
        docs/control.md; the paper of each method stands in :func:`entropy_kernels.methods`.
    """
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch: expected an ek.TokenBatch, got {type(batch).__name__}")
    row = find(method)
    checked, drawn = _checked(method, row, options, batch.logprob.device), _seeded(method, row, seed)
    return _decided(row, WholeBatch([batch], batch_group, backend), checked, drawn).controls[0]


def _checked(method: str | Method, row: Method, given: dict[str, Any], device: torch.device | None) -> Options:
    """The row's options with those that are given; without a ``device`` tensors may be anywhere."""
    known = row.options
    name = method if isinstance(method, str) else "this method"
    for option in given:
        if option not in known:
            raise TypeError(f"{option}: expected an option of {name} ({', '.join(known)}), got {option}")
    chosen = dict(known)
    if row.presets:
        preset = given.get("preset", known["preset"])
        _checked_option("preset", preset, "", row, device)
        chosen |= row.presets[preset]
    if given.get("k") is not None and "ratio" not in given:
        chosen["ratio"] = None  # k takes the place of its default
    chosen |= given
    checked = {option: _checked_option(option, value, known[option], row, device) for option, value in chosen.items()}
    for least, most in _ORDERED:
        low, high = chosen.get(least), chosen.get(most)
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
            raise ValueError(f"{least}: expected <= {most}, got {least}={low}, {most}={high}")
    checked.setdefault("effect", row.effects[0])
    return Options(checked)


def _checked_option(name: str, value: Any, default: Any, row: Method, device: torch.device | None) -> Any:
    words = row.effects if name == "effect" else tuple(row.presets) if name == "preset" else row.words.get(name, ())
    if isinstance(default, str) or (isinstance(value, str) and words):
        return word(name, value, words)
    if isinstance(default, bool):
        return of_type(name, value, bool)
    if isinstance(value, Tensor):
        device = value.device if device is None else device
        check_scalar(name, value, device)
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got {value.dtype} of {tuple(value.shape)}")
        return value.detach().to(device=device, dtype=torch.float64, non_blocking=True)
    if value is None:
        if default is not None and name not in _OPTIONAL:
            raise TypeError(f"{name}: expected a number, got None")
        return None
    if name in _COUNTED:  # the selection checks them
        return value
    value = number(name, value, torch.float64)
    least, most = {**CLIP_BOUNDS, **row.bounds}.get(name, (-math.inf, math.inf))
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number within [{least}, {most}], got {value}")
    # a compiler would take a number for a constant
    if torch.compiler.is_compiling() and device is not None:
        return scalar_tensor(value, torch.float64, device)
    return value


def _seeded(method: str | Method, row: Method, seed: Any) -> Any:
    if not row.draws:
        return None
    if seed is None:
        raise ValueError(
            f"seed: expected an int or a 0-d int64 tensor for {method if isinstance(method, str) else 'a method'}, "
            "which draws tokens, got None; ek.Controller and ek.SeedCounter count calls where nobody counts steps"
        )
    return seed


class _Decided(NamedTuple):
    controls: list[Control]  # of each micro-batch
    metrics: dict[str, Tensor]  # a rank without micro-batches has them, too
    kept: dict[str, Tensor]  # of a method with memory


def _decided(row: Method, batch: WholeBatch, options: Options, seed: Any) -> _Decided:
    for name in row.reads(options):
        batch.expect(name)
    batch.agree({"method": (row.formula, *row.effects), **options})
    if row.draws:
        options["seed"] = seed_tensor(seed, batch.device)
    effect = options.effect
    value = _checked_value(effect, row.rule(batch, row.score(batch, options), options), batch)
    told: dict[str, Any] = {}
    touched, weight, advantages = torch.zeros_like(batch.mask), None, None
    if effect == "entropy_coef":
        told["entropy_coef"] = value
    elif effect == "advantages":
        advantages = torch.where(batch.free, value, batch["advantages"])
        touched = batch.free & (advantages != batch["advantages"])
        told[effect] = advantages
    elif effect == "token_weight":
        if value.dtype == torch.bool:
            if "weight" not in options:
                raise TypeError("rule: expected numbers, or a bool beside an option weight, got a bool without one")
            value = torch.where(value, torch.ones_like(value, dtype=torch.float64) * options.weight, 1.0)
        weight = torch.where(batch.free, value.double(), 1.0)
        touched = weight != 1
        told[effect] = weight.float()
    else:
        told[effect] = touched = value & batch.free
        if effect == "penalized":
            told["penalty_coef"] = options.kl_coef
        else:
            weight = (~touched).double()
    metrics = _metrics(batch, options, touched, weight, advantages)
    if effect == "entropy_coef":
        metrics["entropy_coef"] = told[effect]
    parts = {name: [x] * len(batch) for name, x in told.items()}
    for name, x in told.items():
        if isinstance(x, Tensor) and x.dim():
            parts[name] = batch.advantages(x) if name == "advantages" else batch.split(x)
    found = [
        Control(**{name: part[i] for name, part in parts.items()}, metrics=dict(metrics)) for i in range(len(batch))
    ]
    return _Decided(found, metrics, {} if row.remember is None else row.remember(batch, options))


def _checked_value(effect: str, value: Any, batch: WholeBatch) -> Tensor:
    """What a rule returned."""
    shape = () if effect == "entropy_coef" else batch.mask.shape
    floats = effect in ("token_weight", "advantages", "entropy_coef")
    right = isinstance(value, Tensor) and value.shape == shape
    right = right and ((floats and value.is_floating_point()) or (effect in _MASKS and value.dtype == torch.bool))
    if not right:
        got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        kind = "floating point" if floats else "bool"
        raise TypeError(f"rule: expected to return {kind} of {tuple(shape)} for the effect {effect!r}, got {got}")
    return value


def _metrics(
    batch: WholeBatch, options: Options, touched: Tensor, weight: Tensor | None, advantages: Tensor | None
) -> dict[str, Tensor]:
    """``weight``: what is left of a token's gradient; ``advantages``: what goes in the place of the batch's."""
    predicted = batch.has("vocab_covariance")
    count = touched.double()
    # the same reductions on every rank, also where one has no micro-batch, or not the same fields
    if batch.shared:
        batch["coefficient"]
    sums = [torch.full_like(count, math.nan)] * 4
    if predicted:
        free = entropy_decrease(batch, options)
        kept = free if advantages is None else decrease_of(batch, advantages, options)
        kept = kept if weight is None else torch.where(weight == 0, 0.0, kept * weight)
        positive = free.clamp(min=0)
        sums = [torch.where(touched, positive, 0.0), positive, kept, free]
    count, valid, carried, every, kept, free = batch.totals(count, batch.mask.double(), *sums)
    found = {"touched": count, "touched_frac": count / valid.clamp(min=1)}
    if predicted:
        found["decrease_share"] = torch.where(every == 0, 0.0, carried / every)
        found["predicted_change"], found["predicted_change_free"] = (-x / valid.clamp(min=1) for x in (kept, free))
    return found


class SelectionBatch:
    """Selection and control over a whole batch that is processed in micro-batches: collect, decide, then the losses.

    ``add`` every micro-batch (the order counts only through the default token index), then ask for the masks, or for
    the control. They are the same, bit for bit, for every way to split the batch, on every number of ranks; also for
    every padding if ``token_index`` is given.

        batch = SelectionBatch()
        for micro in micro_batches:                      # no gradient, or old log-probs: no extra forward
            batch.add(micro.logprob, micro.advantages, micro.mask)
        for micro, dropped in zip(micro_batches, batch.clip_cov(seed=step)):
            clip_cov_loss(..., dropped=dropped).loss.backward()

    Args:
        batch_group: torch.distributed process group over the ranks that share the batch. Every rank calls the same
            methods; the numbers of micro-batches may differ.
        backend: "auto", "torch", "triton", "cpu" or "cuda"; see :func:`entropy_kernels.backends`.

    Raises:
        TypeError: a ``batch_group`` that is none.

    Source:
        docs/math.md §3; docs/control.md.
    """

    def __init__(self, batch_group: Any = None, *, backend: str = "auto") -> None:
        group_name(batch_group)
        of_type("backend", backend, str)
        self._group = batch_group
        self._backend = backend
        self._added: list[TokenBatch] = []
        self._whole: WholeBatch | None = None

    def __len__(self) -> int:
        """Number of micro-batches added."""
        return len(self._added)

    def add(
        self,
        logprob: Tensor,
        advantages: Tensor,
        mask: Tensor | None,
        token_index: Tensor | None = None,
        *,
        old_logprob: Tensor | None = None,
        entropy: Tensor | None = None,
        old_entropy: Tensor | None = None,
        collision: Tensor | None = None,
        vocab_covariance: Tensor | None = None,
        coefficient: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        cu_seqlens: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            token_index: int64, ``logprob``'s shape, distinct over the batch; for all micro-batches or for none. The
                default continues where the last one ended.
            others: as in :class:`entropy_kernels.TokenBatch`.

        Raises:
            TypeError, ValueError: as in :class:`entropy_kernels.TokenBatch`; a ``token_index`` for some only; another
                device than that of the earlier ones.
        """
        added = TokenBatch(
            logprob, old_logprob, advantages, mask, entropy=entropy, old_entropy=old_entropy, collision=collision,
            vocab_covariance=vocab_covariance, coefficient=coefficient, temperature=temperature,
            cu_seqlens=cu_seqlens, token_index=token_index, exclude=exclude,
        )  # fmt: skip
        if self._added and logprob.device != (device := self._added[0].logprob.device):
            raise ValueError(
                f"logprob: expected on the device of the earlier micro-batches, {device}, got {logprob.device}"
            )
        if self._added and (token_index is None) != (self._added[0].token_index is None):
            got = "one" if token_index is not None else "none"
            raise ValueError(
                f"token_index: expected for all micro-batches or for none, got {got} for number {len(self)}, "
                "other than for those before"
            )
        self._added.append(added)
        self._whole = None

    def __repr__(self) -> str:
        positions = sum(batch.logprob.numel() for batch in self._added)
        return f"SelectionBatch({len(self)} micro-batches, {positions} positions{_shown_group(self._group)})"

    @property
    def whole(self) -> WholeBatch:
        """All micro-batches; a rank without any still takes part in the reductions.

        What is known of them is kept, but not over ranks, of which another one may have added to its own.
        """
        if self._whole is None or self._group is not None:
            self._whole = WholeBatch(self._added, self._group, self._backend)
        return self._whole

    def covariance(self) -> list[Tensor]:
        """:func:`entropy_kernels.token_covariance` over the whole batch. Raises nothing.

        Returns:
            One fp32 tensor per micro-batch, of its shape; nats times the unit of the advantages.
        """
        whole = self.whole
        return whole.split(whole["covariance"])

    def clip_cov(self, *, seed: int | Tensor, **options: Any) -> list[Tensor]:
        """:func:`entropy_kernels.clip_cov_mask` over the whole batch.

        Args:
            seed: as in :func:`entropy_kernels.clip_cov_mask`.
            options: of that function: ratio, k, low, high, band, closed, at_least_one.

        Returns:
            One bool mask per micro-batch added, of its shape.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.clip_cov_mask`; what :meth:`add` takes, as an option.
        """
        return self._select(clip_cov_mask, {"seed": seed, **options})

    def kl_cov(self, **options: Any) -> list[Tensor]:
        """:func:`entropy_kernels.kl_cov_mask` over the whole batch.

        Args:
            options: of that function: ratio, k, at_least_one.

        Returns:
            One bool mask per micro-batch added, of its shape.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.kl_cov_mask`; what :meth:`add` takes, as an option.
        """
        return self._select(kl_cov_mask, options)

    def control(
        self, method: str | Method, *, seed: int | Tensor | SeedCounter | None = None, **options: Any
    ) -> list[Control]:
        """:func:`entropy_kernels.control` of the whole batch.

        Args:
            others: as in :func:`entropy_kernels.control`.

        Returns:
            One :class:`Control` per micro-batch added.

        Raises:
            TypeError, ValueError: as in :func:`entropy_kernels.control`.
        """
        row, whole = find(method), self.whole
        return _decided(row, whole, _checked(method, row, options, whole.device), _seeded(method, row, seed)).controls

    def _select(self, function: Any, options: dict[str, Any]) -> list[Tensor]:
        for name in ("mask", "exclude", "token_index", "batch_group"):
            if name in options:
                raise TypeError(f"{name}: expected in add() or SelectionBatch(), got it as an option of the selection")
        whole = self.whole
        return whole.split(function(whole["covariance"], **whole.candidates(), **{"backend": self._backend, **options}))


class Controller:
    """A method over the steps of a run: it counts the seeds, and keeps what a method with memory remembers.

        controller = ek.Controller("adaptive_entropy", target=0.3)
        decided = controller.step(batch)                 # in every update; a list for a SelectionBatch

    Args:
        method: as in :func:`control`.
        seed: of the first step of a method that draws; each later one draws with the next.
        batch_group, backend, options: as in :func:`control`.

    Attributes:
        options: all options of the method, those that are given and the others' defaults.
        needs: names of the optional fields of ``TokenBatch`` that a step reads, as "entropy" or "vocab_covariance".
        effect: what its control does: "dropped", "detached", "penalized", "token_weight", "advantages", "entropy_coef".
        memory: name -> 0-d float64 tensor: what the method remembers; empty before the first step and without memory.

    Raises:
        TypeError, ValueError: as in :func:`control`.

    Source:
        docs/control.md.
    """

    def __init__(
        self, method: str | Method, *, seed: int = 0, batch_group: Any = None, backend: str = "auto", **options: Any
    ) -> None:
        self._method, self._row, self._options = method, find(method), options
        self._seeds = SeedCounter(seed)
        self._group, self._backend = batch_group, backend
        group_name(batch_group)
        of_type("backend", backend, str)
        self.options = _checked(method, self._row, options, None)
        self.needs = self._row.reads(self.options)
        self.effect: str = self.options["effect"]
        self.memory: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        method = repr(self._method) if isinstance(self._method, str) else "ek.Method"
        given = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"{type(self).__name__}({method}{given}{_shown_group(self._group)})"

    @overload
    def step(self, batch: TokenBatch, *, seed: int | Tensor | None = None) -> Control: ...

    @overload
    def step(self, batch: SelectionBatch, *, seed: int | Tensor | None = None) -> list[Control]: ...

    def step(self, batch: TokenBatch | SelectionBatch, *, seed: int | Tensor | None = None) -> Control | list[Control]:
        """Decide about a batch, and remember it.

        Args:
            batch: the tokens, with the statistics that the method needs.
            seed: of a method that draws, an int or a 0-d int64 tensor, in the place of the one that is counted here.

        Returns:
            The :class:`Control` of this step; for a :class:`SelectionBatch` a list of one per micro-batch.

        Raises:
            TypeError, ValueError: as in :func:`control`; another ``batch_group`` than the batch's.
        """
        whole = self._whole(batch)
        options = self._with_memory(whole.device)
        # the counter is asked where the call is known to be right
        found, _, kept = _decided(self._row, whole, options, self._seeds if seed is None else seed)
        self.memory = {**self.memory, **self._known("remember", kept)}
        return found if isinstance(batch, SelectionBatch) else found[0]

    def _whole(self, batch: TokenBatch | SelectionBatch) -> WholeBatch:
        if isinstance(batch, SelectionBatch):
            if self._group is not None and batch._group is not self._group:
                raise ValueError("batch_group: expected that of the SelectionBatch (or None), got another one")
            return batch.whole
        if not isinstance(batch, TokenBatch):
            raise TypeError(f"batch: expected an ek.TokenBatch or ek.SelectionBatch, got {type(batch).__name__}")
        return WholeBatch([batch], self._group, self._backend)

    def _with_memory(self, device: torch.device) -> Options:
        """The options of a step on ``device``, what is remembered in the place of those of its name."""
        options = _checked(self._method, self._row, self._options, device)
        options.update({name: x.to(device, non_blocking=True) for name, x in self.memory.items()})
        return options

    def state_dict(self) -> dict[str, Any]:
        """The state, which a checkpoint saves: it waits for the device. Raises nothing.

        Returns:
            ``{"calls": how many seeds were drawn, "memory": {name: number}}``.
        """
        return {"calls": int(self._seeds.calls), "memory": {name: float(x) for name, x in self.memory.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Args:
            state: what it returned.

        Raises:
            TypeError, ValueError: what is not the state of a controller of this method.
        """
        if not isinstance(state, dict) or {*state} != {"calls", "memory"} or not isinstance(state["memory"], dict):
            got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected a dict of calls (an int) and memory (a dict of numbers), got {got}")
        calls, memory = integer("calls", state["calls"]), self._known("memory", state["memory"])
        if calls < 0:
            raise ValueError(f"calls: expected >= 0, got {calls}")
        numbers = {name: float(number(name, x, torch.float64)) for name, x in memory.items()}
        self._seeds.calls.fill_(calls)
        self.memory = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}

    def _known(self, what: str, memory: dict[str, Any]) -> dict[str, Any]:
        """What is remembered, if it has the names of options."""
        if self._row.remember is None and memory:
            raise ValueError(f"{what}: expected none of a method without memory, got {', '.join(memory)}")
        for name in memory:
            if name not in self._row.options:
                raise ValueError(f"{what}: expected names of options ({', '.join(self._row.options)}), got {name}")
        return memory


def _shown_group(group: Any) -> str:
    return "" if group is None else f", batch_group={group_name(group)!r}"
