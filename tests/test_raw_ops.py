"""The operators called by hand, ``torch.ops.entropy_kernels`` and the kernels below them: one argument is wrong, and
the error names it. ``make sanitize`` makes many more such calls (tools/sanitize.py), of which some are made here."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_kernels as ek
import sanitize
from entropy_kernels._rows import LOGPROB, STATISTICS, bits
from entropy_kernels.backends import native

N, V, H = 6, 40, 5
NUMBERS = {"softcap": 0.0, "ignore_index": -100, "vocab_start": 0, "vocab_size": V}
LINEAR = {"product_dtype": torch.float32, "logits_dtype": torch.float32, "memory_budget": 1 << 20, "group": ""}
NEEDS = {"need_hidden": True, "need_weight": True, "need_bias": True}
COUNT = {"numbers": None, "ratio": 0.5, "k": None, "at_least_one": True}


def calls(backend: str) -> dict[str, dict[str, Any]]:
    """A call of every operator, by argument, in order."""
    logits, target, one = torch.randn(2, 3, V), torch.arange(N), torch.ones(1)
    rows = {"logits": logits, "target": target, "temperature": one}
    grads = {"grad_stats": torch.randn(3, N)}
    differentiable = {"want": bits("logprob", "entropy", "collision")}
    state = {"state": torch.rand(6, N) + 1}
    head = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V), "target": target}
    head["temperature"] = one
    linear = {**NUMBERS, **LINEAR, "backend": backend}
    masks = {"mask": torch.ones(N, dtype=torch.bool), "exclude": torch.zeros(N, dtype=torch.bool)}
    masks["token_index"] = target.clone()
    tokens = {"covariance": torch.randn(N), **masks}
    last = {"group": "", "backend": backend}
    band = {"low": 0.0, "high": 5.0, "quantile": False, "closed": True}
    covariance = {"logprob": torch.randn(N), "advantages": torch.randn(N), "mask": tokens["mask"]}
    kept = torch.randn(N, 64)
    tile = {"logits": torch.zeros(N, 64), **head, **linear}
    backward = {**grads, **rows, **state, **NUMBERS, **differentiable, "backend": backend}
    linear_backward = {**grads, **head, **state, "logits": kept, **linear, **differentiable, **NEEDS}
    return {
        "token_stats": {**rows, **NUMBERS, "want": 15, "inplace_backward": False, **last},
        "token_stats_backward": backward,
        "token_stats_backward_": backward,
        "token_covariance": {**covariance, **last},
        "token_moments": {
            "values": torch.randn(1, N, dtype=torch.float64), "mask": tokens["mask"], "deviation": True, "group": "",
        },
        "clip_cov_mask": {**tokens, "seed": torch.tensor(3), **COUNT, **band, **last},
        "kl_cov_mask": {**tokens, **COUNT, **last},
        "budget_mask": {"score": tokens["covariance"], **masks, "numbers": torch.ones(3).double(), **last},
        "linear_token_stats": {**head, **linear, "want": 3, "keep": True, **NEEDS},
        "linear_token_stats_backward": linear_backward,
        "linear_token_stats_backward_": linear_backward,
        "linear_tile_stats": {**tile, "end": V},
        "linear_tile_grads": {
            **tile, **state, "c": torch.randn(N), "e": torch.randn(N), "again": torch.tensor([1, 0]),
            "change": torch.randn(2), "begin": 2, "d_hidden": torch.zeros(N, H), "d_weight": torch.zeros(V, H),
            "d_bias": torch.zeros(V), "adds": True, "summed": True,
        },
    }  # fmt: skip


def call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.entropy_kernels, name)(*arguments.values())


OPS = list(calls("torch"))
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(native.load_error is not None, reason="no C++"))]


def test_no_operator_is_missing() -> None:
    registered = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    public = {name for namespace, _, name in registered if namespace == "entropy_kernels"}
    kernels = {name for namespace, _, name in registered if namespace == "entropy_kernels_native"}
    assert public == set(OPS)
    assert kernels in (set(), set(sanitize.OPERATORS))


def required(name: str) -> set[str]:
    schema = getattr(torch.ops.entropy_kernels, name).default._schema
    return {x.name for x in schema.arguments if not isinstance(x.type, torch.OptionalType)}


def cut(value: Tensor, share: float) -> Tensor:
    """A copy that has lost all but a share of its memory."""
    value = value.clone()
    value.untyped_storage().resize_(int(share * value.nbytes))
    return value


def hostile(value: Tensor) -> list[Tensor]:
    """No plain tensors, or not with all of their memory."""
    kinds = [cut(value, 0), cut(value, 0.5), value.to_sparse()]
    kinds += [value.to_sparse_csr()] if value.dim() == 2 else []
    kinds += [value.to_mkldnn()] if value.dtype == torch.float32 else []
    kinds += [torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)] if value.dtype == torch.float32 else []
    return kinds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_every_tensor_is_checked(name: str, backend: str) -> None:
    given = calls(backend)[name]
    call(name, calls(backend)[name])
    for argument, value in given.items():
        if not isinstance(value, Tensor):
            continue
        wrong: list[Tensor | None] = [*hostile(value)]
        if not (
            value.is_floating_point() and argument in ("logprob", "advantages", "covariance", "score", "bias", "d_bias")
        ):
            wrong.append(value.to(torch.float32 if value.dtype in (torch.bool, torch.int64) else torch.int64))
        wrong += [value.to(torch.complex64)] + [None] * (argument in required(name))
        for tensor in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected"):
                call(name, calls(backend)[name] | {argument: tensor})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_every_shape_and_device_is_checked(name: str, backend: str) -> None:
    for argument, value in calls(backend)[name].items():
        if not isinstance(value, Tensor):
            continue
        wrong = [value.to("meta"), value[None]]
        wrong += [value[: len(value) - 1]] if value.dim() and name != "linear_tile_grads" else []
        for tensor in wrong:
            arguments = calls(backend)[name] | {argument: tensor}
            # where two disagree, either may be the wrong one; of the first argument the others are called wrong
            with pytest.raises((TypeError, ValueError), match=r"^(\w+, )*\w+: expected") as caught:
                call(name, arguments)
            first = argument == next(iter(arguments)) or argument in ("hidden", "logits", "target", "weight", "again")
            assert first or str(caught.value).startswith(argument), (argument, str(caught.value))


def test_no_derivative_of_a_tile() -> None:
    for name in ("linear_tile_stats", "linear_tile_grads"):
        for argument in ("hidden", "weight", "bias", "temperature"):
            arguments = calls("torch")[name]
            arguments[argument] = arguments[argument].clone().requires_grad_()
            with pytest.raises(ValueError, match=rf"^{argument}: expected a tensor without grad"):
                call(name, arguments)
            with torch.no_grad():
                call(name, arguments)


def test_freed_memory_in_public_functions() -> None:
    logits, target, hidden, weight = (
        torch.randn(2, 3, V),
        torch.zeros(2, 3).long(),
        torch.randn(2, 3, H),
        torch.randn(V, H),
    )
    logprob, mask = torch.randn(2, 3), torch.ones(2, 3)
    functions: list[tuple[Any, dict[str, Any]]] = [
        (ek.token_stats, {"logits": logits, "target": target, "temperature": torch.ones(2, 3)}),
        (ek.logprob_entropy, {"logits": logits.requires_grad_(), "target": target.mT.contiguous().mT}),
        (ek.linear_token_stats, {"hidden": hidden, "weight": weight, "target": target, "bias": torch.randn(V)}),
        (ek.token_covariance, {"logprob": logprob, "advantages": logprob, "mask": mask}),
        (
            functools.partial(ek.clip_cov_loss, seed=3),
            {"logprob": logprob, "old_logprob": logprob, "advantages": logprob, "mask": mask},
        ),
    ]
    for function, given in functions:
        for argument, value in given.items():
            with pytest.raises(ValueError, match=rf"^{argument}: expected .*whose memory was freed"):
                function(**(given | {argument: cut(value.detach(), 0)}))


WRONG: list[tuple[str, str, Any, str]] = [
    ("token_stats", "want", 1 << len(STATISTICS), "want: .* got "),
    ("token_stats", "want", -1, "want: .* got -1"),
    ("token_stats", "softcap", math.nan, "softcap: .* got nan"),
    ("token_stats", "softcap", math.inf, "softcap: .* got inf"),
    ("token_stats", "vocab_start", -1, "vocab_start: .* got -1"),
    ("token_stats", "vocab_size", -(2**63), "vocab_size: .* got -9"),
    ("token_stats", "target", torch.full((N,), 99), "target: .* got 99"),
    ("token_stats", "target", torch.arange(2 * N)[::2], "target: expected a contiguous"),
    ("token_stats", "temperature", torch.ones(2 * N)[::2], "temperature: expected a contiguous"),
    ("token_stats", "temperature", torch.zeros(1), "temperature: expected numbers > 0"),
    ("token_stats_backward", "state", torch.ones(4, N), r"state: expected shape \(6 or more, 6\), got \(4, 6\)"),
    ("token_stats_backward", "want", 1 << len(STATISTICS), "want: .* got "),
    ("token_stats_backward", "grad_stats", torch.ones(2, N), r"grad_stats: expected shape \(3, 6\), got \(2, 6\)"),
    ("linear_token_stats", "memory_budget", -1, "memory_budget: .* got -1"),
    ("linear_token_stats", "logits_dtype", torch.float64, "logits_dtype: expected float64 where .* torch.float32"),
    ("linear_token_stats", "product_dtype", torch.float64, "logits_dtype: expected float64 where .* torch.float64"),
    ("linear_token_stats", "logits_dtype", torch.int64, "logits_dtype: .* got torch.int64"),
    ("linear_token_stats", "target", torch.full((N,), -1), "target: .* got -1"),
    ("linear_tile_stats", "logits", torch.zeros(N, V - 1), r"logits: expected at least shape \(6, 40\)"),
    ("linear_tile_grads", "begin", -1, "begin: .* got -1"),
    ("linear_tile_grads", "begin", 3, "begin: expected 0 to 2, .* got 3"),
    ("linear_tile_grads", "again", torch.tensor([1, N]), "again: .* got 1 to 6"),
    ("linear_tile_grads", "again", torch.arange(N + 1), "change: expected shape"),
    ("linear_tile_grads", "d_weight", torch.zeros(V - 1, H), "d_weight: expected at least 40 rows"),
    ("kl_cov_mask", "k", 3, "ratio, k: expected one of them"),
    ("kl_cov_mask", "ratio", math.nan, "ratio: .* got nan"),
    ("clip_cov_mask", "seed", torch.tensor(3, dtype=torch.int32), "seed: expected torch.int64, got torch.int32"),
    ("clip_cov_mask", "numbers", torch.zeros(2).double(), r"numbers: expected shape \(4,\)"),
    ("clip_cov_mask", "mask", torch.ones(N), "mask: expected torch.bool, got torch.float32"),
]


@pytest.mark.parametrize(("name", "argument", "value", "message"), WRONG)
def test_wrong_numbers_and_shapes(name: str, argument: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call(name, calls("torch")[name] | {argument: value})


@pytest.mark.parametrize("name", [name for name in OPS if "backend" in calls("torch")[name]])
def test_backends_and_groups_that_are_not_there(name: str) -> None:
    arguments = calls("torch")[name]
    for backend, message in (("gpu", "backend: expected one of .*'gpu'"), ("cuda", "backend: .* on cpu tensors")):
        with pytest.raises(ValueError, match=message):
            call(name, arguments | {"backend": backend})
    if "group" in arguments:
        with pytest.raises(ValueError, match=r"group: expected the name of a process group .* got 'nobody'"):
            call(name, arguments | {"group": "nobody"})


def test_a_backward_pass_needs_a_gradient() -> None:
    for name in ("token_stats_backward", "token_stats_backward_", "linear_token_stats_backward"):
        for want in (0, bits("vocab_covariance")):
            nothing = {"grad_stats": torch.ones(want.bit_count(), N), "want": want}
            with pytest.raises(ValueError, match="want: expected a statistic that has a derivative"):
                call(name, calls("torch")[name] | nothing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_over_is_nobody_elses(backend: str) -> None:
    arguments = calls(backend)["token_stats_backward_"]
    with pytest.raises(ValueError, match=r"logits: .* do not share memory"):
        call("token_stats_backward_", arguments | {"logits": torch.randn(V).expand(2, 3, V)})
    shared = {"grad_stats": arguments["logits"].flatten()[7 : 7 + 3 * N].view(3, N)}
    with pytest.raises(ValueError, match="grad_stats: expected memory apart from the logits'"):
        call("token_stats_backward_", arguments | shared)


def test_the_cases_that_were_seen() -> None:
    ops = torch.ops.entropy_kernels
    with pytest.raises(ValueError, match=r"advantages: expected shape \(1000000,\), got \(3,\)"):
        ops.token_covariance(torch.randn(10**6), torch.randn(3), None, "", "auto")
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool, got torch\.float32"):
        ops.kl_cov_mask(torch.randn(100), torch.ones(100), None, None, None, 0.5, None, True, "", "auto")
    logits, target = torch.randn(1, 2, 9), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="target: expected on cpu, got meta"):
        ops.token_stats(logits, target, torch.ones(1), 0.0, -100, 0, 9, 3, False, "", "auto")


needs_native = pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error))


@needs_native
@pytest.mark.parametrize("name", sanitize.OPERATORS)
def test_every_kernel_names_what_is_wrong(name: str) -> None:
    op = getattr(torch.ops.entropy_kernels_native, name).default
    required = {x.name for x in op._schema.arguments if not isinstance(x.type, torch.OptionalType)}
    arguments = getattr(sanitize.Maker(1, 2), name)()
    tensors = {argument: value for argument, value in arguments.items() if isinstance(value, Tensor)}
    for argument, value in tensors.items():
        for tensor in (value.to("meta"), value.to(torch.complex64), *([None] if argument in required else [])):
            with pytest.raises(RuntimeError, match=f"{argument}: expected"):
                op(*(arguments | {argument: tensor}).values())


@needs_native
def test_memory_that_is_written_is_nobody_elses() -> None:
    op = torch.ops.entropy_kernels_native.token_stats_backward
    buffer, state, grad = torch.randn(400), torch.rand(4, 6), torch.ones(1, 6)

    def run(logits: Tensor, dlogits: Tensor, state: Tensor = state) -> None:
        op(grad, logits, torch.arange(6), torch.ones(1), state, 0.0, -100, 0, 20, LOGPROB, dlogits)

    logits = buffer[:120].view(2, 3, 20)
    run(logits, logits)
    run(logits, buffer[120:240].view(2, 3, 20))
    run(logits, torch.empty(2, 40, 3).transpose(1, 2)[..., ::2])
    wrong = [
        (buffer[1:121].view(2, 3, 20), state, "some of logits's"),
        (buffer[:120].view(3, 2, 20).transpose(0, 1), state, "some of logits's"),
        (buffer[120:140].expand(2, 3, 20), state, "overlaps itself"),
        (buffer[120:].as_strided((2, 3, 20), (60, 10, 1)), state, "overlaps itself"),
        (buffer[120:240].view(2, 3, 20), buffer[200:224].view(4, 6), "some of state's"),
    ]
    for dlogits, given, message in wrong:
        with pytest.raises(RuntimeError, match=f"dlogits: expected .*{message}"):
            run(logits, dlogits, given)
    with pytest.raises(RuntimeError, match=r"dlogits: .* some of grad_stats's"):
        op(buffer[None, 5:11], logits, torch.arange(6), torch.ones(1), state, 0.0, -100, 0, 20, LOGPROB, logits)
    interleaved = torch.empty(80).as_strided((2, 3, 1), (3, 2, 1))
    narrow, label = torch.randn(2, 3, 1), torch.zeros(6).long()
    op(grad, narrow, label, torch.ones(1), state, 0.0, -100, 0, 1, LOGPROB, interleaved)
    freed = torch.randn(2, 3, 20)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"logits: expected a storage of at least 480 bytes .*, got 0"):
        run(freed, torch.empty(2, 3, 20))


@needs_native
def test_digits_and_counts_out_of_range() -> None:
    ops = torch.ops.entropy_kernels_native
    keys, state, offset = torch.arange(9), torch.zeros(1, 3, dtype=torch.int64), torch.tensor(0)
    for shift, width, message in ((0, 12, "bits: .* got 12"), (0, 0, "bits: .* got 0"), (30, 11, "shift: .* got 30"),
                                 (-1, 4, "shift: .* got -1"), (2**62, 4, "shift")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            ops.selection_key_histogram(keys, state, shift, width)
    with pytest.raises(RuntimeError, match=r"known: expected 0 to 11 bits above the digit, got 12"):
        ops.selection_index_histogram(keys, None, offset, state, state, 42, 11, 12)
    for ratio, k, message in ((0.1, -2, "k: .* got -2"), (math.nan, -1, "ratio: .* got nan"), (1.5, -1, "ratio")):
        with pytest.raises(RuntimeError, match=message):
            ops.kl_cov_mask(torch.randn(9), None, None, None, ratio, k, True, None)


@needs_native
def test_far_labels_and_infinite_sums_overflow_nothing() -> None:
    """Found by reading for UBSan: label - vocab_start, and sums of what is not finite."""
    target = torch.tensor([-(2**63), 2**63 - 1, 3])
    (logprob,), _ = torch.ops.entropy_kernels_native.token_stats_forward(
        torch.randn(1, 3, 9), target, torch.ones(1), 0.0, -100, 7, 2**63 - 1, LOGPROB
    )
    assert logprob[:2].isnan().all() and logprob[2] == -math.inf
    infinite = torch.full((40,), math.inf)
    assert ek.token_covariance(infinite, torch.ones(40)).isnan().all()


@needs_native
def test_some_hundred_inputs_of_the_fuzzer() -> None:
    assert [problem for i in range(400) if (problem := sanitize.attempt(0, i)) is not None] == []
