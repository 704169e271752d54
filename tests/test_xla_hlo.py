"""The ops in XLA's standard operations, as devices without a handler get them: values against the
oracle, compiled for the CPU; what is given to a GPU, which is compiled as far as needs none.

Separate from test_xla.py, where the same function calls the native kernels.
"""

import re

import numpy as np
import oracle
import pytest
import tensorflow as tf
from native_op import (
    TYPES,
    bound_of,
    random_configuration,
    random_output_gradient,
    with_whole_offsets,
)
from oracle import assert_close, random_case

import tf_mdcn

# Not where the library is merely missing: there it should have been built.
pytestmark = pytest.mark.skipif(
    [int(part) for part in tf.__version__.split(".")[:2]] < [2, 20],
    reason="the headers of this TensorFlow do not let the library be built",
)

LAYOUTS = ["channels_last", "channels_first"]
CASES = {
    "one group each": {"groups": 1, "deformable_groups": 1},
    "groups within deformable groups": {"groups": 4, "deformable_groups": 2, "out_channels": 8},
    "deformable groups within groups": {"groups": 2, "deformable_groups": 4},
    "depthwise": {"in_channels": 6, "out_channels": 12, "groups": 6, "deformable_groups": 2},
    "same padding": {"padding": "same", "strides": (2, 2), "dilations": (1, 3)},
    "neither mask nor bias": {"with_mask": False, "with_bias": False},
    "one pixel": {
        "batch": 1,
        "in_size": (1, 1),
        "in_channels": 1,
        "out_channels": 1,
        "padding": ((2, 3), (1, 0)),
        "groups": 1,
        "deformable_groups": 1,
        "offset_scale": 1.0,
    },
    "one output pixel": {"in_size": (5, 3), "padding": "valid", "strides": (3, 2)},
    "far offsets": {"offset_scale": 50.0},
    "empty batch": {"batch": 0},
}


@pytest.fixture
def hlo_on_cpu(monkeypatch):
    monkeypatch.setenv("TF_MDCN_XLA_LOWERING", "hlo")


def in_layout(case, data_format):
    return case.channels_first() if data_format == "channels_first" else case


def numpy_dtype(name):
    return tf.as_dtype(name).as_numpy_dtype


def step_of(case):
    """The compiled function that gives output and gradients of a case."""

    @tf.function(jit_compile=True)
    def step(tensors, output_gradient):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = tf_mdcn.modulated_deform_conv2d(**tensors, **case.arguments)
        return output, tape.gradient(output, tensors, output_gradients=output_gradient)

    return step


def arguments_of(case):
    tensors = {name: tf.constant(tensor) for name, tensor in case.tensors.items()}
    return tensors, tf.constant(random_output_gradient(case))


def run(case):
    output, gradients = step_of(case)(*arguments_of(case))
    return output.numpy(), {name: gradient.numpy() for name, gradient in gradients.items()}


def check(case):
    """Fails unless output and gradients are the oracle's, to rounding in the types of the case."""
    output, gradients = run(case)
    expected = oracle.forward(case)
    assert output.dtype == case.inputs.dtype
    assert_close(output, expected, bound_of(case, expected, output.dtype), "output")
    expected_gradients = oracle.gradients(case, random_output_gradient(case))
    assert set(gradients) == set(case.tensors)
    for name, gradient in gradients.items():
        expected = getattr(expected_gradients, name)
        assert gradient.dtype == case.tensors[name].dtype
        bound = bound_of(case, expected, gradient.dtype)
        assert_close(gradient, expected, bound, f"gradient of {name}")


# ---- Values. ----


@pytest.mark.parametrize("seed", range(16))
def test_random_cases_agree_with_the_oracle(seed, hlo_on_cpu):
    """Whole-number positions among them, from outside to outside."""
    case = with_whole_offsets(random_case(seed, **random_configuration(seed)))
    check(in_layout(case, LAYOUTS[seed % 2]))


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype, sampling_dtype", TYPES)
def test_every_type_agrees_with_the_oracle(dtype, sampling_dtype, data_format, hlo_on_cpu):
    case = random_case(3).cast(numpy_dtype(dtype), numpy_dtype(sampling_dtype))
    check(in_layout(case, data_format))


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_arguments_agree_with_the_oracle(name, data_format, hlo_on_cpu):
    check(in_layout(random_case(4, **CASES[name]), data_format))


def test_half_precision_rounds_once(hlo_on_cpu):
    """Positions, sums and the bias are float32; only the output is rounded."""
    case = random_case(in_size=(40, 40), padding="same", strides=(5, 5)).cast(np.float16)
    exact = oracle.forward(case)
    bound = np.finfo(np.float16).eps / 2 * np.abs(exact) + 1e-4
    error = np.abs(run(case)[0].astype(np.float64) - exact)
    assert np.all(error <= bound), (error / bound).max()


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_offsets_that_are_not_finite(dtype, data_format, hlo_on_cpu):
    case = random_case(8).cast(numpy_dtype(dtype))
    far = min(1e30, float(tf.as_dtype(dtype).max))
    case.offset[0, 0, 0, :6] = [np.inf, 0, 0, -np.inf, far, -far]
    case.offset[1, 1, 2, 3] = case.offset[1, 0, 5, 4] = np.nan
    assert np.isnan(oracle.forward(case)).any()
    check(in_layout(case, data_format))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_corners_outside_read_no_pixel(value, hlo_on_cpu):
    """Neither the one across the border nor the first or the last, where clamped indices lead."""
    case = random_case(9, padding="valid", dilations=(1, 1), with_bias=False)
    # The first tap of the first output row reads half of input row 0, and all others nothing.
    offset = np.full(case.offset.shape, 1e6)
    offset[:, 0, :, 0::12], offset[:, 0, :, 1::12] = -0.5, 0.25
    case = case.replace(offset=offset)
    spoilt = case.inputs.copy()
    spoilt[:, 1:] = value
    check(case)
    expected, expected_gradients = run(case)
    found, gradients = run(case.replace(inputs=spoilt))
    assert expected.any()
    np.testing.assert_array_equal(found, expected)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, expected_gradients[name], err_msg=name)
    outside = case.replace(inputs=np.full_like(spoilt, value), offset=np.full_like(offset, -1e6))
    assert not run(outside)[0].any()


def test_it_is_what_ran(hlo_on_cpu):
    case = random_case()
    hlo = step_of(case).experimental_get_compiler_ir(*arguments_of(case))(stage="hlo")
    assert "custom-call" not in hlo and " scatter(" in hlo


def test_other_lowerings_are_refused(monkeypatch):
    monkeypatch.setenv("TF_MDCN_XLA_LOWERING", "llo")
    message = r"\(TF_MDCN_XLA_LOWERING\) must be hlo or nothing; received llo"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(random_case())


# ---- For a GPU. ----


def gpu_hlo(case):
    step = step_of(case)
    return step.experimental_get_compiler_ir(*arguments_of(case))(stage="hlo", platform_name="GPU")


def count(hlo, operation):
    return len(re.findall(rf" {operation}\(", hlo))


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype, sampling_dtype", TYPES)
def test_a_gpu_gets_standard_operations(dtype, sampling_dtype, data_format):
    case = random_case().cast(numpy_dtype(dtype), numpy_dtype(sampling_dtype))
    hlo = gpu_hlo(in_layout(case, data_format))
    assert "custom-call" not in hlo
    # In each of the three ops a gather and a product; one of them scatters.
    assert [count(hlo, name) for name in ("gather", "dot", "scatter")] == [3, 3, 1]


def test_taps_are_not_unrolled():
    lines = [
        gpu_hlo(random_case(in_size=(9, 9), kernel_size=size)).count("\n")
        for size in ((2, 2), (3, 4))
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("batch", [0, 1])
def test_a_gpu_gets_what_shapes_need(batch):
    hlo = gpu_hlo(random_case(batch=batch))
    assert count(hlo, "gather") == (3 if batch else 0)


@pytest.mark.parametrize("in_width, integer", [(2**15 - 1, "s32"), (2**15, "s64")])
def test_indices_are_as_wide_as_the_input_needs(in_width, integer):
    """The input has 2^31 rows of one channel, or fewer; it is never made."""

    @tf.function(jit_compile=True)
    def forward(inputs, filters, offset):
        return tf_mdcn.modulated_deform_conv2d(
            inputs, filters, offset, strides=2**14, deformable_groups=2
        )

    shapes = [(1, 2**15, in_width, 2), (1, 1, 2, 3), (1, 2, 2, 4)]
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    hlo = forward.experimental_get_compiler_ir(*specs)(stage="hlo", platform_name="GPU")
    (indices,) = re.findall(r"gather\(f32\[\d+,1\]\S* \S+ (\w+)\[", hlo)
    assert indices == integer


@pytest.mark.parametrize("enabled", [True, False])
def test_tensor_float_32_is_tensorflow_s_choice(enabled):
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(enabled)
    try:
        hlo = gpu_hlo(random_case().cast(np.float32))
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
    assert hlo.count("operand_precision={highest,highest}") == (0 if enabled else 3)
