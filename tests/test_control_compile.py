"""Control in one compiled graph, without a compilation for a new number and without a value read back; on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import entropy_kernels as ek
from calls import same_bits
from conftest import BackendDevice, gpu_backend_devices, needs_fake_gpu
from control_cases import Micro, micro, one
from entropy_kernels import _arguments, _selection_request, _sequences
from entropy_kernels.backends import radix_select
from stub_gpu import HERE, run_on_fake_gpu
from test_control_ranks import CASES
from test_losses_scope import NoHostSync

pytestmark = pytest.mark.filterwarnings("ignore:entropy. expected a tensor that requires grad")
SEEDED = {name: {"seed": torch.tensor(5)} for name, row in ek.methods().items() if row.draws}
# method -> (options that may be numbers, two values of each)
NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "clip_cov": {"ratio": (0.1, 0.2), "low": (0.05, 0.3), "high": (3.0, 0.9), "clip_low": (0.1, 0.3)},
    "kl_cov": {"ratio": (0.1, 0.3), "kl_coef": (0.5, 0.7)},
    "exact_cov": {"share": (0.1, 0.9), "ratio": (0.1, 0.3), "clip_high": (0.1, 0.3), "dual_clip": (3.0, 1.1)},
    "random": {"ratio": (0.1, 0.3)},
    "clip_b": {"mu": (0.5, 1.0)},
    "clip_v": {"mu": (0.5, 1.0), "ratio": (0.01, 0.1)},
    "steer": {"w_min": (0.5, 0.8), "w_max": (1.2, 1.0)},
    "top_entropy": {"rho": (0.2, 0.7)},
    "erc": {"low": (0.9, 0.5), "high": (1.1, 1.6)},
    "entropy_advantage": {"alpha": (0.4, 0.1), "kappa": (2.0, 5.0)},
    "repo": {"zeta": (0.2, -0.3), "floor": (-20.0, -2.0)},
    "adaptive_entropy": {"target": (9.0, 8.0), "coef": (0.1, 0.2)},
    "entrocraft": {"low": (0.2, 0.9), "high": (0.3, 0.95), "step": (0.1, 0.2), "total_steps": (8.0, 9.0)},
}


def told(decided: ek.Control) -> list[Tensor]:
    fields = decided._replace(penalty_coef=None, metrics={})  # a number, which compiled code has as a tensor
    found = [x for x in fields if isinstance(x, Tensor)]
    return [*found, *decided.metrics.values()]


def call(method: str, given: Micro, options: dict[str, Any]) -> list[Tensor]:
    return told(ek.control(method, one(given), **SEEDED.get(method, {}), **options))


def tensors(given: Micro) -> Micro:
    return {name: x.nan_to_num(-0.4) if x.is_floating_point() else x for name, x in given.items()}


def steps_of(method: str) -> list[dict[str, float]]:
    return [{name: a + (b - a) * i / 2 for name, (a, b) in NUMBERS[method].items()} for i in range(3)]


@pytest.mark.parametrize("method", NUMBERS)
def test_one_graph_for_all_numbers(method: str) -> None:
    """Of 0-d tensors; the control is that of eager code. "eager": it is dynamo that compiles anew; aot_eager below."""
    given = tensors(micro(4, 30, 3))
    right = [call(method, given, options) for options in steps_of(method)]
    assert any(not torch.equal(a, b) for a, b in zip(right[0], right[2], strict=True))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for options, expected in zip(steps_of(method), right, strict=True):
        numbers = {name: torch.tensor(x, dtype=torch.float64) for name, x in options.items()}
        torch.testing.assert_close(compiled(method, given, numbers), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ("clip_cov", "steer"))
def test_no_graph_for_a_new_float(method: str) -> None:
    """Of which the first are taken for constants."""
    given = tensors(micro(4, 30, 3))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for options in steps_of(method):
        torch.testing.assert_close(compiled(method, given, options), call(method, given, options))
    assert counter.frame_count == 2


def test_the_table_of_numbers_is_whole() -> None:
    assert {*NUMBERS} == {*ek.methods()}


@pytest.mark.parametrize("name", ("kl_cov", "exact_cov, weight", "repo", "adaptive_entropy"))
def test_in_one_graph_with_the_loss(name: str) -> None:
    """Of each effect that other losses do not have."""
    method, options = CASES[name]
    torch._dynamo.reset()

    def step(logprob: Tensor, given: Micro, seed: Tensor) -> list[Tensor]:
        own = {**options, **({"seed": seed} if "seed" in options else {})}
        decided = ek.control(method, one({**given, "logprob": logprob.detach()}), **own)
        tokens = given["old_logprob"], given["advantages"], given["mask"]
        out = ek.policy_loss(logprob, *tokens, entropy=given["entropy"], control=decided)
        return [out.loss, *out.metrics.values(), *told(decided)]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    given = tensors(micro(4, 30, 5))
    logprob = given.pop("logprob")
    results = []
    for function in (step, compiled):
        x = logprob.clone().requires_grad_()
        found = function(x, given, torch.tensor(3))
        results.append([*(y.detach() for y in found), *torch.autograd.grad(found[0], x)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [("adaptive_entropy", {"target": 9.0}), ("repo", {"target": "initial"}), ("random", {"k": 9})],
)
def test_a_controller_in_a_graph(method: str, options: dict[str, Any]) -> None:
    """Its memory, and a counter of seeds, go on from call to call."""
    torch._dynamo.reset()
    given = tensors(micro(4, 30, 5))
    eager, traced = (ek.Controller(method, **options) for _ in range(2))

    def step(given: Micro) -> list[Tensor]:
        return told(traced.step(one(given)))

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(given), told(eager.step(one(given))))
    assert traced.state_dict() == eager.state_dict()
    assert counter.frame_count <= 2  # without and with a memory


def test_inductor(inductor: Callable) -> None:
    """The real compiler: masks are the same, values to rounding."""
    given = tensors(micro(4, 30, 6))

    def both(given: Micro) -> list[Tensor]:
        return call("clip_b", given, {"mu": 0.5}) + call("repo", given, {"zeta": 0.3})

    torch.testing.assert_close(inductor(both)(given), both(given))


# ---- nothing is read back ------------------------------------------------------------------------------------------


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (_arguments, _sequences, radix_select, _selection_request):
        if hasattr(module, "values_are_checked"):
            monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)
    with NoHostSync():
        yield


FAKE = """
import torch
import entropy_kernels as ek
from control_cases import micro, one
from test_control_ranks import CASES

torch.manual_seed(0)
here = micro(4, 30, 5)
here["coefficient"], here["temperature"] = torch.rand(4), torch.rand(4, 1) + 0.5
there = {name: x.cuda() for name, x in here.items()}
number = {name: torch.tensor(0.3, device="cuda") for name in ("mu", "zeta", "rho", "weight", "coef", "low_end")}


def decide(given, on):
    found = {}
    for name, (method, options) in CASES.items():
        known = ek.methods()[method].options
        more = {key: x if on == "cuda" else x.cpu() for key, x in number.items() if key in known and key not in options}
        controller = ek.Controller(method, **{k: x for k, x in {**options, **more}.items() if k != "seed"})
        decided = [ek.control(method, one(given), **options, **more), controller.step(one(given)),
                   controller.step(one(given))]
        told = [x for each in decided for x in (*each[:-1], *each.metrics.values())]
        found[name] = [x for x in told if isinstance(x, torch.Tensor)]
        found[name] += [*controller.memory.values()]
        tokens = [given[key] for key in ("logprob", "old_logprob", "advantages", "mask")]
        x = tokens[0].detach().requires_grad_()
        out = ek.policy_loss(x, *tokens[1:], entropy=given["entropy"], control=decided[0])
        found[name] += [out.loss.detach(), *torch.autograd.grad(out.loss, x)]
    return found


torch.cuda.set_sync_debug_mode("error")
found = decide(there, "cuda")
torch.cuda.set_sync_debug_mode("default")
for name, right in decide(here, "cpu").items():
    for a, b in zip(found[name], right, strict=True):
        assert a.is_cuda, name
        torch.testing.assert_close(a.cpu(), b, msg=name)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    decide(there, "cuda")
print("no sync")
"""


@needs_fake_gpu
def test_no_sync_on_the_fake_gpu() -> None:
    done = run_on_fake_gpu("-c", FAKE, paths=(HERE.parent, HERE))
    assert done.returncode == 0 and done.stdout.endswith("no sync\n"), done.stderr[-3000:]


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_read_back_by_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, options = CASES[name]
    given = micro(4, 30, 5)
    with as_on_a_gpu(monkeypatch):
        ek.control(method, one(given), backend="torch", **options)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

SELECTION = ("token_covariance", "clip_cov_mask", "kl_cov_mask")


@pytest.mark.parametrize("on", gpu_backend_devices(*SELECTION))
@pytest.mark.parametrize("rows", (4, 3000))
def test_masks_are_those_of_the_cpu(on: BackendDevice, rows: int) -> None:
    """Bit-equal masks, means and counts; values, which exp and log round differently, to 1e-6."""
    here = micro(rows, 60, rows, dtype=torch.float32)
    there = {name: x.to(on.device) for name, x in here.items()}
    for name, (method, options) in CASES.items():
        ours = ek.control(method, one(there), backend=on.backend, **options)
        right = ek.control(method, one(here), **options)
        for field, expected in right._asdict().items():
            if not isinstance(expected, Tensor):
                continue
            got = getattr(ours, field).cpu()
            if expected.dtype == torch.bool:
                assert torch.equal(got, expected), (name, field)
            else:
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, msg=name)
        for metric, expected in right.metrics.items():
            torch.testing.assert_close(ours.metrics[metric].cpu(), expected, rtol=1e-9, atol=1e-12, msg=name)
    values = here["entropy"].double()
    for std in (False, True):
        pair = [ek.token_moments(x, m, std=std) for x, m in ((values, here["mask"]), (there["entropy"], there["mask"]))]
        assert all(same_bits(a, b.cpu()) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("on", gpu_backend_devices(*SELECTION))
def test_no_sync(on: BackendDevice) -> None:
    given = {name: x.to(on.device) for name, x in micro(40, 60, 5).items()}

    def decide() -> None:
        for method, options in CASES.values():
            ek.control(method, one(given), backend=on.backend, **options)
            ek.Controller(method, backend=on.backend, **{k: x for k, x in options.items() if k != "seed"}).step(
                one(given)
            )

    decide()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decide()
    finally:
        torch.cuda.set_sync_debug_mode("default")
