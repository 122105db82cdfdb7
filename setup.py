"""Build of the native half: ``_ops`` and ``_ops_cuda``, and in place ``_C`` (pybind11: primitives for the tests).

The former hold no symbol of Python's, and of torch's only those of its stable ABI: one wheel, tagged cp310-abi3, serves
every Python and torch of the support window (docs/install.md). ``_C`` is of one Python and stays out of wheels.
``_ops_cuda`` is built where torch is a CUDA build and its toolkit is there; no GPU is needed.

Switches: ENTROPY_KERNELS_SKIP_CPP=1 builds no C++, CXX names the compiler, MAX_JOBS limits parallelism; those of CUDA
and the flags are in tools/cuda_build.py.
Without a C++ compiler the package installs pure Python and runs on its torch and Triton backends; without torch,
tools/build_backend.py stops.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build

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


class CleanBuild(build):
    """What goes into a wheel is collected anew: setuptools would add what an earlier build has left there."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def native_build() -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable installation would throw its object files away; the next one, or a wheel, goes on with them.
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

        def run(self) -> None:
            if not (self.inplace or self.editable_mode):
                self.extensions = [extension for extension in self.extensions if extension is not test_primitives]
            super().run()

        def get_ext_filename(self, fullname: str) -> str:
            # _ops and _ops_cuda hold no Python symbols: their names carry no Python version.
            if fullname.split(".")[-1].startswith("_ops"):
                return os.path.join(*fullname.split(".")) + ".so"
            return super().get_ext_filename(fullname)

        def build_extension(self, ext: Extension) -> None:
            if ext is test_primitives:
                import pybind11  # here, as a wheel needs none

                ext.include_dirs.append(pybind11.get_include())
            if not ext.name.endswith("_ops_cuda"):
                super().build_extension(ext)
                return
            library = Path(self.get_ext_fullpath(ext.name))
            if self.force or is_older(library, ext.depends):
                folder = Path(self.build_temp) / "cuda"
                cuda_build.build(library, folder, Path(torch.__file__).parent, torch_has_cuda=True)

        def get_export_symbols(self, ext: object) -> list[str]:
            return []  # _ops has no PyInit; it registers its operators when loaded

    headers = sources("csrc/**/*.h")
    flags = list(cuda_build.CXX_FLAGS)
    csrc = str(ROOT / "csrc")
    test_primitives = CppExtension(
        "entropy_kernels._C", ["csrc/bindings.cpp"], include_dirs=[csrc], depends=headers, extra_compile_args=flags
    )
    extensions = [
        CppExtension(
            "entropy_kernels._ops",
            sources(*cuda_build.OPERATOR_SOURCES),
            include_dirs=[csrc],
            depends=headers,
            extra_compile_args=[*flags, cuda_build.STABLE_ABI_FLAG],
            py_limited_api=True,
        ),
        test_primitives,
    ]
    if build_cuda():
        # no sources: torch would want to compile them itself
        depends = [*headers, *sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"), "tools/cuda_build.py"]
        extensions.append(Extension("entropy_kernels._ops_cuda", [], depends=depends))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build": CleanBuild, "build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = skip_reason() or (None if torch_is_there() else "torch is not installed")
if reason:
    print(f"entropy_kernels: building without C++: {reason}", file=sys.stderr)
    setup(cmdclass={"build": CleanBuild})
else:
    setup(**native_build())
