"""What nvcc makes of the CUDA kernels: no warnings, no spills, at least half occupancy.

Needs nvcc but no GPU. `TF_MDCN_TEST_CUDA_ARCHS` (such as "75;90") chooses the architectures; the
default is the oldest, the one with the fewest registers to spare, and the newest.
`python tests/test_cuda_build.py 75 80 86 ...` prints the README's table.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_KERNELS = sorted((_ROOT / "cc" / "core" / "cuda").glob("*.cu.cc"))
_DEFAULT_ARCHS = ["75", "90", "120"]
_THREADS_PER_BLOCK = 256
_NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(_NVCC is None, reason="nvcc is not installed")


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    threads: int
    blocks: int
    shared_kib: int


_MULTIPROCESSORS = {
    "70": Multiprocessor(2048, 32, 96),
    "75": Multiprocessor(1024, 16, 64),
    "80": Multiprocessor(2048, 32, 164),
    "86": Multiprocessor(1536, 16, 100),
    "87": Multiprocessor(1536, 16, 164),
    "89": Multiprocessor(1536, 24, 100),
    "90": Multiprocessor(2048, 32, 228),
    "100": Multiprocessor(2048, 32, 228),
    "103": Multiprocessor(2048, 32, 228),
    "110": Multiprocessor(1536, 24, 228),
    "120": Multiprocessor(1536, 24, 100),
    "121": Multiprocessor(1536, 24, 100),
}


@dataclasses.dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int

    @property
    def occupancy(self) -> float:
        """Resident threads over the most there can be, by the rules of cuda_occupancy.h.

        A multiprocessor has four parts of 16384 registers; a warp takes them from one part, in
        units of 256. Shared memory comes in units of 128 bytes (256 on 7.x), with 1 KiB for the
        system from 8.0 on.
        """
        limits = _MULTIPROCESSORS[self.arch]
        warps_per_block = _THREADS_PER_BLOCK // 32
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * (16384 // registers_per_warp) // warps_per_block
        unit, reserved = (128, 1024) if int(self.arch) >= 80 else (256, 0)
        shared = -(-self.shared_bytes // unit) * unit + reserved
        by_shared = limits.shared_kib * 1024 // shared if shared else limits.blocks
        by_threads = limits.threads // _THREADS_PER_BLOCK
        blocks = min(by_registers, by_shared, by_threads, limits.blocks)
        return blocks * _THREADS_PER_BLOCK / limits.threads


def _compile(source: pathlib.Path, arch: str) -> list[Usage]:
    """Compiles for one architecture; warnings are errors."""
    with tempfile.TemporaryDirectory() as directory:
        command = [_NVCC, "-x", "cu", "-std=c++17", "-O3", f"-I{_ROOT / 'cc'}", "-cubin"]
        command += [f"-arch=sm_{arch}", "-Werror", "all-warnings", "--resource-usage"]
        command += [source, "-o", pathlib.Path(directory) / "kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=540)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    usages = []
    for entry in report.split("Compiling entry function '")[1:]:
        mangled = entry.split("'")[0]

        def number(pattern: str, text: str = entry) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        usages.append(
            Usage(
                kernel=re.findall(r"\d+([A-Z][A-Za-z]*Kernel)", mangled)[0],
                arch=arch,
                registers=number(r"Used (\d+) registers"),
                stack_bytes=number(r"(\d+) bytes stack frame"),
                spill_bytes=number(r"(\d+) bytes spill stores")
                + number(r"(\d+) bytes spill loads"),
                shared_bytes=number(r"(\d+) bytes smem"),
            )
        )
    return usages


@functools.cache
def _usages(archs: tuple[str, ...]) -> list[Usage]:
    pairs = [(source, arch) for source in _KERNELS for arch in archs]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [
            usage for usages in pool.map(lambda pair: _compile(*pair), pairs) for usage in usages
        ]


def _archs_of_nvcc() -> set[str]:
    listed = subprocess.run([_NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return set(re.findall(r"sm_(\d+)\b", listed.stdout))


@pytest.fixture(scope="module")
def usages():
    chosen = os.environ.get("TF_MDCN_TEST_CUDA_ARCHS")
    archs = chosen.split(";") if chosen else sorted(_archs_of_nvcc() & set(_DEFAULT_ARCHS), key=int)
    return _usages(tuple(archs))


def test_every_kernel_is_reported(usages):
    declared = set()
    for source in _KERNELS:
        declared |= set(re.findall(r"__global__[^;{]*?\b([A-Z]\w*Kernel)\(", source.read_text()))
    assert {usage.kernel for usage in usages} == declared


def test_no_spills(usages):
    spilling = [usage for usage in usages if usage.spill_bytes or usage.stack_bytes]
    assert not spilling


def test_at_least_half_occupancy(usages):
    low = [(usage, usage.occupancy) for usage in usages if usage.occupancy < 0.5]
    assert not low


def test_the_cuda_runtime_is_linked_in():
    """TensorFlow exports a CUDA runtime of another version; none of it may be used."""
    import tf_mdcn

    if tf_mdcn.build_info()["cuda"] is None:
        pytest.skip("tf_mdcn was built without CUDA")
    command = ["nm", "-D", "--undefined-only", tf_mdcn.op_library_path()]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not [symbol for symbol in symbols if symbol.startswith(("cuda", "__cuda"))]


def _print_table(archs: list[str]) -> None:
    """For each kernel, its worst variant: registers, and occupancy on each architecture."""
    usages = _usages(tuple(archs))
    print("| kernel | variants | " + " | ".join(f"sm_{arch}" for arch in archs) + " | shared |")
    print("|---|---|" + "---|" * (len(archs) + 1))
    for kernel in sorted({usage.kernel for usage in usages}):
        own = [usage for usage in usages if usage.kernel == kernel]
        cells = []
        for arch in archs:
            here = [usage for usage in own if usage.arch == arch]
            registers = max(usage.registers for usage in here)
            cells.append(f"{registers}, {min(usage.occupancy for usage in here):.0%}")
        shared = max(usage.shared_bytes for usage in own)
        print(f"| {kernel} | {len(here)} | " + " | ".join(cells) + f" | {shared} B |")
    print(f"spilled bytes: {sum(usage.spill_bytes for usage in usages)}, ", end="")
    print(f"stack bytes: {sum(usage.stack_bytes for usage in usages)}")


if __name__ == "__main__":
    _print_table(sys.argv[1:])
