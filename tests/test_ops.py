"""The native op's values: forward and gradients against the oracle, numeric differentiation and
tf.nn.conv2d, in all types, layouts and shapes. How TensorFlow holds the op (graphs, shapes,
pruning, second derivatives) and what it refuses have files of their own.
"""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from native_op import (
    TYPES,
    check_forward_and_gradients,
    forward,
    gradients,
    random_configuration,
    random_output_gradient,
    with_whole_offsets,
)
from oracle import Case, assert_close, random_case

from tf_mdcn import modulated_deform_conv2d

LAYOUTS = ["channels_last", "channels_first"]
# What no random case has. Positions are deformable_groups * taps; the kernels take 256 at a time.
SHAPES = {
    "one pixel": {
        "batch": 1,
        "in_size": (1, 1),
        "kernel_size": (1, 1),
        "padding": ((0, 0), (0, 0)),
    },
    "one output pixel": {"in_size": (5, 3), "padding": "valid", "strides": (3, 2)},
    "odd channels": {"in_channels": 5, "out_channels": 7, "groups": 1, "deformable_groups": 5},
    "one channel": {"in_channels": 1, "out_channels": 1, "groups": 1, "deformable_groups": 1},
    "depthwise": {"in_channels": 6, "out_channels": 12, "groups": 6, "deformable_groups": 2},
    "1x1": {"kernel_size": (1, 1), "in_size": (9, 8), "in_channels": 36, "out_channels": 34},
    "5x5": {"kernel_size": (5, 5), "in_size": (9, 7), "padding": "same", "dilations": (1, 2)},
    "many taps": {
        "batch": 1,
        "kernel_size": (17, 16),
        "in_size": (3, 4),
        "padding": "same",
        "in_channels": 19,
        "out_channels": 3,
        "groups": 1,
        "deformable_groups": 1,
    },
    "many deformable groups": {
        "batch": 1,
        "kernel_size": (3, 3),
        "in_size": (5, 4),
        "padding": "same",
        "in_channels": 60,
        "deformable_groups": 30,
    },
    "many channels": {
        "batch": 1,
        "in_size": (9, 11),
        "kernel_size": (3, 3),
        "padding": "same",
        "strides": (1, 1),
        "in_channels": 530,
        "out_channels": 6,
        "deformable_groups": 2,
    },
    "many filters": {"in_channels": 6, "out_channels": 530},
    "filters with a remainder": {"in_channels": 6, "out_channels": 2 * 37},
    "many pixels": {
        "batch": 3,
        "in_size": (23, 29),
        "kernel_size": (1, 1),
        "strides": (1, 1),
        "padding": "valid",
        "in_channels": 3,
        "out_channels": 2,
        "groups": 1,
        "deformable_groups": 1,
    },
    "no mask": {"with_mask": False},
    "no bias": {"with_bias": False},
    "neither": {"with_mask": False, "with_bias": False},
}


def in_layout(case: Case, data_format: str) -> Case:
    return case.channels_first() if data_format == "channels_first" else case


def numpy_dtype(name: str):
    return tf.as_dtype(name).as_numpy_dtype


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("seed", range(40))
def test_random_cases_agree_with_the_oracle(seed, data_format):
    case = with_whole_offsets(random_case(seed, **random_configuration(seed)))
    check_forward_and_gradients(in_layout(case, data_format))


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype, sampling_dtype", TYPES)
def test_every_type_agrees_with_the_oracle(dtype, sampling_dtype, data_format):
    case = random_case(3).cast(numpy_dtype(dtype), numpy_dtype(sampling_dtype))
    check_forward_and_gradients(in_layout(case, data_format))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_unusual_shapes_agree_with_the_oracle(name, dtype):
    case = random_case(4, **SHAPES[name]).cast(numpy_dtype(dtype))
    check_forward_and_gradients(case)
    if dtype == "float32":
        check_forward_and_gradients(case.channels_first())


@pytest.mark.parametrize("data_format", LAYOUTS)
def test_an_empty_batch(data_format):
    case = in_layout(random_case(5, batch=2), data_format)
    empty = case.replace(inputs=case.inputs[:0], offset=case.offset[:0], mask=case.mask[:0])
    output = forward(empty)
    assert output.shape == (0, *forward(case).shape[1:])
    found = gradients(empty, output)
    for name, tensor in empty.tensors.items():
        assert found[name].shape == tensor.shape
        assert not np.any(found[name]), name  # of filters and bias: sums over nothing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strides": (1, 3), "dilations": (1, 2), "padding": ((2, 1), (0, 3))},
        {"kernel_size": (2, 3), "padding": "same", "groups": 3, "deformable_groups": 4},
        {"with_mask": False, "with_bias": False, "padding": "valid", "dilations": (1, 1)},
    ],
)
def test_gradients_are_those_of_numeric_differentiation(changes):
    """Away from whole numbers the output is linear in every single element, so that a central
    difference has no error but rounding, however large the step."""
    settings = {"batch": 1, "in_size": (5, 6), "out_channels": 6, **changes}
    case = random_case(6, **settings)
    output_gradient = random_output_gradient(case)
    step = 1 / 32  # offsets are 1/16 away from whole numbers
    tensors = {name: tf.Variable(tensor) for name, tensor in case.tensors.items()}

    @tf.function
    def differences(name):
        """Of the scalar, for every element of a tensor."""
        flat = tf.reshape(tensors[name], [-1])

        def scalar(index, change):
            changed = tf.tensor_scatter_nd_add(flat, [[index]], [change])
            arguments = {**tensors, name: tf.reshape(changed, tensors[name].shape)}
            output = modulated_deform_conv2d(**arguments, **case.arguments)
            return tf.reduce_sum(output * output_gradient)

        def difference(index):
            return scalar(index, tf.constant(step, tf.float64)) - scalar(
                index, tf.constant(-step, tf.float64)
            )

        return tf.map_fn(difference, tf.range(tf.size(flat)), fn_output_signature=tf.float64)

    found = gradients(case, output_gradient)
    # Each of the two scalars is a sum of `terms` rounded terms.
    terms = output_gradient.size * case.filters[..., 0].size
    magnitude = np.sum(np.abs(forward(case) * output_gradient))
    bound = 2 * terms * magnitude * np.finfo(np.float64).eps / (2 * step)
    assert bound < 1e-6
    for name, tensor in case.tensors.items():
        numeric = differences(name).numpy().reshape(tensor.shape) / (2 * step)
        assert_close(found[name], numeric, bound, f"gradient of {name}")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_derivative_at_whole_numbers_is_the_right_hand_one(dtype):
    """At every whole y and x from outside to outside, exactly -1, H - 1 and H among them. To the
    right of a whole number the sample is linear: half a pixel gives the slope without an error."""
    height, width, channels = 4, 5, 3
    rng = np.random.default_rng(7)
    targets = np.array(
        [(y, x) for y in range(-2, height + 2) for x in range(-2, width + 2)], np.float64
    )
    # One output pixel for each target, with the same picture (of small whole numbers: no rounding).
    picture = rng.integers(-4, 5, size=(1, height, width, channels))
    case = Case(
        inputs=np.repeat(picture, len(targets), axis=0).astype(np.float64),
        filters=rng.integers(-2, 3, size=(1, 1, channels, 2)).astype(np.float64),
        offset=targets.reshape(-1, 1, 1, 2),
        mask=np.full((len(targets), 1, 1, 1), 0.5),
        strides=(height, width),
    ).cast(numpy_dtype(dtype))
    output_gradient = rng.integers(-2, 3, size=(len(targets), 1, 1, 2)).astype(case.inputs.dtype)
    found = gradients(case, output_gradient)["offset"].astype(np.float64)
    here = forward(case).astype(np.float64)
    for axis in range(2):
        moved = case.offset.astype(np.float64)
        moved[..., axis] += 0.5
        there = forward(case.replace(offset=moved.astype(case.offset.dtype))).astype(np.float64)
        slope = np.sum((there - here) / 0.5 * output_gradient.astype(np.float64), axis=-1)
        assert_close(found[..., axis], slope, 0, f"{dtype}, axis {axis}")
        inside = slope[..., 0].reshape(height + 4, width + 4)
        assert np.any(inside[:, 1] if axis else inside[1]), "at -1 the slope is the first pixel"
        assert np.any(inside[:, -3] if axis else inside[-3]), "at H - 1 minus the last pixel"
        assert not np.any(inside[:, -2:] if axis else inside[-2:]), "from H on it is 0"


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_offsets_that_are_not_finite(dtype, data_format):
    case = random_case(8).cast(numpy_dtype(dtype))
    offset = case.offset.copy()
    far = min(1e30, float(tf.as_dtype(dtype).max))
    offset[0, 0, 0, :6] = [np.inf, 0, 0, -np.inf, far, -far]
    offset[1, 1, 2, 3] = np.nan
    offset[1, 0, 5, 4] = np.nan
    case = in_layout(case.replace(offset=offset), data_format)
    check_forward_and_gradients(case)
    is_nan = np.isnan(in_channels_last(forward(case).astype(np.float64), data_format))
    wanted = np.zeros(is_nan.shape, bool)
    wanted[1, 1, 2, :5] = wanted[1, 0, 5, :5] = True  # deformable group 0 is in weight group 0
    np.testing.assert_array_equal(is_nan, wanted)


def in_channels_last(image: np.ndarray, data_format: str) -> np.ndarray:
    return image if data_format == "channels_last" else np.moveaxis(image, 1, -1)


def test_infinite_offsets_sample_zero():
    case = random_case(9, with_bias=False)
    for far in (np.inf, -np.inf, 1e30, -1e30, 1e300, 2.0**31, -(2.0**31) - 1, 2.0**32, 2.0**63):
        offset = np.full_like(case.offset, far)
        assert not np.any(forward(case.replace(offset=offset))), far
        offset[..., 1::2] = 0.25  # only dy is far
        far_case = case.replace(offset=offset)
        assert not np.any(forward(far_case)), far
        found = gradients(far_case, random_output_gradient(case))
        for name, gradient in found.items():
            assert not np.any(gradient), (name, far)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_pixels_that_are_not_sampled_do_not_leak(dtype, value):
    """Their place in memory is next to those that are: in the next pixel, row, image, group."""
    dtype = numpy_dtype(dtype)
    case = random_case(10, in_size=(9, 9), in_channels=6, strides=(1, 1), padding="same")
    grid = np.arange(9)
    target = np.where(grid < 4, np.minimum(grid, 2.5), np.maximum(grid, 5.5))  # never reaches 4
    taps = case.filters.shape[:2]
    shape = (*case.offset.shape[:3], case.deformable_groups, *taps, 2)
    offset = np.zeros(shape)
    before = [(size - 1) * d // 2 for size, d in zip(taps, case.dilations, strict=True)]
    for i, j in np.ndindex(*taps):
        y = grid - before[0] + i * case.dilations[0]
        x = grid - before[1] + j * case.dilations[1]
        offset[:, :, :, :, i, j, 0] = (target - y)[None, :, None, None]
        offset[:, :, :, :, i, j, 1] = (target - x)[None, None, :, None]
    case = case.replace(offset=offset.reshape(case.offset.shape)).cast(dtype)
    inputs = case.inputs.copy()
    inputs[:, 4] = inputs[:, :, 4] = value
    spoilt = case.replace(inputs=inputs)
    np.testing.assert_array_equal(forward(spoilt), forward(case))
    output_gradient = random_output_gradient(case)
    expected = gradients(case, output_gradient)
    for name, gradient in gradients(spoilt, output_gradient).items():
        assert np.all(np.isfinite(gradient.astype(np.float64))), name
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "strides, dilations", [((1, 1), (1, 1)), ((3, 2), (1, 1)), ((1, 1), (2, 3))]
)
@pytest.mark.parametrize(
    "padding", ["valid", "SAME", 1, (2, 0), [0, 3], ((1, 0), (2, 3)), ((0, 2), (1, 0))], ids=str
)
def test_zero_offset_and_unit_mask_equal_conv2d(padding, strides, dilations, dtype):
    rng = np.random.default_rng(11)
    inputs = rng.normal(size=(2, 11, 12, 10)).astype(dtype)
    filters = rng.normal(size=(3, 4, 5, 6)).astype(dtype)
    bias = rng.normal(size=6).astype(dtype)
    if isinstance(padding, str):
        their_padding = padding.upper()
    else:
        pair = (padding, padding) if isinstance(padding, int) else padding
        pair = [(p, p) if isinstance(p, int) else p for p in pair]
        their_padding = [(0, 0), *pair, (0, 0)]
    expected = np.concatenate(
        [
            tf.nn.conv2d(
                inputs[..., 5 * group : 5 * group + 5],
                filters[..., 3 * group : 3 * group + 3],
                strides,
                their_padding,
                dilations=dilations,
            )
            for group in range(2)
        ],
        axis=-1,
    )
    offset = np.zeros((*expected.shape[:3], 2 * 5 * 12), dtype)
    mask = np.ones((*expected.shape[:3], 5 * 12), dtype)
    arguments = {"strides": strides, "padding": padding, "dilations": dilations}
    arguments |= {"groups": 2, "deformable_groups": 5}
    # Two sums of 60 terms, each in an order of its own.
    bound = 2 * 4 * np.sqrt(61) * np.finfo(dtype).eps * np.max(np.abs(expected))
    with_mask = modulated_deform_conv2d(inputs, filters, offset, mask, bias, **arguments)
    assert_close(with_mask, expected + bias, bound, "with a mask and a bias")
    without = modulated_deform_conv2d(inputs, filters, offset, **arguments)
    assert_close(without, expected, bound, "without")


# More than a tile, a band of the input gradient, and 256 positions, for one image and for three.
BATCH_CASES = {
    "plain": {},
    "remainders": {"in_size": (19, 17), "in_channels": 35, "out_channels": 9, "groups": 1,
                   "deformable_groups": 5, "strides": (1, 1)},
    "many deformable groups": {"in_size": (24, 25), "in_channels": 72, "out_channels": 24,
                               "groups": 1, "kernel_size": (3, 3), "strides": (1, 1),
                               "deformable_groups": 36},
    "many taps": {"in_size": (22, 21), "in_channels": 10, "out_channels": 5, "groups": 1,
                  "kernel_size": (17, 16), "strides": (1, 1), "padding": "same",
                  "deformable_groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", BATCH_CASES)
def test_a_sample_does_not_depend_on_its_batch(name, dtype):
    """Bit for bit, forward and gradients of what belongs to the sample."""
    case = random_case(12, batch=3, **BATCH_CASES[name]).cast(numpy_dtype(dtype))
    output_gradient = random_output_gradient(case)
    together, gradients_together = forward(case), gradients(case, output_gradient)
    for i in range(3):
        alone = case.replace(
            **{key: case.tensors[key][i : i + 1] for key in ("inputs", "offset", "mask")}
        )
        np.testing.assert_array_equal(forward(alone)[0], together[i], err_msg=f"output {i}")
        found = gradients(alone, output_gradient[i : i + 1])
        for key in ("inputs", "offset", "mask"):
            np.testing.assert_array_equal(
                found[key][0], gradients_together[key][i], err_msg=f"gradient of {key}, sample {i}"
            )


def test_the_oracle_in_the_layouts_is_one():
    """What the comparisons above rest on: the oracle's layouts agree exactly."""
    case = random_case(13)
    np.testing.assert_array_equal(
        np.moveaxis(oracle.forward(case), -1, 1), oracle.forward(case.channels_first())
    )
