"""The forward pass in bfloat16 through pairs, which is how a CPU with AVX512-BF16 computes it, on
any CPU: the core is compiled here, without TensorFlow, with plain arithmetic for the instruction.
Separate from test_core.py, which runs the instruction itself where the machine has it.
"""

import concurrent.futures
import ctypes
import os
import pathlib
import shlex
import subprocess

import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import Case, assert_close, random_case, rounding_bound

_ROOT = pathlib.Path(__file__).parents[1]
_COMPILER = shlex.split(os.environ.get("CXX") or "g++")
_FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", f"-I{_ROOT / 'cc'}"]
_FLAGS += ["-DMDCN_ISA=baseline", "-DMDCN_BFLOAT16_PAIRS"]
_SOURCES = [
    *(_ROOT / "cc" / "core" / name for name in ("cpu/kernels.cc", "cpu/convolution.cc")),
    *(_ROOT / "cc" / "core" / name for name in ("cpu/plan.cc", "geometry.cc")),
    _ROOT / "tests" / "cc" / "bfloat16_pairs.cc",
]
_OFFSET_TYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bfloat16_pairs")

    def run(*command):
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def compile_one(source: pathlib.Path) -> pathlib.Path:
        run(*_COMPILER, *_FLAGS, "-c", source, "-o", directory / f"{source.stem}.o")
        return directory / f"{source.stem}.o"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _SOURCES))
    run(*_COMPILER, "-shared", "-pthread", *objects, "-o", directory / "pairs.so")
    return ctypes.CDLL(directory / "pairs.so")


def forward(library, case: Case, offset_type=ml_dtypes.bfloat16, threads: int = 2) -> np.ndarray:
    case = case.cast(ml_dtypes.bfloat16, offset_type)
    names = ("inputs", "filters", "offset", "mask", "bias")
    tensors = [getattr(case, name) for name in names]
    tensors = [None if tensor is None else np.ascontiguousarray(tensor) for tensor in tensors]
    shapes = np.zeros((len(names), 4), np.int64)
    for i, tensor in enumerate(tensors):
        if tensor is not None:
            shapes[i, : tensor.ndim] = tensor.shape
    first = case.data_format == "channels_first"
    paddings = ((0, 0), (0, 0)) if case.padding == "valid" else case.padding
    attributes = np.array(
        [*case.strides, *case.dilations, *paddings[0], *paddings[1], first, case.groups,
         case.deformable_groups], np.int64
    )  # fmt: skip
    out_shape = list(case.offset.shape)
    out_shape[1 if first else 3] = case.filters.shape[3]
    output = np.zeros(out_shape, ml_dtypes.bfloat16)

    def pointer(array):
        return None if array is None else array.ctypes.data_as(ctypes.c_void_p)

    failure = library.Forward(
        pointer(attributes), pointer(shapes), threads, int(offset_type == np.float32),
        (ctypes.c_void_p * len(names))(*map(pointer, tensors)), pointer(output),
    )  # fmt: skip
    assert failure == 0
    return output


def quantised(case: Case) -> Case:
    """Small whole numbers at half pixels: columns are exact in bfloat16, sums in float32. So there
    is one right result, without a tolerance."""
    rng = np.random.default_rng(1)

    def whole(tensor, most):
        return rng.choice([-1, 1], tensor.shape) * rng.integers(1, most + 1, tensor.shape)

    return case.replace(
        inputs=whole(case.inputs, 3).astype(np.float64),
        filters=whole(case.filters, 3).astype(np.float64),
        offset=np.round(2 * case.offset) / 2,
        mask=None if case.mask is None else rng.choice([0.5, 1], case.mask.shape),
        bias=None if case.bias is None else whole(case.bias, 3).astype(np.float64),
    )


def assert_exact(library, case: Case) -> None:
    expected = oracle.forward(case)
    assert np.ptp(expected[np.isfinite(expected)]) > 1
    expected = expected.astype(ml_dtypes.bfloat16)
    for name, offset_type in _OFFSET_TYPES.items():
        for threads in (1, 3):
            actual = forward(library, case, offset_type, threads)
            assert_close(actual, expected, 0, f"{name} offsets, {threads} threads")


# A plan has at most 1365 columns of two bytes and 256 positions.
_ONE_GROUP = {"groups": 1, "deformable_groups": 1}
_CASES = {
    "asymmetric": {},
    "remainders": {"in_channels": 62, "out_channels": 46, "kernel_size": (2, 2), **_ONE_GROUP},
    "no mask": {"with_mask": False, "with_bias": False},
    "groups": {"in_channels": 24, "out_channels": 12, "groups": 6, "deformable_groups": 1},
    "deformable groups of 2": {"deformable_groups": 6},
    "deformable groups of 4": {"in_channels": 36, "groups": 2, "deformable_groups": 9},
    "deformable groups of 8": {"in_channels": 24, "groups": 1, "deformable_groups": 3},
    "deformable groups of 18": {"in_channels": 36, "groups": 1, "deformable_groups": 2},
    "two plans of positions": {
        "in_channels": 72,
        "kernel_size": (3, 3),
        "groups": 2,
        "deformable_groups": 36,
    },
    "two plans of columns": {"in_channels": 236, "out_channels": 6, **_ONE_GROUP},
    "two plans of columns, groups": {"in_channels": 264, "groups": 2, "deformable_groups": 2},
    "two plans of a tap": {"in_channels": 1402, "kernel_size": (1, 2), **_ONE_GROUP},
    "odd channels": {"in_channels": 9, "kernel_size": (3, 3), **_ONE_GROUP},
    "odd groups": {"in_channels": 18, "kernel_size": (3, 3), "deformable_groups": 1},
    "odd deformable groups": {"in_channels": 18, "groups": 1, "deformable_groups": 6},
    "odd deformable groups, two plans": {  # the first plan would end at an odd column
        "in_size": (10, 9),
        "kernel_size": (5, 3),
        "in_channels": 90,
        "out_channels": 15,
        "groups": 15,
        "deformable_groups": 18,
    },
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", _CASES)
def test_exact_sums(name, data_format, library):
    case = quantised(random_case(50, **_CASES[name]))
    assert_exact(library, case if data_format == "channels_last" else case.channels_first())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ["asymmetric", "remainders"])
def test_values_that_are_not_finite(name, library):
    """Infinity in the image's frame, where samples are taken in another way; NaN offsets."""
    case = quantised(random_case(51, in_size=(8, 9), **_CASES[name]))
    inputs, offset = case.inputs.copy(), case.offset.copy()
    inputs[0, 1, 2, ::5] = np.inf
    offset[1, 1, 2, 3:40:7] = np.nan
    assert_exact(library, case.replace(inputs=inputs, offset=offset))


@pytest.mark.parametrize("channels", [2, 6, 34, 62])
def test_columns_round_to_nearest_even(channels, library):
    """An identity filter returns the samples: exact in float32, rounded once to bfloat16."""
    case = random_case(
        52, in_channels=channels, out_channels=channels, kernel_size=(1, 1), padding="valid",
        with_mask=False, with_bias=False, **_ONE_GROUP,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    inputs = rng.integers(-128, 128, case.inputs.shape).astype(np.float64)
    case = case.replace(
        inputs=inputs,
        filters=np.eye(channels)[None, None],
        offset=np.round(16 * case.offset) / 16,
    )
    samples = oracle.forward(case)
    assert np.mean(samples != samples.astype(ml_dtypes.bfloat16).astype(np.float64)) > 0.3
    assert_exact(library, case)


@pytest.mark.parametrize(
    "in_channels, groups, deformable_groups, paired",
    [
        (2, 1, 1, True),
        (8, 2, 2, True),
        (8, 2, 1, True),
        (3, 1, 1, False),
        (6, 2, 1, False),
        (6, 1, 2, False),
    ],
)
def test_pairs_are_used_where_channels_are_even(
    in_channels, groups, deformable_groups, paired, library
):
    """A sample of 1 + 2^-9, less one of 1: only columns of bfloat16 lose the difference."""
    inputs = np.ones((1, 2, 2, in_channels))
    inputs[:, :, 1, :: in_channels // groups] += 2**-7
    filters = np.zeros((1, 1, in_channels // groups, groups))
    filters[0, 0, :2, :] = [[1], [-1]]
    offset = np.zeros((1, 2, 2, 2 * deformable_groups))
    offset[:, 0, 0, 1::2] = 1 / 4
    arguments = {"groups": groups, "deformable_groups": deformable_groups}
    output = forward(library, Case(inputs, filters, offset, **arguments))
    assert output[0, 0, 0].tolist() == [0 if paired else 2**-9] * groups


@pytest.mark.parametrize("offset_type", _OFFSET_TYPES)
@pytest.mark.parametrize("name", _CASES)
def test_random_numbers(name, offset_type, library):
    case = random_case(53, **_CASES[name])
    case = case.cast(ml_dtypes.bfloat16, _OFFSET_TYPES[offset_type])
    expected = oracle.forward(case)
    actual = forward(library, case, _OFFSET_TYPES[offset_type])
    assert_close(actual, expected, rounding_bound(case, expected, ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ["asymmetric", "two plans of columns", "two plans of positions"])
def test_results_depend_neither_on_threads_nor_on_the_batch(name, library):
    case = random_case(54, in_size=(24, 23), **_CASES[name])
    one = forward(library, case, threads=1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(forward(library, case, threads=threads), one)
    images = {name: getattr(case, name) for name in ("inputs", "offset", "mask")}
    second = case.replace(**{name: image[1:] for name, image in images.items()})
    np.testing.assert_array_equal(forward(library, second, threads=3), one[1:])
