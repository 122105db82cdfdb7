"""Tensors of another kind than a plain one: refused by the argument's name for every public function, or served."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import entropy_kernels as ek
from calls import same_bits
from entry_points import ENTRIES, V, tensors
from gloo import run_ranks

every_entry = pytest.mark.parametrize("name", ENTRIES)
REFUSED = (TypeError, ValueError, NotImplementedError)


def sparse_csr(x: Tensor) -> Tensor | None:
    return x.to_sparse_csr() if x.dim() == 2 else None


def jagged(x: Tensor) -> Tensor | None:
    return torch.nested.nested_tensor([*x.detach()], layout=torch.jagged) if x.dim() > 1 else None


def nested(x: Tensor) -> Tensor | None:
    return torch.nested.nested_tensor([*x.detach()]) if x.dim() > 1 else None


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


# name -> (made of an argument; None: not of this one), what the error says of it and of the way out
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse_coo": (Tensor.to_sparse, r"torch.sparse_coo.*\.to_dense\(\)"),
    "sparse_csr": (sparse_csr, r"torch.sparse_csr.*\.to_dense\(\)"),
    "jagged": (jagged, r"nested tensor.*to_padded_tensor"),
    "nested": (nested, r"nested tensor.*to_padded_tensor"),
    "quantised": (quantised, r"quantised.*\.dequantize\(\)"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "MaskedTensor": (lambda x: masked_tensor(x, x == x), "MaskedTensor, a subclass with operators of its own"),
    "subclass with operators": (lambda x: TwoTensor(x, x), "TwoTensor, a subclass with operators of its own"),
    "FakeTensor": (fake, "FakeTensor outside of its FakeTensorMode"),
    "numpy": (lambda x: x.numpy() if x.dim() else None, "ndarray"),
    "list": (lambda x: x.tolist() if x.dim() else None, "list"),
    "meta": (lambda x: x.to("meta"), "meta"),
}  # fmt: skip


def error_of(call: Callable[[], Any]) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about prototypes
        try:
            call()
        except Exception as error:
            return error
    return None


def served(name: str, argument: str, kind: str) -> bool:
    """What is none of ours: a head's or a model's own tensors; and what torch.as_tensor takes, where it is asked."""
    if name.endswith(("module", "function")):
        return argument in ("weight", "bias")
    if kind == "DTensor" and argument == "weight":  # gathered
        return True
    if name == "predicted_entropy_change":
        return kind in ("numpy", "list", "meta") and argument != ("" if kind == "meta" else "vocab_covariance")
    return name.startswith("hf.causal_lm") and argument in ("hidden", "weight")


def refusals(name: str, kind: str, make: Callable[[Tensor], Any], says: str) -> list[str]:
    """Of an entry, what is wrong with the error for each argument of a kind."""
    entry, plain, wrong = ENTRIES[name], tensors(), []
    for argument in entry.arguments:
        odd = None if served(name, argument, kind) else make(plain[argument])
        if odd is None:
            continue
        given = {n: plain[n] for n in entry.arguments} | {argument: odd}
        error = error_of(lambda given=given: entry.call(**given))
        # on another device than the first tensor: that one is right by definition, and another is named
        named = (
            rf"^{argument}: expected|^\w+: expected.* of (old_)?(logprob|{argument})"
            if says == "meta"
            else f"^{argument}: expected"
        )
        if not isinstance(error, REFUSED) or not re.search(named, str(error)) or not re.search(says, str(error)):
            wrong.append(f"{argument}: {type(error).__name__}: {str(error)[:200]}")
    return wrong


@every_entry
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(name: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not refusals(name, kind, *KINDS[kind])


# What a call needs beside one batch's tensors: of some the name means something else, or nothing
BESIDE: dict[str, dict[str, Any]] = {
    "Controller": {"method": "kl_cov"},
    "Method": {"score": len, "rule": len},
    "Surrogate": {"fn": len},
    "TargetEntropy": {"target": 0.3},
    "budget_tokens": {"share": 0.3},
    "clip_cov_loss": {"seed": 1},
    "control": {"method": "kl_cov", "batch": ek.TokenBatch(*(torch.ones(2, 3) for _ in range(3)), None)},
    "fit_entropy_law": {"entropy": [0.1, 0.2, 0.3], "performance": [0.3, 0.2, 0.1]},
    "random_tokens": {"k": 2},
    "top_tokens": {"k": 2},
}
TEXTS = ("formula", "source", "users", "when")  # for the documentation
WORDS = [
    (name, parameter.name)
    for name in ek.__all__
    if callable(made := getattr(ek, name))
    for parameter in inspect.signature(made).parameters.values()
    if name != "EntropyLaw"
    and type(parameter.default) in (bool, str)
    and parameter.name not in ("clip_low", "clip_high", *TEXTS)  # a word or a number
]


@pytest.mark.parametrize(("name", "argument"), WORDS)
def test_a_flag_is_a_bool_and_a_word_is_one_of_those_known(name: str, argument: str) -> None:
    """Not what is true or false by Python's rules: a word like "no" is true, and a tensor would be read back."""
    required = [p.name for p in inspect.signature(getattr(ek, name)).parameters.values() if p.default is p.empty]
    given = {p: x for p, x in (tensors() | BESIDE.get(name, {})).items() if p in (*required, *BESIDE.get(name, ()))}
    for odd in (None, [], {}, b"auto", np.ones(2), torch.ones(2), torch.tensor(True), 1):
        error = error_of(lambda odd=odd: getattr(ek, name)(**{**given, argument: odd}))
        assert isinstance(error, (TypeError, ValueError)), (odd, error)
        assert re.match(f"{argument}: expected", str(error)), (odd, error)


def test_logits_of_a_head_are_plain() -> None:
    made = tensors()
    for kind in ("sparse_coo", "quantised", "FakeTensor"):
        make, says = KINDS[kind]

        def head(hidden: Tensor, start: int, stop: int, make: Any = make) -> Any:
            return make(torch.zeros(hidden.shape[0], stop - start))

        error = error_of(
            lambda head=head: ek.linear_logprob_entropy(made["hidden"], head, made["target"] % 5, vocab_size=5)
        )
        assert re.search(rf"^weight: the head's logits: expected .*{says}", str(error)), error


@pytest.mark.parametrize("name", [n for n in ENTRIES if n.startswith("linear") and "function" not in n])
def test_lazy_parameters_are_named(name: str) -> None:
    entry, plain = ENTRIES[name], tensors()
    given = {n: plain[n] for n in entry.arguments} | {"weight": torch.nn.LazyLinear(V).weight}
    error = error_of(lambda: entry.call(**given))
    assert re.search("^weight: expected .*(UninitializedParameter|lazy)", str(error)), error


class Mine(Tensor):
    """Torch's operators, and results of its own class."""


@every_entry
def test_subclasses_with_torchs_operators_are_served(name: str) -> None:
    entry, plain = ENTRIES[name], tensors()
    given = {n: plain[n] for n in entry.arguments}
    kinds = {n: torch.nn.Parameter(x) if x.is_floating_point() else torch.nn.Buffer(x) for n, x in given.items()}
    expected = [x for outputs in entry.call(**given) for x in outputs]
    with torch.no_grad():
        for odd in (kinds, {n: x.as_subclass(Mine) for n, x in given.items()}):
            found = [x for outputs in entry.call(**odd) for x in outputs]
            assert all(same_bits(a.as_subclass(Tensor), b) for a, b in zip(found, expected, strict=True))
    if name.startswith("hf"):  # its tensors are the model's, and this is no model's parameter
        return
    tracked = {n: plain[n].as_subclass(Mine).requires_grad_() for n in entry.differentiable}
    for output in entry.call(**given | tracked)[0]:
        output.sum().backward(retain_graph=True)
    assert all(x.grad is not None for x in tracked.values())


@pytest.mark.parametrize("name", [name for name in ENTRIES if not name.endswith(("module", "function"))])
def test_a_fake_tensor_mode_gives_shapes_and_dtypes(name: str) -> None:
    entry, plain = ENTRIES[name], tensors()
    expected = entry.call(**{n: plain[n] for n in entry.arguments})
    with FakeTensorMode() as mode:
        found = entry.call(**{n: mode.from_tensor(plain[n]) for n in entry.arguments})
    for outputs, real in zip(found, expected, strict=True):
        assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in real]


@every_entry
def test_mapped_tensors_are_refused_or_served(name: str) -> None:
    """torch.vmap works where an operator is all there is to it; the losses and heads name what is mapped."""
    entry, plain = ENTRIES[name], tensors()
    for argument in entry.arguments:

        def call(value: Tensor, argument: str = argument) -> tuple[Tensor, ...]:
            outputs = entry.call(**{n: plain[n] for n in entry.arguments} | {argument: value})
            return *outputs[0], *outputs[1]

        try:
            found = torch.vmap(call, randomness="same")(torch.stack([plain[argument]] * 2))
        except NotImplementedError as error:
            assert str(error).startswith("linear_" if served(name, argument, "mapped") else f"{argument}: expected")
            continue
        for mapped, value in zip(found, call(plain[argument]), strict=True):
            assert all(same_bits(x, value) for x in mapped)


@pytest.mark.parametrize("name", [n for n, entry in ENTRIES.items() if "logprob" in entry.differentiable])
def test_a_loss_inside_a_transform_of_something_else_is_refused(name: str) -> None:
    entry, plain = ENTRIES[name], tensors()
    given = {n: plain[n] for n in entry.arguments}
    with pytest.raises(NotImplementedError, match=r"policy_loss: torch.func's (transforms|derivatives)"):
        torch.func.grad(lambda factor: (factor * entry.call(**given)[0][0]).sum())(torch.tensor(2.0))


# ---- DTensor --------------------------------------------------------------------------------------------------------

# columns, options, whether target and temperature are replicated DTensors, shape of the mesh
SHARDED: dict[str, tuple[int, dict[str, Any], bool, tuple[int, ...]]] = {
    "even": (8, {}, False, (2,)),
    "uneven": (7, {"softcap": 2.0}, True, (2,)),
    "empty": (1, {}, False, (2,)),
    "padded": (9, {"vocab_size": 6}, False, (2,)),
    "in place": (9, {"inplace_backward": True}, False, (2,)),
    "two dimensions, shards in the second": (7, {}, True, (1, 2)),
    "two dimensions, copies in the first": (7, {}, False, (2, 1)),
    "copies": (7, {}, True, (2,)),
}


def _sample(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, min(vocab, 6), (2, 3), generator=g)
    target[0, 1] = -100
    return 3 * torch.randn(2, 3, vocab, generator=g), target, 0.5 + torch.rand(2, 1, generator=g)


def _differentiated(logits: Tensor, target: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    leaf = logits.detach().requires_grad_()
    found = ek.token_stats(leaf * 1, target, **options)
    sum((i + 1) * x.square().sum() for i, x in enumerate(found[:3])).backward()
    assert leaf.grad is not None
    return [x.detach() for x in found], leaf.grad


def sharded_logits(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed import _functional_collectives as functional_collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    results: dict[str, Any] = {}
    for name, (vocab, options, replicas, shape) in SHARDED.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
        logits, *rest = _sample(vocab)
        placements: list[Any] = [Replicate() for _ in shape]
        if name != "copies":
            placements[-1] = Shard(2)
        if replicas:
            rest = [distribute_tensor(x, mesh, [Replicate() for _ in shape]) for x in rest]
        dtensor = distribute_tensor(logits, mesh, placements)
        stats, gradient = _differentiated(dtensor, rest[0], temperature=rest[1], **options)
        assert all(type(x) is Tensor for x in stats)
        assert isinstance(gradient, DTensor) and gradient.placements == tuple(placements)
        with torch.no_grad():
            again = ek.logprob_entropy(dtensor, rest[0], temperature=rest[1], **{**options, "inplace_backward": False})
        assert all(same_bits(a, b) for a, b in zip(again, stats, strict=False))
        results[name] = stats, gradient.full_tensor()
    mesh = init_device_mesh("cpu", (world,))
    logits, target, _ = _sample(8)
    whole, shards = distribute_tensor(logits, mesh, [Replicate()]), distribute_tensor(logits, mesh, [Shard(2)])
    compiled = torch.compile(lambda x, y: ek.token_stats(x, y), backend="aot_eager", fullgraph=True)
    results["compiled"] = [x.detach() for x in compiled(shards.detach().requires_grad_(), target)]
    # what a collective returns is waited for, like everywhere
    results["under way"] = [*ek.token_stats(*(functional_collectives.broadcast(x, 0, mesh) for x in (logits, target)))]
    weight = distribute_tensor(torch.ones(7, 4), mesh, [Shard(0)]).requires_grad_()
    hidden, labels = torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([0, 6, 3])
    compiled = torch.compile(lambda h, w, y: ek.linear_logprob_entropy(h, w, y), backend="aot_eager", fullgraph=True)
    found, eager = (call(hidden, weight, labels) for call in (compiled, ek.linear_logprob_entropy))
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-6)
    results["plan"] = ek.linear_plan(torch.ones(3, 4), weight)
    partial = DTensor.from_local(logits, mesh, [Partial()])
    uneven = DTensor.from_local(logits[..., : 4 + rank], mesh, [Shard(2)], shape=(2, 3, 8), stride=(24, 8, 1))
    wrong = {
        "batch": (distribute_tensor(logits, mesh, [Shard(0)]), target, {}),
        "partial": (partial, target, {}),
        "target": (shards, distribute_tensor(target, mesh, [Shard(0)]), {}),
        "target alone": (logits, distribute_tensor(target, mesh, [Replicate()]), {}),
        "temperature": (shards, target, {"temperature": distribute_tensor(torch.ones(2, 1), mesh, [Shard(0)])}),
        "vocab_start": (shards, target, {"vocab_start": 3}),
        "vocab_size": (shards, target, {"vocab_size": 9}),
        "vocab_group": (shards, target, {"vocab_group": torch.distributed.new_group([0, 1])}),
        "copies with a start": (whole, target, {"vocab_start": 3}),
        "uneven": (uneven, target, {}) if rank else (whole, target, {"vocab_start": 3}),
    }
    results["wrong"] = {
        name: str(error_of(lambda a=a, b=b, c=c: ek.logprob_entropy(a, b, **c))) for name, (a, b, c) in wrong.items()
    }
    replica = lambda x: distribute_tensor(x, mesh, [Replicate()])  # noqa: E731
    serve = ("token_stats", "token_stats, by name", "logprob_entropy", "entropy")
    warned = (name for name in ENTRIES if name not in serve)
    results["elsewhere"] = {name: refusals(name, "DTensor", replica, r"DTensor.*\.full_tensor\(\)") for name in warned}
    return results


def test_dtensors_sharded_over_the_vocabulary_are_served_and_others_named() -> None:
    ranks = run_ranks(2, sharded_logits)
    for name, (vocab, options, *_) in SHARDED.items():
        logits, target, temperature = _sample(vocab)
        expected, gradient = _differentiated(logits, target, temperature=temperature, **options)
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank[name][1], gradient, rtol=1e-5, atol=1e-6)
    logits, target, _ = _sample(8)
    for rank in ranks:
        for name in ("compiled", "under way"):
            torch.testing.assert_close(rank[name], [*ek.token_stats(logits, target)], rtol=1e-5, atol=1e-6)
        assert rank["plan"] == ek.linear_plan(torch.ones(3, 4), torch.ones(7, 4, requires_grad=True))
    says = {
        "batch": r"logits: expected a DTensor sharded over the vocabulary, Shard\(2\).*got \(Shard\(dim=0\),\); \.re",
        "partial": r"logits: expected a DTensor sharded over the vocabulary.* got \(Partial",
        "target": r"target: expected a plain tensor or a DTensor that is replicated.* got \(Shard",
        "target alone": r"target: expected a plain torch.Tensor, got a DTensor placed",
        "temperature": "temperature: expected a plain tensor or a DTensor that is replicated",
        "vocab_start": "vocab_start: expected None or [04], that of the DTensor's shard, got 3",
        "vocab_size": "vocab_size: expected <= 8, the width of logits, got 9",
        "vocab_group": "vocab_group: expected None or the group of the mesh",
        "copies with a start": "vocab_start: expected None without a vocab_group, got 3",
        "uneven": "logits: expected a DTensor whose shards are torch.chunk's|vocab_start",
    }
    for rank in ranks:
        for name, pattern in says.items():
            assert re.search(pattern, rank["wrong"][name]), (name, rank["wrong"][name])
        assert not {name: wrong for name, wrong in rank["elsewhere"].items() if wrong}
