"""Our statistics behind verl's functions, in verl's own engine: what verl has in float64, from one read; and more."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import verl_engine
from torch import Tensor
from verl_engine import Reads, engine, micro_batch, step

import entropy_kernels as ek
from entropy_kernels.integrations import _reads
from entropy_kernels.integrations._patch import Patch
from entropy_kernels.integrations.verl import statistics

TEMPERATURES = {"one": 1.0, "number": 0.75, "per sample": torch.tensor([0.75, 1.0, 1.25])}
ALL = {"calculate_entropy": True, "calculate_sum_pi_squared": True}
BOTH = ("collision", "vocab_covariance")


@pytest.fixture(autouse=True)
def _verl_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    verl_engine.on_cpu(monkeypatch)
    statistics.install()
    yield
    statistics.enable(False)


def patch(name: str) -> Patch:
    return next(one for one in statistics.PATCHES if one.target.endswith(name))


def both(batch: Any, forward_only: bool = False, **options: Any) -> tuple[Any, Any, Reads]:
    """Outputs and gradients by ours and by verl's functions, and what ours read."""
    statistics.enable(False)
    before = [one.calls for one in statistics.PATCHES]
    peer = step(engine(**options), batch, forward_only)
    assert [one.calls for one in statistics.PATCHES] == before, "ours served where it is not enabled"
    statistics.enable()
    made = engine(**options)
    with Reads() as reads:
        mine = step(made, batch, forward_only)
    return mine, peer, reads


def assert_same(mine: Any, peer: Any, tolerance: float = 1e-9) -> None:
    for found, expected in zip(mine, peer, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance / 100, check_dtype=False,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def covariance(logits: Tensor, labels: Tensor) -> Tensor:
    """Cov of log π(a) and 1[a = y] - π(a) over a ~ π, as it is defined."""
    p = logits.double().softmax(-1)
    y = torch.nn.functional.one_hot(labels, logits.shape[-1]).double() - p
    logp = p.log()
    mean = (p * logp).sum(-1), (p * y).sum(-1)
    return (p * logp * y).sum(-1) - mean[0] * mean[1]


@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES.keys())
@pytest.mark.parametrize("asked", [{}, {"calculate_entropy": True}, {"calculate_sum_pi_squared": True}, ALL], ids=str)
def test_a_packed_micro_batch_is_read_once(asked: dict[str, bool], temperature: Any) -> None:
    mine, peer, reads = both(micro_batch(temperature, **asked))
    assert_same(mine, peer)
    assert (reads.forward, reads.backward, reads.of_torch) == (1, 1, 0)
    assert reads.in_place == (not asked)  # verl allows it where it asks for no entropy


@pytest.mark.parametrize(
    "options",
    [{"chunks": True}, {"compiled": True}, {"compiled": True, "chunks": True}, {"pad_to_length": True}],
    ids=str,
)
def test_ways_of_verls_entropy(options: dict[str, bool]) -> None:
    """verl's compiled entropy is ours: the compiler does not trace it."""
    entropy = patch(":entropy_from_logits_with_chunking" if options.get("chunks") else ":entropy_from_logits")
    before = entropy.calls
    mine, peer, reads = both(micro_batch(**ALL), **options)
    assert_same(mine, peer, 1e-3 if options.get("chunks") else 1e-9)  # verl's are float32 with chunks
    assert (reads.forward, reads.backward) == (1, 1) and entropy.calls == before + 1


def test_statistics_of_a_micro_batch_that_is_padded_to_a_length() -> None:
    statistics.enable()
    asked = {"ek_statistics": BOTH, **ALL}
    plain, padded = (step(engine(pad_to_length=on), micro_batch(**asked)) for on in (False, True))
    assert_same(padded, plain)


@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES.keys())
def test_a_padded_micro_batch(temperature: Any) -> None:
    """verl asks for entropy of the padded logits and for log-probs of a copy without padding: a read for each."""
    mine, peer, reads = both(micro_batch(temperature, use_remove_padding=False, **ALL))
    assert_same(mine, peer)
    assert (reads.forward, reads.backward, reads.of_torch) == (2, 2, 0)


@pytest.mark.parametrize("asked", [{"calculate_entropy": True}, ALL], ids=str)
@pytest.mark.parametrize("use_remove_padding", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_entropy(
    monkeypatch: pytest.MonkeyPatch, reentrant: bool, use_remove_padding: bool, asked: dict[str, bool]
) -> None:
    """A reentrant checkpoint makes the entropy again in the backward pass, a read more; another has no need."""
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    mine, peer, reads = both(micro_batch(use_remove_padding=use_remove_padding, **asked), checkpoint=True)
    assert_same(mine, peer)
    once = 1 if use_remove_padding else 2
    assert (reads.forward, reads.backward) == ((once + 1, 2) if reentrant else (once, once))


@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_without_gradient(use_remove_padding: bool) -> None:
    batch = micro_batch(use_remove_padding=use_remove_padding, **ALL)
    mine, peer, reads = both(batch, forward_only=True)
    assert_same(mine, peer)
    assert reads.forward == (1 if use_remove_padding else 2)
    assert not any(value.requires_grad for value in mine[0].values())


@pytest.mark.parametrize("forward_only", [True, False])
@pytest.mark.parametrize("use_remove_padding", [True, False])
@pytest.mark.parametrize("head", [None, "torch", "triton"])
def test_statistics_beside_those_of_verl(head: str | None, use_remove_padding: bool, forward_only: bool) -> None:
    """From the same read, in the logits' order, detached: as defined, and Σp² also where verl refuses."""
    if head == "triton" and not use_remove_padding:
        pytest.skip("verl's own outputs of this head are flat, and its engine cannot unpad them")
    asked = {"use_remove_padding": use_remove_padding, "ek_statistics": BOTH, **ALL}
    statistics.enable()
    made = engine(head=head)
    with Reads() as reads:
        output, _ = step(made, micro_batch(use_fused_kernels=head is not None, **asked), forward_only)
    assert output.keys() == {"log_probs", "entropy", "sum_pi_squared", "ek_collision", "ek_vocab_covariance"}
    if head is None:
        assert reads.forward == (1 if use_remove_padding else 2)
    batch = micro_batch()
    rows = zip(batch["input_ids"].unbind(), batch["position_ids"].unbind(), strict=True)
    with torch.no_grad():
        logits = [engine().module(ids[None], position_ids=at[None]).logits[0] / 0.75 for ids, at in rows]
    inner = verl_engine.inner()
    values, labels = torch.cat(logits)[inner], batch["input_ids"].values().roll(-1)[inner]
    statistics.enable(False)
    p = values.softmax(-1)
    expected = {"sum_pi_squared": (p * p).sum(-1), "ek_vocab_covariance": covariance(values, labels)}
    expected["ek_collision"] = expected["sum_pi_squared"]
    expected["entropy"] = -(p * p.log()).sum(-1)
    expected["log_probs"] = values.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")
        assert not output[name].requires_grad


@pytest.mark.parametrize("use_remove_padding", [True, False])
@pytest.mark.parametrize("head", ["torch", "triton"])
def test_fused_heads(head: str, use_remove_padding: bool) -> None:
    """Against verl on logits, in float64; its triton head runs on no CPU."""
    if head == "triton" and not use_remove_padding:
        pytest.skip("verl's own outputs of this head are flat, and its engine cannot unpad them")
    asked = {"use_remove_padding": use_remove_padding, **ALL}
    peer = step(engine(), micro_batch(**asked))
    ours = patch("linear_cross_entropy:linear_cross_entropy" if head == "triton" else "FusedLinearForPPO.forward")
    before = ours.calls
    statistics.enable()
    mine = step(engine(head=head), micro_batch(use_fused_kernels=True, **asked))
    assert ours.calls == before + 1
    assert_same(mine, peer)


def test_verl_refuses_sum_pi_squared_with_fused_kernels() -> None:
    """Else ours would hide what verl can do by itself."""
    batch = micro_batch(use_fused_kernels=True, **ALL)
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared=True is not supported with use_fused_ker"):
        step(engine(head="torch"), batch)
    statistics.enable()
    step(engine(head="torch"), batch)
    assert batch["calculate_sum_pi_squared"]  # the caller's batch is as it was


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("head", [None, "torch"])
def test_a_checkpointed_model_leaves_its_statistics_once(head: str | None, reentrant: bool) -> None:
    statistics.enable()
    batch = micro_batch(use_fused_kernels=head is not None, ek_statistics=BOTH, calculate_entropy=True)
    plain, checkpointed = engine(head=head), engine(head=head)
    checkpointed.module.train()
    checkpointed.module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.module.enable_input_require_grads()
    assert_same(step(checkpointed, batch), step(plain, batch))


def test_logits_are_not_kept() -> None:
    statistics.enable()
    made, kept = engine(), []
    made.module.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output.logits)))
    step(made, micro_batch(1.0, ek_statistics=BOTH, **ALL), forward_only=True)
    gc.collect()
    assert kept[0]() is None and statistics._micro_batch.get() is None and _reads.wanted() == ()


def test_what_goes_another_way_is_an_error() -> None:
    statistics.enable()
    with pytest.raises(ValueError, match=r"ek_statistics: expected of collision, vocab_covariance, got 'entropy'"):
        step(engine(), micro_batch(ek_statistics=("entropy",)))
    patch("FusedLinearForPPO.forward").undo()
    with pytest.raises(RuntimeError, match=r"collision: expected a call of a head that was replaced by ours, got none"):
        step(engine(head="torch"), micro_batch(use_fused_kernels=True, ek_statistics=("collision",)))
    made, batch = engine(), micro_batch(ek_statistics=("collision",))
    inputs, output_args = made.prepare_model_inputs(batch)
    with pytest.raises(
        RuntimeError, match=r"collision: expected to be collected in forward_step, got a call of prepare"
    ):
        made.prepare_model_outputs(made.module(**inputs), output_args, batch, None)


def logits(dtype: torch.dtype, shape: tuple[int, ...] = (64, 1031), *, hard: str = "") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator) * 4
    if hard == "offset":
        z = z + 60000
    if hard == "infinite":
        z[..., 5::7] = -torch.inf
    return z.to(dtype), torch.randint(0, 5, shape[:-1], generator=generator)


def functions() -> dict[str, Any]:
    from verl.utils import torch_functional as verl_F

    return {
        "logprob": verl_F.logprobs_from_logits,
        "entropy": lambda z, y: verl_F.entropy_from_logits(z),
        "chunked entropy": lambda z, y: verl_F.entropy_from_logits_with_chunking(z, chunk_size=16),
        "collision": lambda z, y: verl_F.calculate_sum_pi_squared_from_logits(z),
    }


def value_and_gradient(name: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = functions()[name](z, y)
    value.float().sum().backward() if value.dtype != torch.float64 else value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", ["", "offset", "infinite"])
@pytest.mark.parametrize("name", ["logprob", "entropy", "chunked entropy", "collision"])
def test_errors_against_float64(name: str, hard: str, dtype: torch.dtype) -> None:
    """Ours is never further off than verl's, plus the rounding of one number of the result's size."""
    z, y = logits(dtype, hard=hard)
    finite = z.double().nan_to_num(neginf=-1e4)  # verl's functions make NaN of -inf, in float64, too
    # with chunks verl computes in float32
    exact, exact_gradient = value_and_gradient(name.removeprefix("chunked "), finite, y)
    theirs, their_gradient = value_and_gradient(name, z, y)
    statistics.enable()
    ours, our_gradient = value_and_gradient(name, z, y)
    assert ours.dtype == torch.float32 and our_gradient.dtype == dtype
    for what, mine, peer, right, eps in (
        ("value", ours, theirs, exact, 2**-22),
        ("gradient", our_gradient, their_gradient, exact_gradient, max(2**-22, torch.finfo(dtype).eps)),
    ):
        error, their_error = (float((x.double() - right).abs().max()) for x in (mine, peer))
        print(f"{name} {hard or 'plain'} {dtype} {what}: ours {error:.2e}, verl's {their_error:.2e}")
        limit = their_error if their_error == their_error else 0.0
        assert error <= limit + eps * float(right.abs().max().clamp(min=1e-3)), what


def test_where_verls_functions_break() -> None:
    """-inf logits: NaN entropies; an offset: the entropy of float32 is off by more than 1e-3. Ours holds."""
    z, y = logits(torch.float32, hard="infinite")
    assert functions()["entropy"](z, y).isnan().all()
    z, y = logits(torch.float32, hard="offset")
    exact = functions()["entropy"](z.double(), y)
    assert (functions()["entropy"](z, y) - exact).abs().max() > 1e-3
    statistics.enable()
    assert (functions()["entropy"](z, y) - exact).abs().max() < 2e-6
    z, y = logits(torch.float32, hard="infinite")
    assert functions()["entropy"](z, y).isfinite().all()


@pytest.mark.parametrize("shape", [(6, 31), (2, 3, 31), (31,)], ids=str)
def test_called_by_themselves(shape: tuple[int, ...]) -> None:
    """Outside of the engine each is a read of its own, of any shape; a leaf is nobody's to write to."""
    z, y = logits(torch.float64, shape)
    # verl's loop over rows wants some, and its chunks are float32
    expected = [value_and_gradient(name, z.view(-1, 31), y.view(-1)) for name in ("logprob", "entropy", "collision")]
    expected.insert(1, expected[1])
    statistics.enable()
    for name, (value, gradient) in zip(functions(), expected, strict=True):
        leaf = z.clone().requires_grad_()
        found = functions()[name](leaf, y)
        found.sum().backward()
        assert leaf.detach().equal(z) and found.shape == shape[:-1]
        peer = value.view(found.shape), gradient.view(shape)
        torch.testing.assert_close((found.detach(), leaf.grad), peer, rtol=1e-10, atol=1e-12)


def test_labels_of_another_shape() -> None:
    """verl with flash-attn flattens logits and labels, and gives 0 for a label of -100."""
    from verl.utils import torch_functional as verl_F

    statistics.enable()
    z, y = logits(torch.float64, (5, 31))
    found = verl_F.logprobs_from_logits(z, y[None])
    torch.testing.assert_close(found, z.log_softmax(-1).gather(-1, y[:, None])[:, 0])
    y[2] = -100
    assert verl_F.logprobs_from_logits(z, y)[2] == 0


def test_in_place_where_verl_allows_it() -> None:
    from verl.utils import torch_functional as verl_F

    statistics.enable()
    z, y = logits(torch.float64, (5, 31))
    exact = value_and_gradient("logprob", z, y)[1]
    for allowed in (True, False):
        leaf = z.clone().requires_grad_()
        output = leaf * 1.0
        verl_F.logprobs_from_logits(output, y, inplace_backward=allowed).sum().backward()
        torch.testing.assert_close(leaf.grad, exact)
        assert output.detach().equal(z) is not allowed


@pytest.mark.parametrize("use_remove_padding", [True, False])
def test_a_distillation_loss_reads_the_logits_too(monkeypatch: pytest.MonkeyPatch, use_remove_padding: bool) -> None:
    """Its backward pass comes after that of the log-probs, which verl lets overwrite the logits."""

    def processor(model_output: Any = None, data: Any = None, student_logits: Any = None, dp_group: Any = None) -> Any:
        if student_logits is not None:
            return {"distillation_losses": student_logits.square().sum(-1)}
        total, metrics = verl_engine.loss(model_output, data, dp_group)
        return total + model_output["distillation_losses"].values().sum(), metrics

    monkeypatch.setattr(verl_engine, "LOSS", processor)
    batch = micro_batch(1.0, distillation_use_topk=True, use_remove_padding=use_remove_padding)
    mine, peer, reads = both(batch)
    assert_same(mine, peer)
    assert (reads.backward, reads.in_place) == (1, 0)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_errors_of_heads_against_float64(name: str) -> None:
    """In bf16 of hidden states: log-prob, entropy and both gradients, beside verl's own for torch."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as kernel

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 72, generator=generator).bfloat16()
    weight = (torch.randn(1031, 72, generator=generator) / 3).bfloat16()
    labels = torch.randint(0, 1031, (96,), generator=generator)

    def results(function: Any, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        logprob, entropy = function(h, w, labels, 1.25)
        (logprob.sum() + entropy.float().sum().to(logprob.dtype)).backward()
        return [x.detach().double() for x in (logprob, entropy, h.grad, w.grad)]

    def plain(h: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp = (h @ w.T / temperature).log_softmax(-1)
        return logp.gather(-1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    exact, theirs = results(plain, torch.float64), results(FusedLinearForPPO())
    statistics.enable()
    ours = results(FusedLinearForPPO() if name == "torch" else lambda *x: kernel.linear_cross_entropy(*x, "none"))
    for what, mine, peer, right in zip(
        ("logprob", "entropy", "d hidden", "d weight"), ours, theirs, exact, strict=True
    ):
        error, their_error = (float((x - right).abs().max()) for x in (mine, peer))
        print(f"{name} {what}: ours {error:.2e}, verl's torch head {their_error:.2e}")
        assert error <= their_error + 2**-22 * float(right.abs().max())


def test_other_tensors_in_a_micro_batch_have_reads_of_their_own() -> None:
    """What is changed in place is another tensor; labels of somebody else are answered for themselves."""
    from verl.utils import torch_functional as verl_F

    statistics.enable()
    z, y = logits(torch.float64, (5, 31))
    other = y.flip(0)
    with statistics._reading(statistics._MicroBatch(y, ("entropy",))):
        first = verl_F.entropy_from_logits(z)
        torch.testing.assert_close(verl_F.logprobs_from_logits(z, other), ek.logprob_entropy(z, other).logprob)
        torch.testing.assert_close(verl_F.logprobs_from_logits(z, y), ek.logprob_entropy(z, y).logprob)
        z.mul_(0.5)
        torch.testing.assert_close(verl_F.entropy_from_logits(z), ek.entropy(z))
        torch.testing.assert_close(verl_F.logprobs_from_logits(z, y), ek.logprob_entropy(z, y).logprob)
    assert not first.equal(ek.entropy(z))
