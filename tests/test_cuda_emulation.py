"""The CUDA kernels and their driver, unchanged, on CPU threads, under the sanitizers.

Builds tests/cc/cuda_test.cc with the kernels of cc/core/cuda and the emulation of CUDA in
tests/cc/cuda_emulation, once with AddressSanitizer and UndefinedBehaviorSanitizer, once with
ThreadSanitizer, and runs every test of that program in both. Needs no GPU and no CUDA.
"""

import concurrent.futures
import os
import pathlib
import shlex
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_TESTS = _ROOT / "tests" / "cc"
_EMULATION = _TESTS / "cuda_emulation"
_CUDA = _ROOT / "cc" / "core" / "cuda"

_COMPILER = shlex.split(os.environ.get("CXX") or "g++")
_FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
_FLAGS += [f"-I{_ROOT / 'cc'}", f"-I{_TESTS}", f"-I{_EMULATION}"]
_SANITIZERS = {
    # What AddressSanitizer finds too is left to it.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr",
        "-fno-sanitize-recover=all",
    ],
    "thread": ["-fsanitize=thread"],
}
_NAMES = [
    "sample",
    "sampling_gradient",
    "scatter",
    "gather",
    "sort",
    "elementwise",
    "bias_gradient",
    "forward",
    "input_gradient",
    "filter_gradient",
    "errors",
    "large",
    "tuning",
]


def _run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=540, **options
    )


def _require_sanitizer(flags: list[str], directory: pathlib.Path) -> None:
    """Skips where the compiler has no such sanitizer, or the machine does not let it run."""
    source = directory / "empty.cc"
    source.write_text("int main() {}\n")
    built = _run([*_COMPILER, *flags, source, "-o", directory / "empty"])
    if built.returncode != 0:
        pytest.skip(f"{_COMPILER[0]} cannot link with {flags[0]}")
    if _run([directory / "empty"]).returncode != 0:
        pytest.skip(f"a program built with {flags[0]} does not start on this machine")


def _build(sanitizer: str, directory: pathlib.Path) -> pathlib.Path:
    flags = _SANITIZERS[sanitizer]
    kernels = sorted(_CUDA.glob("*.cu.cc"))
    assert kernels
    own_flags = {source: flags for source in [*kernels, _TESTS / "cuda_test.cc"]}
    own_flags[_CUDA / "convolution.cc"] = flags
    own_flags[_ROOT / "cc" / "core" / "geometry.cc"] = flags
    # ThreadSanitizer must watch the kernels, not what runs them.
    own_flags[_EMULATION / "emulation.cc"] = (
        ["-DCUDA_EMULATION_TSAN"] if sanitizer == "thread" else flags
    )

    def compile_one(source: pathlib.Path) -> pathlib.Path:
        compiled = directory / f"{source.name}.o"
        result = _run([*_COMPILER, *_FLAGS, *own_flags[source], "-c", source, "-o", compiled])
        assert result.returncode == 0, result.stderr
        return compiled

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, own_flags))
    program = directory / "cuda_test"
    result = _run([*_COMPILER, *flags, *objects, "-o", program, "-lpthread"])
    assert result.returncode == 0, result.stderr
    return program


@pytest.fixture(scope="module", params=sorted(_SANITIZERS))
def runs(request, tmp_path_factory):
    """The runs of all tests with one sanitizer, as futures by name; side by side for speed."""
    directory = tmp_path_factory.mktemp(f"cuda_{request.param}")
    _require_sanitizer(_SANITIZERS[request.param], directory)
    program = _build(request.param, directory)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(_run, [program, name]) for name in [*_NAMES, "--list"]}


def test_every_test_is_run(runs):
    assert runs["--list"].result().stdout.split() == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_emulated(runs, name):
    result = runs[name].result()
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    assert result.stdout == f"{name}: passed\n"
