"""Arguments: every accepted form, every refusal with its words, sizes against `tf.nn.conv2d`.

Separate from the tests of the implementations because these need none.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tf_mdcn import _arguments

OP = "ModulatedDeformConv2D"


def normalize(**changes):
    arguments = {
        "strides": 1,
        "padding": "valid",
        "data_format": "channels_last",
        "dilations": 1,
        "groups": 1,
        "deformable_groups": 1,
    }
    return _arguments.normalize_arguments(OP, **(arguments | changes))


def refusal(message: str) -> str:
    """A pattern for the whole message, which opens with the operation."""
    return f"^{re.escape(f'{OP}: {message}')}$"


@pytest.mark.parametrize("value", [2, np.int64(2), (2, 2), [2, np.int32(2)]])
@pytest.mark.parametrize("name", ["strides", "dilations"])
def test_integers_and_pairs_become_pairs(name, value):
    pair = getattr(normalize(**{name: value}), name)
    assert pair == (2, 2)
    assert all(type(size) is int for size in pair)


def test_pairs_are_height_then_width():
    arguments = normalize(strides=(3, 1), dilations=[2, 5])
    assert arguments.strides == (3, 1)
    assert arguments.dilations == (2, 5)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("valid", ("VALID", (0, 0, 0, 0))),
        ("SAME", ("SAME", (0, 0, 0, 0))),
        ("Same", ("SAME", (0, 0, 0, 0))),
        (0, ("EXPLICIT", (0, 0, 0, 0))),
        (2, ("EXPLICIT", (2, 2, 2, 2))),
        ((1, 2), ("EXPLICIT", (1, 1, 2, 2))),
        ([(1, 2), [3, 4]], ("EXPLICIT", (1, 2, 3, 4))),
    ],
)
def test_padding_forms(padding, expected):
    arguments = normalize(padding=padding)
    assert (arguments.padding, arguments.explicit_paddings) == expected


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "1", None, (1,), (1, 1, 1), (1, 0)])
@pytest.mark.parametrize("name", ["strides", "dilations"])
def test_strides_and_dilations_refusals(name, value):
    rule = f"{name} must be an integer or 2 integers between 1 and 2^31 - 1; received {value!r}"
    with pytest.raises(ValueError, match=refusal(rule)):
        normalize(**{name: value})


@pytest.mark.parametrize("value", [0, -3, 2**31, 2.0, True, None, (1, 1)])
@pytest.mark.parametrize("name", ["groups", "deformable_groups"])
def test_groups_refusals(name, value):
    rule = f"{name} must be an integer between 1 and 2^31 - 1; received {value!r}"
    with pytest.raises(ValueError, match=refusal(rule)):
        normalize(**{name: value})


@pytest.mark.parametrize(
    "value",
    ["causal", -1, 1.5, True, None, (1,), (1, -1), ((1, 2), 3), ((1, 2), (3,)), ((1, 2), (3, 0.0))],
)
def test_padding_refusals(value):
    rule = (
        'padding must be "valid", "same", an integer, (height, width) or ((top, bottom), (left, '
        f"right)), of integers between 0 and 2^31 - 1; received {value!r}"
    )
    with pytest.raises(ValueError, match=refusal(rule)):
        normalize(padding=value)


@pytest.mark.parametrize("value", ["NHWC", "CHANNELS_LAST", None])
def test_data_format_refusals(value):
    rule = f'data_format must be "channels_last" or "channels_first"; received {value!r}'
    with pytest.raises(ValueError, match=refusal(rule)):
        normalize(data_format=value)


# The shapes of a case that is right, by argument; the tests below break one thing each.
RIGHT = {
    "inputs": [2, 7, 9, 12],
    "filters": [3, 2, 6, 10],
    "offset": [2, 2, 11, 36],
    "mask": [2, 2, 11, 18],
    "bias": [10],
}
RIGHT_ARGUMENTS = {
    "strides": (2, 1),
    "padding": ((1, 0), (2, 1)),
    "dilations": (2, 1),
    "groups": 2,
    "deformable_groups": 3,
}


def check(changes, **arguments):
    _arguments.check_shapes(OP, normalize(**(RIGHT_ARGUMENTS | arguments)), **(RIGHT | changes))


def channels_first(shape):
    return [shape[0], shape[3], *shape[1:3]] if len(shape) == 4 else shape


def test_right_shapes_pass():
    check({})
    check({"mask": None, "bias": None})
    check({"inputs": [0, 7, 9, 12], "offset": [0, 2, 11, 36], "mask": [0, 2, 11, 18]})
    first = {
        name: shape if name == "filters" else channels_first(shape) for name, shape in RIGHT.items()
    }
    check(first, data_format="channels_first")


@pytest.mark.parametrize("name", RIGHT)
def test_unknown_shapes_pass(name):
    check({name: tf.TensorShape(None)})
    for axis in range(len(RIGHT[name])):
        shape = list(RIGHT[name])
        shape[axis] = None
        check({name: shape})


OFFSET_RULE = (
    "offset must have shape [batch, out_height, out_width, 2 * deformable_groups * kernel_height * "
    "kernel_width]"
)
MASK_RULE = (
    "mask must have shape [batch, out_height, out_width, deformable_groups * kernel_height * "
    "kernel_width]"
)
FILTERS_RULE = "[kernel_height, kernel_width, in_channels / groups, out_channels]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": [7, 9, 12]},
            "inputs must have rank 4, [batch, in_height, in_width, in_channels]; received shape "
            "[7, 9, 12]",
        ),
        (
            {"filters": [3, 2, 6]},
            f"filters must have rank 4, {FILTERS_RULE}; received shape [3, 2, 6]",
        ),
        ({"bias": [1, 10]}, "bias must have rank 1, [out_channels]; received shape [1, 10]"),
        (
            {"filters": [3, 0, 6, 10]},
            "filters must have dimensions between 1 and 2^31 - 1; received shape [3, 0, 6, 10]",
        ),
        (
            {"filters": [2**16, 2**16, 6, 10]},
            "filters must have at most 2^31 - 1 kernel taps; received shape [65536, 65536, 6, 10]",
        ),
        (
            {"inputs": [2, 7, 9, 0]},
            "inputs must have at least one channel; received shape [2, 7, 9, 0]",
        ),
        (
            {"inputs": [2, 7, 9, 13]},
            "groups must divide in_channels; received groups=2, in_channels=13",
        ),
        (
            {"filters": [3, 2, 6, 9]},
            "groups must divide out_channels; received groups=2, out_channels=9",
        ),
        (
            {"inputs": [2, 7, 9, 14]},
            "deformable_groups must divide in_channels; received deformable_groups=3, "
            "in_channels=14",
        ),
        (
            {"inputs": tf.TensorShape(None), "filters": [3, 2, 5, 10]},
            "deformable_groups must divide in_channels; received deformable_groups=3, "
            "in_channels=10",
        ),
        (
            {"filters": [3, 2, 12, 10]},
            f"filters must have shape {FILTERS_RULE} = [3, 2, 6, 10]; received [3, 2, 12, 10]",
        ),
        (
            {"inputs": [2, 3, 9, 12]},
            "the padded input must be at least as large as the dilated kernel; received "
            "in_height=3, padding 1, dilated kernel_height=5",
        ),
        (
            {"offset": [2, 2, 11, 35]},
            f"{OFFSET_RULE} = [2, 2, 11, 36]; received [2, 2, 11, 35]",
        ),
        (
            {"offset": [2, 3, 11, 36], "inputs": [None, None, 9, 12]},
            f"{MASK_RULE} = [2, 3, 11, 18]; received [2, 2, 11, 18]",
        ),
        (
            {"offset": [3, None, 11, 36]},
            f"{OFFSET_RULE} = [2, 2, 11, 36]; received [3, ?, 11, 36]",
        ),
        ({"mask": [2, 2, 11, 36]}, f"{MASK_RULE} = [2, 2, 11, 18]; received [2, 2, 11, 36]"),
        ({"bias": [11]}, "bias must have shape [out_channels] = [10]; received [11]"),
    ],
)
def test_shape_refusals(changes, message):
    with pytest.raises(ValueError, match=refusal(message)):
        check(changes)


def test_same_padding_refuses_an_input_without_pixels():
    message = "inputs must have at least one pixel; received in_width=0"
    with pytest.raises(ValueError, match=refusal(message)):
        check({"inputs": [2, 7, 0, 12]}, padding="same")


def test_channels_first_rules_name_the_channels_first():
    message = (
        "inputs must have rank 4, [batch, in_channels, in_height, in_width]; received shape [12]"
    )
    with pytest.raises(ValueError, match=refusal(message)):
        check({"inputs": [12]}, data_format="channels_first")


@pytest.mark.parametrize("inputs", ["float16", "bfloat16", "float32", "float64"])
def test_types_that_pass(inputs):
    _arguments.check_dtypes(OP, inputs, inputs, inputs)
    _arguments.check_dtypes(OP, inputs, inputs, inputs, inputs, inputs)
    if inputs in ("float16", "bfloat16"):
        _arguments.check_dtypes(OP, inputs, inputs, tf.float32, tf.float32, inputs)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["int32"] * 5, "inputs must be float16, bfloat16, float32 or float64; received int32"),
        (
            ["float32", "float64", "float32", None, None],
            "filters must have the type of inputs = float32; received float64",
        ),
        (
            ["float32", "float32", "float16", None, None],
            "offset must have the type of inputs = float32; received float16",
        ),
        (
            ["bfloat16", "bfloat16", "float16", None, None],
            "offset must have the type of inputs or float32 = bfloat16 or float32; received "
            "float16",
        ),
        (
            ["float16", "float16", "float32", "float16", None],
            "mask must have the type of offset = float32; received float16",
        ),
        (
            ["float16", "float16", "float32", "float32", "float32"],
            "bias must have the type of inputs = float16; received float32",
        ),
    ],
)
def test_type_refusals(types, message):
    with pytest.raises(TypeError, match=refusal(message)):
        _arguments.check_dtypes(OP, *types)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_output_size_is_that_of_conv2d(padding, stride, dilation):
    arguments = normalize(padding=padding, strides=(stride, 1), dilations=(dilation, 1))
    for size in range(7, 12):
        for kernel in (1, 2, 3):
            expected = tf.nn.conv2d(
                tf.zeros([1, size, 5, 1]),
                tf.zeros([kernel, 2, 1, 1]),
                (stride, 1),
                padding,
                dilations=(dilation, 1),
            )
            actual = _arguments.output_size(arguments, (size, 5), (kernel, 2))
            assert actual == tuple(expected.shape[1:3])


def test_output_size_of_unknown_sizes():
    assert _arguments.output_size(normalize(), (None, 5), (3, None)) == (None, None)
    assert _arguments.output_size(normalize(padding="same"), (None, 5), (3, None)) == (None, 5)


@pytest.mark.parametrize(
    ("stride", "dilation", "kernel", "size", "expected"),
    [
        (1, 1, 3, 8, (1, 1)),
        (2, 1, 3, 8, (0, 1)),
        (1, 1, 2, 8, (0, 1)),
        (3, 1, 2, 9, (0, 0)),
        (1, 2, 4, 8, (3, 3)),
        (2, 3, 2, 7, (1, 2)),
    ],
)
def test_same_padding_puts_the_odd_pixel_after(stride, dilation, kernel, size, expected):
    arguments = normalize(padding="same", strides=(stride, 1), dilations=(dilation, 1))
    amounts = _arguments.padding_amounts(arguments, (size, 4), (kernel, 1))
    assert amounts == (expected, (0, 0))
    dynamic = _arguments.padding_amounts(arguments, (tf.constant(size), 4), (kernel, 1))
    assert tuple(int(amount) for amount in dynamic[0]) == expected


def test_explicit_padding_amounts():
    arguments = normalize(padding=((1, 2), (3, 4)))
    assert _arguments.padding_amounts(arguments, (8, 8), (3, 3)) == ((1, 2), (3, 4))
