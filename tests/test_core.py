"""The core on NumPy arrays, without TensorFlow: every instruction set against the baseline and the
oracle, every thread count against one thread, and what is forced by the environment. The last
part runs TensorFlow in fresh processes, whose thread counts are fixed at their start.
"""

import concurrent.futures
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import Case, assert_close, random_case, rounding_bound

PACKAGE = pathlib.Path(importlib.util.find_spec("tf_mdcn").origin).parent


def load_core():
    """`tf_mdcn._core` without importing `tf_mdcn`, which imports TensorFlow."""
    (path,) = [
        path
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
        if (path := PACKAGE / f"_core{suffix}").is_file()
    ]
    spec = importlib.util.spec_from_file_location("_core", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CORE = load_core()
INSTRUCTION_SETS = CORE.instruction_sets()
TYPES = {
    "float64": (np.float64, np.float64),
    "float32": (np.float32, np.float32),
    "float16": (np.float16, np.float16),
    "float16, float32": (np.float16, np.float32),
    "bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    "bfloat16, float32": (ml_dtypes.bfloat16, np.float32),
}
# Channels and filters leave every remainder that vectors of 4, 8 or 16 have; more channels than a
# vector, more pixels than a tile and more positions than the kernels take at a time (256) occur.
CASES = {
    "asymmetric": {},
    "narrow": {"in_channels": 3, "out_channels": 5, "groups": 1, "deformable_groups": 3},
    "remainders": {
        "in_channels": 2 * 31,
        "out_channels": 2 * 23,
        "deformable_groups": 1,
        "kernel_size": (2, 2),
    },
    "1x1": {"kernel_size": (1, 1), "in_channels": 36, "out_channels": 34, "padding": "valid"},
    "depthwise": {"in_channels": 9, "out_channels": 18, "groups": 9, "deformable_groups": 3},
    "many deformable groups": {
        "batch": 1,
        "in_size": (5, 4),
        "kernel_size": (3, 4),
        "in_channels": 48,
        "out_channels": 17,
        "groups": 1,
        "deformable_groups": 24,
        "padding": "same",
    },
    "no mask": {"with_mask": False, "with_bias": False},
}


def keywords(case: Case) -> dict:
    padding = {"valid": "VALID", "same": "SAME"}.get(case.padding, "EXPLICIT")
    explicit = [0] * 4 if padding != "EXPLICIT" else [*case.padding[0], *case.padding[1]]
    return {
        "strides": case.strides,
        "dilations": case.dilations,
        "padding": padding,
        "explicit_paddings": explicit,
        "data_format": case.data_format,
        "groups": case.groups,
        "deformable_groups": case.deformable_groups,
    }


def contiguous(array):
    return None if array is None else np.ascontiguousarray(array)


def run(case: Case, output_gradient: np.ndarray, **options) -> dict[str, np.ndarray]:
    """The output and all gradients."""
    inputs, filters, offset, mask, bias = (
        contiguous(getattr(case, name)) for name in ("inputs", "filters", "offset", "mask", "bias")
    )
    options = {**keywords(case), **options}
    output = CORE.forward(inputs, filters, offset, mask, bias, **options)
    of_inputs, of_offset, of_mask = CORE.input_gradient(
        inputs, filters, offset, mask, output_gradient, **options
    )
    of_filters, of_bias = CORE.filter_gradient(
        inputs, list(filters.shape), offset, mask, output_gradient, **options
    )
    results = {"output": output, "inputs": of_inputs, "offset": of_offset, "filters": of_filters}
    results |= {"mask": of_mask} if mask is not None else {}
    return results | ({"bias": of_bias} if bias is not None else {})


def expected_of(case: Case, output_gradient: np.ndarray) -> dict[str, np.ndarray]:
    gradients = oracle.gradients(case, output_gradient)
    return {
        "output": oracle.forward(case),
        **{name: getattr(gradients, name) for name in case.tensors},
    }


def output_gradient_of(case: Case, seed: int = 1) -> np.ndarray:
    shape = CORE.forward(
        *(contiguous(getattr(case, n)) for n in ("inputs", "filters", "offset", "mask", "bias")),
        **keywords(case),
    ).shape
    return np.random.default_rng(seed).normal(size=shape).astype(case.inputs.dtype)


def bound_of(case: Case, expected: np.ndarray, dtype) -> float:
    return rounding_bound(case, expected[np.isfinite(expected)], dtype)


def in_layouts(case: Case):
    return [case, case.channels_first()]


def with_whole_offsets(case: Case) -> Case:
    """Half of the offsets at whole numbers, where the derivative jumps."""
    chosen = np.random.default_rng(2).uniform(size=case.offset.shape) < 0.5
    return case.replace(offset=np.where(chosen, np.round(case.offset), case.offset))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_agrees_with_the_oracle_and_the_baseline(name, types):
    case = with_whole_offsets(random_case(30, **CASES[name]))
    last, first = in_layouts(case.cast(*TYPES[types]))
    case = first if name in ("asymmetric", "many deformable groups") else last
    output_gradient = output_gradient_of(case)
    expected = expected_of(case, output_gradient)
    results = {
        instruction_set: run(case, output_gradient, instruction_set=instruction_set, threads=2)
        for instruction_set in INSTRUCTION_SETS
    }
    baseline = results["baseline"]
    for instruction_set, result in results.items():
        assert set(result) == set(expected)
        for key, actual in result.items():
            bound = bound_of(case, expected[key], actual.dtype)
            assert_close(actual, expected[key], bound, f"{instruction_set}: {key}")
            # Each is as far from the truth as `bound`; in float32 that is all they share.
            assert_close(actual, baseline[key], 2 * bound, f"{instruction_set}, baseline: {key}")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("types", TYPES)
def test_offsets_that_are_not_finite(types, instruction_set):
    case = random_case(31, in_channels=30, deformable_groups=5).cast(*TYPES[types])
    offset = case.offset.copy()
    far = min(1e30, float(ml_dtypes.finfo(offset.dtype).max))
    offset[0, 0, 0, :8] = [np.inf, 0, 0, -np.inf, far, -far, -far, 0]
    offset[1, 1, 2, 3:40:7] = np.nan
    case = case.replace(offset=offset)
    output_gradient = output_gradient_of(case)
    expected = expected_of(case, output_gradient)
    for key, actual in run(case, output_gradient, instruction_set=instruction_set).items():
        assert_close(actual, expected[key], bound_of(case, expected[key], actual.dtype), key)


# Of an image with a value that is not finite in its frame (the outermost two rows and columns),
# positions near the border are sampled in another way than of other images.
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ["asymmetric", "narrow", "no mask"])
@pytest.mark.parametrize("pixel", [(0, 0), (1, 2), (-2, 2), (2, 1), (3, -2), (-1, -1), (2, 2)])
def test_values_that_are_not_finite_reach_what_touches_them_and_nothing_else(
    pixel, name, types, instruction_set
):
    case = random_case(37, in_size=(6, 5), **CASES[name], offset_scale=3)
    case = with_whole_offsets(case).cast(*TYPES[types])
    output_gradient = output_gradient_of(case)
    inputs = case.inputs.copy()
    inputs[(1, *pixel)][::2] = [np.nan, np.inf, -np.inf][pixel[0] % 3]
    spoilt = case.replace(inputs=inputs)
    clean = run(case, output_gradient, instruction_set=instruction_set)
    found = run(spoilt, output_gradient, instruction_set=instruction_set)
    expected = expected_of(spoilt, output_gradient)
    assert not np.all(np.isfinite(expected["output"]))
    for key in ("output", "filters"):
        actual = found[key].astype(np.float64)
        kept = np.isfinite(expected[key])
        np.testing.assert_array_equal(np.isfinite(actual), kept, err_msg=key)
        np.testing.assert_array_equal(
            actual[kept], clean[key].astype(np.float64)[kept], err_msg=f"{key}, to the last bit"
        )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("in_size", [(1, 1), (1, 7), (8, 1), (2, 2), (2, 9), (7, 3)], ids=str)
def test_images_that_are_all_border(in_size, instruction_set):
    case = with_whole_offsets(random_case(38, in_size=in_size, padding="same", offset_scale=2))
    output_gradient = output_gradient_of(case)
    expected = expected_of(case, output_gradient)
    for key, actual in run(case, output_gradient, instruction_set=instruction_set).items():
        assert_close(actual, expected[key], bound_of(case, expected[key], actual.dtype), key)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_numbers_are_read_and_rounded_exactly(dtype, instruction_set):
    """Every one of them passes through; and products, exact in float32, round to nearest even."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)

    def multiplied(factors):
        """One picture of one pixel for each: no sums, whatever the vector length."""
        channels = 32  # vectors and none: 17 and 15
        inputs = every.reshape(-1, 1, 1, channels)
        filters = np.zeros((1, 1, 1, channels), dtype)
        filters[:] = factors
        offset = np.zeros((len(inputs), 1, 1, 2), dtype)
        return CORE.forward(
            inputs, filters, offset, None, None, groups=channels, instruction_set=instruction_set
        ).reshape(-1, channels)

    assert_same_bits(multiplied(1).reshape(-1), every)
    rng = np.random.default_rng(32)
    factors = rng.normal(size=32).astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        products = every.astype(np.float32).reshape(-1, 32) * factors.astype(np.float32)
        # A product below float32's normal numbers is not exact in it.
        exact = ~(np.abs(products) < np.finfo(np.float32).tiny) | (products == 0)
        expected = products.astype(dtype)
    assert np.mean(exact) > 0.95
    assert_same_bits(multiplied(factors)[exact], expected[exact])


def assert_same_bits(actual, expected):
    """NaN is NaN, whatever its payload; a zero's sign does not matter."""
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(actual[~is_nan], expected[~is_nan])


# Enough pixels for several tiles for each of 7 threads and several bands of the input gradient.
THREAD_CASES = {
    "asymmetric": {"in_size": (60, 33)},
    "channels that no slice divides": {
        "in_size": (41, 37),
        "strides": (1, 1),
        "in_channels": 37,
        "out_channels": 21,
        "groups": 1,
        "deformable_groups": 1,
    },
    "many deformable groups": {
        "batch": 1,
        "in_size": (40, 41),
        "kernel_size": (3, 3),
        "strides": (1, 1),
        "in_channels": 72,
        "out_channels": 20,
        "groups": 1,
        "deformable_groups": 36,
    },
    "many taps": {
        "in_size": (20, 21),
        "kernel_size": (17, 16),
        "strides": (1, 1),
        "padding": "same",
        "in_channels": 10,
        "out_channels": 7,
        "groups": 1,
        "deformable_groups": 1,
    },
    "many channels": {
        "batch": 1,
        "in_size": (13, 14),
        "kernel_size": (3, 3),
        "strides": (1, 1),
        "in_channels": 600,
        "out_channels": 36,
        "deformable_groups": 4,
    },
    "many small images": {"batch": 70, "in_size": (5, 6), "padding": "same"},
    "few pixels": {"batch": 1, "in_channels": 150, "out_channels": 432, "strides": (1, 1)},
}


@pytest.mark.parametrize("types", ["float32", "float64", "bfloat16, float32"])
@pytest.mark.parametrize("name", THREAD_CASES)
def test_results_do_not_depend_on_the_number_of_threads(name, types):
    """Bit for bit, forward and all gradients, in both layouts."""
    for case in in_layouts(random_case(33, **THREAD_CASES[name]).cast(*TYPES[types])):
        output_gradient = output_gradient_of(case)
        for instruction_set in INSTRUCTION_SETS:
            one = run(case, output_gradient, instruction_set=instruction_set, threads=1)
            for threads in (2, 3, 7):
                result = run(
                    case, output_gradient, instruction_set=instruction_set, threads=threads
                )
                different = [k for k in one if not np.array_equal(result[k], one[k])]
                assert not different, (
                    f"{instruction_set}, {case.data_format}, {threads} threads instead of 1: "
                    f"other bits in {different}"
                )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_sample_does_not_depend_on_its_batch(instruction_set):
    """Bit for bit, also where one sample has so few pixels that it is computed by filters."""
    settings = THREAD_CASES["few pixels"] | {"batch": 6}
    case = random_case(39, **settings).cast(np.float32)

    def forward_of(samples):
        inputs, offset, mask = (
            np.ascontiguousarray(tensor[samples])
            for tensor in (case.inputs, case.offset, case.mask)
        )
        options = {**keywords(case), "instruction_set": instruction_set, "threads": 2}
        return CORE.forward(inputs, case.filters, offset, mask, case.bias, **options)

    together = forward_of(slice(None))
    assert together[..., 0].size > 256 > together[0, ..., 0].size
    for sample in range(6):
        np.testing.assert_array_equal(forward_of([sample])[0], together[sample])


def test_a_call_repeats_itself():
    case = random_case(34, in_size=(40, 41)).cast(np.float32)
    output_gradient = output_gradient_of(case)
    first = run(case, output_gradient, threads=7)
    for _ in range(5):
        for key, again in run(case, output_gradient, threads=7).items():
            np.testing.assert_array_equal(again, first[key], err_msg=key)


def test_the_layouts_differ_in_nothing_but_the_layout():
    last, first = in_layouts(random_case(35).cast(np.float32))
    output_gradient = output_gradient_of(last)
    expected = run(last, output_gradient)
    actual = run(first, np.ascontiguousarray(np.moveaxis(output_gradient, -1, 1)))
    for key, wanted in expected.items():
        image = key in ("output", "inputs", "offset", "mask")
        np.testing.assert_array_equal(
            np.moveaxis(actual[key], 1, -1) if image else actual[key], wanted, err_msg=key
        )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_row_of_more_than_2_gib(instruction_set):
    """Byte distances within a row, and the last pixel of one, are beyond 32 bits."""
    width = 2**28 + 16
    inputs = np.zeros((1, 2, width, 1), np.float64)  # pages that nobody writes take no memory
    inputs[0, :, -8:, 0] = np.arange(16.0).reshape(2, 8)
    stride = 2**27 + 4
    offset = np.zeros((1, 2, 3, 2))
    offset[0, 0, 2] = 0.5, 1.25  # at 2^28 + 9.25, between columns 1 and 2 of those 8
    offset[0, 1, 2] = -1.5, 3.0  # half of the upper corners lies above the image
    output = CORE.forward(
        inputs, np.ones((1, 1, 1, 1)), offset, None, None, strides=(1, stride),
        instruction_set=instruction_set, threads=1,
    )  # fmt: skip
    assert output[0, :, :, 0].tolist() == [[0, 0, 1.25 + 4], [0, 0, 0.5 * 3]]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_nothing_is_written_beyond_the_outputs_that_are_returned(data_format):
    """Whole vectors are computed where fewer elements exist: every remainder up to two vectors."""
    for channels, filters in itertools.product((1, 7, 17, 33), range(1, 35, 3)):
        settings = {"in_channels": channels, "out_channels": filters, "groups": 1}
        case = random_case(36, batch=1, deformable_groups=1, **settings).cast(np.float32)
        case = case.channels_first() if data_format == "channels_first" else case
        expected = oracle.forward(case)
        for instruction_set in INSTRUCTION_SETS:
            actual = run(case, output_gradient_of(case), instruction_set=instruction_set)["output"]
            bound = rounding_bound(case, expected, np.float32)
            assert_close(actual, expected, bound, f"{instruction_set}, {channels} -> {filters}")


# What the module refuses.

SMALL = random_case(37, padding="valid").cast(np.float32)


def forward(**changes):
    options = {**keywords(SMALL), **{k: v for k, v in changes.items() if k not in SMALL.tensors}}
    tensors = {**SMALL.tensors, **{k: v for k, v in changes.items() if k in SMALL.tensors}}
    return CORE.forward(**tensors, **options)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"threads": 0}, ValueError, "threads must be at least 1; received 0"),
        ({"padding": "same"}, ValueError, "padding must be VALID, SAME or EXPLICIT; received same"),
        (
            {"data_format": "NHWC"},
            ValueError,
            "data_format must be channels_last or channels_first; received NHWC",
        ),
        ({"stride": 1}, TypeError, "unknown keyword stride"),
        (
            {"groups": 5},
            ValueError,
            "groups must divide in_channels; received groups=5, in_channels=12",
        ),
        (
            {
                "inputs": SMALL.inputs.astype(np.int32),
                "filters": SMALL.filters.astype(np.int32),
                "bias": SMALL.bias.astype(np.int32),
            },
            TypeError,
            "no kernel for inputs of dtype int32 with offset of dtype float32",
        ),
        (
            {"filters": SMALL.filters.astype(np.float64)},
            TypeError,
            "filters must have dtype float32; received float64",
        ),
        (
            {"mask": SMALL.mask.astype(np.float16)},
            TypeError,
            "mask must have dtype float32; received float16",
        ),
        (
            {"bias": SMALL.bias.astype(np.float16)},
            TypeError,
            "bias must have dtype float32; received float16",
        ),
        (
            {"offset": SMALL.offset.astype(np.float64), "mask": SMALL.mask.astype(np.float64)},
            TypeError,
            "no kernel for inputs of dtype float32 with offset of dtype float64",
        ),
        ({"inputs": SMALL.inputs[:, ::-1]}, TypeError, "inputs must be C-contiguous"),
    ],
)
def test_what_the_module_refuses(changes, error, message):
    with pytest.raises(error, match=re.escape(f"tf_mdcn._core: {message}") + "$"):
        forward(**changes)


def test_half_precision_takes_its_own_offsets_or_float32():
    half = SMALL.cast(np.float16, ml_dtypes.bfloat16)
    message = "tf_mdcn._core: offset must have dtype float32 or float16; received bfloat16"
    with pytest.raises(TypeError, match=re.escape(message) + "$"):
        CORE.forward(**half.tensors, **keywords(half))


def test_an_instruction_set_that_is_not_there():
    available = ", ".join(INSTRUCTION_SETS)
    message = (
        "tf_mdcn: the instruction set (TF_MDCN_CPU_ISA) must be one of "
        f"[{available}] on this machine; received sse9"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        forward(instruction_set="sse9")


# Fresh processes.


def fresh_python(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
    )


WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None  # its import would fail
import test_core
print(test_core.CORE.chosen_instruction_set())
test_core.forward()
"""


@pytest.mark.parametrize("name", ["", *INSTRUCTION_SETS])
def test_the_environment_forces_an_instruction_set(name):
    result = fresh_python(WITHOUT_TENSORFLOW, TF_MDCN_CPU_ISA=name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [name or INSTRUCTION_SETS[0]]


def test_the_environment_names_no_instruction_set():
    result = fresh_python(WITHOUT_TENSORFLOW, TF_MDCN_CPU_ISA="sse9")
    assert result.returncode != 0
    assert result.stderr.strip().endswith(
        "ValueError: tf_mdcn: the instruction set (TF_MDCN_CPU_ISA) must be one of "
        f"[{', '.join(INSTRUCTION_SETS)}] on this machine; received sse9"
    )


# With the number of intra-op threads as its argument: hashes of everything that the op computes.
THROUGH_TENSORFLOW = """
import os, sys
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["THREADS"]))
import json
import test_core
try:
    print(json.dumps(test_core.hashes_through_tensorflow()))
except tf.errors.InvalidArgumentError as error:
    sys.exit(error.message)
"""


def hashes_through_tensorflow() -> dict[str, str]:
    import native_op

    hashes = {}
    for name, types in itertools.product(THREAD_CASES, ("float32", "bfloat16, float32")):
        case = random_case(38, **THREAD_CASES[name]).cast(*TYPES[types])
        results = native_op.gradients(case, native_op.random_output_gradient(case))
        results["output"] = native_op.forward(case)
        for key, result in results.items():
            hashes[f"{name}, {types}: {key}"] = hashlib.sha256(result.tobytes()).hexdigest()
    return hashes


def test_tensorflow_threads_do_not_change_a_bit():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = list(
            pool.map(lambda n: fresh_python(THROUGH_TENSORFLOW, THREADS=n), ("1", "2", "5"))
        )
    for result in results:
        assert result.returncode == 0, result.stderr
    one, two, five = (json.loads(result.stdout) for result in results)
    assert len(one) == len(THREAD_CASES) * 2 * 6
    assert [key for key in one if one[key] != two[key]] == []
    assert [key for key in one if one[key] != five[key]] == []


def test_tensorflow_reports_a_wrong_instruction_set():
    result = fresh_python(THROUGH_TENSORFLOW, THREADS="2", TF_MDCN_CPU_ISA="avx1")
    assert result.returncode == 1
    assert (
        "the instruction set (TF_MDCN_CPU_ISA) must be one of "
        f"[{', '.join(INSTRUCTION_SETS)}] on this machine; received avx1" in result.stderr
    )
