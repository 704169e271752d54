"""Where a layer is said and drawn to sample."""

import builtins
import doctest

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from matplotlib import pyplot

import tf_mdcn.visualize
from tf_mdcn import ModulatedDeformConv2D
from tf_mdcn.visualize import plot_sampling, sampling_points

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def layer_with_bias(bias, **arguments):
    layer = ModulatedDeformConv2D(4, (3, 2), **arguments)
    axis = 1 if layer.data_format == "channels_first" else -1
    shape = [1, 9, 10, 4] if axis == -1 else [1, 4, 9, 10]
    layer.build(shape)
    layer.offset_bias.assign(bias)
    return layer, np.random.default_rng(0).normal(size=[2, *shape[1:]]).astype("float32")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_sampling_points(data_format):
    """Group 1 of 2, stride (2, 3), dilation (2, 1): everything by hand."""
    offsets = np.arange(24) / 8
    logits = np.linspace(-2, 2, 12)
    layer, x = layer_with_bias(
        np.concatenate([offsets, logits]),
        strides=(2, 3),
        dilation_rate=(2, 1),
        padding="same",
        deformable_groups=2,
        mask_scale=2.0,
        data_format=data_format,
    )
    # Same padding: 9 rows, stride 2, extent 5: 4 rows of it, 2 above; 10 columns, stride 3,
    # extent 2: 1 column, none before.
    rows, columns = 2 * 2 - 2, 3 * 3
    grid = [[rows + i * 2, columns + j] for i in range(3) for j in range(2)]
    points = sampling_points(layer, x, (2, 3), sample=1, deformable_group=1)
    np.testing.assert_array_equal(points.grid, grid)
    np.testing.assert_allclose(points.points, grid + offsets[12:].reshape(6, 2), rtol=1e-6)
    np.testing.assert_allclose(points.mask, 2 / (1 + np.exp(-logits[6:])), rtol=1e-6)
    last = sampling_points(layer, x, (2, -1), sample=-1, deformable_group=-1)
    np.testing.assert_array_equal(last.points, points.points)


def test_sampling_points_are_where_the_layer_reads():
    """The output is the mask times what stands at the points."""
    bias = np.concatenate([np.tile([1, -2], 6), np.linspace(-1, 1, 6)])
    layer, x = layer_with_bias(bias, padding=2, kernel_initializer="ones")
    y = np.asarray(layer(x))
    for position in [(2, 3), (0, 0), (10, 12)]:
        _, points, mask = sampling_points(layer, x, position, sample=1)
        expected = 0
        for (row, column), weight in zip(points.astype(int), mask, strict=True):
            if 0 <= row < 9 and 0 <= column < 10:
                expected += weight * x[1, row, column].sum()
        np.testing.assert_allclose(y[(1, *position, 0)], expected, rtol=1e-5, atol=1e-5)


def test_sampling_points_differ_by_sample_and_by_features():
    layer = ModulatedDeformConv2D(4, 3, offset_kernel_initializer="glorot_uniform", modulated=False)
    rng = np.random.default_rng(0)
    x, features = rng.normal(size=(2, 9, 10, 4)), rng.normal(size=(2, 9, 10, 3))
    points = sampling_points(layer, [x, features], (4, 5), sample=1)
    offset, _ = layer.predict_offset_and_mask([x, features])
    expected = points.grid + np.reshape(offset[1, 4, 5], (9, 2))
    np.testing.assert_allclose(points.points, expected, rtol=1e-5)
    np.testing.assert_array_equal(points.mask, np.ones(9))


def test_picture_scales_positions_to_the_image():
    layer, x = layer_with_bias(np.concatenate([np.tile([0.5, 0.25], 6), np.zeros(6)]))
    image = np.zeros((36, 30, 3))  # 4 pixels of the image to one row of the map, 3 to a column
    ax = plot_sampling(layer, x, (2, 3), image=image)
    grid, discs = (np.asarray(each.get_offsets()) for each in ax.collections)
    taps = np.array([[2 + i, 3 + j] for i in range(3) for j in range(2)])
    np.testing.assert_allclose(grid, ((taps + 0.5) * [4, 3] - 0.5)[:, ::-1])
    np.testing.assert_allclose(discs, ((taps + np.array([1.0, 0.75])) * [4, 3] - 0.5)[:, ::-1])
    np.testing.assert_allclose(ax.collections[1].get_array(), np.full(6, 0.5))
    assert np.shape(ax.images[0].get_array()) == (36, 30, 3)
    assert ax.get_xlim() == (-0.5, 29.5) and ax.get_ylim() == (35.5, -0.5)


def test_picture_of_several_positions_on_given_axes():
    layer, x = layer_with_bias(np.zeros(18))
    _, ax = pyplot.subplots()
    assert plot_sampling(layer, x, [(0, 0), (2, 3), (6, 8)], ax=ax) is ax
    assert len(ax.collections) == 6
    np.testing.assert_allclose(ax.images[0].get_array(), x[0].mean(-1))


def test_discs_grow_with_the_mask():
    logits = np.linspace(-3, 3, 6)
    layer, x = layer_with_bias(np.concatenate([np.zeros(12), logits]))
    discs = plot_sampling(layer, x, (2, 3)).collections[1]
    np.testing.assert_allclose(discs.get_array(), 1 / (1 + np.exp(-logits)), rtol=1e-6)
    assert len(discs.get_sizes()) == 6 and np.all(np.diff(discs.get_sizes()) > 1)


def test_far_and_non_finite_points_do_not_shrink_the_image():
    offsets = np.zeros(12)
    offsets[:3] = np.nan, 1e9, -1e9
    layer, x = layer_with_bias(np.concatenate([offsets, np.zeros(6)]))
    ax = plot_sampling(layer, x, (2, 3))
    assert ax.get_xlim()[0] >= -5.5 and ax.get_xlim()[1] <= 14.5
    assert ax.get_ylim()[1] >= -5.0 and ax.get_ylim()[0] <= 13.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"position": (7, 0)}, "the row of position must be between -7 and 6; received 7"),
        ({"position": (0, -10)}, "the column of position must be between -9 and 8; received -10"),
        ({"sample": 2}, "sample must be between -2 and 1; received 2"),
        ({"deformable_group": 1}, "deformable_group must be between -1 and 0; received 1"),
    ],
)
@pytest.mark.parametrize("function", [sampling_points, plot_sampling])
def test_indices_refused(function, arguments, message):
    layer, x = layer_with_bias(np.zeros(18))
    with pytest.raises(IndexError) as error:
        function(layer, x, **{"position": (0, 0), **arguments})
    assert str(error.value) == f"{function.__name__}: {message}"
    assert pyplot.get_fignums() == []  # nothing drawn, nothing left open


@pytest.mark.parametrize("function", [sampling_points, plot_sampling])
@pytest.mark.parametrize("name", ["sample", "deformable_group"])
def test_indices_that_are_no_integers_refused(function, name):
    layer, x = layer_with_bias(np.zeros(18))
    with pytest.raises(ValueError) as error:
        function(layer, x, (0, 0), **{name: 0.5})
    assert str(error.value) == f"{function.__name__}: {name} must be an integer; received 0.5"


@pytest.mark.parametrize(
    "position", [3, None, (1,), (1, 2, 3), (1.5, 2), (1, True), [], "ab", [(1, 2), 3], [(1, 2, 3)]]
)
def test_positions_refused(position):
    check_position_refused(position)


def test_tensors_of_floats_as_positions_refused():
    check_position_refused(tf.constant([1.5, 2.0]))


def check_position_refused(position):
    layer, x = layer_with_bias(np.zeros(18))
    with pytest.raises(ValueError) as error:
        sampling_points(layer, x, position)
    assert str(error.value) == (
        f"sampling_points: position must be (row, column), 2 integers; received {position!r}"
    )
    with pytest.raises(ValueError) as error:
        plot_sampling(layer, x, position)
    assert str(error.value) == (
        "plot_sampling: position must be (row, column), 2 integers, or one or more such pairs; "
        f"received {position!r}"
    )


@pytest.mark.parametrize(
    "position, pictures",
    [
        ([2, 3], 1),
        (np.array([2, 3]), 1),
        (np.array([[2, 3], [0, 0]]), 2),
        (((2, 3), (0, 0), (1, 1)), 3),
        (zip([2, 0], [3, 0], strict=True), 2),
    ],
    ids=["list", "array", "array of two", "tuple of three", "iterator"],
)
def test_positions_taken(position, pictures):
    layer, x = layer_with_bias(np.zeros(18))
    assert len(plot_sampling(layer, x, position).collections) == 2 * pictures


@pytest.mark.parametrize("function", [sampling_points, plot_sampling])
def test_what_is_no_layer_and_what_is_no_batch_refused(function):
    layer, x = layer_with_bias(np.zeros(18))
    with pytest.raises(TypeError) as error:
        function(keras.layers.Conv2D(4, 3, name="plain"), x, (0, 0))
    assert str(error.value) == (
        f"{function.__name__}: layer must be a ModulatedDeformConv2D; received "
        "<Conv2D name=plain, built=False>"
    )
    for inputs, shape in [(x[0], [9, 10, 4]), (x[:0], [0, 9, 10, 4]), ([], [0])]:
        with pytest.raises(ValueError) as error:
            function(layer, inputs, (0, 0))
        assert str(error.value) == (
            f"{function.__name__}: inputs must have 4 axes and at least one sample; received shape "
            f"{shape}"
        )


def test_public_names():
    assert tf_mdcn.visualize.__all__ == ["SamplingPoints", "plot_sampling", "sampling_points"]


def test_without_matplotlib(monkeypatch):
    layer, x = layer_with_bias(np.zeros(18))
    original = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError) as error:
        plot_sampling(layer, x, (0, 0))
    assert str(error.value) == (
        "plot_sampling: matplotlib must be installed; received an environment without it. To "
        "install it: pip install 'tf_mdcn[plot]'"
    )


def test_examples_in_the_docstrings():
    result = doctest.testmod(tf_mdcn.visualize)
    assert result.attempted > 0 and result.failed == 0
