"""The op ``policy_loss``: every backend, and the CUDA kernels emulated on the CPU, against its definition."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cuda_selection_emulator as emulator
import entropy_kernels as ek
from calls import same_bits
from conftest import Place, places
from cuda_emulator import missing
from entropy_kernels.backends import registry
from entropy_kernels.backends.eager import policy_loss as eager
from entropy_kernels.backends.eager import selection
from entropy_kernels.backends.policy_names import METRICS, PENALTIES, TOTALS, Selected
from entropy_kernels.backends.radix_select import Band, Count

INF, NAN = math.inf, math.nan
NO_COUNT, NO_BAND = Count(None, 0, False), Band(0.0, 0.0, False, False)


class Case(NamedTuple):
    """One loss: clips (None: none), what becomes of the selected, how they are found."""

    selected: Selected = Selected.UNCHANGED
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    count: Count | None = None
    band: Band | None = None
    exclude_clipped: bool = False
    estimator: str = "abs"
    covariance_given: bool = False

    @property
    def clips(self) -> tuple[float, float, float]:
        low = -INF if self.clip_low is None else 1 - self.clip_low
        high = INF if self.clip_high is None else 1 + self.clip_high
        return low, high, INF if self.dual_clip is None else self.dual_clip

    def arguments(self, data: dict[str, Tensor]) -> tuple[Any, ...]:
        """Of the contract in ops/policy_loss.py, but for the data's first four."""
        count, band = self.count or NO_COUNT, self.band or NO_BAND
        given = self.count is None and self.selected != Selected.UNCHANGED
        return (
            data["covariance"] if self.covariance_given else None, data["given"] if given else None,
            data["token_index"], data["seed"] if self.band is not None else None,
            data["coefficient"] if self.selected == Selected.PENALISED else None, *self.clips, int(self.selected),
            self.count is not None, self.exclude_clipped, PENALTIES.index(self.estimator.removesuffix("+")),
            self.estimator.endswith("+"), -1.0 if count.ratio is None else count.ratio,
            -1 if count.k is None else count.k, count.at_least_one, *band,
        )  # fmt: skip


CLIP = Case(Selected.DROPPED, count=Count(0.1, None, True), band=Band(0.05, 2.0, False, False))
KL = Case(Selected.PENALISED, clip_low=None, clip_high=None, count=Count(None, 40, True))
CASES = {
    "ppo": Case(),
    "ppo, dual clip": Case(dual_clip=1.5, clip_low=None),
    "no clip": Case(clip_low=None, clip_high=None),
    "clip-cov, verl": CLIP._replace(exclude_clipped=True),
    "clip-cov, paper": CLIP._replace(
        selected=Selected.DETACHED, clip_low=None, clip_high=None, band=Band(0.05, 2.0, False, True)
    ),
    "clip-cov, quantile": CLIP._replace(exclude_clipped=True, band=Band(0.3, 0.9, True, False)),
    "clip-cov, given": Case(Selected.DROPPED, dual_clip=2.0),
    "clip-cov, covariance given": CLIP._replace(covariance_given=True),
    "kl-cov": KL._replace(count=Count(0.1, None, True)),
    "kl-cov, given": Case(Selected.PENALISED, estimator="k3", covariance_given=True),
    **{f"kl-cov, {name}": KL._replace(estimator=name) for name in ("k1", "k2", "k3+")},
}


def batch(tokens: int, seed: int, special: str = "") -> dict[str, Tensor]:
    """Log-probs near those of the old policy, some far off; advantages with zeros; NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(tokens, generator=generator)
    logprob = old + 0.3 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    advantages[::7] = 0
    mask = torch.rand(tokens, generator=generator) < 0.8
    if special:
        logprob[:7] = torch.tensor([200.0, -200.0, 25.0, -25.0, 12.0, 90.0, 0.0])
        old[6], mask[:7] = 0.0, True
    if special == "nonfinite":
        logprob[1:4] = torch.tensor([NAN, INF, -INF])
        old[4], advantages[5] = INF, NAN
    if special == "masked":
        mask[:] = False
    covariance = torch.where(mask, torch.randn(tokens, generator=generator), 0)
    return {
        "logprob": torch.where(mask, logprob, NAN),
        "old_logprob": torch.where(mask, old, INF),
        "advantages": torch.where(mask, advantages, NAN),
        "mask": mask,
        "given": torch.rand(tokens, generator=generator) < 0.2,
        "token_index": torch.randperm(tokens, generator=generator),
        "seed": torch.tensor(5),
        "coefficient": torch.tensor(0.7),
        "covariance": covariance,
    }


def surrogate(case: Case, data: dict[str, Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Term and slope token by token, in Python's floats: SPEC of the losses, as written in docs/losses.md."""
    low, high, dual = case.clips
    terms, slopes = [], []
    differences = data["logprob"] - data["old_logprob"]  # in fp32, as the inputs are
    d = differences.double().requires_grad_()
    value = ek.losses.kl_estimate(d, case.estimator)
    change = torch.autograd.grad(value.sum(), d)[0] if value.requires_grad else torch.zeros_like(d)
    columns = (differences, data["advantages"], data["mask"], chosen, value, change)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for difference, advantage, valid, selected, penalty, penalty_slope in rows:
        if not valid:
            term, slope = 0.0, 0.0
        elif not (math.isfinite(difference) and math.isfinite(advantage)):
            term, slope = NAN, NAN
        else:
            ratio = math.exp(difference) if difference < 88.7 else INF  # the overflow of fp32
            first = -advantage * ratio if advantage else 0.0
            second = -advantage * min(max(ratio, low), high) if advantage else 0.0
            term = max(first, second)
            slope = first if term == first else 0.0
            if advantage < 0 and term > -advantage * dual:
                term, slope = -advantage * dual, 0.0
            if selected and case.selected in (Selected.DROPPED, Selected.DETACHED):
                slope = 0.0
                term = 0.0 if case.selected == Selected.DROPPED else term
            if selected and case.selected == Selected.PENALISED:
                beta = float(data["coefficient"])
                term += beta * penalty
                slope += beta * penalty_slope
        terms.append(term)
        slopes.append(slope)
    return torch.tensor(terms, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


def expect(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = data["mask"]
    covariance = data["covariance"]
    if not case.covariance_given:
        covariance = selection.token_covariance(data["logprob"], data["advantages"], mask, "")
    low, high, _ = case.clips
    log_ratio = torch.where(mask, data["logprob"] - data["old_logprob"], 0)
    ratio = torch.where(mask, log_ratio.exp(), 0)
    gain = torch.where(mask, -data["advantages"], 0)
    first = torch.where(gain == 0, 0, gain * ratio)
    clipped = (gain * ratio.clamp(low, high)) > first
    exclude = clipped if case.exclude_clipped else None
    chosen, in_band = torch.zeros_like(mask), torch.zeros_like(mask)
    if case.count is None:
        chosen = data["given"] & mask if case.selected != Selected.UNCHANGED else chosen
    elif case.band is None:
        chosen = selection.kl_cov_mask(covariance, mask, None, data["token_index"], case.count, "")
    else:
        common = (covariance, mask, exclude, data["token_index"], data["seed"])
        chosen = selection.clip_cov_mask(*common, case.count, case.band, "")
        in_band = selection.clip_cov_mask(*common, Count(None, 1 << 53, True), case.band, "")
    term, slope = surrogate(case, data, chosen)
    value = torch.where(clipped, gain * ratio.clamp(low, high), first)
    clipped_lower = (gain > 0) & (value > gain * case.clips[2])
    sums = (
        term, clipped, clipped_lower, log_ratio, log_ratio.abs(), ratio, covariance, in_band, chosen & mask,
        mask & ~term.float().isfinite(), mask,
    )  # fmt: skip
    largest = [torch.where(mask, x, -INF).amax() if mask.any() else torch.tensor(0.0) for x in (ratio, covariance)]
    totals = torch.stack([*(x.double().sum() for x in sums), *(x.double() for x in largest)])
    return {"term": term, "slope": slope, "covariance": covariance, "chosen": chosen, "totals": totals}


def compare(case: Case, got: Any, want: dict[str, Tensor]) -> None:
    term, slope, covariance, chosen, totals, mean, metrics = (x.cpu() for x in got)
    assert covariance.numel() == 0 if case.covariance_given else same_bits(covariance, want["covariance"])
    assert chosen.numel() == 0 if case.count is None else torch.equal(chosen, want["chosen"])
    close: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(term, want["term"].float(), **close)
    torch.testing.assert_close(slope, want["slope"].float(), **close)
    for name, total, expected in zip(TOTALS, totals, want["totals"], strict=True):
        torch.testing.assert_close(total, expected, **{**close, "rtol": 1e-5}, msg=lambda text, n=name: f"{n}: {text}")
    named = dict(zip(TOTALS, totals.tolist(), strict=True))
    weight = 1 / max(named["tokens"], 1)
    made = {name: value * weight for name, value in named.items()}
    made |= {"ppo_kl": -made["log_ratio"], "weight": weight}
    made |= {name: named[name] for name in ("nonfinite_tokens", "ratio_max", "cov_max")}
    expected = torch.tensor([made[name] for name in METRICS])
    torch.testing.assert_close(metrics, expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(mean, torch.tensor(made["pg_loss"]), rtol=1e-6, atol=0, equal_nan=True)


def check(function: Any, case: Case, tokens: int, special: str, device: str = "cpu") -> None:
    data = batch(tokens, tokens, special)
    there = {name: value.to(device) for name, value in data.items()}
    inputs = [there[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    compare(case, function(*inputs, *case.arguments(there)), expect(case, data))


SPECIAL = ["", "overflow", "nonfinite", "masked"]
PLACES = places("policy_loss")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backends(place: Place, case: Case, special: str) -> None:
    kernel = registry.kernel("policy_loss", "policy_loss", place.backend, torch.empty(0, device=place.device))
    sizes = (40, 777) if place.interpreted else (40, 777, 9001)
    for tokens in sizes:
        check(kernel, case, tokens, special, place.device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_large_batches(place: Place, case: Case) -> None:
    """A full cluster, and more than a cluster holds."""
    if place.device == "cpu":
        pytest.skip("sizes of a GPU")
    kernel = registry.kernel("policy_loss", "policy_loss", place.backend, torch.empty(0, device=place.device))
    for tokens in (70_000, 600_000):
        check(kernel, case, tokens, "", place.device)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulator.compile_library(tmp_path_factory.mktemp("emulator"))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("team", [(True, 1), (True, 4), (False, 3)], ids=str)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cuda_kernels_emulated(library: Any, case: Case, team: tuple[bool, int], special: str) -> None:
    for tokens in (40, 777):
        check(emulator.Emulated(library, *team).policy_loss, case, tokens, special)


@pytest.mark.parametrize("place", PLACES)
def test_no_tokens(place: Place) -> None:
    kernel = registry.kernel("policy_loss", "policy_loss", place.backend, torch.empty(0, device=place.device))
    data = {name: value.to(place.device) for name, value in batch(0, 1).items()}
    inputs = [data[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    for case in (CASES["ppo"], CASES["clip-cov, verl"], CASES["kl-cov"]):
        *per_token, totals, mean, metrics = kernel(*inputs, *case.arguments(data))
        assert all(x.numel() == 0 for x in per_token)
        assert not totals.any()
        assert mean == 0
        assert not metrics[:-1].any()


def call(logprob: Tensor, backend: str, case: Case = CASES["clip-cov, verl"]) -> tuple[Tensor, ...]:
    """The op itself, its other inputs made for ``logprob``, which has no padding."""
    data = batch(logprob.numel(), 3)
    count, band = case.count or NO_COUNT, case.band or NO_BAND
    old, advantages = (torch.nan_to_num(data[name], 0.5, 0.5) for name in ("old_logprob", "advantages"))
    return torch.ops.entropy_kernels.policy_loss(
        logprob, old.view_as(logprob), advantages.view_as(logprob), None, None, None, None, data["seed"],
        data["coefficient"], *case.clips, int(case.selected), case.count is not None, case.exclude_clipped, 2, False,
        count.ratio, count.k, count.at_least_one, *band, backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(backend: str) -> None:
    if ek.backends()["policy_loss"][backend] != "available":
        pytest.skip(ek.backends()["policy_loss"][backend])
    logprob = -torch.rand(4, 15)
    data = batch(60, 3)
    inputs = [torch.nan_to_num(data[name], 0.5, 0.5).view(4, 15) for name in ("old_logprob", "advantages")]
    arguments = (
        logprob.requires_grad_(), *inputs, None, None, None, None, data["seed"], None, 0.8, 1.2, INF, 1, True, True, 1,
        False, 0.1, None, True, 0.05, 2.0, False, False, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.entropy_kernels.policy_loss.default, arguments)


def test_gradient_in_float64() -> None:
    """Slopes against finite differences, through both differentiable outputs."""
    logprob = -torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name in ("ppo", "kl-cov, k2", "clip-cov, verl"):
        for output in (0, 1):
            assert torch.autograd.gradcheck(
                lambda x, n=name, o=output: call(x, "torch", CASES[n])[o], logprob.requires_grad_(), eps=1e-7, atol=1e-5
            )


def test_gradients_of_both_outputs_add_up() -> None:
    logprob = (-torch.rand(50)).requires_grad_()
    term, mean, slope, *_ = call(logprob, "auto")
    weights = torch.randn(50)
    (gradient,) = torch.autograd.grad((term * weights).sum() + 3 * mean, logprob)
    torch.testing.assert_close(gradient, slope * (weights + 3 / 50))


def test_second_derivative_is_an_error() -> None:
    logprob = (-torch.rand(50)).requires_grad_()
    (gradient,) = torch.autograd.grad(call(logprob, "auto")[1], logprob, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_forward_mode_is_an_error() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(-torch.rand(50), torch.ones(50))
        with pytest.raises(NotImplementedError, match="policy_loss: forward-mode"):
            call(dual, "auto")


@pytest.mark.parametrize("options", [{}, {"dropped": torch.arange(50) == 3}], ids=["drawn", "given"])
def test_functional_derivatives_are_an_error(options: dict[str, Any]) -> None:
    old, advantages, mask = -torch.rand(50), torch.randn(50), torch.ones(50, dtype=torch.bool)
    options = {"seed": None if "dropped" in options else 1, **options}

    def loss(logprob: torch.Tensor) -> torch.Tensor:
        return ek.clip_cov_loss(logprob, old, advantages, mask, **options).loss

    with pytest.raises(
        NotImplementedError, match=r"policy_loss: torch\.func's derivatives .* use torch\.autograd\.grad"
    ):
        torch.func.grad(loss)(old)


def test_float64_has_one_backend() -> None:
    logprob = -torch.rand(50, dtype=torch.float64)
    assert call(logprob, "auto")[0].dtype == torch.float64
    with pytest.raises(TypeError, match=r"logprob: expected at most fp32 with backend='cpu', got torch\.float64"):
        call(logprob, "cpu")


@pytest.mark.skipif(ek.backends()["policy_loss"]["cpu"] != "available", reason=ek.backends()["policy_loss"]["cpu"])
def test_threads_leave_no_trace() -> None:
    """The partial sums are of fixed blocks of tokens."""
    data = batch(70_000, 8)
    inputs = [data[name] for name in ("logprob", "old_logprob", "advantages", "mask")]
    kernel = registry.kernel("policy_loss", "policy_loss", "cpu", torch.empty(0))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel(*inputs, *CLIP.arguments(data)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_wrong_kernel_fails() -> None:
    """The comparison has teeth: a slope without its clip, a term without its penalty, a mean over all tokens."""

    def wrong(change: str, *arguments: Any) -> tuple[Tensor, ...]:
        term, slope, *rest, totals, mean, metrics = eager.policy_loss(*arguments)
        if change == "slope":
            slope = -arguments[2] * torch.exp(arguments[0] - arguments[1])
        elif change == "term":
            term = torch.where(arguments[5], 0, term)
        elif change == "mean":
            mean = totals[0].float() / term.numel()
        else:
            metrics = metrics.flip(0)
        return term, slope, *rest, totals, mean, metrics

    check(eager.policy_loss, CASES["kl-cov, given"], 777, "")
    for change in ("slope", "term", "mean", "metrics"):
        with pytest.raises(AssertionError):
            check(lambda *a, c=change: wrong(c, *a), CASES["kl-cov, given"], 777, "")
