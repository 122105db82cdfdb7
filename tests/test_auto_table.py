"""backend="auto": the table of measurements decides, hardware has to have verified, and doctor says why."""

from __future__ import annotations

import json
import math
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import doctor
from entropy_kernels.backends import auto_table, registry
from pretended import SOURCE, pretend_gpu, row, use_table, verified

pytestmark = pytest.mark.usefixtures("forgetful_registry")
needs_cpu = pytest.mark.skipif(
    ek.backends()["token_stats"]["cpu"] != "available", reason="the C++ kernels are not built"
)

GPU = torch.device("cuda", 0)


def chosen(op: str, tensor: torch.Tensor) -> str:
    """Backend whose kernel an "auto" call on ``tensor`` gets."""
    module = getattr(registry.kernel(op, registry.OPS[op][0], "auto", tensor), "__module__", "") or ""
    return "cpu" if module.endswith("native") else "torch"


@needs_cpu
def test_a_row_that_prefers_torch_makes_auto_pick_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 4, 64)
    assert chosen("token_stats", logits) == "cpu"
    use_table(monkeypatch, row("token_stats", "cpu", "fp32", "small", torch=1.0, cpu=2.0))
    assert chosen("token_stats", logits) == "torch"
    # of another dtype, or larger, it is another class
    assert chosen("token_stats", logits.bfloat16()) == "cpu"
    assert chosen("token_stats", torch.empty(1, 2, 1 << 18)) == "cpu"
    assert chosen("kl_cov_mask", logits) == "cpu"


@needs_cpu
def test_both_passes_run_on_what_the_table_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass asks by itself, also in a compiled graph, whose kernels are found when it runs."""
    from entropy_kernels.backends.eager import token_stats as eager

    calls = []
    for name in registry.OPS["token_stats"]:
        right = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, name=name, right=right: calls.append(name) or right(*a))

    def step(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sum(ek.logprob_entropy(logits, target)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    logits, target = torch.randn(4, 64, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    for function in (step, compiled):
        use_table(monkeypatch)
        function(logits, target).backward()
        assert calls == []
        use_table(monkeypatch, row("token_stats", "cpu", "fp32", "small", torch=1.0, cpu=2.0))
        function(logits, target).backward()
        assert calls == list(registry.OPS["token_stats"])
        calls.clear()


def test_an_unverified_gpu_backend_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    named = row("token_stats", "sm_90", "bf16", "large", cuda=1.0, torch=9.0)
    use_table(monkeypatch, named)
    assert registry.resolve("token_stats", "auto", GPU, "bf16", "large") == "torch"
    assert registry.resolve("token_stats", "auto", GPU) == "torch"
    assert registry.resolve("token_stats", "cuda", GPU) == "cuda"
    reason = registry.unverified("token_stats", "cuda", GPU)
    assert reason == "no hardware run has verified it on sm_90 yet; backend='cuda' runs it all the same"
    assert registry.unverified("token_stats", "torch", GPU) is None
    # verified, but of another op, as another backend, or on another GPU
    for other in (
        verified("kl_cov_mask", "cuda", "sm_90"),
        verified("token_stats", "triton", "sm_90"),
        verified("token_stats", "cuda", "sm_80"),
    ):
        use_table(monkeypatch, named, other)
        assert registry.resolve("token_stats", "auto", GPU, "bf16", "large") != "cuda"


def test_a_verified_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    pair = verified("token_stats", "cuda", "sm_90")
    use_table(monkeypatch, pair)
    assert registry.resolve("token_stats", "auto", GPU, "bf16", "large") == "cuda"
    assert registry.resolve("token_stats", "auto", GPU) == "cuda"
    assert registry.resolve("kl_cov_mask", "auto", GPU) == "torch"
    # a measurement in which torch was the best is obeyed, in its class only
    use_table(monkeypatch, pair, row("token_stats", "sm_90", "fp32", "small", torch=1.0, cuda=1.5))
    assert registry.resolve("token_stats", "auto", GPU, "fp32", "small") == "torch"
    assert registry.resolve("token_stats", "auto", GPU, "fp32", "large") == "cuda"


def test_the_next_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(registry, "unavailable", lambda op, backend, device: "broken" if backend == "cuda" else None)
    pairs = [verified("token_stats", backend, "sm_90") for backend in ("cuda", "triton")]
    use_table(monkeypatch, row("token_stats", "sm_90", "bf16", "large", cuda=1.0, triton=1.1, torch=9.0), *pairs)
    assert registry.resolve("token_stats", "auto", GPU, "bf16", "large") == "triton"
    assert registry.resolve("token_stats", "auto", GPU, "fp16", "large") == "triton"
    wrong = auto_table.Row(
        "token_stats", "sm_90", "bf16", "large", ("torch",), {"torch": 1.0}, 1, (SOURCE,), {"triton": "wrong: 2 ≠ 3"}
    )
    use_table(monkeypatch, wrong, *pairs)
    assert registry.preference("token_stats", GPU, "bf16", "large") == ("torch",)
    assert registry.preference("token_stats", torch.device("cpu")) == ("cpu", "torch")
    assert registry.resolve("token_stats", "auto", torch.device("xpu"), "bf16", "large") == "torch"


def test_two_gpus_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that holds the tensor decides, whichever was asked about first and whichever is the current one."""
    pretend_gpu(monkeypatch, (9, 0), (8, 0), (7, 5))
    hopper, ampere, turing = (torch.device("cuda", index) for index in range(3))
    use_table(
        monkeypatch,
        *(verified("token_stats", "cuda", name) for name in ("sm_90", "sm_80")),
        row("token_stats", "sm_80", "bf16", "large", torch=1.0, cuda=1.5),
    )
    for _ in range(2):  # the second time from memory
        assert registry.resolve("token_stats", "auto", hopper, "bf16", "large") == "cuda"
        assert registry.resolve("token_stats", "auto", ampere, "bf16", "large") == "torch"
        assert registry.resolve("token_stats", "cuda", ampere) == "cuda"
        assert registry.resolve("token_stats", "auto", turing) == "torch"
        with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0 or higher, this GPU is sm_75"):
            registry.resolve("token_stats", "cuda", turing)
    reason = registry.unverified("token_stats", "triton", ampere)
    assert reason is not None and "on sm_80 yet" in reason

    # a call: the kernel of the tensor's device
    tensors = [SimpleNamespace(device=d, dtype=torch.bfloat16, numel=lambda: 1 << 28, element_size=lambda: 2)
               for d in (hopper, ampere)]  # fmt: skip
    modules = [registry.kernel("token_stats", "token_stats_forward", "auto", t).__module__ for t in tensors]
    assert [name.rpartition(".")[2] for name in modules] == ["native", "token_stats"]

    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    choices = {c.device: c.backend for c in doctor.auto_choices() if (c.op, c.dtype, c.size) ==
               ("token_stats", "bf16", "large")}  # fmt: skip
    assert choices == {"cuda:0": "cuda", "cuda:1": "torch", "cuda:2": "torch"}


def test_the_architecture_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device.index)
        return SimpleNamespace(major=9 - device.index, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert [registry.architecture(torch.device("cuda", i)) for i in (0, 1, 0, 1)] == ["sm_90", "sm_80"] * 2
    assert asked == [0, 1]


def test_size_classes() -> None:
    def of(op: str, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        return auto_table.size_class(op, math.prod(shape), dtype.itemsize)

    assert of("token_stats", 1, 4, 64) == of("token_stats", 0, 64) == "small"
    assert of("token_stats", 1, 2, 1 << 17) == "small" and of("token_stats", 1, 2, (1 << 17) + 1) == "medium"
    # the same numbers in half the bytes
    assert of("token_stats", 128, 151_936) == "large"
    assert of("token_stats", 128, 151_936, dtype=torch.bfloat16) == "medium"
    assert of("linear_token_stats", 128, 151_936, dtype=torch.bfloat16) == "medium"
    for op in set(registry.OPS) - {"token_stats", "linear_token_stats"}:
        assert [of(op, n) for n in (1, 4096, 4097, 1 << 19, (1 << 19) + 1)] == [
            "small", "small", "medium", "medium", "large",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "JSONDecodeError"),
        (lambda text: "[]", "expected an object of format 1"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "expected an object of format 1"),
        (lambda text: text.replace('"rows"', '"lines"'), "no field 'rows'"),
        (lambda text: text.replace('"op"', '"operator"'), "operator"),
        (lambda text: text.replace('"cpu",\n    "torch"', '"cpu",\n    "cuda"'), "expected an order of"),
        (lambda text: text.replace('"torch": ', '"torch": -'), "expected a time > 0"),
        (lambda text: text.replace('"small"', '"tiny"'), "expected a size of"),
        (lambda text: text.replace('"large"', '"small"'), "two for the same"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_damaged_table_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str
) -> None:
    path = tmp_path / "auto_table.json"
    if damage is not None:
        text = auto_table.FILE.read_text()
        path.write_text(damage(text))
        assert path.read_text() != text
    monkeypatch.setattr(auto_table, "FILE", path)
    with pytest.raises(RuntimeError, match=message) as caught:
        ek.logprob_entropy(torch.randn(2, 8), torch.zeros(2, dtype=torch.int64))
    assert str(path) in str(caught.value) and "reinstall" in str(caught.value)
    # a backend that is named needs no table
    ek.logprob_entropy(torch.randn(2, 8), torch.zeros(2, dtype=torch.int64), backend="torch")


def test_the_choice_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is looked at once per class; after that a choice is one look-up, a fraction of a call's time."""
    reads = []
    table = auto_table.load()
    monkeypatch.setattr(auto_table, "load", lambda: reads.append(1) or table)
    logits = torch.randn(1, 4, 64)

    def once() -> None:
        registry.kernel("token_stats", "token_stats_forward", "auto", logits)

    once()
    before = len(reads)
    # 1.6 µs on a core here; six times that leaves room for a busy machine and catches a look-up without a memory
    assert min(timeit.repeat(once, number=2000, repeat=5)) / 2000 < 10e-6
    assert len(reads) == before


def test_doctor_explains_a_measured_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    monkeypatch.setattr(doctor, "hardware", lambda: [("GPU 0", "pretended")])
    use_table(
        monkeypatch,
        row("token_stats", "sm_90", "bf16", "medium", cuda=1.0, torch=7.5),
        row("token_stats", "sm_90", "bf16", "large", cuda=1.0, torch=12.0),
        verified("token_stats", "cuda", "sm_90"),
    )
    assert doctor.run(check=False, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "sm_90"
    by_class = {(c["op"], c["dtype"], c["size"]): c for c in report["auto"]}
    assert len(by_class) == len(report["auto"]) == (2 * 3 + len(registry.OPS) - 2) * len(auto_table.SIZES)
    large, small = by_class["token_stats", "bf16", "large"], by_class["token_stats", "bf16", "small"]
    assert (large["backend"], large["times"]) == ("cuda", {"cuda": 1.0, "torch": 12.0})
    assert large["sources"][0]["file"] == SOURCE.file and SOURCE.machine in large["reason"]
    assert small["backend"] == "cuda" and not small["sources"] and "not measured" in small["reason"]
    masks = by_class["kl_cov_mask", "fp32", "large"]
    assert masks["backend"] == "torch" and "no CUDA kernel kl_cov_mask yet" in masks["skipped"]["cuda"]

    assert doctor.run(check=False) == 0
    out = " ".join(capsys.readouterr().out.split())
    # both measured classes in one row, with the range of their ratios
    assert "bf16: medium, large" in out and "torch takes 7.5–12 times as long as cuda" in out
    assert "up to 64 MiB" in out


def test_doctor_names_what_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(doctor, "device_types", lambda: ["cuda"])
    use_table(monkeypatch, row("token_stats", "sm_90", "bf16", "large", cuda=1.0, torch=12.0))
    (choice,) = (c for c in doctor.auto_choices() if (c.op, c.dtype, c.size) == ("token_stats", "bf16", "large"))
    assert choice.backend == "torch" and "best that may run of those measured" in choice.reason
    assert "not cuda: no hardware run has verified it on sm_90 yet" in choice.reason
