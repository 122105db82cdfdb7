"""Errors of the statistics functions: each names the argument, what was expected and what came (CONTRIBUTING.md)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import entropy_kernels as ek
from conftest import BackendDevice

N, V = 4, 11


def call(**changes: Any) -> Any:
    arguments = {"logits": torch.randn(N, V), "target": torch.arange(N)} | changes
    logits, target = arguments.pop("logits"), arguments.pop("target")
    return ek.token_stats(logits, target, **arguments)


# name -> (what is passed, exception, argument that must be named, what must be said of what came)
ERRORS: dict[str, tuple[dict[str, Any], tuple[type[Exception], ...], str, str]] = {
    "logits a list": ({"logits": [[1.0]]}, (TypeError,), "logits", "list"),
    "logits of integers": ({"logits": torch.ones(N, V, dtype=torch.int64)}, (TypeError,), "logits", "int64"),
    "logits complex": ({"logits": torch.ones(N, V, dtype=torch.complex64)}, (TypeError,), "logits", "complex64"),
    "logits fp8": ({"logits": torch.ones(N, V).to(torch.float8_e4m3fn)}, (TypeError,), "logits", "float8"),
    "logits 0-d": ({"logits": torch.tensor(1.0), "target": torch.tensor(0)}, (ValueError,), "logits|target", r"\(\)"),
    "target a list": ({"target": [0, 1, 2, 3]}, (TypeError,), "target", "list"),
    "target float": ({"target": torch.zeros(N)}, (TypeError,), "target", "float32"),
    "target bool": ({"target": torch.zeros(N, dtype=torch.bool)}, (TypeError,), "target", "bool"),
    "target int16": ({"target": torch.zeros(N, dtype=torch.int16)}, (TypeError,), "target", "int16"),
    "target too short": ({"target": torch.arange(N - 1)}, (ValueError,), "target", r"\(3,\)"),
    "target (N, 1)": ({"target": torch.arange(N)[:, None]}, (ValueError,), "target", r"\(4, 1\)"),
    "target (N, V)": ({"target": torch.zeros(N, V, dtype=torch.long)}, (ValueError,), "target", r"\(4, 11\)"),
    "target 0-d for a batch": ({"target": torch.tensor(1)}, (ValueError,), "target", r"\(\)"),
    "target on meta": ({"target": torch.zeros(N, dtype=torch.long, device="meta")}, (ValueError,), "target", "meta"),
    "label V": ({"target": torch.tensor([0, V, 1, 2])}, (IndexError, ValueError), "target", "11"),
    "label -1": ({"target": torch.tensor([0, -1, 1, 2])}, (IndexError, ValueError), "target", "-1"),
    "label -100 with another ignore_index": (
        {"target": torch.tensor([0, -100, 1, 2]), "ignore_index": -1},
        (IndexError, ValueError),
        "target",
        "-100",
    ),
    "label huge": ({"target": torch.tensor([0, 2**40, 1, 2])}, (IndexError, ValueError), "target", str(2**40)),
    "label int32 minimum": (
        {"target": torch.tensor([0, -(2**31), 1, 2], dtype=torch.int32)},
        (IndexError, ValueError),
        "target",
        str(-(2**31)),
    ),
    "label in the padding": (
        {"target": torch.tensor([0, 7, 1, 2]), "vocab_size": 7},
        (IndexError, ValueError),
        "target",
        "7",
    ),
    "no vocabulary": ({"logits": torch.empty(N, 0)}, (ValueError,), "logits", "0"),
    "temperature 0": ({"temperature": 0.0}, (ValueError,), "temperature", "0"),
    "temperature int 0": ({"temperature": 0}, (ValueError,), "temperature", "0"),
    "temperature negative": ({"temperature": -1.0}, (ValueError,), "temperature", "-1"),
    "temperature NaN": ({"temperature": float("nan")}, (ValueError,), "temperature", "nan"),
    "temperature tensor with 0": (
        {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])},
        (ValueError,),
        "temperature",
        "0",
    ),
    "temperature tensor with NaN": (
        {"temperature": torch.tensor([1.0, float("nan"), 1.0, 1.0])},
        (ValueError,),
        "temperature",
        "nan",
    ),
    "temperature requires grad": (
        {"temperature": torch.ones((), requires_grad=True)},
        (ValueError, TypeError),
        "temperature",
        "grad",
    ),
    "temperature of a wrong shape": ({"temperature": torch.ones(3)}, (ValueError,), "temperature", r"\(3,\)"),
    "temperature of more dimensions": ({"temperature": torch.ones(2, N)}, (ValueError,), "temperature", r"\(2, 4\)"),
    "temperature per column": ({"temperature": torch.ones(N, 1)}, (ValueError,), "temperature", r"\(4, 1\)"),
    "temperature a string": ({"temperature": "1"}, (TypeError,), "temperature", "str"),
    "temperature None": ({"temperature": None}, (TypeError,), "temperature", "None"),
    "temperature bool": ({"temperature": True}, (TypeError,), "temperature", "bool"),
    "temperature bool tensor": ({"temperature": torch.tensor(True)}, (TypeError,), "temperature", "bool"),
    "temperature complex tensor": ({"temperature": torch.tensor(1j)}, (TypeError,), "temperature", "complex"),
    "softcap 0": ({"softcap": 0.0}, (ValueError,), "softcap", "0"),
    "softcap negative": ({"softcap": -30.0}, (ValueError,), "softcap", "-30"),
    "softcap NaN": ({"softcap": float("nan")}, (ValueError,), "softcap", "nan"),
    "softcap inf": ({"softcap": float("inf")}, (ValueError,), "softcap", "inf"),
    "softcap a string": ({"softcap": "30"}, (TypeError,), "softcap", "str"),
    "softcap a tensor": ({"softcap": torch.tensor(30.0)}, (TypeError,), "softcap", "Tensor"),
    "ignore_index None": ({"ignore_index": None}, (TypeError,), "ignore_index", "None"),
    "ignore_index float": ({"ignore_index": 1.5}, (TypeError,), "ignore_index", "float"),
    "vocab_size 0": ({"vocab_size": 0}, (ValueError,), "vocab_size", "0"),
    "vocab_size beyond the columns": ({"vocab_size": V + 1}, (ValueError,), "vocab_size", "12"),
    "vocab_size float": ({"vocab_size": 5.0}, (TypeError,), "vocab_size", "float"),
    "vocab_start without a group": ({"vocab_start": 3}, (ValueError,), "vocab_start|vocab_group", "3"),
    "vocab_group a number": ({"vocab_group": 2}, (TypeError,), "vocab_group", "int"),
    "backend unknown": ({"backend": "numpy"}, (ValueError,), "backend", "numpy"),
    "backend of another device": ({"backend": "cuda"}, (ValueError, RuntimeError), "backend", "cuda"),
    "backend None": ({"backend": None}, (TypeError, ValueError), "backend", "None"),
    "inplace_backward a string": ({"inplace_backward": "yes"}, (TypeError,), "inplace_backward", "str"),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ERRORS)
def test_error_names_argument_expected_and_got(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, exceptions, argument, got = ERRORS[name]
    if device == "cuda":
        if not torch.cuda.is_available() or name == "backend of another device":
            pytest.skip("no GPU, or no error on one")
        monkeypatch.setenv("ENTROPY_KERNELS_DEBUG", "1")  # values are not looked at otherwise
        changes = {"logits": torch.randn(N, V), "target": torch.arange(N)} | changes
        on_cpu = {k: v for k, v in changes.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        changes = changes | {k: v.to(device) for k, v in on_cpu.items()}
    with pytest.raises(exceptions) as caught:
        call(**changes)
    message = str(caught.value)
    assert re.search(argument, message), message
    assert "expected" in message, message
    assert re.search(rf"got.*{got}|{got}", message, re.DOTALL), message
    assert "got" in message or "cannot run" in message, message


def test_both_functions_share_the_validator() -> None:
    for changes, exceptions, argument, _ in ERRORS.values():
        arguments = {"logits": torch.randn(N, V), "target": torch.arange(N)} | changes
        with pytest.raises(exceptions, match=argument):
            ek.logprob_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        ek.logprob_entropy(torch.randn(N, V), torch.arange(N), 0.7)  # type: ignore[misc]


@pytest.mark.parametrize("temperature", (0.0, -1.0, float("nan")))
def test_temperature_is_checked_on_every_backend(temperature: float, on: BackendDevice) -> None:
    """An error on the CPU; NaN, without a sync, on a GPU."""
    logits, target = torch.randn(N, V, device=on.device), torch.arange(N, device=on.device)
    values = torch.tensor([1.0, temperature, 1.0, 1.0], device=on.device)
    if on.device == "cpu":
        with pytest.raises(ValueError, match="temperature"):
            ek.token_stats(logits, target, temperature=values, backend=on.backend)
        return
    for output in ek.token_stats(logits, target, temperature=values, backend=on.backend):
        assert output.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("label", (V, -1, 2**31 - 1, -(2**31)))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_labels_are_checked_on_every_backend(label: int, dtype: torch.dtype, on: BackendDevice) -> None:
    """An error on the CPU; NaN, without a sync, on a GPU."""
    logits = torch.randn(N, V, device=on.device)
    target = torch.tensor([0, label, 1, -100], dtype=dtype, device=on.device)
    if on.device == "cpu":
        with pytest.raises((IndexError, ValueError), match=str(label)):
            ek.token_stats(logits, target, backend=on.backend)
        return
    for output in ek.token_stats(logits, target, backend=on.backend):
        assert output.isnan().tolist() == [False, True, False, False]


def test_kernels_give_nan_where_the_cpu_checks_raise(on: BackendDevice) -> None:
    """What a GPU returns in place of an error, from the kernels themselves, forward and backward, beside good rows."""
    from entropy_kernels._rows import RowOptions
    from entropy_kernels.backends import registry

    logits = torch.randn(1, 6, V, device=on.device)
    forward: Callable = registry.kernel("token_stats", "token_stats_forward", on.backend, logits)
    target = torch.tensor([0, V, -1, 2, 3, -100], device=on.device)
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.0, float("nan"), 1.0], device=on.device)
    stats, _ = forward(logits, target, temperature, RowOptions(0.0, -100, 0, V), 15)
    for output in stats:
        assert output.isnan().tolist() == [False, True, True, True, True, False]
        assert output[5] == 0


def test_two_wrong_labels_are_counted() -> None:
    with pytest.raises((IndexError, ValueError), match=r"11.*2 "):
        call(target=torch.tensor([0, V, V + 5, 1]))


def test_import_without_the_extension_names_the_reason() -> None:
    """A backend that is not there is an error that says why, and auto goes on without it."""
    for backend, state in ek.backends()["token_stats"].items():
        if state == "available":
            continue
        with pytest.raises((RuntimeError, ValueError), match="backend"):
            call(backend=backend)
    call(backend="auto")


@pytest.mark.slow
def test_ignored_rows_are_not_read(on: BackendDevice) -> None:
    """The ignored row lies on a page that may not be read; reading it kills the process."""
    if on.device != "cpu":
        pytest.skip("needs memory protection of the CPU")
    if on.backend == "torch":
        pytest.skip("plain torch reads whole chunks of rows and drops the ignored ones")
    code = f"""
import ctypes, mmap, torch
import entropy_kernels as ek
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
flat = torch.frombuffer(memory, dtype=torch.float32)
flat.copy_(torch.randn(flat.numel()))
logits = flat.view(3, page // 4)
address = logits.data_ptr()
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
target = torch.tensor([1, -100, 2])
logits.requires_grad_()
out = ek.token_stats(logits, target, backend={on.backend!r})
(out.logprob + out.entropy + out.collision).sum().backward()
assert logits.grad[[0, 2]].isfinite().all() and not logits.grad[1].any()
print("alive", out.logprob.tolist())
import os, sys
sys.stdout.flush(); os._exit(0)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0 and "alive" in result.stdout, (result.returncode, result.stderr[-2000:])


@pytest.mark.parametrize("value", [float("inf"), 1e39, 8e37, float("nan"), 0.0, -1.0, 1e-39])
def test_temperature_is_positive_and_its_inverse_is_a_normal_number(value):
    logits, target = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"temperature: expected a number > 0 within .*, got"):
        ek.logprob_entropy(logits, target, temperature=value)
    with pytest.raises(ValueError, match=r"temperature: expected numbers > 0 within .*, got"):
        ek.logprob_entropy(logits, target, temperature=torch.tensor([1.0, value]))


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e30, 1.3e36])
def test_extreme_temperatures(on, temperature):
    """As cold as it gets, the argmax is certain; as hot as it gets, the distribution is uniform."""
    logits, target = torch.tensor([[1.0, 2.0, 3.0]], device=on.device), torch.tensor([2], device=on.device)
    out = ek.token_stats(logits, target, temperature=temperature, backend=on.backend)
    uniform = temperature > 1
    assert out.entropy.item() == pytest.approx(np.log(3) if uniform else 0.0, abs=1e-6)
    assert out.logprob.item() == pytest.approx(-np.log(3) if uniform else 0.0, abs=1e-6)
    assert out.collision.item() == pytest.approx(1 / 3 if uniform else 1.0, abs=1e-6)


def test_forward_mode_is_refused(on):
    logits, target = torch.randn(2, 5, device=on.device), torch.tensor([0, 1], device=on.device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        ek.logprob_entropy(forward_ad.make_dual(logits, logits), target, backend=on.backend)


def test_functional_derivatives_are_refused(on):
    logits, target = torch.randn(2, 5, device=on.device), torch.tensor([0, 1], device=on.device)

    def entropy(logits, factor):
        return factor * ek.logprob_entropy(logits, target, backend=on.backend).entropy.sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"logprob_entropy / token_stats: torch\.func's derivatives"):
            transform(entropy)(logits, 2.0)
    # of another argument it is nothing to us
    factor = torch.tensor(2.0, device=on.device)
    by_factor = torch.func.grad(entropy, argnums=1)(logits, factor)
    torch.testing.assert_close(by_factor, entropy(logits, 1.0))


def test_numbers_of_numpy_are_numbers():
    logits, target = torch.randn(2, 5), torch.tensor([0, 1])
    plain = ek.logprob_entropy(logits, target, temperature=0.5, softcap=3.0, ignore_index=1, vocab_size=4)
    numpy = ek.logprob_entropy(
        logits,
        target,
        temperature=np.float32(0.5),
        softcap=np.float64(3.0),
        ignore_index=np.int64(1),
        vocab_size=np.int32(4),
    )
    assert torch.equal(plain.logprob, numpy.logprob) and torch.equal(plain.entropy, numpy.entropy)


@pytest.mark.parametrize("name", ["temperature", "softcap", "ignore_index", "vocab_size"])
@pytest.mark.parametrize("value", [True, "1", np.bool_(True)])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"{name}: expected an? (number|int)"):
        ek.logprob_entropy(torch.randn(2, 5), torch.tensor([0, 1]), **{name: value})


@pytest.mark.parametrize("value", [1e39, 1e32, 1e-39, 1e-46, 10**400, np.float32(1e-40), np.float64(1e300)])
def test_softcap_and_its_inverse_are_numbers_of_the_kernels(value):
    logits, hidden, target = torch.randn(2, 5), torch.randn(2, 3), torch.tensor([0, 1])
    for call in (
        lambda **options: ek.logprob_entropy(logits, target, **options),
        lambda **options: ek.token_stats(logits.bfloat16(), target, **options),
        lambda **options: ek.linear_logprob_entropy(hidden, torch.randn(5, 3), target, **options),
        lambda **options: ek.linear_logprob_entropy(hidden, torch.nn.Linear(3, 5), target, **options),
    ):
        with pytest.raises(ValueError, match=r"softcap: expected a (finite )?number .*, got"):
            call(softcap=value)
    for wide in (1e39, 1e-46):
        assert ek.logprob_entropy(logits.double(), target, softcap=wide).logprob.isfinite().all()


def test_extreme_softcaps(on):
    """As wide as it gets there is none, as narrow as it gets the distribution is uniform."""
    logits, target = torch.tensor([[1e-3, 2.0, 3.0]], device=on.device), torch.tensor([2], device=on.device)
    wide, narrow = (ek.token_stats(logits, target, softcap=s, backend=on.backend) for s in (1e31, 1.2e-38))
    for out, expected in zip(wide, ek.token_stats(logits, target, backend=on.backend), strict=True):
        torch.testing.assert_close(out, expected)
    assert narrow.logprob.item() == pytest.approx(-np.log(3))


@pytest.mark.parametrize("name", ["ignore_index", "vocab_size", "memory_budget"])
@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 10**5000], ids=["2**63", "-2**63 - 1", "10**5000"])
def test_integers_beyond_int64(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected an int of at most 64 bits"):
        ek.linear_logprob_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), **{name: value})
    if name != "memory_budget":
        with pytest.raises(ValueError, match=rf"{name}: expected an int of at most 64 bits"):
            ek.token_stats(torch.randn(2, 5), torch.tensor([0, 1]), **{name: value})


def test_temperature_of_an_ignored_token_does_not_matter(on):
    logits, target = torch.randn(3, 5, device=on.device), torch.tensor([0, -100, 1], device=on.device)
    temperature = torch.tensor([1.0, 0.0, 1.0], device=on.device)
    result = ek.logprob_entropy(logits, target, temperature=temperature, backend=on.backend)
    expected = ek.logprob_entropy(logits, target, backend=on.backend)
    assert torch.equal(result.logprob, expected.logprob) and torch.equal(result.entropy, expected.entropy)
