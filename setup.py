"""Build of the native half: ``_ops`` and ``_ops_cuda`` (torch's stable ABI, one binary for every torch >= 2.10) and
``_C`` (pybind11). ``_ops_cuda`` is built where torch is a CUDA build and its toolkit is there; no GPU is needed.

Switches: ENTROPY_KERNELS_SKIP_CPP=1 builds no C++, CXX names the compiler, MAX_JOBS limits parallelism; those of CUDA
and the flags are in tools/cuda_build.py.
Without a C++ compiler the package installs pure Python and runs on its torch and Triton backends; without torch,
tools/build_backend.py stops.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402  (found through the line above)
from build_backend import skip_reason, torch_is_there  # noqa: E402


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def is_older(library: Path, files: list[str]) -> bool:
    """Whether the library is missing or one of the files is newer."""
    return not library.exists() or any(Path(f).stat().st_mtime > library.stat().st_mtime for f in files)


def build_cuda() -> bool:
    """Whether to build the CUDA half; says why not, and with FORCE_CUDA raises instead."""
    import torch

    reason = cuda_build.skip_reason(torch.version.cuda)
    if reason and cuda_build.enabled("FORCE_CUDA"):
        raise RuntimeError(f"FORCE_CUDA: {reason}")
    if reason:
        print(f"entropy_kernels: building without CUDA: {reason}", file=sys.stderr)
    return reason is None


def native_build() -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            # _ops and _ops_cuda hold no Python symbols: their names carry no Python version.
            if fullname.split(".")[-1].startswith("_ops"):
                return os.path.join(*fullname.split(".")) + ".so"
            return super().get_ext_filename(fullname)

        def build_extension(self, ext: Extension) -> None:
            if not ext.name.endswith("_ops_cuda"):
                super().build_extension(ext)
                return
            library = Path(self.get_ext_fullpath(ext.name))
            if self.force or is_older(library, ext.depends):
                folder = Path(self.build_temp) / "cuda"
                cuda_build.build(library, folder, Path(torch.__file__).parent, torch_has_cuda=True)

        def get_export_symbols(self, ext: object) -> list[str]:
            return []  # _ops has no PyInit; it registers its operators when loaded

    import pybind11

    headers = sources("csrc/**/*.h")
    flags = list(cuda_build.CXX_FLAGS)
    extensions = [
        CppExtension(
            "entropy_kernels._ops",
            sources(*cuda_build.OPERATOR_SOURCES),
            include_dirs=[str(ROOT / "csrc")],
            depends=headers,
            extra_compile_args=[*flags, cuda_build.STABLE_ABI_FLAG],
            py_limited_api=True,
        ),
        CppExtension(
            "entropy_kernels._C",
            ["csrc/bindings.cpp"],
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
            depends=headers,
            extra_compile_args=flags,
        ),
    ]
    if build_cuda():
        # no sources: torch would want to compile them itself
        depends = [*headers, *sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"), "tools/cuda_build.py"]
        extensions.append(Extension("entropy_kernels._ops_cuda", [], depends=depends))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


reason = skip_reason() or (None if torch_is_there() else "torch is not installed")
if reason:
    print(f"entropy_kernels: building without C++: {reason}", file=sys.stderr)
    setup()
else:
    setup(**native_build())
