"""Where a layer samples: the sampling points as numbers, and a picture of them.

Separate because it alone needs matplotlib, which is an extra.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tf_mdcn._arguments import padding_amounts
from tf_mdcn.layers import ModulatedDeformConv2D

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SamplingPoints", "plot_sampling", "sampling_points"]


class SamplingPoints(NamedTuple):
    """The taps of one output position, in the order of the kernel, row by row.

    `grid` and `points` have shape `(kernel_height * kernel_width, 2)`: `(y, x)` in pixels of the
    layer's input, `grid` where a plain convolution reads and `points` where the layer does. `mask`
    has shape `(kernel_height * kernel_width,)`, ones when the layer is not modulated.
    """

    grid: np.ndarray
    points: np.ndarray
    mask: np.ndarray


def sampling_points(
    layer: ModulatedDeformConv2D,
    inputs: Any,
    position: tuple[int, int],
    *,
    sample: int = 0,
    deformable_group: int = 0,
) -> SamplingPoints:
    """Where one output position of a layer samples its input.

    Args:
        layer: A `ModulatedDeformConv2D`.
        inputs: What the layer is called with: a 4D array or tensor, or `[x, features]`.
        position: `(row, column)` of the output. Negative ones count from the end.
        sample: The sample of the batch.
        deformable_group: The deformable group whose points are returned.

    Returns:
        `SamplingPoints(grid, points, mask)`.

    Raises:
        TypeError: If layer is not a `ModulatedDeformConv2D`.
        ValueError: If position is not 2 integers, if sample or deformable_group is not an integer,
            if inputs has not 4 axes or no sample, and as `layer.predict_offset_and_mask`.
        IndexError: If position, sample or deformable_group lies outside what the layer has.

    Example:

    >>> import numpy as np
    >>> from tf_mdcn.layers import ModulatedDeformConv2D
    >>> from tf_mdcn.visualize import sampling_points
    >>> layer = ModulatedDeformConv2D(4, (1, 2), strides=2)
    >>> points = sampling_points(layer, np.zeros((1, 8, 8, 3)), (2, 3))
    >>> points.grid.tolist()
    [[4.0, 6.0], [4.0, 7.0]]
    >>> points.points.tolist(), points.mask.tolist()
    ([[4.0, 6.0], [4.0, 7.0]], [0.5, 0.5])
    """
    pair = _pair(position)
    if pair is None:
        raise ValueError(
            f"sampling_points: position must be (row, column), 2 integers; received {position!r}"
        )
    return _sampling_points("sampling_points", layer, inputs, pair, sample, deformable_group)


def _sampling_points(
    operation: str,
    layer: ModulatedDeformConv2D,
    inputs: Any,
    position: tuple[int, int],
    sample: int,
    deformable_group: int,
) -> SamplingPoints:
    if not isinstance(layer, ModulatedDeformConv2D):
        raise TypeError(f"{operation}: layer must be a ModulatedDeformConv2D; received {layer!r}")
    nested = isinstance(inputs, (list, tuple))
    arrays = [np.asarray(array) for array in (inputs if nested else [inputs])]
    for array in arrays or [np.empty(0)]:
        if array.ndim != 4 or len(array) == 0:
            raise ValueError(
                f"{operation}: inputs must have 4 axes and at least one sample; received shape "
                f"{list(array.shape)}"
            )
    sample = _checked_index(operation, "sample", sample, len(arrays[0]))
    arrays = [array[sample : sample + 1] for array in arrays]
    offset, mask = layer.predict_offset_and_mask(arrays if nested else arrays[0])
    x, offset = (_channels_last(layer, np.asarray(array)) for array in (arrays[0], offset))
    _, height, width, _ = offset.shape
    row = _checked_index(operation, "the row of position", position[0], height)
    column = _checked_index(operation, "the column of position", position[1], width)
    groups = layer.deformable_groups
    group = _checked_index(operation, "deformable_group", deformable_group, groups)

    kernel_size = layer.kernel_size
    paddings = padding_amounts(layer.convolution_arguments, x.shape[1:3], kernel_size)
    start = [
        index * stride - before
        for index, stride, (before, _) in zip((row, column), layer.strides, paddings, strict=True)
    ]
    taps = np.moveaxis(np.indices(kernel_size), 0, -1).reshape(-1, 2)
    grid = (start + taps * layer.dilation_rate).astype(offset.dtype)
    displacement = offset[0, row, column].reshape(groups, -1, 2)[group]
    if mask is None:
        weights = np.ones(len(taps), offset.dtype)
    else:
        mask = _channels_last(layer, np.asarray(mask))[0, row, column]
        weights = mask.reshape(groups, -1)[group]
    return SamplingPoints(grid, grid + displacement, weights)


def plot_sampling(
    layer: ModulatedDeformConv2D,
    inputs: Any,
    position: tuple[int, int] | Sequence[tuple[int, int]],
    *,
    image: Any = None,
    sample: int = 0,
    deformable_group: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draws where output positions of a layer sample.

    Over the image: a cross where each tap of a plain convolution would read, a disc where this
    layer reads, a line from one to the other. Area and colour of the disc grow with the mask, from
    0 to `mask_scale`. A star marks the output position, the middle of its regular grid.

    A layer deep in a network samples a feature map. Give that map as `inputs` and the picture that
    the network saw as `image`: positions are scaled by the ratio of the two sizes, so that pixel
    centres fall where resizing the map to the image would put them. For a functional model,
    `keras.Model(model.inputs, layer.input)(images)` computes the map.

    Args:
        layer: A `ModulatedDeformConv2D`.
        inputs: What the layer is called with: a 4D array or tensor, or `[x, features]`.
        position: `(row, column)` of the output, or several of them.
        image: What to draw under the points, `(height, width)` or `(height, width, 1, 3 or 4)`.
            By default the input of the layer: itself when it has 1 or 3 channels, else the mean
            of its channels.
        sample: The sample of the batch.
        deformable_group: The deformable group whose points are drawn.
        ax: The axes to draw on, by default new ones.

    Returns:
        The axes. They show the image and up to half of its size around it: points further out
        are not in the picture. Out there every sample is 0.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If layer is not a `ModulatedDeformConv2D`.
        ValueError: If position is neither 2 integers nor one or more pairs of them, if sample or
            deformable_group is not an integer, if inputs has not 4 axes or no sample, and as
            `layer.predict_offset_and_mask`.
        IndexError: If position, sample or deformable_group lies outside what the layer has.

    Example:

    >>> import numpy as np
    >>> from tf_mdcn.layers import ModulatedDeformConv2D
    >>> from tf_mdcn.visualize import plot_sampling
    >>> layer = ModulatedDeformConv2D(4, 3, padding="same")
    >>> features = np.random.rand(1, 16, 16, 8)
    >>> picture = np.random.rand(64, 64, 3)
    >>> ax = plot_sampling(layer, features, (8, 8), image=picture)

    Source: the figures of arXiv:1703.06211 and arXiv:1811.11168.
    """
    drawn = [
        _sampling_points("plot_sampling", layer, inputs, each, sample, deformable_group)
        for each in _pairs(position)
    ]
    x = np.asarray(inputs[0] if isinstance(inputs, (list, tuple)) else inputs)
    feature_map = _channels_last(layer, x)[sample]
    if image is None:
        image = feature_map
        if image.shape[-1] not in (1, 3):
            image = image.mean(axis=-1)
    image = np.asarray(image)
    scale = np.divide(image.shape[:2], feature_map.shape[:2])

    ax = _new_axes() if ax is None else ax
    ax.imshow(image, cmap="gray")
    for grid, points, mask in drawn:
        grid, points = ((array + 0.5) * scale - 0.5 for array in (grid, points))
        for start, end in zip(grid, points, strict=True):
            ax.plot(*np.transpose([start, end])[::-1], color="tab:orange", linewidth=0.8)
        ax.scatter(grid[:, 1], grid[:, 0], marker="+", color="tab:cyan", linewidths=1.0)
        ax.scatter(
            points[:, 1],
            points[:, 0],
            s=10 + 50 * mask / layer.mask_scale,
            c=mask,
            vmin=0,
            vmax=layer.mask_scale,
            cmap="autumn",
            edgecolors="black",
            linewidths=0.5,
            zorder=3,
        )
        ax.plot(*grid.mean(axis=0)[::-1], marker="*", color="tab:cyan")
    limits = np.array([[-0.5, -0.5], np.subtract(image.shape[:2], 0.5)])
    margin = np.divide(image.shape[:2], 2)
    every = np.concatenate([np.concatenate([grid, points]) for grid, points, _ in drawn])
    every = (every[np.isfinite(every).all(axis=1)] + 0.5) * scale - 0.5
    lowest = np.clip(every.min(axis=0) - scale, limits[0] - margin, limits[0])
    highest = np.clip(every.max(axis=0) + scale, limits[1], limits[1] + margin)
    ax.set_xlim(lowest[1], highest[1])
    ax.set_ylim(highest[0], lowest[0])
    return ax


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot_sampling: matplotlib must be installed; received an environment without it. To "
            "install it: pip install 'tf_mdcn[plot]'"
        ) from error
    return pyplot.subplots()[1]


def _channels_last(layer: ModulatedDeformConv2D, array: np.ndarray) -> np.ndarray:
    return array if layer.data_format == "channels_last" else np.moveaxis(array, 1, -1)


def _pair(position: Any) -> tuple[int, int] | None:
    """The position as integers, or None if it is not one."""
    try:
        row, column = position
        pair = operator.index(row), operator.index(column)
    except (AttributeError, TypeError, ValueError):  # TensorFlow's floats raise the first
        return None
    return None if isinstance(row, bool) or isinstance(column, bool) else pair


def _pairs(position: Any) -> list[tuple[int, int]]:
    try:
        given = list(position)
    except TypeError:
        given = []
    one = _pair(given)
    pairs = [_pair(each) for each in given] if one is None else [one]
    if not pairs or None in pairs:
        raise ValueError(
            "plot_sampling: position must be (row, column), 2 integers, or one or more such pairs; "
            f"received {position!r}"
        )
    return [pair for pair in pairs if pair is not None]


def _checked_index(operation: str, name: str, value: Any, size: int) -> int:
    try:
        index = operator.index(value)
    except (AttributeError, TypeError):
        raise ValueError(f"{operation}: {name} must be an integer; received {value!r}") from None
    if not -size <= index < size:
        raise IndexError(
            f"{operation}: {name} must be between {-size} and {size - 1}; received {index}"
        )
    return index % size
