"""Fixtures of the whole suite: where a test runs, poisoned memory, fixed seeds."""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is decorated, so it has to be set before anything imports triton. Without a GPU its
# interpreter runs the kernels on CPU tensors; tests that compile ahead of time do so in a subprocess without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Where this forces an instruction set, torch's inductor (2.13) would run what it has compiled for another one.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = f"inductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), cache))
# No pool of compilers: the suite has a process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# cuBLAS reads this when it starts; without it the deterministic mode of poisoned_memory warns at every product
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import entropy_kernels as ek
import loss_cases
import stub_gpu
from entropy_kernels.backends import registry

pytest_plugins = ["gpu_guard"]
# they need another environment: make test-integrations
collect_ignore = ["integrations"]

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreter

    interpreter.speed_up()


@dataclass(frozen=True)
class BackendDevice:
    """A backend and the device that it runs on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Runs in Triton's interpreter: thousands of times slower than a kernel, so sizes have to be small."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Logit dtypes that the contract promises here (fp64 is a CPU dtype)."""
        half = [torch.bfloat16, torch.float16, torch.float32]
        return [*half, torch.float64] if self.device == "cpu" else half


def on_gpu(backend: str, *ops: str) -> pytest.MarkDecorator:
    """Marks a test of ``ops`` on a GPU: if it fails, "auto" does not choose ``backend`` for them there."""
    return pytest.mark.gpu(backend=backend, ops=ops)


needs_fake_gpu = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None,
    reason="the fake GPU needs a C++ compiler and a CPU build of torch",
)


def backend_devices(op: str = "token_stats") -> list:
    """pytest parameters: every backend of ``op`` on every device here, skipped with the reason where it cannot run."""
    there = [BackendDevice(name, "cuda") for name in ("torch", "triton", "cuda")] if torch.cuda.is_available() else []
    interpreted = [] if torch.cuda.is_available() else [BackendDevice("triton", "cpu")]
    params = []
    for on in (BackendDevice("torch", "cpu"), BackendDevice("cpu", "cpu"), *interpreted, *there):
        reason = ek.backends()[op][on.backend]
        marks = [] if reason == "available" else [pytest.mark.skip(reason=f"backend {on.backend}: {reason}")]
        if on.device == "cuda":
            # ops whose kernels are written together are tested together, but for what a kernel of its own may do
            known = registry.OPS
            alone = [o for o in known if known[o].fused]
            together = [o for o in known if known[o].stem == known[op].stem and o not in alone]
            together = [op] if op in alone else together
            marks.append(on_gpu(on.backend, *together))
        params.append(pytest.param(on, marks=marks, id=str(on)))
    return params


@pytest.fixture
def inductor() -> Callable[[Callable], Callable]:
    """torch.compile of a whole function; C++ without vectors, whose headers would take g++ longer than all else."""
    torch._dynamo.reset()  # the recompilations of the tests before count towards its limit
    return functools.partial(torch.compile, fullgraph=True, options={"cpp.simdlen": 0})


@pytest.fixture(params=backend_devices())
def on(request: pytest.FixtureRequest) -> BackendDevice:
    """Backend × device of the statistics ops."""
    return request.param


def pytest_report_header() -> list[str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (tests on a GPU are not collected)"
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, gpu: {gpu}"]
    for op, backends in ek.backends().items():
        lines.append(f"{op}: " + "; ".join(f"{name} {state}" for name, state in backends.items()))
    return lines


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN (integers: the largest), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # torch fills only in deterministic mode; warn_only, because it is the filling that is wanted and not the mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """Without the deterministic mode of :func:`poisoned_memory`, in which torch runs other kernels: as users run it."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def large_memory() -> Iterator[Callable[[float], None]]:
    """``reserve(gigabytes)`` of the GPU, or skip. One such test at a time, however many processes share the GPU."""
    with open(os.path.join(tempfile.gettempdir(), f"entropy_kernels-gpu-memory-{os.getuid()}"), "w") as lock:

        def reserve(gigabytes: float) -> None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            gc.collect()
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] / 1e9
            if free < gigabytes:
                pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")

        yield reserve
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's figures are made, and empty ones written: test_figures.py lays them out."""
    plots, blank = pytest.importorskip("benchmarks.plots"), pytest.importorskip("matplotlib.figure").Figure
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: save(figure and blank(), path))


@pytest.fixture(scope="session")
def folder_of_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of pytest share, for what takes long to make."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """No test depends on which others ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def forgetful_registry() -> Iterator[None]:
    """The registry remembers what it found; forget before and after a test that changes what there is to find."""
    registry.forget()
    yield
    registry.forget()


@pytest.fixture(params=backend_devices("clip_cov_mask"))
def selection_on(request: pytest.FixtureRequest) -> BackendDevice:
    """Backend × device of the selection ops."""
    return request.param


def gpu_backend_devices(*ops: str, name: str = "") -> list:
    """pytest parameters: every backend on the GPU, for a test of ``ops``."""
    params = []
    for backend in ("torch", "triton", "cuda"):
        states = {op: ek.backends()[op][backend] for op in ops}
        reasons = [f"backend {backend}, {op}: {state}" for op, state in states.items() if state != "available"]
        if not torch.cuda.is_available():
            reasons = ["needs a GPU"]
        marks = [on_gpu(backend, *ops), *(pytest.mark.skip(reason=reason) for reason in reasons[:1])]
        params.append(pytest.param(BackendDevice(backend, "cuda"), marks=marks, id=backend + name))
    return params


def loss_backend_devices() -> list:
    """Where the losses run: the CPU, and on a GPU each backend that can select there in the place of "auto"."""
    ops = ("token_covariance", "clip_cov_mask", "kl_cov_mask")
    there = gpu_backend_devices(*ops, name="-cuda") if torch.cuda.is_available() else []
    return [pytest.param(BackendDevice("auto", "cpu"), id="cpu"), *there]


@pytest.fixture(params=loss_backend_devices())
def loss_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forgetful_registry: None) -> BackendDevice:
    """Runs a module that imports ``ek`` from loss_cases there too."""
    on = request.param
    if on.device == "cuda":
        stub_gpu.serve_auto_with(monkeypatch, on.backend)
        monkeypatch.setattr(loss_cases.OnDevice, "device", on.device)
    return on


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Python's collector leaves alone what is there before the first test: millions of objects, and they stay."""
    atexit.register(gc.unfreeze)  # else nanobind tells what of triton is left at the end
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: while processes share what is left, none should be the last one at a long test."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_configure(config: pytest.Config) -> None:
    # numpy remarks on inf - inf and the like in the interpreter; a kernel's NaN are compared, not warned about
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    # By default torch lets cuBLAS round partial sums to 16 bits. Whether it does differs between two products of one
    # shape, ours and the one that ours is judged by: of bf16, 36 × 12 × 803, on an H200 into rows of 832, not of 803.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
