"""``make sanitize``: the C++ kernels under AddressSanitizer and UBSan, and their threads under ThreadSanitizer, fed
with hostile arguments: views that end with their allocation, any strides, NaN and infinities, labels and indices out
of range, and one argument in three calls that is wrong.

A call with right arguments has to succeed, with a result that makes sense; one with a wrong argument may succeed, or
raise an error that names the argument. Anything else fails, with the input's number: ``--first N --inputs 1`` makes
that one again.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cuda_build

FOLDER = cuda_build.ROOT / "build" / "sanitize"
FLAGS = {
    # float-cast-overflow is not part of undefined; the rest of the process is not built for their run-time options
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-Wl,-Bsymbolic"],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}
# The file by itself: the package would load the operators that are not built for a sanitizer.
STATISTICS = len(runpy.run_path(str(cuda_build.ROOT / "entropy_kernels" / "_rows.py"))["STATISTICS"])
CAPABILITIES = ("default", "avx2", "avx512")
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e38, -1e38, 1.0]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = [0, 1, -1, -100, 2**31, -(2**31), 2**63 - 1, -(2**63)]
WIDTHS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 300, 1023, 2047, 2048, 2049]
TOKENS = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 65, 255, 2047, 2048, 2049, 4100]


@functools.cache
def pool(dtype: torch.dtype, wild: bool) -> Tensor:
    """Numbers to cut tensors out of."""
    generator = torch.Generator().manual_seed(7)
    if dtype == torch.bool:
        return torch.rand(1 << 17, generator=generator) < 0.7
    if not dtype.is_floating_point:
        values = torch.randint(-5, 50, (1 << 17,), generator=generator)
        special = torch.tensor(INTEGERS)
    else:
        values = 4 * torch.randn(1 << 17, generator=generator, dtype=torch.float64)
        special = torch.tensor(SPECIAL, dtype=torch.float64)
    if wild:
        where = torch.rand(values.shape, generator=generator) < 0.03
        values[where] = special[torch.randint(0, len(special), (int(where.sum()),), generator=generator)]
    return values.to(dtype)


class Maker:
    """Arguments of one call, all from its number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.wild = self.random.random() < 0.5

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False, wild: bool | None = None
    ) -> Tensor:
        """Of values of the pool, in an allocation that ends with its last element; ``strided``: with any strides."""
        order = list(range(len(shape)))[::-1]
        gap = 0
        if strided and self.chance(0.5):
            self.random.shuffle(order)
            gap = self.random.choice([0, 0, 1, 3])
        strides, span = [0] * len(shape), 1
        for dim in order:
            strides[dim] = span
            span += max(0, shape[dim] - 1) * span + gap * self.random.choice([0, 1])
        needed = 1 + sum(max(0, size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        needed = 0 if 0 in shape else needed
        before = self.random.choice([0, 0, 1, 5])  # a start that is not aligned
        numbers = pool(dtype, self.wild if wild is None else wild)
        begin = self.random.randrange(len(numbers))
        memory = numbers[begin : begin + before + needed]
        while len(memory) < before + needed:
            memory = torch.cat([memory, numbers[: before + needed - len(memory)]])
        return memory.clone().as_strided(shape, strides, before)

    def some(self, value: Callable[[], Any]) -> Any:
        return value() if self.chance(0.6) else None

    def size(self, sizes: list[int], large: int) -> int:
        return self.random.randrange(large) if self.chance(0.01) else self.random.choice(sizes)

    # ---- the operators, by argument

    def rows(self) -> dict[str, Any]:
        batch, length, vocab = self.random.randrange(4), self.random.randrange(4), self.size(WIDTHS, 40000)
        dtype = self.random.choice(FLOATS)
        result = torch.float64 if dtype == torch.float64 else torch.float32
        n = batch * length
        temperature = self.tensor((1 if self.chance(0.5) else n,), result)
        if not self.wild:
            temperature = temperature.abs_().add_(0.1)
        start = self.random.choice([0, 0, 0, 7, 2**40])
        return {
            "logits": self.tensor((batch, length, vocab), dtype, strided=True),
            "target": self.tensor((n,), self.random.choice([torch.int32, torch.int64])),
            "temperature": temperature,
            "softcap": self.random.choice([0.0, 0.0, 5.0, 1e-3, 1e30]),
            "ignore_index": self.random.choice([-100, 3, -(2**63), 2**63 - 1]),
            "vocab_start": start,
            "vocab_size": self.random.choice([start + vocab, vocab, vocab // 2, 0, 2**40, 2**63 - 1]),
        }

    def token_stats_forward(self) -> dict[str, Any]:
        return {**self.rows(), "want": self.random.randrange(1 << STATISTICS)}

    def token_stats_backward(self) -> dict[str, Any]:
        rows = self.rows()
        logits, result = rows["logits"], rows["temperature"].dtype
        n, want = rows["target"].numel(), self.random.randrange(1 << STATISTICS)
        grads = self.tensor((want.bit_count(), n), result, strided=True)
        out = logits if self.chance(0.3) else self.tensor(tuple(logits.shape), logits.dtype, strided=True)
        numbers = {name: rows.pop(name) for name in ("softcap", "ignore_index", "vocab_start", "vocab_size")}
        state = self.tensor((self.random.choice([6, 7]), n), result, strided=True)
        return {"grad_stats": grads, **rows, "state": state, **numbers, "want": want, "dlogits": out}

    def covariance(self) -> dict[str, Any]:
        n, dtype = self.size(TOKENS, 90000), self.random.choice([torch.float32, torch.float64])
        shape = (n,) if self.chance(0.7) else (n // 3, 3)
        mask = self.some(lambda: self.tensor(shape, torch.bool))
        return {"logprob": self.tensor(shape, dtype), "advantages": self.tensor(shape, dtype), "mask": mask}

    token_covariance = covariance_extremes = covariance

    def covariance_sums(self) -> dict[str, Any]:
        return {**self.covariance(), "scales": self.tensor((2,), torch.float64)}

    def covariance_apply(self) -> dict[str, Any]:
        return {**self.covariance(), "means": self.tensor((2,), torch.float64)}

    def selection_value_keys(self) -> dict[str, Any]:
        n = self.size(TOKENS, 90000)
        masks = {name: self.some(lambda: self.tensor((n,), torch.bool)) for name in ("mask", "exclude")}
        return {"covariance": self.tensor((n,), torch.float32), **masks}

    def scalar(self) -> Tensor:
        return self.tensor((), torch.int64)

    def tokens(self, *also: str) -> dict[str, Any]:
        tokens = self.selection_value_keys()
        n = tokens["covariance"].numel()
        tokens["token_index"] = self.some(lambda: self.tensor((n,), torch.int64))
        if "seed" in also:
            tokens["seed"] = self.scalar()
        k = self.random.choice([-1, 0, 1, 3, n, 2**53])
        tokens |= {"ratio": self.random.choice([0.0, 2e-4, 0.3, 1.0]), "k": k, "at_least_one": self.chance(0.5)}
        return tokens

    def clip_cov_mask(self) -> dict[str, Any]:
        bounds = [-math.inf, math.inf, math.nan, 0.0, -0.0, 0.2, 0.9, 1.0, 5.0, 1e300]
        band = {"low": self.random.choice(bounds), "high": self.random.choice(bounds)}
        band |= {"quantile": self.chance(0.4), "closed": self.chance(0.5)}
        numbers = self.some(lambda: self.tensor((4,), torch.float64))
        return {**self.tokens("seed"), **band, "numbers": numbers}

    def kl_cov_mask(self) -> dict[str, Any]:
        return {**self.tokens(), "numbers": self.some(lambda: self.tensor((2,), torch.float64))}

    def budget_mask(self) -> dict[str, Any]:
        tokens = self.selection_value_keys()
        score = tokens.pop("covariance")
        index = self.some(lambda: self.tensor((score.numel(),), torch.int64))
        return {"score": score, **tokens, "token_index": index, "numbers": self.tensor((3,), torch.float64)}

    def keys(self, name: str = "keys") -> dict[str, Any]:
        n = self.size(TOKENS, 90000)
        index = self.some(lambda: self.tensor((n,), torch.int64))
        return {name: self.tensor((n,), torch.int64), "token_index": index, "offset": self.scalar()}

    def selection_random_keys(self) -> dict[str, Any]:
        keys = self.keys("value_keys")
        return {
            "value_keys": keys.pop("value_keys"),
            "band": self.tensor((2,), torch.int64),
            **keys,
            "seed": self.scalar(),
        }

    def selection_key_histogram(self) -> dict[str, Any]:
        bits = self.random.randrange(1, 12)
        state = self.tensor((self.random.randrange(4), 3), torch.int64)
        return {"keys": self.keys()["keys"], "state": state, "shift": self.random.randrange(33 - bits), "bits": bits}

    def selection_weight_histogram(self) -> dict[str, Any]:
        digit = self.selection_key_histogram()
        digit["state"] = self.tensor((1, 3), torch.int64)
        keys, state, *rest = digit.items()
        return dict([keys, state, ("scale", self.tensor((), torch.float64)), *rest])

    def selection_index_histogram(self) -> dict[str, Any]:
        bits = self.random.randrange(1, 12)
        shift = self.random.randrange(65 - bits)
        states = {name: self.tensor((1, 3), torch.int64) for name in ("key_state", "state")}
        known = self.random.randrange(65 - bits - shift)
        return {**self.keys(), **states, "shift": shift, "bits": bits, "known": known}

    def selection_mask(self) -> dict[str, Any]:
        return {**self.keys(), "threshold": self.scalar(), "last_index": self.scalar()}

    # ---- one argument that is wrong

    def spoiled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.random.choice(WRONG)(self, value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, float):
            return self.random.choice([*SPECIAL, 1e300, -1.0])
        if isinstance(value, int):
            return self.random.choice([*INTEGERS, value + 1, 16, 64])
        return self.tensor((self.random.randrange(4),), self.random.choice([torch.bool, torch.float32, torch.int64]))


def _freed(maker: Maker, value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(maker.random.choice([0, value.untyped_storage().nbytes() // 2]))
    return value


WRONG: list[Callable[[Maker, Tensor], Any]] = [
    lambda maker, x: x.to("meta"),
    lambda maker, x: x.to(maker.random.choice([torch.bool, torch.int32, torch.int64, torch.float32, torch.float64])),
    lambda maker, x: x[..., : x.shape[-1] // 2] if x.dim() else x.reshape(1),
    lambda maker, x: x[None],
    lambda maker, x: x.flatten()[:1].expand(x.shape) if x.numel() > 1 else x,
    lambda maker, x: maker.tensor(tuple(x.shape), x.dtype, strided=True),
    lambda maker, x: x.to_sparse(),
    _freed,
    lambda maker, x: None,
]  # fmt: skip
OPERATORS = (
    "token_stats_forward", "token_stats_backward", "token_covariance", "covariance_extremes", "covariance_sums",
    "covariance_apply", "clip_cov_mask", "kl_cov_mask", "budget_mask", "selection_value_keys", "selection_random_keys",
    "selection_key_histogram", "selection_weight_histogram", "selection_index_histogram", "selection_mask",
)  # fmt: skip


def makes_sense(name: str, arguments: dict[str, Any], result: Any) -> bool:
    """What can be said of a result at little cost."""
    if name == "token_stats_forward":
        return result[0].shape == (arguments["want"].bit_count(), arguments["target"].numel())
    if name in ("clip_cov_mask", "kl_cov_mask") and arguments["numbers"] is None:
        left = ~arguments["covariance"].isnan()
        for mask, keep in (("mask", True), ("exclude", False)):
            if arguments[mask] is not None:
                left &= arguments[mask] == keep
        selected, k = int(result.sum()), arguments["k"]
        exact = name == "kl_cov_mask" and k >= 0
        inside = not bool((result & ~left).any())
        return inside and (selected == min(k, int(left.sum())) if exact else k < 0 or selected <= k)
    if name == "budget_mask":
        left = arguments["score"].isfinite() & (arguments["score"] > 0)
        for mask, keep in (("mask", True), ("exclude", False)):
            if arguments[mask] is not None:
                left &= arguments[mask] == keep
        return not bool((result & ~left).any())
    if name in ("selection_key_histogram", "selection_index_histogram"):
        return int(result.sum()) <= arguments["keys"].numel() * result.shape[0]
    return True


def attempt(seed: int, number: int) -> str | None:
    """What is wrong with what a call does, or None."""
    maker = Maker(seed, number)
    name = maker.random.choice(OPERATORS)
    arguments = getattr(maker, name)()
    wrong = maker.random.choice(list(arguments)) if maker.chance(1 / 3) else None
    if wrong is not None:
        arguments[wrong] = maker.spoiled(arguments[wrong])
    try:
        result = getattr(torch.ops.entropy_kernels_native, name)(*arguments.values())
        if wrong is None and not makes_sense(name, arguments, result):
            return f"{name}: a result that cannot be"
    except RuntimeError as error:
        named = any(f"{key}: expected" in str(error) or f"argument '{key}'" in str(error) for key in arguments)
        if wrong is None or not named:
            return f"{name}, with {wrong or 'nothing'} wrong: {error}"
    return None


def work(seed: int, first: int, inputs: int) -> int:
    """Make the calls in this process, which has loaded the operators; the number of those that failed."""
    failed = 0
    progress = Path(os.environ.get("SANITIZE_PROGRESS", os.devnull))  # for whoever started a process that dies
    for number in range(first, first + inputs):
        progress.write_text(str(number))
        problem = attempt(seed, number)
        if problem is not None:
            print(f"input {number}: {problem}", flush=True)
            failed += 1
    return failed


def build(kind: str) -> Path:
    """``_ops.so`` for a sanitizer, in a folder of its own."""
    folder = FOLDER / kind
    extra = [*FLAGS[kind], "-O1", "-g1", "-fno-omit-frame-pointer"]
    sources = [cuda_build.ROOT / "tools" / "sanitize_threads.cpp"] if kind == "thread" else []
    print(f"building {folder.relative_to(cuda_build.ROOT)}/_ops.so", flush=True)
    cuda_build.build_operators(folder / "_ops.so", folder, Path(torch.__file__).parent, extra, sources)
    return folder / "_ops.so"


def runtime(kind: str) -> str:
    """What the process has to start with: the sanitizer, and the C++ library, whose exceptions it looks for then."""
    compiler, paths = os.environ.get("CXX", "c++").split(), []
    for name in (RUNTIME[kind], "libstdc++.so.6"):
        found = subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        paths.append(found.stdout.strip())
        if not Path(paths[-1]).is_absolute():
            raise RuntimeError(f"sanitize: {compiler[0]} has no {name}; this needs GCC with its sanitizers")
    return " ".join(paths)


def run(kind: str, library: Path, capability: str, arguments: argparse.Namespace) -> bool:
    """All inputs in a process that the sanitizer watches; whether it found nothing."""
    progress = library.with_name(f"progress-{capability}")
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": runtime(kind), "SANITIZE_PROGRESS": str(progress)}
    environment |= {"ENTROPY_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2" if kind == "address" else "1"}
    inputs = arguments.inputs if kind == "address" else -(-arguments.inputs // 10)  # it is several times as slow
    numbers = ["--seed", str(arguments.seed), "--first", str(arguments.first), "--inputs", str(inputs)]
    command = [sys.executable, __file__, kind, capability, *numbers, "--library", str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    again = f"python tools/sanitize.py {kind} {capability} --seed {arguments.seed} --first N --inputs 1"
    if done.returncode == 0:
        print(f"{kind} {capability}: {inputs} inputs, seed {arguments.seed}: nothing found", flush=True)
        return True
    last = progress.read_text() if progress.exists() else "none"
    print(f"{kind} {capability}: failed at input {last}; again: {again.replace('N', last)}")
    print(done.stdout[:5000] + done.stderr[:10000], flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=[*FLAGS, "all"], default="all")
    parser.add_argument("capability", nargs="?", choices=[*CAPABILITIES, "all"], default="all")
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="calls under each instruction set; of thread a tenth"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        torch.ops.load_library(arguments.library)
        return int(work(arguments.seed, arguments.first, arguments.inputs) > 0)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    here = [name for name in CAPABILITIES if name == "default" or name in flags]
    chosen = here if arguments.capability == "all" else [arguments.capability]
    kinds = list(FLAGS) if arguments.kind == "all" else [arguments.kind]
    libraries = {kind: build(kind) for kind in kinds}
    jobs = [(kind, libraries[kind], name) for kind in kinds for name in chosen]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1) as executor:
        passed = list(executor.map(lambda job: run(*job, arguments), jobs))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
