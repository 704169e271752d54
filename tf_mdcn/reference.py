"""Modulated deformable convolution in standard TensorFlow operations only.

Separate from the native op because it needs none of it: the twin that tests compare with, and what
XLA, TFLite and stock model servers run. It is differentiable to any order, on any device.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tensorflow as tf

from tf_mdcn import _arguments

_OP = "ModulatedDeformConv2D"

# Pixels are processed in blocks whose samples, [pixels, kernel taps, in_channels], take at most
# this. About 6 arrays of this size live at once in the forward pass and 12 in the gradients.
_BLOCK_BYTES = 4 * 2**20

# The image is padded with zeros so that every corner of every position has a row in the table:
# positions lie in [-1, size), those outside are moved to -2, and the corners of -2 are zeros too.
_PAD_BEFORE, _PAD_AFTER = 2, 1
_OUTSIDE = -2

# A size: an integer, or a scalar tensor where the shape is known at run time only.
_Size = int | tf.Tensor


def modulated_deform_conv2d(
    inputs,
    filters,
    offset,
    mask=None,
    bias=None,
    *,
    strides=1,
    padding="valid",
    data_format="channels_last",
    dilations=1,
    groups=1,
    deformable_groups=1,
    name=None,
):
    """Modulated deformable convolution (DCNv2) in standard TensorFlow operations.

    The same function as `tf_mdcn.modulated_deform_conv2d`, with the same arguments, errors and
    results to rounding, for where the native op cannot go: TPUs, TFLite, model servers without the
    op, and derivatives of second and higher order.

    Each output position `p` and kernel tap `k` samples the input at
    `p * stride - padding + k * dilation + offset`, bilinearly, a pixel outside the image counting
    as 0; the sample is multiplied by the mask and by the filters. At whole-number positions the
    derivative for the offset is the right-hand one. A NaN offset makes the outputs that use it
    NaN; an infinite one samples outside the image, which is 0.

    Args:
        inputs: Tensor `[batch, in_height, in_width, in_channels]`, float16, bfloat16, float32 or
            float64. Positions and sums are computed in float32 at least.
        filters: Tensor `[kernel_height, kernel_width, in_channels / groups, out_channels]`, of the
            type of `inputs`.
        offset: Tensor `[batch, out_height, out_width, 2 * deformable_groups * kernel_height *
            kernel_width]`, in input pixels, of the type of `inputs`, or float32 beside half
            precision. Channel `2 * (g * K + i * kernel_width + j)` is the vertical offset of tap
            `(i, j)` for deformable group `g`, with `K` taps; the next channel is the horizontal.
        mask: Tensor `[batch, out_height, out_width, deformable_groups * kernel_height *
            kernel_width]` of the type of `offset`, usually in [0, 1]; `None` for all ones (DCNv1).
        bias: Tensor `[out_channels]` of the type of `inputs`, or `None`.
        strides: Integer or pair `(height, width)`.
        padding: `"valid"`, `"same"` as in `tf.nn.conv2d`, an integer, `(height, width)` or
            `((top, bottom), (left, right))`.
        data_format: `"channels_last"`, or `"channels_first"`, which moves the channel axis of
            `inputs`, `offset`, `mask` and the output to 1.
        dilations: Integer or pair `(height, width)`.
        groups: Groups of input and output channels that are convolved separately.
        deformable_groups: Groups of input channels that have offsets and a mask of their own.
        name: Name of the operation.

    Returns:
        Tensor `[batch, out_height, out_width, out_channels]` of the type of `inputs`.

    Raises:
        ValueError: If an argument or a shape breaks its rule.
        TypeError: If a type does.

    Example:

    >>> inputs = tf.random.normal([1, 8, 8, 4])
    >>> filters = tf.random.normal([3, 3, 4, 6])
    >>> offset, mask = tf.zeros([1, 8, 8, 18]), tf.ones([1, 8, 8, 9])
    >>> outputs = modulated_deform_conv2d(inputs, filters, offset, mask, padding="same")
    >>> expected = tf.nn.conv2d(inputs, filters, 1, "SAME")
    >>> bool(tf.reduce_max(tf.abs(outputs - expected)) < 1e-4)
    True

    Reference: Zhu et al., Deformable ConvNets v2, arXiv 1811.11168, section 3.2.
    """
    arguments = _arguments.normalize_arguments(
        _OP,
        strides=strides,
        padding=padding,
        data_format=data_format,
        dilations=dilations,
        groups=groups,
        deformable_groups=deformable_groups,
    )
    with tf.name_scope(name or _OP):
        tensors = [
            None if tensor is None else tf.convert_to_tensor(tensor)
            for tensor in (inputs, filters, offset, mask, bias)
        ]
        out_type = tensors[0].dtype
        _arguments.check_dtypes(_OP, *(None if t is None else t.dtype for t in tensors))
        _arguments.check_shapes(_OP, arguments, *(None if t is None else t.shape for t in tensors))

        compute_type = tf.float64 if out_type == tf.float64 else tf.float32
        inputs, filters, offset, mask, bias = (
            None if tensor is None else tf.cast(tensor, compute_type) for tensor in tensors
        )
        if arguments.data_format == "channels_first":
            inputs, offset, mask = (
                None if image is None else tf.transpose(image, (0, 2, 3, 1))
                for image in (inputs, offset, mask)
            )
        outputs = _convolve(arguments, inputs, filters, offset, mask)
        if bias is not None:
            outputs += bias
        outputs = tf.cast(outputs, out_type)
        if arguments.data_format == "channels_first":
            outputs = tf.transpose(outputs, (0, 3, 1, 2))
        return outputs


def _convolve(arguments, inputs, filters, offset, mask):
    """The convolution without bias, channels_last, in the type it is computed in."""
    plan = _make_plan(arguments, inputs, filters)
    # With one image at least, an empty batch is no special case: its one block is all padding.
    border = [_PAD_BEFORE, _PAD_AFTER]
    table = tf.pad(inputs, [[0, _maximum(1 - plan.batch, 0)], border, border, [0, 0]])
    tensors = [
        tf.reshape(table, (-1, plan.group_channels)),
        _group_filters(plan, filters),
        _split_blocks(plan, offset, math.inf),  # padding samples outside the image
    ]
    if mask is not None:
        tensors.append(_split_blocks(plan, mask, 0.0))
    outputs = _convolve_blocks(plan, *tensors)
    outputs = tf.reshape(outputs, (plan.block_count * plan.block_pixels, plan.out_channels))
    outputs = outputs[: plan.batch * plan.out_pixels]
    return tf.reshape(outputs, (plan.batch, *plan.out_size, plan.out_channels))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The sizes of one convolution and of the blocks it is done in. Pairs are (height, width).

    The output pixels of all images, one after the other, make `block_count` blocks of
    `block_pixels`; the last block may reach beyond the last image.
    """

    arguments: _arguments.ConvolutionArguments
    batch: _Size
    in_size: tuple[_Size, _Size]
    in_channels: _Size
    out_channels: _Size
    kernel_size: tuple[_Size, _Size]
    out_size: tuple[_Size, _Size]
    padding_before: tuple[_Size, _Size]
    deformable_groups: int  # a multiple or a divisor of the groups
    block_count: _Size
    block_pixels: _Size

    @property
    def groups(self) -> int:
        return self.arguments.groups

    @property
    def taps(self) -> _Size:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def out_pixels(self) -> _Size:
        """In one image."""
        return self.out_size[0] * self.out_size[1]

    @property
    def group_channels(self) -> _Size:
        """Channels of a deformable group: the width of the table and of the samples."""
        return self.in_channels // self.deformable_groups

    @property
    def merged(self) -> int:
        """Deformable groups in a group, 1 where there is less than one."""
        return max(self.deformable_groups // self.groups, 1)

    @property
    def divided(self) -> int:
        """Groups in a deformable group, 1 where there is less than one."""
        return max(self.groups // self.deformable_groups, 1)

    @property
    def table_size(self) -> tuple[_Size, _Size]:
        """Height and width of an image in the table."""
        height, width = self.in_size
        return height + _PAD_BEFORE + _PAD_AFTER, width + _PAD_BEFORE + _PAD_AFTER

    @property
    def corner_steps(self) -> tuple[_Size, _Size, _Size, _Size]:
        """Rows of the table from the (low y, low x) corner to each of the four, itself first."""
        right = self.deformable_groups
        down = self.table_size[1] * self.deformable_groups
        return 0, right, down, down + right

    @property
    def index_type(self) -> tf.DType:
        """The type of indices; int32, which is faster, where sizes are known and small enough."""
        height, width = self.table_size
        table_rows = _maximum(self.batch, 1) * height * width * self.deformable_groups
        pixels = self.block_count * self.block_pixels
        known = not any(tf.is_tensor(size) for size in (table_rows, pixels, self.taps))
        return tf.int32 if known and max(table_rows, pixels) < 2**31 else tf.int64


def _make_plan(arguments, inputs, filters) -> _Plan:
    batch, in_height, in_width, in_channels = _sizes(inputs)
    kernel_height, kernel_width, _, out_channels = _sizes(filters)
    in_size, kernel_size = (in_height, in_width), (kernel_height, kernel_width)
    out_size = _arguments.output_size(arguments, in_size, kernel_size)
    (top, _), (left, _) = _arguments.padding_amounts(arguments, in_size, kernel_size)
    deformable_groups = arguments.deformable_groups
    if arguments.groups % deformable_groups:
        # Offsets are repeated, see _split_blocks, until every group has a whole number of them.
        deformable_groups = math.lcm(arguments.groups, deformable_groups)

    pixels = batch * out_size[0] * out_size[1]
    pixel_bytes = kernel_height * kernel_width * in_channels * inputs.dtype.size
    block_count = _maximum(_divide_up(pixels, _maximum(_BLOCK_BYTES // pixel_bytes, 1)), 1)
    return _Plan(
        arguments=arguments,
        batch=batch,
        in_size=in_size,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        out_size=out_size,
        padding_before=(top, left),
        deformable_groups=deformable_groups,
        block_count=block_count,
        block_pixels=_maximum(_divide_up(pixels, block_count), 1),
    )


def _split_blocks(plan: _Plan, tensor, padding_value: float):
    """The offset or the mask as `[blocks, pixels, deformable_groups * taps * (2 or 1)]`."""
    pixels = plan.batch * plan.out_pixels
    groups = plan.arguments.deformable_groups
    repeats = plan.deformable_groups // groups
    channels = _sizes(tensor)[3]
    if repeats > 1:
        tensor = tf.reshape(tensor, (pixels, groups, channels // groups))
        tensor = tf.repeat(tensor, repeats, axis=1)
    tensor = tf.reshape(tensor, (pixels, channels * repeats))
    beyond = plan.block_count * plan.block_pixels - pixels
    tensor = tf.pad(tensor, [[0, beyond], [0, 0]], constant_values=padding_value)
    return tf.reshape(tensor, (plan.block_count, plan.block_pixels, channels * repeats))


def _convolve_blocks(plan: _Plan, *tensors):
    """The output `[blocks, pixels, out_channels]` of table, filters, offset and perhaps mask.

    Its gradient is written out, block by block like the output: TensorFlow's own would keep the
    samples, corner values and weights of every block.
    """
    grid = _make_grid(plan, tensors[0].dtype)

    @tf.custom_gradient
    def convolve(table, filters, offset, mask=None):
        def block_output(i):
            position = _locate(plan, grid, i, offset[i])
            weights = _modulated_weights(position, None if mask is None else mask[i])
            samples = _weighted_sum(weights, _corner_values(plan, table, position))
            return _ungroup_outputs(plan, tf.matmul(_group_samples(plan, samples), filters))

        def gradient(outputs_gradient):
            return _gradients(plan, grid, table, filters, offset, mask, outputs_gradient)

        _, outputs = _for_each_block(plan, lambda i, _: ([], [block_output(i)]), [], [table.dtype])
        return outputs[0], gradient

    return convolve(*tensors)


def _gradients(plan: _Plan, grid: _Grid, table, filters, offset, mask, outputs_gradient):
    """The gradients of `_convolve_blocks` for its tensors."""

    def block_gradients(i, sums):
        table_gradient, filters_gradient = sums
        position = _locate(plan, grid, i, offset[i])
        block_mask = None if mask is None else mask[i]
        weights = _modulated_weights(position, block_mask)
        values = _corner_values(plan, table, position)
        output_gradient = _group_outputs(plan, outputs_gradient[i])

        samples = _group_samples(plan, _weighted_sum(weights, values))
        filters_gradient += tf.matmul(samples, output_gradient, transpose_a=True)
        samples_gradient = tf.matmul(output_gradient, filters, transpose_b=True)
        samples_gradient = _ungroup_samples(plan, samples_gradient)
        for step, weight in zip(plan.corner_steps, weights, strict=True):
            table_gradient = tf.tensor_scatter_nd_add(
                table_gradient,
                tf.reshape(position.rows + step, (-1, 1)),
                tf.reshape(weight, (-1, 1)) * samples_gradient,
            )

        # What each corner's weight adds to the loss, as [pixels, deformable_groups * taps].
        low_low, low_high, high_low, high_high = (
            tf.reshape(tf.reduce_sum(value * samples_gradient, axis=-1), (plan.block_pixels, -1))
            for value in values
        )
        y, x = position.fraction_y, position.fraction_x
        gradient_y = (1 - x) * (high_low - low_low) + x * (high_high - low_high)
        gradient_x = (1 - y) * (low_high - low_low) + y * (high_high - high_low)
        sampling_gradients = []
        if mask is not None:
            gradient_y, gradient_x = block_mask * gradient_y, block_mask * gradient_x
            low, high = (1 - x) * low_low + x * low_high, (1 - x) * high_low + x * high_high
            sampling_gradients = [(1 - y) * low + y * high]
        gradient_offset = tf.stack([gradient_y, gradient_x], axis=-1)
        gradient_offset = tf.reshape(gradient_offset, (plan.block_pixels, -1))
        return [table_gradient, filters_gradient], [gradient_offset, *sampling_gradients]

    sums = [tf.zeros_like(table), tf.zeros_like(filters)]
    types = [tensor.dtype for tensor in (offset, mask) if tensor is not None]
    sums, sampling_gradients = _for_each_block(plan, block_gradients, sums, types)
    return [*sums, *sampling_gradients]


def _for_each_block(plan: _Plan, body, sums, types):
    """Runs `body(i, sums) -> (sums, results)` for each block `i`, one after the other.

    Returns the last sums, and the results of all blocks stacked. `types` are those of the results.
    Where the shapes say that there is one block, there is no loop.
    """
    if isinstance(plan.block_count, int) and plan.block_count == 1:
        sums, results = body(0, sums)
        return sums, [result[tf.newaxis] for result in results]

    def step(i, sums, arrays):
        sums, results = body(i, sums)
        arrays = [array.write(i, result) for array, result in zip(arrays, results, strict=True)]
        return i + 1, sums, arrays

    count = tf.cast(plan.block_count, tf.int32)
    _, sums, arrays = tf.while_loop(
        lambda i, *_: i < count,
        step,
        (0, sums, [tf.TensorArray(dtype, count) for dtype in types]),
        parallel_iterations=1,
        maximum_iterations=count,
    )
    return sums, [array.stack() for array in arrays]


# The samples of a block are rows [pixels * deformable_groups * taps, group_channels]; the product
# wants [groups, pixels, terms], and the filters as [groups, terms, features]. Where there is one
# group, the transpositions move axes of size 1 only, which costs nothing.


def _group_filters(plan: _Plan, filters):
    channels, features = plan.in_channels // plan.groups, plan.out_channels // plan.groups
    shape = (plan.taps, plan.merged, channels // plan.merged, plan.groups, features)
    filters = tf.transpose(tf.reshape(filters, shape), (3, 1, 0, 2, 4))
    return tf.reshape(filters, (plan.groups, plan.taps * channels, features))


def _group_samples(plan: _Plan, samples):
    whole, terms = plan.groups // plan.divided, plan.merged * plan.taps
    channels = plan.group_channels // plan.divided
    samples = tf.reshape(samples, (plan.block_pixels, whole, terms, plan.divided, channels))
    samples = tf.transpose(samples, (1, 3, 0, 2, 4))
    return tf.reshape(samples, (plan.groups, plan.block_pixels, terms * channels))


def _ungroup_samples(plan: _Plan, samples):
    whole, terms = plan.groups // plan.divided, plan.merged * plan.taps
    channels = plan.group_channels // plan.divided
    samples = tf.reshape(samples, (whole, plan.divided, plan.block_pixels, terms, channels))
    return tf.reshape(tf.transpose(samples, (2, 0, 3, 1, 4)), (-1, plan.group_channels))


def _group_outputs(plan: _Plan, outputs):
    features = plan.out_channels // plan.groups
    outputs = tf.reshape(outputs, (plan.block_pixels, plan.groups, features))
    return tf.transpose(outputs, (1, 0, 2))


def _ungroup_outputs(plan: _Plan, outputs):
    outputs = tf.transpose(outputs, (1, 0, 2))
    return tf.reshape(outputs, (plan.block_pixels, plan.out_channels))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What the sampling positions of all blocks share."""

    pixels: tf.Tensor  # [block_pixels], the output pixels of the first block
    group: tf.Tensor  # [1, deformable_groups * taps], the deformable group
    tap_y: tf.Tensor  # likewise, from the position of the first tap, in input pixels
    tap_x: tf.Tensor


def _make_grid(plan: _Plan, dtype: tf.DType) -> _Grid:
    index = tf.range(plan.deformable_groups * plan.taps, dtype=plan.index_type)[tf.newaxis]
    group, tap = index // plan.taps, index % plan.taps
    kernel_width = plan.kernel_size[1]
    dilation_height, dilation_width = plan.arguments.dilations
    return _Grid(
        pixels=tf.range(plan.block_pixels, dtype=plan.index_type),
        group=group,
        tap_y=tf.cast(tap // kernel_width * dilation_height, dtype),
        tap_x=tf.cast(tap % kernel_width * dilation_width, dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Position:
    """Where the samples of a block are, `[block_pixels, deformable_groups * taps]` each."""

    rows: tf.Tensor  # rows of the table that hold the (low y, low x) corners, flat
    fraction_y: tf.Tensor
    fraction_x: tf.Tensor


def _locate(plan: _Plan, grid: _Grid, i, offset) -> _Position:
    pixels = grid.pixels[:, tf.newaxis] + tf.cast(i, plan.index_type) * plan.block_pixels
    image = tf.minimum(pixels // plan.out_pixels, _maximum(plan.batch, 1) - 1)
    pixels -= image * plan.out_pixels
    out_width = plan.out_size[1]
    (stride_height, stride_width), (top, left) = plan.arguments.strides, plan.padding_before
    first_y = tf.cast(pixels // out_width * stride_height - top, offset.dtype)
    first_x = tf.cast(pixels % out_width * stride_width - left, offset.dtype)

    offset_y, offset_x = tf.unstack(tf.reshape(offset, (plan.block_pixels, -1, 2)), axis=-1)
    y, x = first_y + grid.tap_y + offset_y, first_x + grid.tap_x + offset_x
    low_y, fraction_y = _locate_on_axis(y, plan.in_size[0], plan.index_type)
    low_x, fraction_x = _locate_on_axis(x, plan.in_size[1], plan.index_type)

    table_height, table_width = plan.table_size
    first_row = (image * table_height + _PAD_BEFORE) * table_width + _PAD_BEFORE
    rows = low_y * (table_width * plan.deformable_groups) + first_row * plan.deformable_groups
    rows += low_x * plan.deformable_groups + grid.group
    return _Position(tf.reshape(rows, (-1,)), fraction_y, fraction_x)


def _locate_on_axis(position, size: _Size, index_type: tf.DType):
    """The whole number at or below a position, and the distance from there.

    They are -2 and 0 where neither corner is inside the image, and -2 and NaN for NaN.
    """
    outside = (position < -1) | (position >= tf.cast(size, position.dtype))
    position = tf.where(outside, tf.cast(_OUTSIDE, position.dtype), position)
    low = tf.floor(position)
    fraction = position - low
    low = tf.where(low >= _OUTSIDE, low, tf.cast(_OUTSIDE, low.dtype))  # for NaN
    return tf.cast(low, index_type), fraction


def _modulated_weights(position: _Position, mask):
    """The bilinear weights of the four corners, times the mask."""
    y, x = position.fraction_y, position.fraction_x
    low, high = 1 - y, y
    if mask is not None:
        low, high = mask * low, mask * high
    return low * (1 - x), low * x, high * (1 - x), high * x


def _corner_values(plan: _Plan, table, position: _Position):
    return [tf.gather(table, position.rows + step) for step in plan.corner_steps]


def _weighted_sum(weights, values):
    products = (
        tf.reshape(weight, (-1, 1)) * value for weight, value in zip(weights, values, strict=True)
    )
    return tf.add_n(list(products))


def _sizes(tensor) -> list[_Size]:
    """The four sizes of a tensor, integers where they are known."""
    static = [None] * 4 if tensor.shape.rank is None else tensor.shape.as_list()
    if None not in static:
        return static
    dynamic = tf.shape(tensor, out_type=tf.int64)
    return [dynamic[i] if size is None else size for i, size in enumerate(static)]


def _maximum(a: _Size, b: _Size) -> _Size:
    return tf.maximum(a, b) if tf.is_tensor(a) or tf.is_tensor(b) else max(a, b)


def _divide_up(a: _Size, b: _Size) -> _Size:
    return (a + b - 1) // b
