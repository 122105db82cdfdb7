"""Selection by a budget, against fractions: every backend, every case of the definition, ranks, compile."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import entropy_kernels as ek
import reference_selection
from calls import checked_mask, moved
from conftest import BackendDevice, backend_devices
from entropy_kernels import reference
from entropy_kernels.backends.radix_select import Budget
from gloo import run_ranks

INF, NAN = math.inf, math.nan
OPS = torch.ops.entropy_kernels
FORMS = ("budget", "limit", "share")


@pytest.fixture(params=backend_devices("budget_mask"))
def budget_on(request: pytest.FixtureRequest) -> BackendDevice:
    """Backend × device of the op."""
    return request.param


def check(on: BackendDevice, score: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The public mask on a backend equals that of fractions."""
    expected = reference_selection.budget(score, mask, **options)
    return checked_mask(on, "budget_tokens", expected, score=score, mask=mask, **options)


def scores(shape: tuple[int, ...], seed: int = 0, levels: int | None = None, heavy: bool = False) -> dict[str, Tensor]:
    """Scores of either sign, rounded to multiples of 1/levels where ties are wanted, masks and shuffled indices."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(shape, generator=generator)
    if heavy:  # over forty powers of two
        score = score.sign() * (6 * score).exp2()
    if levels:
        score = (score * levels).round() / levels
    return {
        "score": score,
        "mask": torch.rand(shape, generator=generator) < 0.8,
        "exclude": torch.rand(shape, generator=generator) < 0.1,
        "token_index": torch.randperm(score.numel(), generator=generator).view(shape) - 7,
    }


def amounts(data: dict[str, Tensor]) -> list[dict[str, float]]:
    """Budgets, limits and shares from none to all, of what is there."""
    valid = data["score"].double()[data["mask"]]
    gain, total = float(valid.clamp(min=0).sum()), float(valid.sum())
    shares = (1e-9, 0.02, 0.3, 0.97)
    return [
        *({"budget": share * gain} for share in shares),
        *({"limit": total - share * gain} for share in shares),
        *({"share": share} for share in (*shares, 1.0)),
    ]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 40), (9, 400)])
@pytest.mark.parametrize("kind", [{}, {"levels": 2}, {"heavy": True}], ids=["normal", "ties", "heavy"])
def test_masks(budget_on: BackendDevice, shape: tuple[int, ...], kind: dict[str, Any]) -> None:
    if budget_on.interpreted and shape not in ((3, 5), (9, 400)):
        pytest.skip("the interpreter takes a third of a second for each call")
    data = scores(shape, **kind)
    options = [{}, {"mask": data["mask"]}, data]
    for i, amount in enumerate(amounts(data)):
        for given_masks in options if shape == (3, 5) and not budget_on.interpreted else options[i % 3 :: 3]:
            check(budget_on, **{"score": data["score"], **given_masks, **amount})


EVERYTHING = torch.tensor([0.25, NAN, -1.0, INF, 2.0, -INF, 0.0, -0.0, 2.0, 1e-45, 3.0, 0.5, 2.0])
NUMBERS = (
    0.0,
    -0.0,
    -1.0,
    -INF,
    INF,
    NAN,
    1e-300,
    -1e-300,
    5e-324,
    1e300,
    -1e300,
    3.0,
    3.0000001,
    5.0,
    9.0,
    9.75,
    9.76,
)


@pytest.mark.parametrize("form", FORMS)
def test_any_number(budget_on: BackendDevice, form: str) -> None:
    """Also what no number may be, unchecked in a tensor."""
    numbers = NUMBERS if form != "share" else (1e-300, 5e-324, 0.3, 1.0)
    for number in numbers:
        selected = check(budget_on, EVERYTHING, **{form: number})
        if form == "budget":
            assert int(selected.sum()) == (0 if not number > 0 else 1 if number <= 3 else 2 if number <= 5 else
                                           4 if number <= 9 else 6)  # fmt: skip
        if budget_on.interpreted:  # which makes the same tensor of a number
            continue
        given = torch.tensor(number, dtype=torch.float64, device=budget_on.device)
        assert torch.equal(
            ek.budget_tokens(EVERYTHING.to(budget_on.device), **{form: given}, backend=budget_on.backend).cpu(),
            selected,
        )
    everything = check(budget_on, EVERYTHING, share=1.0)
    for number, same_as in ((7.0, everything), (INF, everything), (0.0, None), (-1.0, None), (NAN, None)):
        share = torch.tensor(number, dtype=torch.float64)
        got = ek.budget_tokens(EVERYTHING.to(budget_on.device), share=share, backend=budget_on.backend).cpu()
        assert torch.equal(got, torch.zeros_like(everything) if same_as is None else same_as)


def test_ties_go_to_the_lower_index(budget_on: BackendDevice) -> None:
    score, index = torch.full((40,), 0.5), torch.arange(40).flip(0) - 20
    for budget, count in ((0.5, 1), (0.51, 2), (3.0, 6), (20.0, 40), (21.0, 40)):
        assert check(budget_on, score, budget=budget).nonzero().flatten().tolist() == list(range(count))
        lowest = check(budget_on, score, budget=budget, token_index=index).nonzero().flatten().tolist()
        assert lowest == list(range(40 - count, 40))


def test_reached_exactly(budget_on: BackendDevice) -> None:
    """At the sum of the first three, at the next number above it, and at the one below."""
    score = torch.tensor([1.0, 4.0, 0.25, 3.0, 2.0])
    for budget, count in ((9.0, 3), (math.nextafter(9.0, 10), 4), (math.nextafter(9.0, 0), 3)):
        assert int(check(budget_on, score, budget=budget).sum()) == count
    for limit, count in ((1.25, 3), (math.nextafter(1.25, 2), 3), (math.nextafter(1.25, 0), 4)):
        assert int(check(budget_on, score, limit=limit).sum()) == count
    for share, count in ((0.5, 2), (4 / 10.25, 1), (1.0, 5), (9 / 10.25, 3)):
        assert int(check(budget_on, score, share=share).sum()) in (count, count + 1)


def test_what_counts(budget_on: BackendDevice) -> None:
    """Excluded tokens and those below 0 count in the limit, neither as candidates."""
    score = torch.tensor([5.0, 4.0, -3.0, 2.0, 1.0])
    exclude = torch.tensor([True, False, False, False, False])
    # all come to 9; what is kept to at most 5.5
    assert check(budget_on, score, limit=5.5, exclude=exclude).tolist() == [False, True, False, False, False]
    assert check(budget_on, score, limit=3.0, exclude=exclude).tolist() == [False, True, False, True, False]
    assert check(budget_on, score, share=0.5, exclude=exclude).tolist() == [False, True, False, False, False]
    assert check(budget_on, score, share=1.0, exclude=exclude).tolist() == [False, True, False, True, True]


def test_nothing_counts(budget_on: BackendDevice) -> None:
    nothing: list[tuple[Tensor, Tensor | None]] = [
        (torch.randn(30), torch.zeros(30, dtype=torch.bool)), (torch.zeros(0), None), (torch.zeros(3, 0), None),
        (torch.full((4,), NAN), None), (torch.tensor([INF, -INF, 0.0, -2.0]), None), (torch.zeros(5), None),
    ]  # fmt: skip
    for score, mask in nothing:
        for form, number in (("budget", 1.0), ("budget", 1e300), ("limit", -5.0), ("limit", -1e300), ("share", 1.0)):
            assert not check(budget_on, score, mask, **{form: number}).any()
    score = torch.rand(20)
    assert not check(budget_on, score, exclude=torch.ones(20), share=1.0).any()


@pytest.mark.parametrize("scale", [1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_magnitudes(budget_on: BackendDevice, scale: float) -> None:
    """Denormal scores, and the largest."""
    score = torch.linspace(-1, 1, 41) * scale
    for i, share in enumerate((1e-12, 0.1, 0.6, 1.0)):
        budget = share * float(score.double().clamp(min=0).sum())
        ways = ({"budget": budget}, {"limit": -budget}, {"share": share})
        for amount in ways if not budget_on.interpreted else ways[i % 3 :: 3]:
            check(budget_on, score, **amount)


def test_too_small_to_count(budget_on: BackendDevice) -> None:
    """Scores below half a unit are no part of the sum, and are not selected; halves go to even."""
    unit = 2.0**-50  # three tokens, the largest below 2: 51 bits of it
    for small, selected in ((0.5, False), (0.5000001, True), (1.0, True), (1.5, True), (0.25, False)):
        score = torch.tensor([1.0, small * unit, 0.0])
        assert check(budget_on, score, share=1.0).tolist() == [True, selected, False]
        assert check(budget_on, score, budget=INF).tolist() == [True, selected, False]
    score = torch.tensor([1.0, 1.5 * unit, 2.5 * unit])  # 2 and 2 of them
    assert check(budget_on, score, budget=1 + 2 * unit).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_masks_of_numbers(budget_on: BackendDevice, dtype: torch.dtype) -> None:
    data = scores((5, 40))
    for amount in ({"budget": 3.0}, {"limit": -8.0}, {"share": 0.2}):
        check(budget_on, data["score"].to(dtype), data["mask"].to(dtype), exclude=data["exclude"].int(), **amount)


def test_broadcast_masks_and_strides(budget_on: BackendDevice) -> None:
    data = scores((40, 6))
    score, mask = data["score"], data["mask"]
    check(budget_on, score.t(), mask.t(), share=0.3)
    check(budget_on, score[::3, 1::2], mask[::3, 1::2], share=0.3)
    check(budget_on, score[:1].expand(40, 6), mask[:, :1], share=0.3)


@pytest.mark.parametrize("kind", [{}, {"heavy": True}, {"levels": 8}], ids=["normal", "heavy", "ties"])
def test_large_batches(budget_on: BackendDevice, kind: dict[str, Any]) -> None:
    """Where kernels guess the threshold from a sample, and where a guess fails."""
    if budget_on.interpreted:
        pytest.skip("the interpreter takes seconds for each call")
    data = scores((200_000,), **kind)
    lonely = data["score"].clone().clamp(max=0.0)
    lonely[[12_345, 150_000]] = torch.tensor([0.5, 1e-3])
    for score in (data["score"], lonely):
        placed = {name: moved(x, budget_on.device) for name, x in {**data, "score": score}.items()}
        for i, amount in enumerate(amounts({**data, "score": score})):
            for names in (["score"], ["score", "mask"], list(data))[i % 3 :: 3]:
                got = ek.budget_tokens(**{name: placed[name] for name in names}, **amount, backend=budget_on.backend)
                right = reference.budget_tokens(**{**{n: data[n] for n in names}, "score": score}, **amount)
                assert torch.equal(got.cpu(), right), (amount, names)


def test_a_prefix_of_the_order_of_top_tokens(budget_on: BackendDevice) -> None:
    data = {name: moved(x, budget_on.device) for name, x in scores((600,), levels=4).items()}
    selected = ek.budget_tokens(**data, budget=20.0, backend=budget_on.backend)
    assert torch.equal(selected, ek.top_tokens(**data, k=int(selected.sum()), backend=budget_on.backend))


def test_the_public_reference() -> None:
    """What doctor and smoke_matrix.py compare with."""
    for seed, kind in enumerate(({}, {"levels": 2}, {"heavy": True})):
        data = scores((11, 30), seed, **kind)
        for amount in (*amounts(data), {"budget": INF}, {"budget": NAN}, {"limit": -INF}, {"limit": INF}):
            for names in (["score"], ["score", "mask"], list(data)):
                options: dict[str, Any] = {**{name: data[name] for name in names}, **amount}
                assert torch.equal(reference.budget_tokens(**options), reference_selection.budget(**options))


_fp32 = st.floats(width=32, allow_nan=True)
_few = st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 3.0, 1e-45, 1e-38, 3e38, INF, -INF, NAN, 2.0**-40, 2.0**-52])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.one_of(_few, _few, _fp32), max_size=24),
    form=st.sampled_from(FORMS),
    near=st.tuples(st.integers(0, 24), st.sampled_from([-1, 0, 1])),
    number=st.one_of(st.none(), st.floats()),
    data=st.data(),
)
def test_any_scores(
    budget_on: BackendDevice, values: list[float], form: str, near: tuple[int, int], number: float | None, data: Any
) -> None:
    """Any number, or one at the sum of the largest scores, or next to it."""
    if budget_on.interpreted:
        pytest.skip("the interpreter takes a third of a second for each call")
    score = torch.tensor(values)
    masks = {}
    for name in ("mask", "exclude"):
        if data.draw(st.booleans()):
            masks[name] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
            masks[name] = masks[name].bool()
    if data.draw(st.booleans()):
        masks["token_index"] = torch.tensor(data.draw(st.permutations(range(len(values)))), dtype=torch.int64)
    if number is None or (form == "share" and not 0 < number <= 1):
        found = [Fraction(x) for x in score.tolist() if math.isfinite(x)]
        largest = sum(sorted((x for x in found if x > 0), reverse=True)[: near[0]], Fraction(0))
        all_above = sum((x for x in found if x > 0), Fraction(0))
        exact = {"budget": largest, "limit": sum(found, Fraction(0)) - largest, "share": largest / (all_above or 1)}
        number = float(exact[form])
        number = math.nextafter(number, near[1] * INF) if near[1] else number
        number = min(max(number, 5e-324), 1.0) if form == "share" else number
    check(budget_on, score, **masks, **{form: number})


def test_shares_are_exact() -> None:
    """ceil(share · total) of integers up to 2⁶² and of every exponent."""
    generator = torch.Generator().manual_seed(3)
    nothing = torch.tensor([NAN], dtype=torch.float64)
    for i in range(4000):
        bits = int(torch.randint(0, 63, (), generator=generator))
        total = int(torch.randint(0, 2**62, (), generator=generator)) >> bits
        share = float(torch.rand((), generator=generator, dtype=torch.float64)) * 2.0 ** -(i % 1100)
        share = (1.0, 5e-324, math.nextafter(1.0, 0), 0.5)[i % 4] if i % 50 == 0 else share
        numbers = torch.cat([nothing, nothing, torch.tensor([share], dtype=torch.float64)])
        got = Budget(numbers).of(torch.zeros(1, dtype=torch.int64), torch.tensor([5]), torch.tensor([total]))
        assert int(got) == math.ceil(Fraction(share) * total), (share, total)


# ---- the operator as torch sees it


def test_opcheck(budget_on: BackendDevice) -> None:
    data = {name: moved(x, budget_on.device) for name, x in scores((3, 40)).items()}
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not budget_on.interpreted:
        tests = (*tests, "test_aot_dispatch_dynamic")
    numbers = torch.tensor([2.0, NAN, NAN], dtype=torch.float64, device=budget_on.device)
    check_op: Any = torch.library.opcheck
    check_op(OPS.budget_mask, (*data.values(), numbers, "", budget_on.backend), test_utils=tests)
    score = data["score"].t()
    check_op(OPS.budget_mask, (score, None, None, None, numbers.flip(0), "", budget_on.backend), test_utils=tests)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_compiles_once(form: str, as_tensor: bool) -> None:
    torch._dynamo.reset()
    data = scores((4, 60))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, n: ek.budget_tokens(s, data["mask"], **{form: n}), backend=counter, fullgraph=True
    )
    for value in (0.5, 0.25, 0.125, 0.7, 0.9, 0.3):
        number = torch.tensor(value) if as_tensor else value
        expected = reference_selection.budget(
            data["score"], data["mask"], **{form: float(torch.tensor(value)) if as_tensor else value}
        )
        assert torch.equal(compiled(data["score"], number), expected) and bool(expected.any())
    assert counter.frame_count <= (1 if as_tensor else 2)


def test_the_shared_driver_reads_nothing_back() -> None:
    """On meta tensors, where there is no value to read."""
    meta = torch.device("meta")
    score, mask = torch.empty(100, device=meta), torch.empty(100, dtype=torch.bool, device=meta)
    for number in (0.5, torch.tensor(0.5), torch.empty((), device=meta)):
        assert ek.budget_tokens(score, mask, budget=number, backend="torch").shape == (100,)


def test_debugging_checks_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_KERNELS_DEBUG", "1")
    for value in (0.0, 1.5, NAN):
        with pytest.raises(ValueError, match=r"share: expected a fraction in \(0, 1\], got"):
            ek.budget_tokens(torch.ones(3), share=torch.tensor(value))


ONES = torch.ones(2, 3)
ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "budget, limit, share: expected one of them, got none", {}),
    (ValueError, "budget, limit, share: expected one of them, got budget and share", {"budget": 1.0, "share": 0.5}),
    (TypeError, "budget: expected a number, got str", {"budget": "1"}),
    (TypeError, "limit: expected a float or int dtype, got torch.bool", {"limit": torch.tensor(True)}),
    (ValueError, r"limit: expected a number or a 0-d tensor, got shape \(1,\)", {"limit": torch.ones(1)}),
    (ValueError, r"share: expected a fraction in \(0, 1\], got 0", {"share": 0.0}),
    (ValueError, r"share: expected a fraction in \(0, 1\], got 1.5", {"share": 1.5}),
    (ValueError, r"share: expected a fraction in \(0, 1\], got nan", {"share": NAN}),
    (TypeError, "score: expected a torch.Tensor, got list", {"score": [1.0], "budget": 1.0}),
    (TypeError, "score: expected a floating-point dtype, got torch.int64", {"score": ONES.long(), "budget": 1.0}),
    (ValueError, r"mask: expected score's shape \(2, 3\).*got \(3, 2\)", {"mask": ONES.t(), "budget": 1.0}),
    (TypeError, "token_index: expected dtype torch.int64", {"token_index": ONES.int(), "budget": 1.0}),
    (TypeError, "batch_group: expected a torch.distributed", {"batch_group": 3, "budget": 1.0}),
    (ValueError, "backend: expected one of", {"backend": "gpu", "budget": 1.0}),
]


@pytest.mark.parametrize(("error", "message", "options"), ERRORS)
def test_errors(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ek.budget_tokens(**{"score": ONES, **options})


RIGHT: dict[str, Any] = {"score": ONES, "mask": None, "exclude": None, "token_index": None}
RIGHT["numbers"] = torch.tensor([1.0, NAN, NAN], dtype=torch.float64)
MISUSE: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "score: expected a floating", {"score": ONES.long()}),
    (TypeError, "mask: expected torch.bool, got torch.float32", {"mask": ONES}),
    (ValueError, r"exclude: expected shape \(2, 3\), got \(3, 2\)", {"exclude": ONES.bool().t()}),
    (TypeError, "numbers: expected torch.float64", {"numbers": torch.ones(3)}),
    (ValueError, r"numbers: expected shape \(3,\), got \(4,\)", {"numbers": torch.ones(4).double()}),
]


@pytest.mark.parametrize(("error", "message", "wrong"), MISUSE)
def test_the_raw_operator_checks_its_tensors(error: type, message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        OPS.budget_mask(**{**RIGHT, **wrong}, group="", backend="torch")


# ---- over ranks

SHARDS = {1: [[600]], 2: [[250, 350], [0, 600]], 4: [[100, 201, 99, 200], [3, 0, 590, 7], [0, 0, 0, 600]]}
BACKENDS = ("torch", "cpu")


def cases() -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    found = []
    for seed, kind in enumerate(({}, {"levels": 2}, {"heavy": True})):
        data = scores((600,), seed, **kind)
        data["score"][:5] = torch.tensor([NAN, INF, -INF, 1e-45, -0.0])
        finite = {**data, "score": data["score"].nan_to_num(0.0, 0.0, 0.0)}
        for amount in (*amounts(finite)[1::3], {"budget": NAN}, {"limit": -INF}, {"share": 1.0}):
            found += [(data, amount), ({k: v for k, v in data.items() if k != "token_index"}, amount)]
    return found


def select_on_rank(rank: int, world: int) -> list[Tensor]:
    """Of each case on each backend, in shards that take turns: what counts is the number of collectives."""
    out = []
    for number, backend in enumerate(BACKENDS):
        if ek.backends()["budget_mask"][backend] != "available":
            continue
        for i, (data, amount) in enumerate(cases()):
            shards = SHARDS[world][(i // 2 + number) % len(SHARDS[world])]
            mine = {name: value.split(shards)[rank] for name, value in data.items()}
            if (i // 2 + i) % 2:
                amount = {name: torch.tensor(x, dtype=torch.float64) for name, x in amount.items()}
            out.append(ek.budget_tokens(**mine, **amount, batch_group=dist.group.WORLD, backend=backend))
    return out


@pytest.mark.parametrize("world", [1, 2, 4])
def test_over_ranks(world: int) -> None:
    """Unequal and empty shards: the bits of one process."""
    by_rank = run_ranks(world, select_on_rank)
    expected = [reference_selection.budget(**data, **amount) for data, amount in cases()]
    got = [torch.cat(parts) for parts in zip(*by_rank, strict=True)]
    assert got and len(got) % len(expected) == 0
    for i, mask in enumerate(got):
        assert torch.equal(mask, expected[i % len(expected)]), i


def disagreeing(rank: int, world: int) -> list[str]:
    found, last = [], rank == world - 1
    attempts: list[tuple[Any, dict[str, Any]]] = [
        (ek.budget_tokens, {"budget": 1.0 + last}),
        (ek.budget_tokens, {"limit": 1.0} if last else {"budget": 1.0}),
        (ek.budget_tokens, {"share": torch.tensor(0.5 + 0.25 * last)}),
        (ek.budget_tokens if last else ek.top_tokens, {"budget": 1.0} if last else {"k": 3}),
        (ek.budget_tokens, {"budget": 1.0 + last, "token_index": torch.arange(5) + 5 * rank}),
    ]
    for function, options in attempts:
        try:
            function(torch.ones(5), **options, batch_group=dist.group.WORLD)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    # fp32's 0.3, which is more, and 0.3 are one number to whoever calls: the first rank's counts
    share = torch.tensor(0.3) if rank else 0.3
    assert ek.budget_tokens(torch.ones(5), share=share, batch_group=dist.group.WORLD).sum() == (0 if rank else 3)
    return found


def test_ranks_that_disagree_all_raise_the_same() -> None:
    first, second = run_ranks(2, disagreeing)
    assert first == second == [
        "budget: expected the same on all ranks of the batch_group, got [1.0, 2.0]",
        "budget: expected the same on all ranks of the batch_group, got [1.0, None]",
        "share: expected the same on all ranks of the batch_group, got [0.5, 0.75]",
        "kl_cov_mask: expected the same on all ranks of the batch_group, got ['called', 'not called']",
        "budget: expected the same on all ranks of the batch_group, got [1.0, 2.0]",
    ]  # fmt: skip
