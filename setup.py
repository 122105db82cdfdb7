"""Build of the native half: ``_ops`` (torch's stable ABI, one binary for every torch >= 2.10) and ``_C`` (pybind11).

Switches: ENTROPY_KERNELS_SKIP_CPP=1 builds no C++, CXX names the compiler, MAX_JOBS limits ninja.
Without torch or a C++ compiler the package installs pure Python and runs on its torch and Triton backends.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
from build_backend import skip_reason, torch_is_there  # noqa: E402

# The lowest torch the binary supports; a build on a newer torch must not use newer symbols.
TORCH_TARGET_VERSION = "0x020a000000000000"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def native_build() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            # _ops holds no Python symbols: its name carries no Python version.
            if fullname.endswith("_ops"):
                return os.path.join(*fullname.split(".")) + ".so"
            return super().get_ext_filename(fullname)

        def get_export_symbols(self, ext: object) -> list[str]:
            return []  # _ops has no PyInit; it registers its operators when loaded

    import pybind11

    headers = sources("csrc/**/*.h")
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-g0"]
    # Fused multiply-adds are written where they are meant: the same logit must round alike in every loop that sees it.
    flags.append("-ffp-contract=off")
    extensions = [
        CppExtension(
            "entropy_kernels._ops",
            sources("csrc/registration.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            depends=headers,
            extra_compile_args=[*flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
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
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


reason = skip_reason() or (None if torch_is_there() else "torch is not installed")
if reason:
    print(f"entropy_kernels: building without C++: {reason}", file=sys.stderr)
    setup()
else:
    setup(**native_build())
