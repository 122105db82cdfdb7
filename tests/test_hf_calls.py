"""What a call of a head or of a model does beyond its class's forward: done here too, or refused with the reason."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import entropy_kernels as ek

pytest.importorskip("transformers")

from hf_models import make, transformers

BUDGET = 97 * 4 * 8 * 3  # three tiles
BANNED = torch.arange(30, 41)
SHALLOW = {"num_hidden_layers": 1}  # of which less is traced


def ids() -> Tensor:
    return torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))


def results(model: Any, ours: bool, **options: Any) -> dict[str, Tensor]:
    """Values, and the gradients of all that is trained."""
    model.zero_grad()
    if ours:
        logprob, entropy = ek.hf.causal_lm_logprob_entropy(model, ids(), **options)
    else:
        logprob, entropy = ek.logprob_entropy(model(ids()).logits.float(), ek.hf.next_tokens(ids()))
    weights = torch.randn(2, *logprob.shape, generator=torch.Generator().manual_seed(3))
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), **gradients}


def assert_as_the_model(model: Any, tolerance: float = 2e-5, **options: Any) -> None:
    got, want = results(model, True, **options), results(model, False)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=5 * tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def fill_in_place(module: Any, args: Any, logits: Tensor) -> None:
    logits[:, :, 30:41] = -1e4  # written for (B, L, V)


class Doubled(nn.Linear):
    def __call__(self, hidden: Tensor) -> Tensor:
        return 2 * super().__call__(hidden)


def replace(make_head: Callable[[nn.Linear], nn.Module]) -> Callable[[Any], None]:
    return lambda model: setattr(model, "lm_head", make_head(model.lm_head))


def change(name: str, value: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    return lambda model: setattr(model.lm_head, name, value(model.lm_head))


HEADS: dict[str, Callable[[Any], Any]] = {
    "hook": lambda m: m.lm_head.register_forward_hook(lambda _, a, out: out.index_fill(-1, BANNED, -1e4)),
    "hook in place": lambda m: m.lm_head.register_forward_hook(fill_in_place),
    "hook with keywords": lambda m: m.lm_head.register_forward_hook(lambda _, a, k, out: out * 2, with_kwargs=True),
    "pre-hook": lambda m: m.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "backward hook": lambda m: m.lm_head.register_full_backward_hook(lambda _, grads, out: (grads[0] * 2,)),
    "backward pre-hook": lambda m: m.lm_head.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 2,)),
    "weight_norm": lambda m: nn.utils.weight_norm(m.lm_head),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m.lm_head).eval(),
    "pruned": lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.3),
    "sequential": replace(lambda head: nn.Sequential(head, nn.Tanh())),
    "compiled": replace(lambda head: torch.compile(head, backend="eager")),
    "checkpointed": replace(checkpoint_wrapper),
    "its own call": change("__class__", lambda head: Doubled),
    "its own forward": change("forward", lambda head: lambda hidden, plain=head.forward: 2 * plain(hidden)),
}


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.filterwarnings("ignore:.*weight_norm|.*spectral_norm:FutureWarning")
def test_a_head_that_is_more_than_its_weight_is_called(how: str) -> None:
    model = make("llama")
    HEADS[how](model)
    assert isinstance(ek.hf.causal_lm_parts(model).weight, nn.Module)
    assert_as_the_model(model, memory_budget=BUDGET)


PLAIN: dict[str, Callable[[Any], Any]] = {
    "parametrised": lambda m: parametrizations.weight_norm(m.lm_head),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.lm_head),  # computed anew at each access
    "subclass": change("__class__", lambda head: type("Mine", (nn.Linear,), {})),
    "compiled": lambda m: m.lm_head.compile(backend="eager"),
    "compiled backbone": lambda m: setattr(m, "model", torch.compile(m.model, backend="eager")),
}


@pytest.mark.parametrize("how", PLAIN)
def test_a_head_that_is_its_weight_is_not_called(how: str) -> None:
    model = make("llama", **SHALLOW)
    PLAIN[how](model)
    assert isinstance(ek.hf.causal_lm_parts(model).weight, Tensor)
    assert_as_the_model(model)


def test_a_parametrised_weight_is_computed_once() -> None:
    model = make("llama")
    parametrizations.spectral_norm(model.lm_head.train())
    other = copy.deepcopy(model)
    got, want = results(model, True), results(other, False)
    torch.testing.assert_close(got["entropy"], want["entropy"], rtol=1e-5, atol=1e-5)


def test_global_hooks_reach_the_head_but_not_the_model() -> None:
    def doubled(module: Any, args: Any, out: Any) -> Any:
        return out * 2 if isinstance(module, nn.Linear) else None

    model = make("cohere")  # whose logits have a factor, too
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        with pytest.warns(UserWarning, match=r"the global hook .*doubled runs on backbone and head, not on the model"):
            assert_as_the_model(model, memory_budget=BUDGET)
    finally:
        handle.remove()
    assert isinstance(ek.hf.causal_lm_parts(model).weight, Tensor)


def write(module: Any, args: Any) -> None:
    args[0].mul_(2)


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_heads_that_write_where_a_second_call_would_read() -> None:
    model = make("llama")
    for prepare in (
        lambda: model.lm_head.register_forward_pre_hook(write),
        lambda: model.lm_head._forward_pre_hooks.clear() or nn.utils.spectral_norm(model.lm_head.train()),
    ):
        prepare()
        with pytest.raises(ValueError, match=r"weight: expected a head whose call writes neither to .* eval mode"):
            ek.hf.causal_lm_logprob_entropy(model, ids())


def test_a_head_in_fp32_behind_a_model_in_bf16() -> None:
    model = make("llama").bfloat16()
    model.lm_head.float()
    message = r"weight: expected the dtype of hidden, torch.bfloat16, got torch.float32; cast .* torch.autocast"
    with pytest.raises(TypeError, match=message):
        ek.hf.causal_lm_logprob_entropy(model, ids())
    hook = model.lm_head.register_forward_hook(lambda _, args, out: out * 2)
    message = r"weight: expected a head that takes hidden's dtype, torch.bfloat16, got .* torch.float32, .*autocast"
    with pytest.raises(TypeError, match=message):
        ek.hf.causal_lm_logprob_entropy(model, ids())
    hook.remove()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert_as_the_model(model)


# ---- The model's own call -------------------------------------------------------------------------------------------

ORIGINAL = transformers.LlamaForCausalLM.forward


def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
    out = ORIGINAL(self, *args, **kwargs)
    out.logits = out.logits * 2
    return out


def decorated(forward: Any) -> Any:
    """With the name and module of what it wraps."""
    return functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


class WithForward(transformers.LlamaForCausalLM):
    forward = doubled


class WithCall(transformers.LlamaForCausalLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self, *args, **kwargs)


def hooked_by_accelerate(model: Any) -> None:
    hooks = pytest.importorskip("accelerate").hooks

    class Hook(hooks.ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output

    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))
    hooks.add_hook_to_module(model, Hook(), append=True)


MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda m: m.register_forward_hook(lambda _, args, out: None), "the hook .*<lambda>"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(functools.partial(write)), "the hook test_hf_calls.write"),
    "forward": (lambda m: setattr(m, "forward", types.MethodType(doubled, m)), "doubled in place of its forward"),
    "wrapped": (lambda m: setattr(m, "forward", decorated(m.forward)), "in place of its forward"),
    "subclass": (lambda m: setattr(m, "__class__", WithForward), "in place of the forward of LlamaForCausalLM"),
    "call": (lambda m: setattr(m, "__class__", WithCall), "WithCall.__call__ in place of its call"),
    "accelerate": (hooked_by_accelerate, "the hook hooked_by_accelerate.*Hook"),
}


@pytest.mark.parametrize("how", MODELS)
@pytest.mark.parametrize("wrapped", (False, True), ids=("itself", "compiled"))
def test_what_would_change_the_logits_behind_the_head_is_refused(how: str, wrapped: bool) -> None:
    add, message = MODELS[how]
    model = make("llama")
    add(model)
    message = rf"model: expected .*got \w+ with .*{message}; take ek.logprob_entropy\(model\(...\).logits"
    with pytest.raises(TypeError, match=message):
        ek.hf.causal_lm_logprob_entropy(torch.compile(model, backend="eager") if wrapped else model, ids())


class Scores(transformers.LlamaForCausalLM):
    """As DDP and FSDP want it: what is wrapped is called, and its forward calls us."""

    def forward(self, input_ids: Tensor) -> ek.LogprobEntropy:
        return ek.hf.causal_lm_logprob_entropy(self, input_ids)


def test_a_forward_that_calls_us_is_not_in_the_way() -> None:
    model = make("llama")
    want = ek.hf.causal_lm_logprob_entropy(model, ids())
    model.__class__ = Scores
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(out))
    torch.testing.assert_close(model(ids()), want)
    assert len(seen) == 1
    torch.testing.assert_close(model.forward(ids()), want)
    with pytest.raises(TypeError, match=r"Scores.forward in place of the forward of LlamaForCausalLM"):
        ek.hf.causal_lm_logprob_entropy(model, ids())


@pytest.fixture(params=(False, True), ids=("replaced", "decorated"))
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forward = decorated(ORIGINAL) if request.param else doubled
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    yield


@pytest.mark.usefixtures("patched")
def test_a_class_whose_forward_was_replaced_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: .* in place of the forward of LlamaForCausalLM"):
        ek.hf.causal_lm_logprob_entropy(make("llama"), ids())


class OwnCode(transformers.LlamaPreTrainedModel):
    """As code that comes with a checkpoint: its forward is nobody else's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        hidden = self.model(input_ids, **options)[0]
        return types.SimpleNamespace(logits=self.lm_head(hidden))


def aligned(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    return accelerate.hooks.add_hook_to_module(model, hook)


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "model.compile": lambda m: m.compile(backend="eager") or m,
    "accelerate's placement": aligned,
    "accelerate's placement twice": lambda m: aligned(aligned(m)),
    "a subclass": lambda m: setattr(m, "__class__", type("Mine", (transformers.LlamaForCausalLM,), {})) or m,
    "code of its own": lambda m: OwnCode(m.config),
    "the same, placed": lambda m: aligned(OwnCode(m.config)),
    "the same, compiled": lambda m: torch.compile(OwnCode(m.config), backend="eager"),
}


@pytest.mark.parametrize("how", HARMLESS)
def test_what_leaves_logits_as_they_are_is_not(how: str) -> None:
    assert_as_the_model(HARMLESS[how](make("llama", **SHALLOW)))


def test_mixed_precision_of_accelerate() -> None:
    """It wraps a model's forward in autocast, so that a call of the backbone would be in fp32."""
    operations = pytest.importorskip("accelerate.utils.operations")
    model = make("llama")
    cast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(operations.convert_outputs_to_fp32(cast), model)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    got, want = results(model, True), results(model, False)
    assert set(seen) == {torch.bfloat16}
    # a CPU without fast products of halves makes ours in fp32: logits round otherwise, to bf16's 2^-8 of their size
    torch.testing.assert_close(got["logprob"], want["logprob"], rtol=2**-8, atol=2**-6)
    torch.testing.assert_close(got["entropy"], want["entropy"], rtol=2**-8, atol=2**-6)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # off by the roundings of bf16
        assert (got[name] - want[name]).norm() < 0.02 * want[name].norm()
    assert not torch.is_autocast_enabled("cpu")


def test_a_function_that_is_called_forward_is_no_call_of_the_model() -> None:
    def forward(model: Any, batch: Tensor) -> Any:
        return ek.hf.causal_lm_logprob_entropy(model, batch)

    class Policy:
        def __call__(self, batch: Tensor) -> Any:
            return forward(model, batch)

    model = make("llama")
    model.register_forward_hook(lambda _, args, out: None)
    for call in (lambda: forward(model, ids()), lambda: Policy()(ids())):
        with pytest.raises(TypeError, match=r"got LlamaForCausalLM with the hook"):
            call()


def test_a_forward_that_is_compiled_may_call_us() -> None:
    model = make("llama", **SHALLOW)
    want = ek.hf.causal_lm_logprob_entropy(model, ids())
    model.__class__ = Scores
    torch.testing.assert_close(torch.compile(model, backend="eager")(ids()), want)


def twice(self: Any, hidden: Tensor) -> Tensor:
    return 2 * nn.functional.linear(hidden, self.weight, self.bias)


def test_a_forward_that_was_put_into_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr(nn.Linear, "forward", twice)
    assert isinstance(ek.hf.causal_lm_parts(model).weight, nn.Module)
    assert_as_the_model(model)


def test_a_call_that_was_put_into_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = make("llama"), nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda *args, **kwargs: call(*args, **kwargs))
    with pytest.raises(TypeError, match=r"in place of its call"):
        ek.hf.causal_lm_logprob_entropy(model, ids())


class Doubles(nn.Module):
    def forward(self, module: Any, args: Any, out: Any) -> Any:
        out.logits = out.logits * 2
        return out


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "hook",
    (
        Doubles(), Doubles().__call__, Doubles().forward, Doubles()._call_impl, functools.partial(Doubles().__call__),
        torch.compile(Doubles(), backend="eager"), torch.compile(Doubles(), backend="eager").__call__,
        torch.compile(Doubles().forward, backend="eager"), scripted, scripted.__call__,
    ),
    ids=(
        "module", "call", "forward", "call_impl", "partial", "compiled", "compiled call", "compiled forward",
        "scripted", "scripted call",
    ),
)  # fmt: skip
def test_a_hook_within_a_call_of_torchs(hook: Any) -> None:
    model = make("llama")
    model.register_forward_hook(hook)
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM with the hook"):
        ek.hf.causal_lm_logprob_entropy(model, ids())


class PassesOn(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_the_way_out_for_a_forward_of_a_class() -> None:
    model = make("llama")
    model.__class__ = PassesOn
    with pytest.raises(TypeError, match=r"in place of the forward of LlamaForCausalLM; .* take the model's parts") as e:
        ek.hf.causal_lm_logprob_entropy(model, ids())
    code = str(e.value).partition("parts yourself: ")[2].replace("softcap=...", "softcap=None")
    got = eval(code, {"ek": ek, "model": model, "input_ids": ids()})
    want = ek.logprob_entropy(model(ids()).logits, ek.hf.next_tokens(ids()))
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-5)


class Checkpointed(nn.Linear):
    reentrant = True

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, hidden, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_head_with_a_reentrant_checkpoint_names_the_cure() -> None:
    model = make("llama")
    model.lm_head.__class__ = Checkpointed
    with pytest.raises(
        RuntimeError, match=r"weight: expected a head .* reentrant checkpoint; give use_reentrant=False"
    ):
        results(model, True)
    model.lm_head.reentrant = False
    assert_as_the_model(model)


def test_modules_are_not_walked_over_for_a_look_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of many layers that cost milliseconds a call."""
    model, walk, seen = make("llama"), nn.Module.named_modules, []

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for found in walk(self, *args, **kwargs):
            seen.append(found)
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    ek.hf.causal_lm_parts(model)
    assert len(seen) < len([*walk(model)]) / 2
