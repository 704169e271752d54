"""How TensorFlow holds the native op: graphs, unknown shapes, shape inference, which of its parts
run, and second derivatives. Separate from test_ops.py, which is about values.
"""
# ruff: noqa: E501  (a message stands on one line, where a search finds it)

import concurrent.futures

import numpy as np
import pytest
import tensorflow as tf
from native_op import RAW, forward, random_output_gradient
from oracle import assert_close, random_case, rounding_bound

from tf_mdcn import modulated_deform_conv2d, use_implementation

FORWARD = "Mdcn>ModulatedDeformConv2D"
INPUT_GRADIENT = "Mdcn>ModulatedDeformConv2DBackpropInput"
FILTER_GRADIENT = "Mdcn>ModulatedDeformConv2DBackpropFilter"


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "shape_of, second",
    [
        (lambda shape: shape, {}),
        (lambda shape: [None, *shape[1:]], {"batch": 5}),
        (lambda shape: [None] * len(shape), {"batch": 3, "in_size": (9, 8)}),
        (lambda shape: None, {"batch": 3, "in_size": (9, 8)}),
    ],
    ids=["known", "batch unknown", "sizes unknown", "rank unknown"],
)
def test_graphs_compute_what_eager_does(shape_of, second, data_format):
    """Bit for bit; with one trace for all batches and sizes where they are unknown."""
    cases = [random_case(20), random_case(21, **second)]
    if data_format == "channels_first":
        cases = [case.channels_first() for case in cases]
    names, arguments = list(cases[0].tensors), cases[0].arguments

    def value_and_gradients(*tensors):
        tensors = dict(zip(names, tensors, strict=True))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = modulated_deform_conv2d(**tensors, **arguments)
            loss = tf.reduce_sum(output * output)
        return output, tape.gradient(loss, tensors)

    signature = [tf.TensorSpec(shape_of(t.shape), t.dtype) for t in cases[0].tensors.values()]
    graph = tf.function(value_and_gradients, input_signature=signature)
    for case in cases:
        tensors = [tf.constant(tensor) for tensor in case.tensors.values()]
        expected, actual = value_and_gradients(*tensors), graph(*tensors)
        tf.nest.map_structure(np.testing.assert_array_equal, actual, expected)
    assert graph.experimental_get_tracing_count() == 1


# Shapes of inputs, filters, offset, mask, bias ("none" is an absent one), attributes, the output's.
SAME_3X2 = {"padding": "SAME", "strides": [2, 3]}
INFERENCE = [
    ([2, 7, 9, 4], [3, 2, 4, 5], [2, 5, 8, 12], "none", "none", {}, [2, 5, 8, 5]),
    ([None, 7, 9, 4], [3, 2, 4, 5], None, None, None, {}, [None, 5, 8, 5]),
    ([None, None, 9, 4], [3, 2, 4, 5], None, None, None, {}, [None, None, 8, 5]),
    ([None, None, 9, 4], [3, 2, 4, 5], [6, 5, None, 12], None, None, {}, [6, 5, 8, 5]),
    ([None, None, 9, 4], [3, 2, 4, 5], None, [6, 5, None, 6], None, {}, [6, 5, 8, 5]),
    (None, [3, 2, 4, 5], [None, 5, None, 12], [6, None, 8, 6], "none", {}, [6, 5, 8, 5]),
    (None, None, None, None, [5], {}, [None, None, None, 5]),
    (None, None, None, None, None, {}, [None] * 4),
    ([2, 7, 9, 4], None, None, None, "none", {}, [2, None, None, None]),
    ([2, 7, 9, 4], None, None, None, [5], SAME_3X2, [2, 4, 3, 5]),
    ([2, 7, 9, 4], [None, None, None, 5], None, None, None, SAME_3X2, [2, 4, 3, 5]),
    ([2, 7, 9, 4], [None, 2, None, None], None, None, None, {}, [2, None, 8, None]),
    ([2, 4, 7, 9], [3, 2, 4, 5], None, None, None, {"data_format": "NCHW"}, [2, 5, 5, 8]),
    (None, [3, 2, 4, 5], [2, 12, None, 8], None, None, {"data_format": "NCHW"}, [2, 5, None, 8]),
    (
        [0, 7, 9, 6],
        [3, 2, 2, 9],
        [0, 3, 12, 24],
        [0, 3, 12, 12],
        [9],
        {
            "padding": "EXPLICIT",
            "explicit_paddings": [1, 2, 3, 2],
            "strides": [2, 1],
            "dilations": [2, 2],
            "groups": 3,
            "deformable_groups": 2,
        },
        [0, 3, 12, 9],
    ),
]


@pytest.mark.parametrize("inputs, filters, offset, mask, bias, attributes, expected", INFERENCE)
def test_shape_inference(inputs, filters, offset, mask, bias, attributes, expected):
    with tf.Graph().as_default():
        place = tf.compat.v1.placeholder
        output = RAW.mdcn_modulated_deform_conv2d(
            inputs=place(tf.float32, inputs),
            filters=place(tf.float32, filters),
            offset=place(tf.float32, offset),
            mask=[] if mask == "none" else [place(tf.float32, mask)],
            bias=[] if bias == "none" else [place(tf.float32, bias)],
            **attributes,
        )
    assert output.shape.as_list() == expected


# What contradicts itself although much is unknown, and what the shape function says.
REFUSED = [
    ([2, 7, 9, 4], [3, 2, None, 5], None, None, {"groups": 3}, r"groups must divide in_channels; received groups=3, in_channels=4"),
    (None, [3, 2, 4, 5], None, None, {"groups": 2}, r"groups must divide out_channels; received groups=2, out_channels=5"),
    (None, [3, 2, 4, 5], None, None, {"deformable_groups": 3}, r"deformable_groups must divide in_channels; received deformable_groups=3, in_channels=4"),
    ([2, None, 9, 4], [3, 2, 4, 5], [2, None, 7, None], None, {}, r"offset must have shape .* = \[2, \?, 8, 12\]; received \[2, \?, 7, \?\]"),
    (None, [3, 2, 4, 5], [2, None, 7, 13], None, {}, r"offset must have shape .* = \[\?, \?, \?, 12\]; received \[2, \?, 7, 13\]"),
    (None, None, [2, 5, None, None], [None, 6, None, None], {}, r"mask must have shape .* = \[2, 5, \?, \?\]; received \[\?, 6, \?, \?\]"),
    ([None, 2, None, 4], [3, 2, 4, 5], None, None, {}, r"the padded input must be at least as large as the dilated kernel; received in_height=2, padding 0, dilated kernel_height=3"),
    ([None, 0, None, 4], None, None, None, {"padding": "SAME"}, r"inputs must have at least one pixel; received in_height=0"),
]  # fmt: skip


@pytest.mark.parametrize("inputs, filters, offset, mask, attributes, message", REFUSED)
def test_shape_inference_refuses_what_is_certainly_wrong(
    inputs, filters, offset, mask, attributes, message
):
    with tf.Graph().as_default():
        place = tf.compat.v1.placeholder
        with pytest.raises(ValueError, match="ModulatedDeformConv2D: " + message):
            RAW.mdcn_modulated_deform_conv2d(
                inputs=place(tf.float32, inputs),
                filters=place(tf.float32, filters),
                offset=place(tf.float32, offset),
                mask=[place(tf.float32, mask)],
                bias=[],
                **attributes,
            )


def test_gradient_ops_infer_the_shapes_of_what_they_are_gradients_of():
    case = random_case(22)
    shape = {name: tensor.shape for name, tensor in case.tensors.items()}
    with tf.Graph().as_default():
        tensors = {
            name: tf.compat.v1.placeholder(tf.float64, [None, *tensor.shape[1:]])
            for name, tensor in case.tensors.items()
        }
        output = modulated_deform_conv2d(**tensors, **case.arguments)
        gradients = dict(zip(tensors, tf.gradients(output, list(tensors.values())), strict=True))
    for name in ("inputs", "offset", "mask"):
        assert gradients[name].shape.as_list() == [None, *shape[name][1:]]
    assert gradients["filters"].shape.as_list() == [None, *shape["filters"][1:]]
    assert gradients["bias"].shape.as_list() == [shape["filters"][3]]


@pytest.mark.parametrize(
    "wanted, runs",
    [
        (["filters"], {FORWARD, FILTER_GRADIENT}),
        (["bias"], {FORWARD, FILTER_GRADIENT}),
        (["inputs"], {FORWARD, INPUT_GRADIENT}),
        (["offset", "mask"], {FORWARD, INPUT_GRADIENT}),
        (["inputs", "bias"], {FORWARD, INPUT_GRADIENT, FILTER_GRADIENT}),
    ],
    ids=str,
)
def test_only_the_gradient_ops_that_are_needed_run(wanted, runs):
    case = random_case(23)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tensors = {
            name: tf.compat.v1.placeholder(tensor.dtype, tensor.shape)
            for name, tensor in case.tensors.items()
        }
        output = modulated_deform_conv2d(**tensors, **case.arguments)
        gradients = tf.gradients(output * output, [tensors[name] for name in wanted])
        metadata = tf.compat.v1.RunMetadata()
        session.run(
            gradients,
            {tensors[name]: tensor for name, tensor in case.tensors.items()},
            options=tf.compat.v1.RunOptions(output_partition_graphs=True),
            run_metadata=metadata,
        )
    ran = {node.op for graph in metadata.partition_graphs for node in graph.node}
    assert {op for op in ran if op.startswith("Mdcn>")} == runs


def second_derivatives(case, first_of):
    """The gradient of a function of some first derivatives that is linear in none of them."""
    tensors = {name: tf.constant(tensor) for name, tensor in case.tensors.items()}
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            output = modulated_deform_conv2d(**tensors, **case.arguments)
            loss = tf.reduce_sum(tf.tanh(output) * random_output_gradient(case))
        first = inner.gradient(loss, [tensors[name] for name in first_of])
        second_loss = tf.add_n([tf.reduce_sum(tf.cast(g, tf.float64) ** 2) for g in first])
    return outer.gradient(second_loss, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "first_of, changes",
    [
        (["inputs", "filters", "offset", "mask", "bias"], {}),
        (["offset"], {}),
        (["filters"], {"with_bias": False}),
        (["inputs"], {"with_mask": False, "padding": "same"}),
        (["bias"], {"padding": "valid"}),
    ],
)
def test_second_derivatives_agree_with_the_portable_op(first_of, changes, data_format):
    case = random_case(24, **changes)
    case = case.channels_first() if data_format == "channels_first" else case
    actual = second_derivatives(case, first_of)
    with use_implementation("portable"):
        expected = second_derivatives(case, first_of)
    for name, wanted in expected.items():
        # Both round the first derivatives, then sum them again: a bound for each of the two.
        bound = 2 * rounding_bound(case, wanted.numpy(), np.float64)
        assert_close(actual[name], wanted, bound, f"second derivative for {name}")


def test_second_derivatives_with_mixed_types():
    case = random_case(25).cast(np.float16, np.float32)
    for name, gradient in second_derivatives(case, ["inputs", "offset", "filters"]).items():
        assert gradient.dtype == case.tensors[name].dtype
        assert np.all(np.isfinite(gradient)), name


def test_the_function_under_a_context_is_the_portable_one():
    case = random_case(26)

    @tf.function
    def traced():
        return modulated_deform_conv2d(**case.tensors, **case.arguments)

    def ops(function):
        return {op.type for op in function.get_concrete_function().graph.get_operations()}

    assert FORWARD in ops(traced)
    with use_implementation("portable"):
        assert FORWARD not in ops(tf.function(traced.python_function))
        portable = modulated_deform_conv2d(**case.tensors, **case.arguments)
    expected = forward(case)
    assert_close(portable, expected, 2 * rounding_bound(case, expected, np.float64))


def test_calls_at_the_same_time_do_not_share_anything():
    """Compute must write no members: one kernel object, run by several threads at once."""
    cases = [random_case(seed, in_size=(30 + seed, 19 - seed)) for seed in range(8)]
    names, arguments = list(cases[0].tensors), cases[0].arguments
    signature = [tf.TensorSpec([None] * t.ndim, t.dtype) for t in cases[0].tensors.values()]

    @tf.function(input_signature=signature)
    def value_and_gradients(*tensors):
        tensors = dict(zip(names, tensors, strict=True))
        output = modulated_deform_conv2d(**tensors, **arguments)
        return [output, *tf.gradients(output * output, list(tensors.values()))]

    def run(case):
        return [t.numpy() for t in value_and_gradients(*map(tf.constant, case.tensors.values()))]

    expected = [run(case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for actual, wanted in zip(threads.map(run, cases * 10), expected * 10, strict=True):
            for a, b in zip(actual, wanted, strict=True):
                np.testing.assert_array_equal(a, b)
