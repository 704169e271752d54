"""What the op refuses, and its words: by the public function, by the shape function while a graph
is built, and by Compute past both. Separate from test_ops.py, which is about values.
"""
# ruff: noqa: E501  (a message stands on one line, where a search finds it)

import re

import numpy as np
import pytest
import tensorflow as tf
from native_op import RAW

from tf_mdcn import modulated_deform_conv2d

# A call that is right: groups, deformable groups, and no two sizes alike.
SHAPES = {
    "inputs": [2, 7, 9, 12],
    "filters": [3, 2, 6, 10],
    "offset": [2, 5, 8, 36],
    "mask": [2, 5, 8, 18],
    "bias": [10],
}
ATTRIBUTES = {"groups": 2, "deformable_groups": 3}
OP = "ModulatedDeformConv2D"
OFFSET_RULE = (
    "offset must have shape [batch, out_height, out_width, 2 * deformable_groups * kernel_height * "
    "kernel_width] = "
)
MASK_RULE = (
    "mask must have shape [batch, out_height, out_width, deformable_groups * kernel_height * "
    "kernel_width] = "
)
FILTERS_RULE = (
    "filters must have shape [kernel_height, kernel_width, in_channels / groups, out_channels] = "
)

# Wrong shapes, which all three refuse in the same words.
WRONG_SHAPES = [
    ({"inputs": [7, 9, 12]}, {}, "inputs must have rank 4, [batch, in_height, in_width, in_channels]; received shape [7, 9, 12]"),
    ({"filters": [3, 2, 6]}, {}, "filters must have rank 4, [kernel_height, kernel_width, in_channels / groups, out_channels]; received shape [3, 2, 6]"),
    ({"offset": [2, 5, 8, 3, 12]}, {}, "offset must have rank 4, [batch, out_height, out_width, 2 * deformable_groups * kernel_height * kernel_width]; received shape [2, 5, 8, 3, 12]"),
    ({"mask": [2, 5, 8]}, {}, "mask must have rank 4, [batch, out_height, out_width, deformable_groups * kernel_height * kernel_width]; received shape [2, 5, 8]"),
    ({"bias": [1, 10]}, {}, "bias must have rank 1, [out_channels]; received shape [1, 10]"),
    ({"filters": [3, 0, 6, 10]}, {}, "filters must have dimensions between 1 and 2^31 - 1; received shape [3, 0, 6, 10]"),
    ({"inputs": [2, 7, 9, 0]}, {}, "inputs must have at least one channel; received shape [2, 7, 9, 0]"),
    ({}, {"groups": 5}, "groups must divide in_channels; received groups=5, in_channels=12"),
    ({}, {"groups": 4}, "groups must divide out_channels; received groups=4, out_channels=10"),
    ({}, {"deformable_groups": 5}, "deformable_groups must divide in_channels; received deformable_groups=5, in_channels=12"),
    ({"filters": [3, 2, 12, 10]}, {}, FILTERS_RULE + "[3, 2, 6, 10]; received [3, 2, 12, 10]"),
    ({"inputs": [2, 2, 9, 12]}, {}, "the padded input must be at least as large as the dilated kernel; received in_height=2, padding 0, dilated kernel_height=3"),
    ({"inputs": [2, 7, 0, 12]}, {}, "the padded input must be at least as large as the dilated kernel; received in_width=0, padding 0, dilated kernel_width=2"),
    ({}, {"dilations": [4, 1]}, "the padded input must be at least as large as the dilated kernel; received in_height=7, padding 0, dilated kernel_height=9"),
    ({"inputs": [2, 7, 0, 12]}, {"padding": "SAME"}, "inputs must have at least one pixel; received in_width=0"),
    ({"offset": [2, 5, 8, 18]}, {}, OFFSET_RULE + "[2, 5, 8, 36]; received [2, 5, 8, 18]"),
    ({"offset": [2, 7, 9, 36]}, {}, OFFSET_RULE + "[2, 5, 8, 36]; received [2, 7, 9, 36]"),
    ({"offset": [1, 5, 8, 36]}, {}, OFFSET_RULE + "[2, 5, 8, 36]; received [1, 5, 8, 36]"),
    ({}, {"strides": [1, 2]}, OFFSET_RULE + "[2, 5, 4, 36]; received [2, 5, 8, 36]"),
    ({}, {"padding": "SAME"}, OFFSET_RULE + "[2, 7, 9, 36]; received [2, 5, 8, 36]"),
    ({"mask": [2, 5, 8, 36]}, {}, MASK_RULE + "[2, 5, 8, 18]; received [2, 5, 8, 36]"),
    ({"mask": [2, 8, 5, 18]}, {}, MASK_RULE + "[2, 5, 8, 18]; received [2, 8, 5, 18]"),
    ({"bias": [12]}, {}, "bias must have shape [out_channels] = [10]; received [12]"),
    ({"inputs": [2, 12, 7, 9], "offset": [2, 5, 8, 36]}, {"data_format": "NCHW"}, "offset must have shape [batch, 2 * deformable_groups * kernel_height * kernel_width, out_height, out_width] = [2, 36, 5, 8]; received [2, 5, 8, 36]"),
]  # fmt: skip

# Wrong attributes of the op, which Python does not let through.
PAIR = "must be 2 integers between 1 and 2^31 - 1; received "
LENGTH_2 = "must be 2 integers [height, width]; received "
PADDINGS = "explicit_paddings must be 4 integers [top, bottom, left, right]"
WRONG_ATTRIBUTES = [
    ({"strides": [0, 1]}, "strides " + PAIR + "[0, 1]"),
    ({"strides": [1, -1]}, "strides " + PAIR + "[1, -1]"),
    ({"strides": [2**31, 1]}, "strides " + PAIR + "[2147483648, 1]"),
    ({"strides": [1]}, "strides " + LENGTH_2 + "[1]"),
    ({"strides": []}, "strides " + LENGTH_2 + "[]"),
    ({"dilations": [1, 0]}, "dilations " + PAIR + "[1, 0]"),
    ({"dilations": [1, 1, 1, 1]}, "dilations " + LENGTH_2 + "[1, 1, 1, 1]"),
    ({"groups": 0}, "groups must be an integer between 1 and 2^31 - 1; received 0"),
    ({"groups": 2**31}, "groups must be an integer between 1 and 2^31 - 1; received 2147483648"),
    ({"deformable_groups": -3}, "deformable_groups must be an integer between 1 and 2^31 - 1; received -3"),
    ({"padding": "EXPLICIT", "explicit_paddings": [1, 1]}, PADDINGS + " or empty; received [1, 1]"),
    ({"padding": "EXPLICIT", "explicit_paddings": [0, 0, -1, 0]}, PADDINGS + " between 0 and 2^31 - 1; received [0, 0, -1, 0]"),
    ({"padding": "EXPLICIT", "explicit_paddings": [0, 2**31, 0, 0]}, PADDINGS + " between 0 and 2^31 - 1; received [0, 2147483648, 0, 0]"),
    ({"explicit_paddings": [0, 1, 0, 0]}, "explicit_paddings must be empty or 0 unless padding is EXPLICIT; received [0, 1, 0, 0]"),
]  # fmt: skip


def raw_call(shapes, attributes, masks=1, biases=1, tensor=tf.zeros):
    shapes, attributes = {**SHAPES, **shapes}, {**ATTRIBUTES, **attributes}
    return RAW.mdcn_modulated_deform_conv2d(
        inputs=tensor(shapes["inputs"]),
        filters=tensor(shapes["filters"]),
        offset=tensor(shapes["offset"]),
        mask=[tensor(shapes["mask"])] * masks,
        bias=[tensor(shapes["bias"])] * biases,
        **attributes,
    )


def matches(operation: str, message: str) -> str:
    """The whole message: what follows it is TensorFlow's."""
    return re.escape(f"{operation}: {message}") + r"( \[Op| for '|\n|$)"


def public_arguments(attributes):
    """The same for the public function."""
    arguments = {**ATTRIBUTES, **attributes}
    if "data_format" in attributes:
        arguments["data_format"] = "channels_first"
    return arguments


def test_the_right_call_is_right():
    assert raw_call({}, {}).shape == [2, 5, 8, 10]


@pytest.mark.parametrize("shapes, attributes, message", WRONG_SHAPES)
def test_wrong_shapes(shapes, attributes, message):
    full = matches(OP, message)
    with pytest.raises(tf.errors.InvalidArgumentError, match=full):  # Compute
        raw_call(shapes, attributes)
    with tf.Graph().as_default(), pytest.raises(ValueError, match=full):  # the shape function
        raw_call(shapes, attributes, tensor=lambda s: tf.compat.v1.placeholder(tf.float32, s))
    arguments = public_arguments(attributes)
    tensors = {name: tf.zeros(shape) for name, shape in {**SHAPES, **shapes}.items()}
    with pytest.raises(ValueError, match=full):  # Python
        modulated_deform_conv2d(**tensors, **arguments)


@pytest.mark.parametrize("shapes, attributes, message", WRONG_SHAPES)
def test_wrong_shapes_that_only_running_shows(shapes, attributes, message):
    """The public function in a graph with unknown shapes: Compute is the last to look."""
    arguments = public_arguments(attributes)

    @tf.function(input_signature=[tf.TensorSpec(None)] * 5)
    def call(*tensors):
        return modulated_deform_conv2d(*tensors, **arguments)

    with pytest.raises(tf.errors.InvalidArgumentError, match=matches(OP, message)):
        call(*(tf.zeros(shape) for shape in {**SHAPES, **shapes}.values()))


@pytest.mark.parametrize("attributes, message", WRONG_ATTRIBUTES)
def test_wrong_attributes(attributes, message):
    full = matches(OP, message)
    with pytest.raises(tf.errors.InvalidArgumentError, match=full):
        raw_call({}, attributes)
    with tf.Graph().as_default(), pytest.raises(ValueError, match=full):
        raw_call({}, attributes)


@pytest.mark.parametrize("counts", [{"masks": 2}, {"biases": 3}], ids=str)
def test_more_tensors_than_one(counts):
    (name, count), *_ = counts.items()
    name = {"masks": "mask", "biases": "bias"}[name]
    full = matches(OP, f"{name} must be one tensor or none; received {count}")
    with pytest.raises(tf.errors.InvalidArgumentError, match=full):
        raw_call({}, {}, **counts)
    with tf.Graph().as_default(), pytest.raises(ValueError, match=full):
        raw_call({}, {}, **counts)


@pytest.mark.parametrize("shapes, message", [
    ({"padding": "EXPLICIT", "explicit_paddings": [2**30, 2**30, 0, 0], "strides": [2**31 - 1, 1]},
     "in_height + padding + (kernel_height - 1) * dilation must be below 2^31 - 1; received 2147483649"),
    ({"padding": "EXPLICIT", "explicit_paddings": [0, 0, 2**31 - 1, 0], "strides": [1, 2**31 - 1]},
     "in_width + padding + (kernel_width - 1) * dilation must be below 2^31 - 1; received 2147483648"),
])  # fmt: skip
def test_sizes_beyond_32_bits_are_refused(shapes, message):
    height = 2 if "height" in message else 1
    offset = tf.zeros([1, height, 3 - height, 2])
    with pytest.raises(tf.errors.InvalidArgumentError, match=matches(OP, message)):
        RAW.mdcn_modulated_deform_conv2d(
            inputs=tf.zeros([1, 1, 1, 1]),
            filters=tf.zeros([1, 1, 1, 1]),
            offset=offset,
            mask=[],
            bias=[],
            **shapes,
        )


def input_gradient(masks=1, **changes):
    shapes = {**SHAPES, "out_backprop": [2, 5, 8, 10], **changes}
    return RAW.mdcn_modulated_deform_conv2d_backprop_input(
        inputs=tf.zeros(shapes["inputs"]),
        filters=tf.zeros(shapes["filters"]),
        offset=tf.zeros(shapes["offset"]),
        mask=[tf.zeros(shapes["mask"])] * masks,
        out_backprop=tf.zeros(shapes["out_backprop"]),
        **ATTRIBUTES,
    )


def filter_gradient(masks=1, biases=1, **changes):
    shapes = {**SHAPES, "out_backprop": [2, 5, 8, 10], **changes}
    return RAW.mdcn_modulated_deform_conv2d_backprop_filter(
        inputs=tf.zeros(shapes["inputs"]),
        filters_shape=tf.constant(shapes["filters"], tf.int64),
        offset=tf.zeros(shapes["offset"]),
        mask=[tf.zeros(shapes["mask"])] * masks,
        out_backprop=tf.zeros(shapes["out_backprop"]),
        num_biases=biases,
        **ATTRIBUTES,
    )


WRONG_GRADIENT_CALLS = [
    ({"out_backprop": [2, 5, 8, 12]}, "out_backprop must have the output's shape [2, 5, 8, 10]; received [2, 5, 8, 12]"),
    ({"out_backprop": [2, 5, 80]}, "out_backprop must have the output's shape [2, 5, 8, 10]; received [2, 5, 80]"),
    ({"offset": [2, 5, 8, 34]}, OFFSET_RULE + "[2, 5, 8, 36]; received [2, 5, 8, 34]"),
    ({"mask": [2, 5, 8, 36]}, MASK_RULE + "[2, 5, 8, 18]; received [2, 5, 8, 36]"),
    ({"filters": [3, 2, 4, 10]}, FILTERS_RULE + "[3, 2, 6, 10]; received [3, 2, 4, 10]"),
    ({"inputs": [2, 7, 9]}, "inputs must have rank 4, [batch, in_height, in_width, in_channels]; received shape [2, 7, 9]"),
    ({"masks": 2}, "mask must be one tensor or none; received 2"),
]  # fmt: skip


@pytest.mark.parametrize("call", [input_gradient, filter_gradient])
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("changes, message", WRONG_GRADIENT_CALLS)
def test_wrong_calls_of_the_gradient_ops(call, changes, message, in_graph):
    name = f"{OP}BackpropInput" if call is input_gradient else f"{OP}BackpropFilter"
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=matches(name, message)):
        tf.function(call)(**changes) if in_graph else call(**changes)


WRONG_FILTERS_SHAPES = [
    ([3, 2, 6], "filters must have rank 4, [kernel_height, kernel_width, in_channels / groups, out_channels]; received shape [3, 2, 6]"),
    ([[3, 2, 6, 10]], "filters_shape must be a vector; received [1,4]"),
    ([3, 2, -1, 10], "filters must have no negative dimension; received [3, 2, -1, 10]"),
    ([3, -2, 6, 10], "filters must have no negative dimension; received [3, -2, 6, 10]"),
    ([3, 2, 6, 2**31], "filters must have dimensions between 1 and 2^31 - 1; received shape [3, 2, 6, 2147483648]"),
    ([2**16, 2**16, 1, 1], "filters must have at most 2^31 - 1 kernel taps; received shape [65536, 65536, 1, 1]"),
    ([2**30, 2**30, 1, 1], "filters must have at most 2^58 elements; received shape [1073741824, 1073741824, 1, 1]"),
    ([2**62, 2**62, 2**62, 2**62], f"filters must have at most 2^58 elements; received shape [{2**62}, {2**62}, {2**62}, {2**62}]"),
]  # fmt: skip


@pytest.mark.parametrize("filters_shape, message", WRONG_FILTERS_SHAPES)
def test_wrong_filters_shapes(filters_shape, message):
    full = matches(f"{OP}BackpropFilter", message)
    with pytest.raises(tf.errors.InvalidArgumentError, match=full):
        filter_gradient(filters=filters_shape)


def test_more_bias_gradients_than_one():
    full = matches(f"{OP}BackpropFilter", "bias_backprop must be one tensor or none; received 2")
    with pytest.raises(tf.errors.InvalidArgumentError, match=full):
        filter_gradient(biases=2)


# What Python says first.
PADDING_RULE = (
    'padding must be "valid", "same", an integer, (height, width) or ((top, bottom), (left, '
    "right)), of integers between 0 and 2^31 - 1; received "
)
COUNT = "must be an integer between 1 and 2^31 - 1; received "
WRONG_ARGUMENTS = [
    *(({"padding": wrong}, PADDING_RULE + repr(wrong)) for wrong in (
        "causal", -1, 1.0, True, None, (1, 2, 3), ((1, 2), 3), ((0, 0), (0, -1)), 2**31)),
    *(({"strides": wrong}, "strides must be an integer or 2 integers between 1 and 2^31 - 1; received " + repr(wrong))
      for wrong in (0, (1, 0), (1, 2, 1), 1.0, True, "1", None, 2**31)),
    ({"dilations": (0, 1)}, "dilations must be an integer or 2 integers between 1 and 2^31 - 1; received (0, 1)"),
    *(({"groups": wrong}, "groups " + COUNT + repr(wrong)) for wrong in (0, 1.0, False, (1, 1))),
    ({"deformable_groups": 0}, "deformable_groups " + COUNT + "0"),
    ({"data_format": "NHWC"}, 'data_format must be "channels_last" or "channels_first"; received \'NHWC\''),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS)
def test_wrong_arguments(arguments, message):
    tensors = {name: tf.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=matches(OP, message)):
        modulated_deform_conv2d(**tensors, **{**ATTRIBUTES, **arguments})


@pytest.mark.parametrize("types, message", [
    ({"inputs": "int32"}, "inputs must be float16, bfloat16, float32 or float64; received int32"),
    ({"filters": "float64"}, "filters must have the type of inputs = float32; received float64"),
    ({"offset": "float16"}, "offset must have the type of inputs = float32; received float16"),
    ({"offset": "float64"}, "offset must have the type of inputs = float32; received float64"),
    ({"inputs": "float16", "filters": "float16", "offset": "bfloat16"},
     "offset must have the type of inputs or float32 = float16 or float32; received bfloat16"),
    ({"mask": "float16"}, "mask must have the type of offset = float32; received float16"),
    ({"inputs": "float16", "filters": "float16", "bias": "float16", "mask": "float16"},
     "mask must have the type of offset = float32; received float16"),
    ({"bias": "bfloat16"}, "bias must have the type of inputs = float32; received bfloat16"),
])  # fmt: skip
def test_wrong_types(types, message):
    tensors = {name: tf.zeros(shape, types.get(name, "float32")) for name, shape in SHAPES.items()}
    with pytest.raises(TypeError, match=matches(OP, message)):
        modulated_deform_conv2d(**tensors, **ATTRIBUTES)


def test_types_without_a_kernel():
    """Past Python's checks TensorFlow itself refuses what has no kernel."""
    half = {name: tf.zeros(shape, tf.float16) for name, shape in SHAPES.items()}
    with pytest.raises(tf.errors.NotFoundError, match=f"Mdcn>{OP}"):
        RAW.mdcn_modulated_deform_conv2d(
            inputs=half["inputs"],
            filters=half["filters"],
            offset=tf.cast(half["offset"], tf.float64),
            mask=[],
            bias=[],
            **ATTRIBUTES,
        )


def test_numpy_integers_and_lists_are_integers_and_pairs():
    tensors = {name: tf.zeros(shape) for name, shape in SHAPES.items()}
    output = modulated_deform_conv2d(
        **tensors,
        strides=[np.int64(1), np.int32(1)],
        padding=np.int32(0),
        dilations=np.int64(1),
        groups=np.int64(2),
        deformable_groups=np.int32(3),
    )
    assert output.shape == [2, 5, 8, 10]
