"""The portable implementation: against the oracle in plain loops, `tf.nn.conv2d`, numeric
derivatives, and itself in every way that TensorFlow runs a function.
"""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
import tensorflow as tf

from tf_mdcn import reference

# Asymmetric in everything; then each relation of groups to deformable groups, padding, no mask.
CASES = {
    "default": {},
    "one_group_each": {"groups": 1, "deformable_groups": 1},
    "groups_within_deformable_groups": {"groups": 4, "deformable_groups": 2, "out_channels": 8},
    "deformable_groups_within_groups": {"groups": 2, "deformable_groups": 4},
    "same_padding": {"padding": "same", "groups": 3, "deformable_groups": 2, "out_channels": 9},
    "valid_padding": {"padding": "valid", "strides": (1, 2), "dilations": (1, 2)},
    "without_mask_or_bias": {"with_mask": False, "with_bias": False},
    "one_pixel": {
        "batch": 1,
        "in_size": (1, 1),
        "in_channels": 1,
        "out_channels": 1,
        "padding": ((2, 3), (1, 0)),
        "groups": 1,
        "deformable_groups": 1,
        "offset_scale": 1.0,
    },
    "far_offsets": {"offset_scale": 50.0},
    "empty_batch": {"batch": 0},
}


@pytest.fixture(params=["channels_last", "channels_first"])
def data_format(request):
    return request.param


@pytest.fixture(params=CASES)
def case(request, data_format):
    case = oracle.random_case(**CASES[request.param])
    return case if data_format == "channels_last" else case.channels_first()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 output pixels in the default case in float64, which has 44."""
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 4 * 6 * 12 * 8)
    monkeypatch.setattr(reference, "_SCATTER_SHARE", 10**6)  # in the gradients too


def convolve(case, **tensors):
    return reference.modulated_deform_conv2d(**(as_tensors(case) | tensors), **case.arguments)


def as_tensors(case):
    return {name: tf.constant(tensor) for name, tensor in case.tensors.items()}


def output_gradient_of(case, output):
    """Deterministic, and different everywhere."""
    rng = np.random.default_rng(99)
    return rng.normal(size=output.shape).astype(case.inputs.dtype)


def gradients_with(case, output_gradient, run=lambda function: function):
    """Output and gradients by name, of a function that `run` transforms."""

    def step(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = convolve(case, **tensors)
        return output, tape.gradient(output, tensors, tf.constant(output_gradient))

    return run(step)(as_tensors(case))


def assert_agrees(case, dtype, run=lambda function: function):
    """Holds output and gradients of a case to the oracle's."""
    expected = oracle.forward(case)
    output_gradient = output_gradient_of(case, expected)
    output, gradients = gradients_with(case, output_gradient, run)
    assert output.dtype == dtype
    bound = oracle.rounding_bound(case, expected, dtype)
    oracle.assert_close(output, expected, bound, "output")
    expected_gradients = oracle.gradients(case, output_gradient)
    for name, gradient in gradients.items():
        assert gradient.dtype == case.tensors[name].dtype
        expected = getattr(expected_gradients, name)
        bound = oracle.rounding_bound(case, expected, gradient.dtype.as_numpy_dtype)
        oracle.assert_close(gradient, expected, bound, f"gradient of {name}")


def test_oracle(case):
    assert_agrees(case, np.float64)


@pytest.mark.parametrize("name", CASES)
def test_oracle_in_blocks(name, small_blocks):
    assert_agrees(oracle.random_case(**CASES[name]), np.float64, tf.function)


@pytest.mark.parametrize("sampling", ["the same", "float32"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_types(dtype, sampling, data_format):
    sampling = dtype.as_numpy_dtype if sampling == "the same" else np.float32
    case = oracle.random_case().cast(dtype.as_numpy_dtype, sampling)
    case = case if data_format == "channels_last" else case.channels_first()
    assert_agrees(case, dtype.as_numpy_dtype)


def test_half_precision_rounds_once():
    """Positions, sums and the bias are float32; only the output is rounded."""
    case = oracle.random_case(in_size=(40, 40), padding="same", strides=(5, 5))
    half = case.cast(np.float16)
    exact = oracle.forward(half)
    bound = np.finfo(np.float16).eps / 2 * np.abs(exact) + 1e-4
    error = np.abs(convolve(half).numpy().astype(np.float64) - exact)
    assert np.all(error <= bound), (error / bound).max()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["valid", "same", 1, (2, 0), ((1, 0), (2, 3))])
def test_zero_offset_and_unit_mask_equal_conv2d(padding, groups, data_format):
    case = oracle.random_case(padding="valid", groups=groups)
    if padding in ("valid", "same"):
        conv_padding = padding.upper()
    else:
        pair = (padding, padding) if isinstance(padding, int) else padding
        conv_padding = [[0, 0], *([p, p] if isinstance(p, int) else p for p in pair), [0, 0]]
    expected = tf.nn.bias_add(
        tf.nn.conv2d(case.inputs, case.filters, (2, 1), conv_padding, dilations=(2, 1)), case.bias
    )
    for mask_channels in (18, None):
        sampled = dict(
            offset=tf.zeros([*expected.shape[:3], 36], tf.float64),
            mask=None if mask_channels is None else tf.ones([*expected.shape[:3], 18], tf.float64),
        )
        tensors = as_tensors(case) | sampled
        if data_format == "channels_first":
            for name in ("inputs", "offset", "mask"):
                if tensors[name] is not None:
                    tensors[name] = tf.transpose(tensors[name], (0, 3, 1, 2))
        arguments = case.arguments | {"padding": padding, "data_format": data_format}
        actual = reference.modulated_deform_conv2d(**tensors, **arguments)
        if data_format == "channels_first":
            actual = tf.transpose(actual, (0, 2, 3, 1))
        oracle.assert_close(actual, expected, 1e-13 * np.abs(expected).max())


# Away from whole numbers, where the function is smooth, central differences of the output itself.


def numeric_derivative(function, tensors, directions, step=1e-5):
    """The derivative of a scalar function of named tensors along a direction, numerically."""
    ahead = {name: tensors[name] + step * directions[name] for name in tensors}
    behind = {name: tensors[name] - step * directions[name] for name in tensors}
    return float((function(**ahead) - function(**behind)) / (2 * step))


def random_directions(tensors, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["inputs", "filters", "offset", "mask", "bias"])
def test_gradients_are_numeric_derivatives(name):
    case = oracle.random_case(3)
    _, gradients = gradients_with(case, np.ones_like(oracle.forward(case)))
    tensor = as_tensors(case)[name]
    for seed in range(3):
        direction = random_directions({name: tensor}, seed)
        numeric = numeric_derivative(
            lambda **changed: tf.reduce_sum(convolve(case, **changed)), {name: tensor}, direction
        )
        analytic = np.sum(gradients[name] * direction[name])
        assert analytic == pytest.approx(numeric, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("run", ["eager", "function", "blocks"])
def test_second_derivatives_are_numeric_derivatives_of_the_first(run, request):
    if run == "blocks":
        request.getfixturevalue("small_blocks")
    case = oracle.random_case(5, batch=1, in_size=(5, 6), in_channels=6, out_channels=2)
    tensors = as_tensors(case)
    weights = random_directions(tensors, 1)

    def first(**tensors):
        """A scalar that mixes the first derivatives of a curved loss."""
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = tf.reduce_sum(tf.sin(convolve(case, **tensors)))
        gradients = tape.gradient(loss, tensors)
        return tf.add_n([tf.reduce_sum(gradients[name] * weights[name]) for name in tensors])

    def second(**tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = first(**tensors)
        return tape.gradient(value, tensors)

    gradients = (second if run == "eager" else tf.function(second))(**tensors)
    for name, tensor in tensors.items():
        direction = random_directions({name: tensor}, 2)
        numeric = numeric_derivative(
            lambda **changed: first(**(tensors | changed)), {name: tensor}, direction
        )
        analytic = np.sum(gradients[name] * direction[name])
        assert analytic == pytest.approx(numeric, rel=1e-6, abs=1e-6), name


def one_sample(y, x, inputs=None, mask=None):
    """A 1x1 kernel that samples one position of a 3 x 4 image with one channel."""
    inputs = np.arange(1.0, 13.0).reshape(1, 3, 4, 1) ** 1.5 if inputs is None else inputs
    return oracle.Case(
        inputs=inputs,
        filters=np.full((1, 1, 1, 1), 2.0),
        offset=np.array([y, x], np.float64).reshape(1, 1, 1, 2),
        mask=None if mask is None else np.full((1, 1, 1, 1), mask),
        strides=(3, 4),
    )


WHOLE_POSITIONS = [(y, x) for y in (-2, -1, 0, 1, 2, 3) for x in (-1, 0, 3, 4)]


@pytest.mark.parametrize(("y", "x"), WHOLE_POSITIONS)
def test_right_hand_derivative_at_whole_numbers(y, x):
    case = one_sample(y, x, mask=0.5)
    output, gradients = gradients_with(case, np.ones((1, 1, 1, 1)))
    expected = oracle.gradients(case, np.ones((1, 1, 1, 1)))
    oracle.assert_close(output, oracle.forward(case), 1e-13, "output")
    for name in ("inputs", "offset", "mask"):
        oracle.assert_close(gradients[name], getattr(expected, name), 1e-13, name)
    step = 1e-6
    inside = -1 <= y < 3 and -1 <= x < 4
    for axis, moved in enumerate([one_sample(y + step, x), one_sample(y, x + step)]):
        ahead = float(np.squeeze(convolve(moved))) * 0.5
        slope = (ahead - float(np.squeeze(output))) / step if inside else 0.0
        assert float(gradients["offset"][0, 0, 0, axis]) == pytest.approx(slope, abs=1e-4)


def test_right_hand_derivative_at_minus_one_is_the_slope_into_the_image():
    _, gradients = gradients_with(one_sample(-1, 1), np.ones((1, 1, 1, 1)))
    assert float(gradients["offset"][0, 0, 0, 0]) == pytest.approx(2.0 * 2.0**1.5)


HUGE = [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [*HUGE, np.nan])
@pytest.mark.parametrize("axis", [0, 1])
def test_non_finite_offsets(value, axis, dtype):
    case = oracle.random_case(1)
    case.offset[0, 1, 3, 14 + axis] = value
    case.offset[1, 0, 0, 2:4] = value
    case = case.cast(dtype)
    assert np.any(np.isnan(oracle.forward(case))) == np.isnan(value)
    assert_agrees(case, dtype)


def test_both_coordinates_infinite_with_opposite_signs():
    case = one_sample(np.inf, -np.inf, mask=0.5)
    output, gradients = gradients_with(case, np.ones((1, 1, 1, 1)))
    assert float(np.squeeze(output)) == 0
    for name, gradient in gradients.items():
        assert not np.any(gradient), name


def test_nan_offset_leaves_the_input_gradient_finite():
    _, gradients = gradients_with(one_sample(np.nan, 0.5, mask=0.5), np.ones((1, 1, 1, 1)))
    assert not np.any(gradients["inputs"])
    assert np.all(np.isnan(gradients["mask"]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_pixels_stay_where_they_are(value):
    """Neither samples elsewhere nor corners outside the image take anything from a pixel."""
    inputs = np.full((1, 3, 4, 1), value)
    inputs[0, 1, 1:3, 0] = inputs[0, 2, 1:3, 0] = 1.0
    output, gradients = gradients_with(one_sample(1.5, 1.5, inputs, 0.5), np.ones((1, 1, 1, 1)))
    assert float(np.squeeze(output)) == pytest.approx(1.0)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())
    # Wholly outside, next to pixels that are not finite: 0, and so is every gradient.
    for y, x in [(-1.5, 1.0), (3.0, 1.0), (1.0, -3.0), (1.0, 4.5)]:
        output, gradients = gradients_with(
            one_sample(y, x, np.full((1, 3, 4, 1), value), 0.5), np.ones((1, 1, 1, 1))
        )
        assert float(np.squeeze(output)) == 0
        assert not any(np.any(gradient) for gradient in gradients.values())


def test_non_finite_pixel_beside_a_corner_outside():
    """At y = -0.5 the upper corners are outside: only the lower row counts, in gradients too."""
    inputs = np.ones((1, 3, 4, 1))
    inputs[0, 1:] = inputs[0, :, 3] = np.inf
    case = one_sample(-0.5, 0.5, inputs, 0.5)
    output, gradients = gradients_with(case, np.ones((1, 1, 1, 1)))
    expected = oracle.gradients(case, np.ones((1, 1, 1, 1)))
    assert float(np.squeeze(output)) == pytest.approx(0.5)
    for name in ("inputs", "offset", "mask"):
        oracle.assert_close(gradients[name], getattr(expected, name), 1e-13, name)


@pytest.mark.parametrize("unknown", ["batch", "image", "sizes", "rank"])
@pytest.mark.parametrize("padding", ["same", ((1, 0), (2, 1))])
def test_unknown_shapes(unknown, padding, data_format, request):
    if padding == "same":
        request.getfixturevalue("small_blocks")
    case = oracle.random_case(padding=padding)
    case = case if data_format == "channels_last" else case.channels_first()

    def spec(name, tensor):
        shape = list(tensor.shape)
        image = name in ("inputs", "offset", "mask")
        if unknown == "rank":
            return tf.TensorSpec(None, tensor.dtype)
        if unknown == "sizes":
            return tf.TensorSpec([None] * len(shape), tensor.dtype)
        if image:
            shape[0] = None
            if unknown == "image":
                first = 1 if data_format == "channels_last" else 2
                shape[first : first + 2] = [None, None]
        return tf.TensorSpec(shape, tensor.dtype)

    specs = {name: spec(name, tensor) for name, tensor in case.tensors.items()}

    def run(step):
        traced = tf.function(step, input_signature=[specs])
        output_shape = traced.get_concrete_function().output_shapes[0]
        assert output_shape.is_compatible_with(oracle.forward(case).shape)
        if unknown == "batch":
            assert output_shape.as_list()[1:] == list(oracle.forward(case).shape[1:])
        return traced

    assert_agrees(case, np.float64, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": (2, 4, 9, 18)}, r"offset, channels last, must have shape.*2 6 6 18.*2 4 9 18"),
        ({"offset": (4, 3, 6, 18)}, r"offset, channels last, must have shape.*2 6 6 18.*4 3 6 18"),
        ({"mask": (1, 12, 6, 9)}, r"mask, channels last, must have shape.*2 6 6 9.*1 12 6 9"),
        ({"bias": (1,)}, r"bias, channels last, must have shape.*5.*1"),
        ({"filters": (3, 3, 2, 5)}, r"filters, channels last, must have shape.*3 3 4 5.*3 3 2 5"),
        (
            {"inputs": (2, 2, 8, 4), "offset": (2, 0, 6, 18), "mask": (2, 0, 6, 9)},
            "the padded input must be at least as large as the dilated kernel.*2 8",
        ),
    ],
)
def test_shapes_that_turn_out_wrong_at_run_time(changes, message):
    """Of the right number of elements, mostly: they must not be taken for another shape."""
    shapes = {
        "inputs": (2, 8, 8, 4),
        "filters": (3, 3, 4, 5),
        "offset": (2, 6, 6, 18),
        "mask": (2, 6, 6, 9),
        "bias": (5,),
    }
    specs = {name: tf.TensorSpec([None] * len(shape)) for name, shape in shapes.items()}
    convolve = tf.function(
        lambda tensors: reference.modulated_deform_conv2d(**tensors), input_signature=[specs]
    )
    right = {name: tf.ones(shape) for name, shape in shapes.items()}
    assert convolve(right).shape == (2, 6, 6, 5)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=f"(?s)ModulatedDeformConv2D: {message}"
    ):
        convolve(right | {name: tf.ones(shape) for name, shape in changes.items()})


@pytest.mark.parametrize("sizes", ["batch", "all"])
def test_unknown_batch_may_be_empty(sizes):
    case = oracle.random_case(batch=0)

    def spec(tensor):
        known = [None] * tensor.ndim if sizes == "all" else tensor.shape[1:]
        return tf.TensorSpec([None, *known][: tensor.ndim], tensor.dtype)

    names = ("inputs", "offset", "mask")
    specs = {name: spec(case.tensors[name]) for name in names}
    assert_agrees(
        case,
        np.float64,
        lambda step: (
            lambda tensors: tf.function(
                lambda images: step(tensors | images), input_signature=[specs]
            )({name: tensors[name] for name in names})
        ),
    )


@pytest.mark.parametrize("blocks", ["one_block", "blocks"])
def test_jit_compile(blocks, request):
    if blocks == "blocks":
        request.getfixturevalue("small_blocks")
    case = oracle.random_case()
    case.offset[0, 0, 0, :4] = np.inf, -np.inf, 1e30, -1e30
    assert_agrees(case, np.float64, lambda step: tf.function(step, jit_compile=True))


def test_jit_compile_with_nan_offsets():
    case = oracle.random_case()
    case.offset[0, 1, 3, 14] = np.nan
    assert_agrees(case, np.float64, lambda step: tf.function(step, jit_compile=True))


def test_jit_compile_second_derivatives():
    case = oracle.random_case(5, batch=1, in_size=(5, 6), in_channels=6, out_channels=2)

    def second(offset):
        with tf.GradientTape() as outer:
            outer.watch(offset)
            with tf.GradientTape() as inner:
                inner.watch(offset)
                loss = tf.reduce_sum(tf.sin(convolve(case, offset=offset)))
            first = tf.reduce_sum(inner.gradient(loss, offset) ** 2)
        return outer.gradient(first, offset)

    offset = tf.constant(case.offset)
    expected = second(offset)
    actual = tf.function(second, jit_compile=True)(offset)
    oracle.assert_close(actual, expected, 1e-10 * np.abs(expected).max())


def test_blocks_do_not_change_results(monkeypatch):
    case = oracle.random_case()
    output_gradient = output_gradient_of(case, oracle.forward(case))
    whole_output, whole_gradients = gradients_with(case, output_gradient)
    monkeypatch.setattr(reference, "_SCATTER_SHARE", 10**6)
    for pixels in (1, 5, 7, 22, 43):  # of 44, so most last blocks reach beyond the last image
        monkeypatch.setattr(reference, "_BLOCK_BYTES", pixels * 6 * 12 * 8)
        output, gradients = gradients_with(case, output_gradient)
        oracle.assert_close(output, whole_output, 1e-14 * np.abs(whole_output).max(), "output")
        for name, gradient in gradients.items():
            expected = whole_gradients[name]
            bound = 1e-13 * np.abs(expected).max()
            oracle.assert_close(gradient, expected, bound, f"{name}, {pixels} pixels")


def test_padding_of_the_last_block_takes_nothing_from_bad_pixels(small_blocks):
    case = oracle.random_case(batch=1, in_size=(7, 7))
    case.offset[:] = 1e30
    output_gradient = np.ones_like(oracle.forward(case))
    assert output_gradient[..., 0].size % 4 != 0
    case.inputs[:] = np.inf
    _, gradients = gradients_with(case, output_gradient)
    for name in ("inputs", "filters", "offset", "mask"):
        assert not np.any(gradients[name]), name


def test_a_sample_does_not_depend_on_its_batch():
    case = oracle.random_case(batch=3)
    alone = case.replace(inputs=case.inputs[1:2], offset=case.offset[1:2], mask=case.mask[1:2])
    together = convolve(case)[1:2]
    bound = oracle.rounding_bound(alone, together, np.float64)
    oracle.assert_close(convolve(alone), together, bound)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_samples_in_memory_are_bounded(size, monkeypatch):
    """Forward: by a constant, however large the image. Gradients: by half of the input as well."""
    taken = []
    corner_values = reference._corner_values

    def record(*arguments):
        values = corner_values(*arguments)
        taken.append(values[0].shape.num_elements() * values[0].dtype.size)
        return values

    monkeypatch.setattr(reference, "_corner_values", record)
    specs = [
        tf.TensorSpec(shape)
        for shape in ([1, size, size, 16], [3, 3, 16, 8], [1, size, size, 18], [1, size, size, 9])
    ]

    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = reference.modulated_deform_conv2d(*tensors, padding="same")
        return tape.gradient(output, tensors)

    tf.function(step).get_concrete_function(*specs)
    limit = 4 * 2**20
    assert taken[0] <= limit
    assert max(taken) <= max(limit, size * size * 16 * 4 // 2)


def test_errors_are_those_of_the_arguments():
    case = oracle.random_case()
    message = (
        "ModulatedDeformConv2D: offset must have shape [batch, out_height, out_width, 2 * "
        "deformable_groups * kernel_height * kernel_width] = [2, 2, 11, 36]; received "
        "[2, 2, 11, 35]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convolve(case, offset=tf.constant(case.offset[..., :35]))
    message = (
        "ModulatedDeformConv2D: filters must have the type of inputs = float32; received float64"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        convolve(case, inputs=tf.constant(case.inputs, tf.float32))
    message = "ModulatedDeformConv2D: groups must be an integer between 1 and 2^31 - 1; received 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convolve(case.replace(groups=0))
    with pytest.raises(ValueError, match="rank 4"):
        convolve(case, mask=tf.constant(case.mask[0]))


def test_wrong_sizes_that_show_at_run_time_only_are_errors():
    case = oracle.random_case()
    specs = {name: tf.TensorSpec([None] * t.ndim, t.dtype) for name, t in case.tensors.items()}
    traced = tf.function(lambda tensors: convolve(case, **tensors), input_signature=[specs])
    with pytest.raises(tf.errors.InvalidArgumentError):
        traced(as_tensors(case) | {"offset": tf.constant(case.offset[:, :, :-1])})
