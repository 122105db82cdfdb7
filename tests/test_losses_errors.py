"""Every refused argument is named, with what was expected and what came; the loss modules."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import losses
from entropy_kernels.losses import AGG_MODES, CLIP_COV, KL_COV, KL_ESTIMATORS, METRICS
from loss_cases import MODES, leaf

LP = torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
FUNCTIONS = {"policy": ek.policy_loss, "clip_cov": ek.clip_cov_loss, "kl_cov": ek.kl_cov_loss}


def call(function: Any, **changes: Any) -> ek.PolicyLoss:
    options: dict[str, Any] = {"logprob": LP, "old_logprob": LP, "advantages": LP, "mask": MASK, **changes}
    if function is ek.clip_cov_loss and "dropped" not in changes:
        options.setdefault("seed", 0)
    return function(*[options.pop(name) for name in ("logprob", "old_logprob", "advantages", "mask")], **options)


def surrogate(result: Any, **more: Any) -> ek.Surrogate:
    return ek.Surrogate(lambda d, lp, a, o: result(a), **more)


# (changes, error, words of the message); for every loss
SHARED = [
    ({"logprob": [0.0]}, TypeError, "logprob: expected a torch.Tensor, got list"),
    ({"logprob": LP.long()}, TypeError, "logprob: expected a floating-point dtype, got torch.int64"),
    ({"logprob": torch.tensor(1.0)}, ValueError, "logprob: expected at least one dimension"),
    ({"old_logprob": None}, TypeError, "old_logprob: expected a torch.Tensor, got NoneType"),
    ({"old_logprob": LP.long()}, TypeError, "old_logprob: expected a floating-point dtype"),
    ({"old_logprob": LP[:, :2]}, ValueError, r"old_logprob: expected logprob's shape \(2, 3\), got \(2, 2\)"),
    ({"old_logprob": LP.to("meta")}, ValueError, "old_logprob: expected on the device of logprob, cpu, got meta"),
    ({"advantages": 1.0}, TypeError, "advantages: expected a torch.Tensor, got float"),
    ({"advantages": MASK}, TypeError, "advantages: expected a floating-point dtype, got torch.bool"),
    ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected .*one per sequence \(2,\).*got \(3,\)"),
    ({"advantages": torch.zeros(2, 2)}, ValueError, r"advantages: expected .*got \(2, 2\)"),
    ({"mask": [1]}, TypeError, "mask: expected a torch.Tensor, got list"),
    ({"mask": MASK[:1]}, ValueError, r"mask: expected logprob's shape \(2, 3\), got \(1, 3\)"),
    *(
        ({"mask": torch.full((2, 3), x)}, ValueError, rf"mask: expected a mask of 0 and 1, got {x} \(6 such of 6\)")
        for x in (0.5, float("nan"), -1, 2)
    ),
    ({"mask": MASK.to(torch.complex64)}, TypeError, "mask: expected a bool, int or float"),
    ({"clip_low": -0.1}, ValueError, "clip_low: expected >= 0 or None, got -0.1"),
    ({"clip_high": float("nan")}, ValueError, "clip_high: expected a finite number, got nan"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: expected > 1 or None, got 1.0"),
    ({"dual_clip": "3"}, TypeError, "dual_clip: expected a number, got str"),
    ({"entropy_coef": 0.1}, ValueError, "entropy: expected a tensor with entropy_coef=0.1, got None"),
    ({"entropy_coef": None}, TypeError, "entropy_coef: expected a number, got NoneType"),
    ({"entropy_coef": torch.zeros(2)}, ValueError, "entropy_coef: expected a number or a 0-d tensor"),
    ({"entropy": LP[0]}, ValueError, "entropy: expected logprob's shape"),
    ({"ref_kl_coef": 0.1}, ValueError, "ref_logprob: expected a tensor with ref_kl_coef=0.1, got None"),
    ({"ref_logprob": LP.t()}, ValueError, "ref_logprob: expected logprob's shape"),
    ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of .*k3.*got 'k4'"),
    ({"kl_estimator": "k3++"}, ValueError, r"kl_estimator: .*got 'k3\+\+'"),
    ({"kl_estimator": None}, ValueError, "kl_estimator: .*got None"),
    ({"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode: expected one of 'token-mean'.*got 'mean'"),
    ({"dp_size": 0}, ValueError, "dp_size: expected >= 1, got 0"),
    ({"dp_size": 2.0}, TypeError, "dp_size: expected an int, got float"),
    ({"dp_size": 2}, ValueError, "batch_num_tokens: expected the number of the whole batch.*dp_size=2, got None"),
    ({"dp_size": 2, "loss_agg_mode": "seq-mean-token-sum"}, ValueError, "global_batch_size: expected the number"),
    ({"batch_num_tokens": -1}, ValueError, "batch_num_tokens: expected >= 0, got -1"),
    ({"batch_num_tokens": torch.ones(2)}, ValueError, "batch_num_tokens: expected a number or a 0-d tensor"),
    ({"global_batch_size": "4"}, TypeError, "global_batch_size: expected a number, got str"),
    ({"loss_scale_factor": 0}, ValueError, "loss_scale_factor: expected > 0, got 0"),
    ({"batch_group": "world"}, TypeError, "batch_group: expected a torch.distributed process group or None, got str"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: expected one of 'propagate', 'drop', got 'ignore'"),
    ({"surrogate": "grpo2"}, ValueError, "surrogate: expected an ek.Surrogate or one of ppo, gspo.*got 'grpo2'"),
    ({"surrogate": "sapo", "tau": 1.0}, TypeError,
     "tau: expected one of the loss's keywords.*tau_pos, tau_neg; got tau"),
    ({"epsilon": 0.2}, TypeError, "epsilon: expected one of the loss's keywords.*docs/migration.md"),
    ({"clip_hihg": 0.2}, TypeError, r"clip_hihg: .*did you mean clip_high\?"),
    ({"tau_pos": 1.0}, TypeError, "tau_pos is an option of surrogate='sapo'"),
    ({"surrogate": "dapo"}, ValueError, "surrogate: .*did you mean 'ppo'"),
    ({"surrogate": max}, TypeError, "surrogate: .*wrap it"),
    ({"surrogate": surrogate(lambda a: (a, a))}, TypeError, r"surrogate: expected fn to return \(value"),
    ({"surrogate": surrogate(lambda a: (a.bfloat16(), a, None))}, TypeError, "surrogate: .*got .*bfloat16"),
    ({"surrogate": surrogate(lambda a: (a, a[0], None))}, TypeError, r"surrogate: .*of shape \(3,\)"),
    ({"surrogate": surrogate(lambda a: (a, a, None), defaults={"clip_low": 0.1})}, ValueError,
     "surrogate: expected defaults that are no keywords of the loss, got clip_low"),
    ({"surrogate": surrogate(lambda a: (a, a, None), defaults={"tau": 1.0}), "theta": 1.0}, TypeError, "tau"),
    ({"token_weight": torch.zeros(5)}, ValueError, "token_weight: expected logprob's shape"),
    ({"covariance_advantages": 3.0}, TypeError, "covariance_advantages: expected a torch.Tensor, got float"),
    ({"clip_low": torch.zeros(2)}, ValueError, "clip_low: expected a number or a 0-d tensor"),
    ({"clip_low": torch.tensor(0.1, requires_grad=True)}, ValueError, "clip_low: expected a constant"),
    ({"clip_low": torch.tensor(True)}, TypeError, "clip_low: expected a number, got torch.bool"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError,
     r"cu_seqlens: expected numbers that rise from 0 to the number of .*, 6, got \[0, 3\]"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens: expected numbers that rise"),
    ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens: expected numbers that rise"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens: expected dtype"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int64)}, ValueError,
     r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(2, 2\)"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
]  # fmt: skip
CLIP = [
    ({"preset": "Paper"}, ValueError, "preset: expected one of 'verl', 'paper', got 'Paper'"),
    ({"clip_low": "none"}, ValueError, r"clip_low: expected a number, None \(no clip\) or 'preset', got 'none'"),
    ({"seed": None}, ValueError, "seed: expected an int or a 0-d int64 tensor .or a mask as `dropped`., got None"),
    ({"seed": 1.5}, TypeError, "seed: expected an int"),
    ({"ratio": 0.1, "k": 3}, ValueError, "ratio, k: expected one of them"),
    ({"ratio": 0.0}, ValueError, "ratio: expected a fraction"),
    ({"ratio": 1.1}, ValueError, "ratio: expected a fraction"),
    ({"k": -1}, ValueError, "k: expected >= 0, got -1"),
    ({"low": 5.0}, ValueError, "low: expected < high"),
    ({"band": "relative"}, ValueError, "band: expected one of 'absolute', 'quantile', got 'relative'"),
    ({"band": "quantile"}, ValueError, r"low, high: expected shares in \[0, 1\] with band='quantile', got low=None"),
    ({"band": "quantile", "low": 0.1, "high": 2.0}, ValueError, "high: expected a share"),
    ({"token_index": MASK}, TypeError, "token_index: expected dtype torch.int64"),
    ({"dropped": MASK * 0.5}, ValueError, "dropped: expected a mask of 0 and 1, got 0.5"),
    ({"dropped": MASK, "seed": 0}, ValueError, "dropped: expected no seed, ratio, k, low, high, band.*got seed"),
    ({"dropped": MASK, "ratio": 0.1, "low": 1.0}, ValueError, "dropped: .*got ratio, low"),
    ({"dropped": MASK, "k": 1}, ValueError, "dropped: .*got k"),
    ({"dropped": MASK, "high": 5.0}, ValueError, "dropped: .*got high"),
    ({"dropped": MASK[0]}, ValueError, r"dropped: expected logprob's shape \(2, 3\), got \(3,\)"),
]
KL = [
    ({"preset": None}, ValueError, "preset: expected one of 'verl', 'paper', got None"),
    ({"ratio": 0.1, "k": 3}, ValueError, "ratio, k: expected one of them"),
    ({"ratio": -1.0}, ValueError, "ratio: expected a fraction"),
    ({"kl_coef": "1"}, TypeError, "kl_coef: expected a number, got str"),
    ({"penalty_estimator": "l2"}, ValueError, "penalty_estimator: expected one of .*got 'l2'"),
    ({"penalized": MASK, "ratio": 0.1}, ValueError, "penalized: expected no ratio, k beside it.*got ratio"),
    ({"penalized": MASK.int() * 3}, ValueError, "penalized: expected a mask of 0 and 1, got 3"),
    ({"penalized": MASK, "k": 0}, ValueError, "penalized: .*got k"),
    ({"penalized": 3}, TypeError, "penalized: expected a torch.Tensor, got int"),
]


# Numbers that fp32, or int64, does not hold: (loss, keyword of a number, keyword of a count)
TOO_LARGE = r"expected a number within ±3.4e\+38, the range of torch.float32, got"
BEYOND: list[tuple[str, dict[str, Any], type, str]] = [
    *(
        (function, {name: value}, ValueError, f"{name}: {TOO_LARGE}")
        for function in FUNCTIONS
        for name in ("clip_low", "clip_high", "dual_clip", "entropy_coef", "ref_kl_coef", "loss_scale_factor")
        for value in (1e300, 10**400)
    ),
    ("kl_cov", {"kl_coef": -1e300}, ValueError, f"kl_coef: {TOO_LARGE}"),
    *(
        ("policy", {"surrogate": name, option: value}, ValueError, f"{option}: {TOO_LARGE}")
        for name, known in ek.surrogates().items()
        for option in known.defaults
        for value in (1e39, 10**400)
    ),
    *(
        ("policy", {"surrogate": "sapo", option: value}, ValueError, f"{option}: expected > 0 within .*, got")
        for option in ("tau_pos", "tau_neg")
        for value in (0.0, 0, 1e-46, -1.0)
    ),
    *(("policy", {"loss_scale_factor": x}, ValueError, "loss_scale_factor: .* within .*, got") for x in (1e-46, 3e38)),
    *(
        ("policy", {name: value}, ValueError, f"{name}: expected an int of at most 64 bits")
        for name in ("batch_num_tokens", "global_batch_size", "dp_size")
        for value in (1 << 63, 10**400)
    ),
    ("policy", {"batch_num_tokens": 1e19}, ValueError, "batch_num_tokens: expected a number below 2"),
    ("clip_cov", {"k": 1 << 63}, ValueError, "k: expected an int of at most 64 bits"),
    ("clip_cov", {"seed": 1 << 64}, ValueError, "seed: expected at most 64 bits"),
    ("clip_cov", {"ratio": 10**400}, ValueError, "ratio: expected a"),
    ("clip_cov", {"low": 1e39, "high": 2e39}, ValueError, "low: expected < high"),
    ("clip_cov", {"low": 1.0, "high": 1 + 1e-9}, ValueError, "low: expected < high"),
    ("kl_cov", {"k": -(10**30)}, ValueError, "k: expected an int of at most 64 bits"),
]
REFUSED = [
    *BEYOND,
    *((function, *case) for function in FUNCTIONS for case in SHARED),
    *(("clip_cov", *case) for case in CLIP),
    *(("kl_cov", *case) for case in KL),
]


@pytest.mark.parametrize(("function", "changes", "error", "words"), REFUSED)
def test_refused_arguments_are_named(function: str, changes: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call(FUNCTIONS[function], **changes)


BY_SEQUENCE = [{"loss_agg_mode": mode} for mode in MODES if mode.startswith("seq-")]


@pytest.mark.parametrize("options", [*BY_SEQUENCE, {"surrogate": "gspo"}])
def test_packed_tokens_have_no_sequences(options: dict[str, str]) -> None:
    (name, value), *_ = options.items()
    words = rf"expected \(\.\.\., sequences, tokens\) with {name}='{value}', or cu_seqlens beside it, got shape \(3,\)"
    with pytest.raises(ValueError, match=f"logprob: {words}"):
        ek.policy_loss(LP[0], LP[0], LP[0], None, **options)  # type: ignore[arg-type]
    if name == "loss_agg_mode":
        with pytest.raises(ValueError, match=f"term: {words}"):
            ek.aggregate(LP[0], None, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_agg_mode": "mean"}, "loss_agg_mode: expected one of"),
        ({"dp_size": 2}, "batch_num_tokens: expected the number"),
        ({"mask": MASK[:1]}, "mask: expected term's shape"),
        ({"mask": MASK * 0.5}, "mask: expected a mask of 0 and 1, got 0.5"),
    ],
)
def test_arguments_of_aggregate(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ek.aggregate(LP, **{"mask": MASK, **changes})


WRONG_MASKS: list[tuple[str, str]] = [
    *((f, "mask") for f in FUNCTIONS),
    ("clip_cov", "dropped"),
    ("kl_cov", "penalized"),
]


@pytest.mark.parametrize(("function", "name"), WRONG_MASKS)
def test_wrong_masks_that_nobody_looks_at(function: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: NaN; in compiled code of the CPU an error."""
    mask = MASK.double()
    mask[1, 1] = 0.5
    compiled = torch.compile(FUNCTIONS[function], fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"{name}: expected a mask of 0 and 1"):
        call(compiled, **{"seed": 0} if (function, name) == ("clip_cov", "mask") else {}, **{name: mask})
    monkeypatch.setattr("entropy_kernels._arguments.values_are_checked", lambda tensor: False)
    x = leaf(LP)
    out = call(FUNCTIONS[function], logprob=x, **{name: mask})
    out.loss.backward()
    assert out.loss.isnan() and float(out.metrics["nonfinite_tokens"]) == 1
    assert x.grad is not None and x.grad.isnan().any()
    assert ek.aggregate(LP, mask).isnan()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_numbers_of_numpy_are_numbers(function: Any) -> None:
    options = {"clip_low": 0.25, "clip_high": 0.5, "dual_clip": 3.0, "dp_size": 2, "batch_num_tokens": 12}
    from_numpy = {name: np.asarray(value)[()] for name, value in options.items()}
    assert all(isinstance(value, np.generic) for value in from_numpy.values())
    assert torch.equal(call(function, **options).loss, call(function, **from_numpy).loss)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e5m2])
def test_advantages_of_few_bits_are_their_values(dtype: torch.dtype) -> None:
    advantages = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 4.0]])
    expected, found = (ek.policy_loss(LP, 1.1 * LP, x, None) for x in (advantages, advantages.to(dtype)))
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(x, expected.metrics[name]) for name, x in found.metrics.items())


def test_counts_of_any_integer_dtype() -> None:
    for dtype in (torch.uint8, torch.uint16, torch.uint64, torch.int32, torch.float64):
        out = ek.policy_loss(LP, LP, LP + 1, None, batch_num_tokens=torch.tensor(12, dtype=dtype))
        assert float(out.loss) == -0.5


def test_numbers_that_change_nothing() -> None:
    """What underflows in fp32 acts as 0 or as 1 where nothing is divided by it; what is large acts as it is."""
    right = ek.policy_loss(LP, LP, LP + 1, None, clip_low=None, clip_high=None).loss
    for options in ({"clip_high": 3e38, "clip_low": 10**20}, {"entropy": LP, "entropy_coef": 1e-300}):
        assert torch.equal(ek.policy_loss(LP, LP, LP + 1, None, **options).loss, right)


def test_estimator_of_the_function() -> None:
    with pytest.raises(ValueError, match="estimator: expected one of"):
        losses.kl_estimate(LP, "full")


# ---- signatures, presets, tables ------------------------------------------------------------------------------------


def test_the_three_losses_share_their_arguments_and_defaults() -> None:
    """One signature, extended; only the clips' default differs: the preset decides. The last are the surrogate's."""
    *base, _ = inspect.signature(ek.policy_loss).parameters.values()
    for function in (ek.clip_cov_loss, ek.kl_cov_loss):
        own = inspect.signature(function).parameters
        assert list(own)[: len(base)] == [parameter.name for parameter in base]
        assert list(own)[-1] == "surrogate_options"
        for parameter in base:
            name = parameter.name
            expected = "preset" if name in ("clip_low", "clip_high") else parameter.default
            assert own[name].default == expected and own[name].kind == parameter.kind, name


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_argument_goes_on_under_its_own_name(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(losses.functional, "_loss", lambda method, given: seen.update(given))
    *names, rest = inspect.signature(function).parameters
    arguments = {name: object() for name in (*names, "more")}
    function(**arguments)
    assert seen == {**{name: arguments[name] for name in names}, rest: {"more": arguments["more"]}}


@pytest.mark.parametrize("preset", ["verl", "paper"])
def test_none_means_the_presets_value(preset: str) -> None:
    g = torch.Generator().manual_seed(0)
    lp, old, adv = (2 * torch.randn(8, 64, generator=g) for _ in range(3))
    chosen = CLIP_COV[preset]
    named = {"ratio": chosen.ratio, "low": chosen.low, "high": chosen.high, "band": chosen.band,
             "clip_low": chosen.clip_low, "clip_high": chosen.clip_high}  # fmt: skip
    a = ek.clip_cov_loss(lp, old, adv, None, preset=preset, seed=3)
    b = ek.clip_cov_loss(lp, old, adv, None, preset=preset, seed=3, **named)  # type: ignore[arg-type]
    assert torch.equal(a.loss, b.loss) and float(a.metrics["band_frac"]) > 0
    a = ek.kl_cov_loss(lp, old, adv, None, preset=preset)
    b = ek.kl_cov_loss(lp, old, adv, None, preset=preset, ratio=KL_COV[preset].ratio, clip_low=None, clip_high=None)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.metrics["selected_frac"], b.metrics["selected_frac"])


def test_presets_are_those_of_the_paper_and_of_verl() -> None:
    paper, verl = CLIP_COV["paper"], CLIP_COV["verl"]
    assert (paper.ratio, paper.low, paper.high) == (verl.ratio, verl.low, verl.high) == (2e-4, 1.0, 5.0)
    assert paper.clip_low is paper.clip_high is None and (verl.clip_low, verl.clip_high) == (0.2, 0.2)
    assert paper.closed and not verl.closed and verl.at_least_one and not paper.at_least_one
    assert verl.exclude_clipped and not paper.exclude_clipped
    assert (paper.dropped_value, verl.dropped_value) == ("keep", "zero")
    assert KL_COV["paper"].ratio == 2e-3 and KL_COV["verl"].ratio == 2e-4
    assert all(p.clip_low is p.clip_high is None and p.penalty == "abs" for p in KL_COV.values())


def test_a_clip_can_be_set_and_removed_in_either_preset() -> None:
    old, adv = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    lp = torch.tensor([[1.0, -1.0]])  # both beyond a clip of 0.2
    nothing = torch.zeros(1, 2)
    for preset in ("verl", "paper"):
        for function, mask in ((ek.clip_cov_loss, "dropped"), (ek.kl_cov_loss, "penalized")):
            options: dict[str, Any] = {"preset": preset, mask: nothing}
            on = function(lp, old, adv, None, clip_low=0.2, clip_high=0.2, **options)
            off = function(lp, old, adv, None, clip_low=None, clip_high=None, **options)
            high = function(lp, old, adv, None, clip_low=None, clip_high=0.2, **options)
            assert [float(out.metrics["clipfrac"]) for out in (on, off, high)] == [1.0, 0.0, 0.5]


def test_tables_for_the_docs() -> None:
    table = losses.metric_table()
    assert table.splitlines()[0] == "| metric | definition | present |"
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.definition} | {metric.given} |" in table
        assert "|" not in metric.definition  # it would end the cell
    names = "pg_loss clipfrac clipfrac_low clipfrac_high clipfrac_lower ppo_kl ppo_kl_abs ratio_mean ratio_max cov_mean"
    others = "cov_max band_frac selected_frac entropy ref_kl nonfinite_tokens"
    assert list(METRICS) == [*names.split(), *others.split()]
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    assert table in text and losses.surrogate_table() in text
    assert all(f"`{name}`" in text for name in (*AGG_MODES, "none", *KL_ESTIMATORS))


# ---- modules --------------------------------------------------------------------------------------------------------

MODULES = [
    (ek.PolicyLossModule, ek.policy_loss, {"clip_high": 0.28, "dual_clip": 3.0}),
    (ek.ClipCovLoss, ek.clip_cov_loss, {"preset": "paper", "seed": 4, "k": 2, "low": -9.0}),
    (ek.KlCovLoss, ek.kl_cov_loss, {"kl_coef": 0.5, "k": 2, "loss_agg_mode": "seq-mean-token-mean"}),
]


@pytest.mark.parametrize(("module", "function", "options"), MODULES)
def test_modules_are_their_functions(module: Any, function: Any, options: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    lp, old, adv = (torch.randn(3, 5, generator=g) for _ in range(3))
    criterion = module(**options)
    assert not list(criterion.parameters())
    assert list(criterion.state_dict()) == (["seeds.calls"] if module is ek.ClipCovLoss else [])
    expected = function(lp, old, adv, None, **options)
    out = criterion(lp, old, adv, None)
    assert isinstance(out, ek.PolicyLoss) and torch.equal(out.loss, expected.loss)
    # what is given in the call goes first, and does not stay
    entropy = leaf(lp)
    again = criterion(lp, old, adv, None, entropy=entropy, entropy_coef=0.1, loss_agg_mode="token-sum")
    changed = {**options, "entropy": entropy, "entropy_coef": 0.1, "loss_agg_mode": "token-sum"}
    third = dict(options)
    if module is ek.ClipCovLoss:  # each call draws with the next seed
        changed["seed"], third["seed"] = options["seed"] + 1, options["seed"] + 2
    assert torch.equal(again.loss, function(lp, old, adv, None, **changed).loss)
    assert torch.equal(criterion(lp, old, adv, None).loss, function(lp, old, adv, None, **third).loss)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(criterion)


@pytest.mark.parametrize(("module", "function", "options"), MODULES)
def test_modules_refuse_options_their_function_lacks(module: Any, function: Any, options: dict[str, Any]) -> None:
    with pytest.raises(
        TypeError, match=rf"{module.__name__}: expected keyword arguments of {function.__name__}.*got epsilon"
    ):
        module(epsilon=0.2, **options)
    with pytest.raises(TypeError, match="got mask"):
        module(mask=None)
