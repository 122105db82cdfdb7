"""tools/cuda_build.py and tools/cuda_check.py: what is built for which architecture, and that the check has teeth."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import cuda_build
import cuda_check

CLEAN = """\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function '_Z7forwardv' for 'sm_90a'
ptxas info    : Function properties for _Z7forwardv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_Z8backwardv' for 'sm_90a'
ptxas info    : Function properties for _Z8backwardv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers
"""


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENTROPY_KERNELS_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_report_is_read() -> None:
    forward, backward = cuda_check.parse(CLEAN)
    assert forward == cuda_check.Usage("_Z7forwardv", "sm_90a", registers=64, shared=1024, stack=0, spilled=0)
    assert (backward.kernel, backward.registers, backward.shared) == ("_Z8backwardv", 72, 0)
    assert cuda_check.problems([forward, backward]) == []


@pytest.mark.parametrize(
    "text", ["8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
             "0 bytes stack frame, 16 bytes spill stores, 0 bytes spill loads",
             "0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads"]
)  # fmt: skip
def test_local_memory_fails(text: str) -> None:
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    (problem,) = cuda_check.problems(cuda_check.parse(CLEAN.replace(clean, text, 1)))
    assert "_Z7forwardv for sm_90a" in problem


def test_a_kernel_that_one_architecture_lacks_fails() -> None:
    other = CLEAN[: CLEAN.index("ptxas info    : Compiling entry function '_Z8")].replace("sm_90a", "sm_80")
    assert cuda_check.problems(cuda_check.parse(CLEAN + other)) == ["_Z8backwardv is missing for sm_80"]


def test_no_kernels_and_half_a_report_fail() -> None:
    assert cuda_check.problems(cuda_check.parse("nvcc warning")) == ["no kernels in the compiler's report"]
    with pytest.raises(ValueError, match="nothing of the stack or the registers of _Z8backwardv"):
        cuda_check.parse(CLEAN[: CLEAN.rindex("ptxas")])


def test_table_names_the_kernel_in_local_memory() -> None:
    usage = cuda_check.Usage("_Z7forwardv", "sm_80", registers=255, shared=0, stack=8, spilled=16)
    assert "255" in cuda_check.table([usage]) and "local memory" in cuda_check.table([usage])


def test_without_a_toolkit_the_check_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    assert cuda_check.main() == 0
    assert "cuda-check: skipped: no CUDA toolkit" in capsys.readouterr().out


def test_a_failed_check_is_an_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    spilled = CLEAN.replace("0 bytes spill stores", "16 bytes spill stores", 1)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "build", lambda *arguments, **options: spilled)
    monkeypatch.setattr(cuda_check, "load_error", lambda library, compiler: None)
    assert cuda_check.main() == 1
    assert "_Z7forwardv for sm_90a: 0 bytes of stack, 16 spilled" in capsys.readouterr().err


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_build.architectures((13, 0)) == ["8.0+PTX", "9.0a", "10.0a"]
    assert cuda_build.architectures((12, 6)) == ["8.0+PTX", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6; 9.0a 12.0+PTX")
    assert cuda_build.architectures((12, 6)) == ["8.6", "9.0a", "12.0+PTX"]
    assert cuda_build.gencode_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_120,code=[sm_120,compute_120]",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST .*: expected entries like .* got 'Hopper'"):
        cuda_build.gencode_flags(["Hopper"])


@pytest.mark.skipif(cuda_build.nvcc() is None, reason="no CUDA toolkit")
@pytest.mark.parametrize("qualifier", ["", "constexpr", "__host__ __device__"])
def test_a_kernel_that_calls_host_code_is_no_build(tmp_path: Path, qualifier: str) -> None:
    """nvcc only warns by default, and leaves out what comes behind the call."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        f"{qualifier} int f(int x) {{ return x; }}\n"
        "template <class T> __host__ __device__ T g(T x) { return f(x); }\n"
        "__global__ void kernel(int* x) { *x = g(*x); }\n"
    )
    flags = [*cuda_build.NVCC_FLAGS, "-arch=compute_80", "-ptx", "-o", str(tmp_path / "kernel.ptx")]
    done = subprocess.run([str(cuda_build.nvcc()), *flags, str(source)], capture_output=True, text=True)
    assert (done.returncode == 0) == (qualifier == "__host__ __device__"), done.stderr
    assert done.returncode == 0 or "__host__ function" in done.stdout + done.stderr


def test_reasons_to_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "toolkit_version", lambda compiler: (13, 0))
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    assert cuda_build.skip_reason("13.0") is None
    assert cuda_build.skip_reason(None) == "this torch is built without CUDA"
    assert cuda_build.skip_reason("12.8") == "nvcc is of CUDA 13, torch of CUDA 12.8"
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    assert cuda_build.skip_reason("13.0") == "no CUDA toolkit found (nvcc; CUDA_HOME)"
    monkeypatch.setenv("ENTROPY_KERNELS_SKIP_CUDA", "1")
    assert cuda_build.skip_reason("13.0") == "ENTROPY_KERNELS_SKIP_CUDA is set"


def test_every_source_of_the_cuda_half_is_built() -> None:
    folder = cuda_build.ROOT / "csrc" / "cuda"
    assert sorted(cuda_build.sources()) == sorted(p for p in folder.iterdir() if p.suffix in (".cu", ".cpp"))
    stems = {p.stem for p in cuda_build.sources()}
    assert {"token_stats", "token_stats_forward", "token_stats_backward", "selection", "selection_steps"} <= stems


def test_operators_are_compiled_as_setup_compiles_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(cuda_build, "_run", lambda command: commands.append(command) or "")
    monkeypatch.setenv("CXX", "ccache g++")
    cuda_build.build_operators(tmp_path / "_ops.so", tmp_path / "objects", tmp_path / "torch")
    *compiled, linked = commands
    csrc = cuda_build.ROOT / "csrc"
    expected = {csrc / "registration.cpp", *(csrc / "cpu").glob("*.cpp")}
    assert {Path(command[command.index("-c") + 1]) for command in compiled} == expected
    flags = {*cuda_build.CXX_FLAGS, cuda_build.STABLE_ABI_FLAG}
    assert all(command[:2] == ["ccache", "g++"] and flags <= set(command) for command in commands)
    assert {command[-1] for command in compiled} < set(linked) and "-Wl,-z,defs" in linked
    setup = (cuda_build.ROOT / "setup.py").read_text()
    assert all(f"cuda_build.{name}" in setup for name in ("CXX_FLAGS", "STABLE_ABI_FLAG", "OPERATOR_SOURCES"))
