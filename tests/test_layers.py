"""The Keras layer: what it predicts, computes, trains, saves and refuses.

The op has tests of its own; here an expected value comes from a loop in NumPy that convolves, from
keras.layers.Conv2D, or from the op called by hand.
"""

import doctest
import inspect
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close

import tf_mdcn.layers
import tf_mdcn.ops
from tf_mdcn import ModulatedDeformConv2D, modulated_deform_conv2d, use_implementation

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7, "float16": 2.0**-10}

# Every argument away from its default, and no two sizes alike.
ASYMMETRIC = {
    "filters": 6,
    "kernel_size": (3, 2),
    "strides": (2, 1),
    "padding": ((1, 0), (2, 1)),
    "dilation_rate": (1, 2),
    "groups": 2,
    "deformable_groups": 4,
}
ALL_ARGUMENTS = {
    **ASYMMETRIC,
    "data_format": "channels_first",
    "activation": "relu",
    "use_bias": True,
    "kernel_initializer": keras.initializers.HeNormal(seed=1),
    "bias_initializer": keras.initializers.RandomNormal(stddev=0.5, seed=2),
    "kernel_regularizer": keras.regularizers.L2(0.25),
    "bias_regularizer": keras.regularizers.L1(0.5),
    "activity_regularizer": keras.regularizers.L2(0.125),
    "kernel_constraint": keras.constraints.MaxNorm(3.0),
    "bias_constraint": keras.constraints.NonNeg(),
    "modulated": True,
    "mask_scale": 2.0,
    "offset_kernel_initializer": keras.initializers.RandomNormal(stddev=0.25, seed=3),
    "offset_bias_initializer": keras.initializers.RandomNormal(stddev=2.0, seed=4),
    "offset_kernel_regularizer": keras.regularizers.L2(0.75),
    "offset_bias_regularizer": keras.regularizers.L1(0.375),
    "offset_kernel_constraint": keras.constraints.MaxNorm(2.0),
    "offset_bias_constraint": keras.constraints.MaxNorm(8.0),
    "offset_lr_multiplier": 0.1,
    "max_offset": 5.0,
    "trainable": False,
    "name": "every_argument",
    "dtype": "mixed_bfloat16",
}
RANDOM_BRANCH = {
    "offset_kernel_initializer": keras.initializers.RandomNormal(stddev=0.25, seed=5),
    "offset_bias_initializer": keras.initializers.RandomNormal(stddev=2.0, seed=6),
}


@pytest.fixture(params=["native", "portable"])
def implementation(request):
    with use_implementation(request.param):
        yield request.param


def random(shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def to_layout(x, data_format):
    return x if data_format == "channels_last" else np.moveaxis(x, -1, 1)


def from_layout(x, data_format):
    return x if data_format == "channels_last" else np.moveaxis(x, 1, -1)


def assert_rounding(actual, expected, scale, terms, dtype="float32"):
    """Equal up to the rounding of sums of `terms` products, each of magnitude up to `scale`."""
    assert_close(actual, expected, bound=terms * scale * EPSILON[dtype])


def same_padding(size, kernel, stride, dilation):
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def loop_convolution(x, kernel, strides, padding, dilation_rate, groups=1):
    """channels_last, in float64, one output position after the other."""
    if padding == "valid":
        padding = ((0, 0), (0, 0))
    elif padding == "same":
        padding = [
            same_padding(*sizes)
            for sizes in zip(x.shape[1:3], kernel.shape[:2], strides, dilation_rate, strict=True)
        ]
    x = np.pad(x.astype("float64"), [(0, 0), *padding, (0, 0)])
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation_rate, strict=True)]
    size = [(x.shape[1 + a] - extent[a]) // strides[a] + 1 for a in (0, 1)]
    y = np.zeros((x.shape[0], *size, kernel.shape[3]))
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    for row, column in np.ndindex(*size):
        top, left = row * strides[0], column * strides[1]
        patch = x[
            :,
            top : top + extent[0] : dilation_rate[0],
            left : left + extent[1] : dilation_rate[1],
        ]
        for group in range(groups):
            part = slice(group * outputs, (group + 1) * outputs)
            y[:, row, column, part] = np.tensordot(
                patch[..., group * inputs : (group + 1) * inputs], kernel[..., part], 3
            )
    return y


GEOMETRIES = [
    {"strides": (1, 1), "padding": "same", "dilation_rate": (1, 1)},
    {"strides": (2, 3), "padding": "same", "dilation_rate": (1, 1)},
    {"strides": (2, 1), "padding": "valid", "dilation_rate": (1, 1)},
    {"strides": (1, 2), "padding": ((1, 0), (2, 1)), "dilation_rate": (1, 1)},
    {"strides": (1, 1), "padding": "same", "dilation_rate": (2, 1)},
    {"strides": (1, 1), "padding": ((1, 0), (2, 1)), "dilation_rate": (1, 3)},
    {"strides": (2, 3), "padding": "same", "dilation_rate": (3, 2)},
    {"strides": (3, 2), "padding": "valid", "dilation_rate": (2, 2)},
]


# What is computed.


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_starts_as_a_convolution(implementation, geometry, data_format):
    layer = ModulatedDeformConv2D(
        6, (3, 2), groups=2, mask_scale=2.0, bias_initializer="ones", data_format=data_format,
        **geometry,
    )  # fmt: skip
    x = random((2, 9, 10, 4))
    y = from_layout(layer(to_layout(x, data_format)), data_format)
    kernel = layer.kernel.numpy()
    expected = loop_convolution(x, kernel, groups=2, **geometry) + 1
    assert_rounding(y, expected, np.abs(x).max() * np.abs(kernel).max(), terms=kernel[..., 0].size)


def test_equals_keras_conv2d_at_the_start(implementation):
    x = random((2, 9, 10, 4))
    arguments = {"filters": 6, "kernel_size": 3, "padding": "same", "activation": "tanh"}
    conv = keras.layers.Conv2D(**arguments)
    deform = ModulatedDeformConv2D(mask_scale=2.0, **arguments)
    expected = conv(x)
    deform.build(x.shape)
    deform.set_weights(conv.get_weights() + deform.get_weights()[2:])
    assert_rounding(deform(x), expected, np.abs(x).max(), terms=36)


def test_starts_at_half_a_convolution_by_default():
    layer = ModulatedDeformConv2D(5, 3)
    _, mask = layer.predict_offset_and_mask(random((1, 5, 6, 2)))
    np.testing.assert_array_equal(mask, np.full((1, 3, 4, 9), 0.5, "float32"))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("group", [0, 1])
def test_offset_channels_are_group_tap_then_dy_dx(implementation, group, data_format):
    """Moves one tap of one deformable group, by the bias alone."""
    layer = ModulatedDeformConv2D(
        1, (2, 3), deformable_groups=2, mask_scale=2.0, kernel_initializer="ones",
        data_format=data_format,
    )  # fmt: skip
    x = random((1, 9, 10, 4))
    layer.build(to_layout(x, data_format).shape)
    tap_row, tap_column = 1, 2
    channel = (group * 6 + tap_row * 3 + tap_column) * 2
    bias = np.zeros(layer.offset_bias.shape)
    bias[channel : channel + 2] = 2, -1
    layer.offset_bias.assign(bias)
    y = from_layout(layer(to_layout(x, data_format)), data_format)[..., 0]

    channels = slice(group * 2, group * 2 + 2)
    padded = np.pad(x, [(0, 0), (0, 2), (0, 0), (0, 0)])[..., channels].sum(-1)
    expected = loop_convolution(x, np.ones((2, 3, 4, 1)), (1, 1), "valid", (1, 1))[..., 0]
    expected -= padded[:, tap_row : tap_row + 8, tap_column : tap_column + 8]
    expected += padded[:, tap_row + 2 : tap_row + 10, tap_column - 1 : tap_column + 7]
    assert_rounding(y, expected, np.abs(x).max(), terms=24)


@pytest.mark.parametrize("group", [0, 1])
def test_mask_channels_follow_the_offsets(implementation, group):
    """Switches one tap of one deformable group off, by the bias alone."""
    layer = ModulatedDeformConv2D(
        1, (2, 3), deformable_groups=2, mask_scale=2.0, kernel_initializer="ones"
    )
    x = random((1, 5, 6, 4))
    layer.build(x.shape)
    tap_row, tap_column = 1, 0
    bias = np.zeros(layer.offset_bias.shape)
    bias[24 + group * 6 + tap_row * 3 + tap_column] = -200
    layer.offset_bias.assign(bias)
    kernel = np.ones((2, 3, 4, 1))
    kernel[tap_row, tap_column, group * 2 : group * 2 + 2] = 0
    expected = loop_convolution(x, kernel, (1, 1), "valid", (1, 1))
    assert_rounding(layer(x), expected, np.abs(x).max(), terms=24)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_offset_branch_is_a_convolution(geometry, data_format):
    layer = ModulatedDeformConv2D(
        6, (3, 2), groups=2, deformable_groups=4, mask_scale=1.5, data_format=data_format,
        **geometry, **RANDOM_BRANCH,
    )  # fmt: skip
    x = random((2, 9, 10, 4))
    offset, mask = layer.predict_offset_and_mask(to_layout(x, data_format))
    kernel, bias = layer.offset_kernel.numpy(), layer.offset_bias.numpy()
    assert kernel.shape == (3, 2, 4, 3 * 4 * 6)
    raw = loop_convolution(x, kernel, **geometry) + bias
    scale, terms = np.abs(x).max() * np.abs(kernel).max(), kernel[..., 0].size + 1
    assert_rounding(from_layout(offset, data_format), raw[..., :48], scale, terms)
    expected = 1.5 / (1 + np.exp(-raw[..., 48:]))
    assert_rounding(from_layout(mask, data_format), expected, scale, terms)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_offset_branch_of_an_unknown_size(geometry):
    layer = ModulatedDeformConv2D(6, (3, 2), **geometry, **RANDOM_BRANCH)
    x = random((2, 9, 10, 4))
    expected = layer.predict_offset_and_mask(x)
    traced = tf.function(
        layer.predict_offset_and_mask, input_signature=[tf.TensorSpec((None, None, None, 4))]
    )(x)
    for a, b in zip(traced, expected, strict=True):
        assert a.shape == b.shape
        assert_rounding(a, b, np.abs(b).max(), terms=24)


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_call_is_the_op_with_what_the_layer_predicts(implementation, data_format, modulated):
    layer = ModulatedDeformConv2D(
        **ASYMMETRIC, **RANDOM_BRANCH, data_format=data_format, modulated=modulated,
        bias_initializer="ones", activation="tanh",
    )  # fmt: skip
    x = to_layout(random((2, 9, 10, 4)), data_format)
    y = layer(x)
    offset, mask = layer.predict_offset_and_mask(x)
    assert (mask is not None) == modulated
    by_hand = modulated_deform_conv2d(
        x, layer.kernel.numpy(), offset, mask, layer.bias.numpy(), strides=(2, 1),
        padding=((1, 0), (2, 1)), dilations=(1, 2), groups=2, deformable_groups=4,
        data_format=data_format,
    )  # fmt: skip
    np.testing.assert_array_equal(y, tf.tanh(by_hand))


def test_offsets_can_come_from_other_features(implementation):
    layer = ModulatedDeformConv2D(6, 3, strides=2, padding="same", **RANDOM_BRANCH)
    x, features = random((2, 9, 10, 4)), random((2, 9, 10, 3), seed=1)
    y = layer([x, features])
    assert [tuple(w.shape) for w in layer.weights] == [(3, 3, 4, 6), (6,), (3, 3, 3, 27), (27,)]
    offset, mask = layer.predict_offset_and_mask([x, features])
    by_hand = modulated_deform_conv2d(
        x, layer.kernel.numpy(), offset, mask, layer.bias.numpy(), strides=2, padding="same"
    )
    np.testing.assert_array_equal(y, by_hand)
    moved = layer([x, features + 1])
    assert np.abs(moved - y).max() > 0.1


def test_max_offset_bounds_offsets_and_keeps_small_ones():
    layer = ModulatedDeformConv2D(2, 1, max_offset=3.0)
    x = random((1, 4, 5, 2))
    layer.build(x.shape)
    layer.offset_bias.assign([1e4, -1e-3, 0])
    offset, _ = layer.predict_offset_and_mask(x)
    np.testing.assert_array_equal(offset[..., 0], np.full((1, 4, 5), 3.0))
    np.testing.assert_allclose(offset[..., 1], np.full((1, 4, 5), -1e-3), rtol=1e-6)
    layer.offset_bias.assign([2.0, -4.0, 0])
    offset, _ = layer.predict_offset_and_mask(x)
    np.testing.assert_allclose(offset[0, 0, 0], 3 * np.tanh([2 / 3, -4 / 3]), rtol=1e-6)


def test_empty_batch(implementation):
    layer = ModulatedDeformConv2D(**ASYMMETRIC)
    x = tf.zeros((0, 9, 10, 4))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    assert y.shape == (0, 4, 11, 6)
    gradients = tape.gradient(y, [x, *layer.trainable_weights])
    assert gradients[0].shape == x.shape
    assert all(not np.any(gradient) for gradient in gradients[1:])


# Weights and gradients.


@pytest.mark.parametrize(
    "arguments, names, filters",
    [
        ({}, ["kernel", "bias", "offset_kernel", "offset_bias"], 3 * 4 * 6),
        ({"modulated": False}, ["kernel", "bias", "offset_kernel", "offset_bias"], 2 * 4 * 6),
        ({"use_bias": False}, ["kernel", "offset_kernel", "offset_bias"], 3 * 4 * 6),
    ],
)
def test_weights_order_and_shapes(arguments, names, filters):
    layer = ModulatedDeformConv2D(**ASYMMETRIC, **arguments)
    layer.build((None, None, None, 8))
    shapes = {
        "kernel": (3, 2, 4, 6),
        "bias": (6,),
        "offset_kernel": (3, 2, 8, filters),
        "offset_bias": (filters,),
    }
    assert [(w.name, tuple(w.shape)) for w in layer.weights] == [(n, shapes[n]) for n in names]


def loss_gradients(layer, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = tf.reduce_sum(tf.square(tf.cast(y, "float64"))) / 2
    return y, tape.gradient(loss, [x, *layer.trainable_weights])


def test_lr_multiplier_scales_the_gradient_of_the_branch_alone(implementation):
    x = random((2, 9, 10, 4))
    plain = ModulatedDeformConv2D(**ASYMMETRIC, **RANDOM_BRANCH)
    scaled = ModulatedDeformConv2D(**ASYMMETRIC, **RANDOM_BRANCH, offset_lr_multiplier=0.125)
    scaled.build(x.shape)
    plain.build(x.shape)
    scaled.set_weights(plain.get_weights())
    y, (dx, kernel, bias, offset_kernel, offset_bias) = loss_gradients(plain, x)
    scaled_y, scaled_gradients = loss_gradients(scaled, x)
    np.testing.assert_array_equal(scaled_y, y)
    expected = [dx, kernel, bias, offset_kernel * 0.125, offset_bias * 0.125]
    for gradient, wanted in zip(scaled_gradients, expected, strict=True):
        assert np.abs(wanted).max() > 0.1
        assert_rounding(gradient, wanted, np.abs(wanted).max(), terms=2 * 4 * 11)


def test_lr_multiplier_leaves_regularizers_alone():
    layer = ModulatedDeformConv2D(
        2, 1, offset_lr_multiplier=0.0, offset_bias_initializer="ones", offset_bias_regularizer="l2"
    )
    layer(random((1, 3, 4, 2)))
    with tf.GradientTape() as tape:
        loss = tf.add_n(layer.losses)
    np.testing.assert_allclose(tape.gradient(loss, layer.offset_bias.value), np.full(3, 0.02))


@pytest.mark.parametrize(
    "geometry",
    [{}, {"strides": (2, 3), "dilation_rate": (2, 1)}, {"data_format": "channels_first"}],
)
def test_gradients_of_all_weights_are_numeric_ones(implementation, geometry):
    """float64, along one random direction per weight; TensorFlow's dilated convolutions have no
    gradient on the CPU, the offset branch must."""
    arguments = {"filters": 3, "kernel_size": (3, 2), "padding": "same", "max_offset": 4.0}
    layer = ModulatedDeformConv2D(**arguments, **geometry, **RANDOM_BRANCH, dtype="float64")
    x = to_layout(random((2, 9, 7, 4), dtype="float64"), layer.data_format)
    layer.build(x.shape)
    _, gradients = loss_gradients(layer, x)
    for index, weight in enumerate(layer.trainable_weights):
        value = weight.numpy()
        direction = random(value.shape, seed=7, dtype="float64")
        direction /= np.linalg.norm(direction)
        step = 1e-6
        losses = []
        for sign in (1, -1):
            weight.assign(value + sign * step * direction)
            losses.append(np.sum(np.square(layer(x))) / 2)
        weight.assign(value)
        numeric = (losses[0] - losses[1]) / (2 * step)
        analytic = np.sum(gradients[1 + index] * direction)
        bound = 4 * EPSILON["float64"] * losses[0] * np.size(x) / step
        assert abs(numeric - analytic) <= bound + 1e-6 * abs(analytic), weight.name


def test_regularizers_and_constraints_reach_their_weights(implementation):
    arguments = {**ALL_ARGUMENTS, "data_format": "channels_last", "dtype": "float32"}
    layer = ModulatedDeformConv2D(**{**arguments, "trainable": True})
    layer(random((2, 9, 10, 4)))
    kernel, bias, offset_kernel, offset_bias = (w.numpy() for w in layer.weights)
    expected = [
        0.25 * np.sum(kernel**2),
        0.5 * np.sum(np.abs(bias)),
        0.75 * np.sum(offset_kernel**2),
        0.375 * np.sum(np.abs(offset_bias)),
    ]
    assert len(layer.losses) == 5  # and that of the activity
    for value in expected:
        assert any(np.isclose(value, float(loss), rtol=1e-5) for loss in layer.losses)
    for weight in layer.weights:
        name = weight.name + "_constraint"
        assert weight.constraint is ALL_ARGUMENTS[name], name


def test_training_decreases_the_loss(implementation):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((None, None, 2)),
            ModulatedDeformConv2D(8, 3, padding="same", activation="relu", mask_scale=2.0),
            ModulatedDeformConv2D(8, 3, strides=2, dilation_rate=2, padding="same"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    x = random((32, 8, 9, 2))
    y = x[:, 2, 3, 0] * x[:, 4, 5, 1]
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = [w.numpy() for w in model.weights]
    losses = model.fit(x, y, epochs=15, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.any(w.numpy() != b) for w, b in zip(model.weights, before, strict=True))


# Types.


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(implementation, policy):
    layer = ModulatedDeformConv2D(**ASYMMETRIC, **RANDOM_BRANCH, dtype=policy)
    compute, x = layer.compute_dtype, random((2, 9, 10, 4))
    y, gradients = loss_gradients(layer, x)
    assert y.dtype == compute
    for weight, gradient in zip(layer.weights, gradients[1:], strict=True):
        assert weight.dtype == layer.variable_dtype and gradient.dtype == weight.dtype
        assert np.all(np.isfinite(tf.cast(gradient, "float32")))
    offset, mask = layer.predict_offset_and_mask(x)
    assert offset.dtype == "float32" and mask.dtype == "float32"

    wide = ModulatedDeformConv2D(**ASYMMETRIC, dtype="float32")
    wide.build(x.shape)
    rounded = [tf.cast(tf.cast(w.value, compute), "float32") for w in layer.weights[:2]]
    wide.set_weights([*rounded, *(tf.cast(w.value, "float32") for w in layer.weights[2:])])
    x = tf.cast(tf.cast(x, compute), "float32")
    assert_rounding(
        tf.cast(y, "float32"), wide(x), np.abs(wide.kernel).max() * np.abs(x).max(), 12, compute
    )


@pytest.mark.parametrize("weight", ["offset_kernel", "offset_bias"])
def test_offsets_are_not_rounded_to_the_compute_dtype(implementation, weight):
    """40 + 1/128 takes 13 bits, bfloat16 has 8: a rounded one would read 0 next to the 1."""
    layer = ModulatedDeformConv2D(
        1, 1, kernel_initializer="ones", mask_scale=2.0, dtype="mixed_bfloat16"
    )
    x = np.zeros((1, 1, 64, 1))
    x[0, 0, 41] = 1
    inputs = [x, np.ones((1, 1, 64, 1))]
    layer.build([x.shape, x.shape])
    variable = getattr(layer, weight)
    variable.assign(np.reshape([0, 40 + 1 / 128, 0], variable.shape))
    offset, _ = layer.predict_offset_and_mask(inputs)
    np.testing.assert_array_equal(offset[..., 1], np.full((1, 1, 64), 40 + 1 / 128))
    assert float(layer(inputs)[0, 0, 0, 0]) == 1 / 128


def test_float64_all_the_way():
    layer = ModulatedDeformConv2D(**ASYMMETRIC, dtype="float64")
    x = random((2, 9, 10, 4), dtype="float64")
    assert layer(x).dtype == "float64"
    assert layer.predict_offset_and_mask(x)[0].dtype == "float64"


def test_training_in_mixed_precision():
    model = keras.Sequential([ModulatedDeformConv2D(3, 3, dtype="mixed_float16")])
    model.compile("sgd", "mse")
    x = random((4, 5, 6, 2))
    losses = model.fit(x, np.ones((4, 3, 4, 3)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


# Keras: shapes, models, configuration, files.


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["valid", "SAME", 1, (2, 0), ((0, 3), (1, 2))])
@pytest.mark.parametrize("strides, dilation_rate", [(1, 1), ((2, 3), 1), (1, (2, 3)), (3, 2)])
def test_compute_output_shape(data_format, padding, strides, dilation_rate):
    layer = ModulatedDeformConv2D(
        5, (3, 2), strides=strides, padding=padding, dilation_rate=dilation_rate,
        data_format=data_format,
    )  # fmt: skip
    x = to_layout(random((2, 9, 11, 4)), data_format)
    with use_implementation("portable"):
        actual = tuple(layer(x).shape)
    assert layer.compute_output_shape(x.shape) == actual
    assert layer.compute_output_shape([x.shape, x.shape]) == actual
    assert layer(keras.KerasTensor(x.shape)).shape == actual
    unknown = tuple(4 if size == 4 else None for size in x.shape)
    expected = tuple(5 if axis == layer._channel_axis % 4 else None for axis in range(4))
    assert layer.compute_output_shape(unknown) == expected


def test_unknown_sizes_in_a_model():
    layer = ModulatedDeformConv2D(6, 3, strides=2, padding="same", **RANDOM_BRANCH)
    inputs = keras.Input((None, None, 4))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, None, 6)
    for size in ((9, 10), (6, 5)):
        x = random((2, *size, 4))
        scale = np.abs(x).max() * np.abs(layer.kernel).max()
        assert_rounding(model.predict(x, verbose=0), layer(x), scale, terms=36)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = ModulatedDeformConv2D(6, 3, **RANDOM_BRANCH)

    def call(self, inputs):
        return self.layer(inputs)


def test_sequential_functional_and_subclassed_agree():
    x = random((2, 9, 10, 4))
    subclassed = Subclassed()
    expected = subclassed(x)
    sequential = keras.Sequential([subclassed.layer])
    inputs = keras.Input((9, 10, 4))
    functional = keras.Model(inputs, subclassed.layer(inputs))
    for model in (sequential, functional):
        np.testing.assert_array_equal(model(x), expected)
    for model in (sequential, functional, subclassed):
        assert_rounding(model.predict(x, verbose=0), expected, np.abs(x).max(), terms=36)


def test_default_data_format_is_that_of_keras():
    try:
        keras.config.set_image_data_format("channels_first")
        assert ModulatedDeformConv2D(2, 3).data_format == "channels_first"
    finally:
        keras.config.set_image_data_format("channels_last")
    assert ModulatedDeformConv2D(2, 3).data_format == "channels_last"


def test_config_has_every_argument_and_comes_back():
    arguments = inspect.signature(ModulatedDeformConv2D.__init__).parameters
    assert set(arguments) - {"self", "kwargs"} == set(ALL_ARGUMENTS) - {
        "trainable",
        "name",
        "dtype",
    }
    assert [
        name
        for name, argument in arguments.items()
        if name in ALL_ARGUMENTS and ALL_ARGUMENTS[name] == argument.default
    ] == ["use_bias", "modulated"]
    layer = ModulatedDeformConv2D(**ALL_ARGUMENTS)
    config = layer.get_config()
    for name, value in ALL_ARGUMENTS.items():
        is_object = name.endswith(("_initializer", "_regularizer", "_constraint"))
        if name == "dtype":
            value = keras.dtype_policies.get(value)
        if is_object or name == "dtype":
            value = keras.saving.serialize_keras_object(value)
        assert config[name] == value, name
    again = ModulatedDeformConv2D.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    for flag in ("use_bias", "modulated"):
        assert ModulatedDeformConv2D(2, 3, **{flag: False}).get_config()[flag] is False


@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 2), ((0, 1), (2, 3))])
def test_padding_comes_back_from_the_configuration(padding):
    layer = ModulatedDeformConv2D(2, 3, padding=padding)
    again = ModulatedDeformConv2D.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.padding == layer.padding
    assert again.compute_output_shape((1, 9, 9, 2)) == layer.compute_output_shape((1, 9, 9, 2))


def test_untrainable_layer():
    layer = ModulatedDeformConv2D(2, 3, trainable=False)
    layer.build((1, 5, 5, 2))
    assert layer.trainable_weights == [] and len(layer.weights) == 4


RELOAD = """
import sys
import keras, numpy as np, tensorflow as tf
import tf_mdcn
for folder in sys.argv[1:]:
    inputs = [np.load(folder + "/x.npy"), np.load(folder + "/features.npy")]
    model = keras.models.load_model(folder + "/model.keras")
    np.save(folder + "/keras.npy", model(inputs))
    signature = tf.saved_model.load(folder + "/saved").signatures["serving_default"]
    names = sorted(signature.structured_input_signature[1])
    np.save(folder + "/saved.npy", signature(**dict(zip(names, inputs)))["output_0"])
    exported = tf.saved_model.load(folder + "/exported")
    with tf.GradientTape() as tape:
        outputs = exported.serve(inputs)
        loss = tf.reduce_sum(outputs)
    np.save(folder + "/exported.npy", outputs)
    for index, gradient in enumerate(tape.gradient(loss, exported.trainable_variables)):
        np.save(folder + f"/gradient{index}.npy", gradient)
"""


def test_saved_models_in_a_fresh_process(tmp_path):
    x, features = random((2, 9, 10, 4)), random((2, 9, 10, 3), seed=1)
    inputs = [keras.Input((None, None, 4), name="a"), keras.Input((None, None, 3), name="b")]
    first = ModulatedDeformConv2D(
        **ASYMMETRIC, **RANDOM_BRANCH, mask_scale=2.0, max_offset=3.0, offset_lr_multiplier=0.5
    )
    second = ModulatedDeformConv2D(5, 2, **RANDOM_BRANCH, modulated=False, use_bias=False)
    model = keras.Model(inputs, second(first(inputs)))
    with tf.GradientTape() as tape:
        expected = model([x, features])
        loss = tf.reduce_sum(expected)
    gradients = tape.gradient(loss, model.trainable_variables)

    folders = [tmp_path / name for name in ("native", "portable")]
    for folder in folders:
        folder.mkdir()
        with use_implementation(folder.name):
            model.save(folder / "model.keras")
            model.export(folder / "exported", verbose=False)
            tf.saved_model.save(model, str(folder / "saved"))
        np.save(folder / "x.npy", x)
        np.save(folder / "features.npy", features)
    command = [sys.executable, "-c", RELOAD, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    scale = np.abs(expected).max()
    for folder in folders:
        for name in ("keras", "saved", "exported"):
            assert_rounding(np.load(folder / f"{name}.npy"), expected, scale, terms=24)
        for index, gradient in enumerate(gradients):
            reloaded = np.load(folder / f"gradient{index}.npy")
            terms = 2 * 4 * 11 * 24
            assert_rounding(reloaded, gradient, np.abs(gradient).max(), terms)


def test_weights_file(tmp_path):
    def build():
        model = keras.Sequential([keras.Input((9, 10, 4)), ModulatedDeformConv2D(**ASYMMETRIC)])
        model.layers[0].set_weights([random(w.shape, seed=8) for w in model.weights])
        return model

    model = build()
    model.save_weights(tmp_path / "model.weights.h5")
    again = build()
    again.layers[0].set_weights([np.zeros(w.shape) for w in again.weights])
    again.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_compiles_by_xla_only_where_the_op_can(monkeypatch):
    def compiled_model():
        model = keras.Sequential([keras.Input((5, 6, 2)), ModulatedDeformConv2D(2, 3)])
        model.compile("sgd", "mse", jit_compile=True)
        return model

    monkeypatch.setattr(tf_mdcn.ops, "supports_jit", lambda: True)
    assert compiled_model().jit_compile
    monkeypatch.setattr(tf_mdcn.ops, "supports_jit", lambda: False)
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        assert not compiled_model().jit_compile


def test_supports_jit_can_be_switched_off():
    layer = ModulatedDeformConv2D(2, 3)
    with use_implementation("portable"):
        assert layer.supports_jit
        layer.supports_jit = False
        assert not layer.supports_jit


# What is refused.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"filters": 0}, "filters must be an integer between 1 and 2^31 - 1; received 0"),
        ({"filters": None}, "filters must be an integer between 1 and 2^31 - 1; received None"),
        (
            {"kernel_size": (3, 0)},
            "kernel_size must be an integer or 2 integers between 1 and 2^31 - 1; received (3, 0)",
        ),
        (
            {"kernel_size": (3, 3, 3)},
            (
                "kernel_size must be an integer or 2 integers between 1 and 2^31 - 1; "
                "received (3, 3, 3)"
            ),
        ),
        (
            {"strides": 0},
            "strides must be an integer or 2 integers between 1 and 2^31 - 1; received 0",
        ),
        (
            {"dilation_rate": 1.5},
            "dilation_rate must be an integer or 2 integers between 1 and 2^31 - 1; received 1.5",
        ),
        (
            {"padding": "causal"},
            (
                'padding must be "valid", "same", an integer, (height, width) or ((top, bottom), '
                "(left, right)), of integers between 0 and 2^31 - 1; received 'causal'"
            ),
        ),
        (
            {"data_format": "NHWC"},
            'data_format must be "channels_last" or "channels_first"; received \'nhwc\'',
        ),
        ({"groups": 0}, "groups must be an integer between 1 and 2^31 - 1; received 0"),
        ({"groups": 4}, "groups must divide filters; received groups=4, filters=6"),
        (
            {"deformable_groups": -1},
            "deformable_groups must be an integer between 1 and 2^31 - 1; received -1",
        ),
        ({"mask_scale": 0}, "mask_scale must be a finite number > 0; received 0"),
        ({"mask_scale": "2"}, "mask_scale must be a finite number > 0; received '2'"),
        (
            {"offset_lr_multiplier": -0.1},
            "offset_lr_multiplier must be a finite number >= 0; received -0.1",
        ),
        ({"max_offset": 0.0}, "max_offset must be a finite number > 0; received 0.0"),
        (
            {"max_offset": float("inf")},
            "max_offset must be a finite number > 0; received inf",
        ),
    ],
)
def test_arguments_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        ModulatedDeformConv2D(**{"filters": 6, "kernel_size": 3, **arguments})
    assert str(error.value) == f"ModulatedDeformConv2D: {message}"


@pytest.mark.parametrize(
    "arguments, shape, message",
    [
        (
            {},
            (2, 9, 4),
            (
                "inputs must have rank 4, [batch, in_height, in_width, in_channels]; "
                "received shape [2, 9, 4]"
            ),
        ),
        (
            {"groups": 3},
            (2, 9, 10, 4),
            "groups must divide in_channels; received groups=3, in_channels=4",
        ),
        (
            {"deformable_groups": 3},
            (2, 9, 10, 4),
            (
                "deformable_groups must divide in_channels; received deformable_groups=3, "
                "in_channels=4"
            ),
        ),
        (
            {"dilation_rate": 5},
            (2, 9, 10, 4),
            (
                "the padded input must be at least as large as the dilated kernel; "
                "received in_height=9, padding 0, dilated kernel_height=11"
            ),
        ),
        (
            {},
            (2, 9, 10, None),
            (
                "the channels of an input must be known to build the layer; "
                "received input shape (2, 9, 10, None)"
            ),
        ),
        (
            {},
            [(2, 9, 10, 4), (2, 9, 10, 4), (2, 9, 10, 4)],
            "inputs must be a tensor or the list [x, features]; received a list of 3",
        ),
        (
            {},
            [(2, 9, 10, 4), (2, 10, 9, 3)],
            (
                "features must have rank 4 and the batch size, height and width of x = [2, 9, 10]; "
                "received shape [2, 10, 9, 3]"
            ),
        ),
        (
            {"data_format": "channels_first"},
            [(None, 4, 9, 10), (None, 3, 9)],
            (
                "features must have rank 4 and the batch size, height and width of x = "
                "[None, 9, 10]; received shape [None, 3, 9]"
            ),
        ),
    ],
)
def test_input_shapes_refused(arguments, shape, message):
    with pytest.raises(ValueError) as error:
        ModulatedDeformConv2D(6, 3, **arguments).build(shape)
    assert str(error.value) == f"ModulatedDeformConv2D: {message}"


def test_predicting_from_other_channels_is_refused():
    layer = ModulatedDeformConv2D(6, 3)
    layer.build((2, 9, 10, 4))
    with pytest.raises(ValueError) as error:
        layer.predict_offset_and_mask(np.zeros((2, 9, 10, 8)))
    assert str(error.value) == (
        "ModulatedDeformConv2D: offsets are predicted from 4 channels; received an input with 8, "
        "shape (2, 9, 10, 8)"
    )


def test_other_inputs_than_built_for_are_refused():
    layer = ModulatedDeformConv2D(6, 3)
    layer.build((2, 9, 10, 4))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        layer(np.zeros((2, 9, 10, 5)))
    with pytest.raises(ValueError, match="expects 1 input"):
        layer([np.zeros((2, 9, 10, 4)), np.zeros((2, 9, 10, 4))])


@pytest.mark.parametrize(
    ("arguments", "right", "wrong", "message"),
    [
        (
            {"data_format": "channels_first", "dilation_rate": 3},
            (1, 4, 8, 8),
            (1, 4, 2, 2),
            (
                "the padded input must be at least as large as the dilated kernel; received "
                "in_height=2, padding 0, dilated kernel_height=7"
            ),
        ),
        (
            {},
            [(1, 8, 8, 4), (1, 8, 8, 3)],
            [(1, 8, 8, 4), (1, 5, 5, 3)],
            (
                "features must have rank 4 and the batch size, height and width of x = [1, 8, 8]; "
                "received shape [1, 5, 5, 3]"
            ),
        ),
    ],
)
def test_sizes_refused_once_built(arguments, right, wrong, message):
    """In the layer's words, not in those of the operations that it calls."""
    layer = ModulatedDeformConv2D(6, 3, **arguments)
    layer.build(right)
    inputs = np.zeros(wrong) if isinstance(wrong, tuple) else [np.zeros(x) for x in wrong]
    for call in (layer, layer.predict_offset_and_mask):
        with pytest.raises(ValueError) as error:
            call(inputs)
        assert f"ModulatedDeformConv2D: {message}" in str(error.value)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError) as error:
        ModulatedDeformConv2D(6, 3)
    assert str(error.value) == (
        "ModulatedDeformConv2D needs Keras on the TensorFlow backend; received the backend "
        "'torch'. Set the environment variable KERAS_BACKEND=tensorflow before keras is imported."
    )


def test_examples_in_the_docstrings():
    result = doctest.testmod(tf_mdcn.layers)
    assert result.attempted > 0 and result.failed == 0
