"""tools/gpu_prebuilt.py: what it refuses, with tiny libraries; the real build takes a toolkit and a CUDA torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cuda_build
import gpu_prebuilt
from gpu_prebuilt import Symbol

INCLUDE = Path(torch.__file__).parent / "include"
OPERATORS = cuda_build.ROOT / "entropy_kernels" / "_ops.so"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def compiled(library: Path, source: str, *flags: str) -> Path:
    """A shared library."""
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", "-o", str(library), *flags]
    subprocess.run(command, check=True, input=source, text=True)
    return library


# ---- audit -----------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("declaration", "call", "symbol"),
    [
        ("namespace at { class Tensor; void f(const Tensor*); }", "at::f(nullptr)", "_ZN2at1fEPKNS_6TensorE"),
        ("namespace c10 { struct Error { Error(int); }; }", "c10::Error(1)", "_ZN3c105ErrorC1Ei"),
        ("struct T {}; namespace std { void sort(T*); }", "std::sort(nullptr)", "_ZSt4sortP1T"),
        ('extern "C" void* PyLong_FromLong(long);', "PyLong_FromLong(1)", "PyLong_FromLong"),
        ('extern "C" int torch_of_no_header();', "torch_of_no_header()", "torch_of_no_header"),
        ('extern "C" int cuInit(unsigned);', "cuInit(0)", "cuInit"),
    ],
)
def test_what_is_not_of_the_stable_abi_is_refused(tmp_path: Path, declaration: str, call: str, symbol: str) -> None:
    source = f'{declaration}\nextern "C" void g() {{ {call}; }}'
    if "std" in call:  # beside what of its library is allowed
        source = f'#include <sstream>\n{source}\nextern "C" void h(std::ostringstream& s) {{ s << 1; }}'
    library = compiled(tmp_path / "x.so", source)
    with pytest.raises(RuntimeError, match=rf"x\.so: expected only symbols .* got {symbol} \(") as error:
        gpu_prebuilt.audit(library, INCLUDE)
    assert "GLIBC" not in str(error.value)


@needs_compiler
def test_shims_and_runtimes_are_allowed(tmp_path: Path) -> None:
    source = """
        #include <sstream>
        extern "C" int aoti_torch_get_dim(void*, long*);
        extern "C" int torch_get_num_threads(unsigned*);
        extern "C" int g() {
            std::ostringstream text;
            text << aoti_torch_get_dim(nullptr, nullptr) << torch_get_num_threads(nullptr);
            if (text.str().empty()) throw 1;
            return text.str().size();
        }
    """
    needs = gpu_prebuilt.audit(compiled(tmp_path / "x.so", source), INCLUDE)
    assert {"GLIBCXX", "CXXABI"} <= set(needs)


@pytest.mark.skipif(not OPERATORS.exists(), reason="the C++ extension was not built")
def test_the_library_of_this_tree_passes() -> None:
    gpu_prebuilt.audit(OPERATORS, INCLUDE)


def test_versions_are_compared_as_numbers() -> None:
    symbols = [
        Symbol("a", "GLIBC_2.9"),
        Symbol("b", "GLIBC_2.34"),
        Symbol("c", "GLIBC_2.2.5"),
        Symbol("d", "GLIBCXX_3.4.9"),
        Symbol("e", "libcudart.so.13"),
        Symbol("f", ""),
    ]
    assert gpu_prebuilt.needed_versions(symbols) == {"GLIBC": "2.34", "GLIBCXX": "3.4.9"}


# ---- loading ---------------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_missing_cuda_library_is_no_failure_and_a_missing_symbol_is(tmp_path: Path) -> None:
    compiled(tmp_path / "libcuda.so.1", 'extern "C" int cuInit() { return 0; }')
    source = 'extern "C" int cuInit(); extern "C" int g() { return cuInit(); }'
    library = compiled(tmp_path / "x.so", source, "-L", str(tmp_path), "-l:libcuda.so.1")
    assert gpu_prebuilt.missing_cuda_library([library], [tmp_path]) is None
    assert gpu_prebuilt.missing_cuda_library([library], []) in ("libcuda.so.1", None)  # None: a machine with a driver
    compiled(tmp_path / "libcuda.so.1", 'extern "C" int cuOther() { return 0; }')
    with pytest.raises(RuntimeError, match=r"x\.so does not load: .*undefined symbol: cuInit"):
        gpu_prebuilt.missing_cuda_library([library], [tmp_path])


@needs_compiler
def test_any_other_missing_library_and_a_crash_are_failures(tmp_path: Path) -> None:
    other = compiled(tmp_path / "libother.so", 'extern "C" int f() { return 0; }')
    source = 'extern "C" int f(); extern "C" int g() { return f(); }'
    library = compiled(tmp_path / "x.so", source, "-L", str(tmp_path), "-lother")
    other.unlink()
    with pytest.raises(RuntimeError, match=r"x\.so does not load: .*libother\.so: cannot open"):
        gpu_prebuilt.missing_cuda_library([library], [tmp_path])
    crash = compiled(tmp_path / "y.so", "#include <cstdlib>\nstatic int x = (std::abort(), 1);")
    with pytest.raises(RuntimeError, match=r"y\.so does not load: exit status -\d"):
        gpu_prebuilt.missing_cuda_library([crash], [tmp_path])


# ---- build -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_cuda_torch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_prebuilt.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "gpu-prebuilt: TORCH: expected the folder of an unpacked wheel" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["9.0a;8.0", "Hopper"])
def test_one_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'")
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "skip_reason", lambda version: None)
    assert gpu_prebuilt.main([str(tmp_path), "--arch", architecture]) == 1
    assert f"got {architecture!r}" in capsys.readouterr().err


# ---- fingerprint and install -----------------------------------------------------------------------------------------


def test_fingerprint_is_of_every_source_and_of_the_flags(tmp_path: Path) -> None:
    assert gpu_prebuilt.fingerprint() == gpu_prebuilt.fingerprint()
    shutil.copytree(cuda_build.ROOT / "csrc", tmp_path / "csrc")
    flags = tmp_path / "tools" / "cuda_build.py"
    flags.parent.mkdir()
    shutil.copy(cuda_build.ROOT / "tools" / "cuda_build.py", flags)
    first = gpu_prebuilt.fingerprint(tmp_path)
    assert first == gpu_prebuilt.fingerprint()
    (tmp_path / "csrc" / "notes.txt").write_text("no source")
    assert gpu_prebuilt.fingerprint(tmp_path) == first
    seen = {first}
    header = tmp_path / "csrc" / "common" / "philox.h"
    header.write_text(header.read_text() + "\n")
    seen.add(gpu_prebuilt.fingerprint(tmp_path))
    header.rename(header.with_name("renamed.h"))
    seen.add(gpu_prebuilt.fingerprint(tmp_path))
    flags.write_text(flags.read_text() + "\n")
    seen.add(gpu_prebuilt.fingerprint(tmp_path))
    assert len(seen) == 4


NATIVE = """
import ctypes, pathlib

def error(name):
    try:
        ctypes.CDLL(str(pathlib.Path(__file__).parent.parent / name))
    except OSError as reason:
        return f"{name} does not load: {reason}"

load_error, cuda_load_error = error("_ops.so"), error("_ops_cuda.so")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that loads its libraries as native.py does, whatever torch this is; with an old _ops.so."""
    folder = tmp_path / "site" / "entropy_kernels"
    (folder / "backends").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "backends" / "__init__.py").touch()
    (folder / "backends" / "native.py").write_text(NATIVE)
    (folder / "_ops.so").write_bytes(b"old")
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("library") / "f.so", 'extern "C" int f() { return 0; }')


@pytest.fixture
def prebuilt(tmp_path: Path, library: Path) -> Path:
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for name in gpu_prebuilt.LIBRARIES:
        (folder / name).write_bytes(library.read_bytes() + name.encode())  # neither is the other
    record = {"fingerprint": gpu_prebuilt.fingerprint(), "architecture": "9.0a"}
    (folder / gpu_prebuilt.RECORD).write_text(json.dumps(record))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stubs are of no architecture")
def test_libraries_that_fit_are_installed(package: Path, prebuilt: Path) -> None:
    assert gpu_prebuilt.install(prebuilt, package) is None
    for name in gpu_prebuilt.LIBRARIES:
        assert (package / name).read_bytes() == (prebuilt / name).read_bytes()
    assert sorted(contents(package)) == ["__init__.py", "_ops.so", "_ops_cuda.so"]


@needs_compiler
@pytest.mark.parametrize("spoil", ["stale", "no record", "half a record", "no library", "a file that does not load"])
def test_otherwise_the_package_stays_as_it_was(package: Path, prebuilt: Path, spoil: str) -> None:
    record = prebuilt / gpu_prebuilt.RECORD
    before = contents(package)
    if spoil == "stale":
        record.write_text(json.dumps({"fingerprint": "0", "architecture": "9.0a"}))
        expected = "built from other sources"
    elif spoil == "no record":
        record.unlink()
        expected = "expected the record of make gpu-prebuilt, got FileNotFoundError"
    elif spoil == "half a record":
        record.write_text("[]")
        expected = "expected the record of make gpu-prebuilt, got TypeError"
    elif spoil == "no library":
        (prebuilt / "_ops_cuda.so").unlink()
        expected = "got none of _ops_cuda.so"
    else:
        (prebuilt / "_ops_cuda.so").write_bytes(b"no library")
        expected = "_ops_cuda.so does not load"
    reason = gpu_prebuilt.install(prebuilt, package)
    assert reason is not None and expected in reason and "\n" not in reason
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    assert contents(package) == before and folders - {"__pycache__"} == {"backends"}


@needs_compiler
def test_an_interpreter_that_is_not_there_changes_nothing(package: Path, prebuilt: Path) -> None:
    before = contents(package)
    with pytest.raises(FileNotFoundError):
        gpu_prebuilt.install(prebuilt, package, python="/no/python")
    assert contents(package) == before
