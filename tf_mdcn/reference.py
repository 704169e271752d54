"""Modulated deformable convolution in standard TensorFlow operations only.

Separate from the native op because it needs none of it: the twin that tests compare with, and what
XLA, TFLite and stock model servers run. It is differentiable to any order, on any device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from tf_mdcn import _arguments

_OP = "ModulatedDeformConv2D"

# Output pixels are processed in blocks whose samples, [pixels, kernel taps, in_channels], take at
# most this; up to 9 arrays of that size live at once. Blocks that stay in the caches are also
# faster: half or twice this costs up to a tenth, all pixels at once took 1.6 to 3 times as long.
_BLOCK_BYTES = 4 * 2**20

# In the gradients the samples of a block may also take the input's size divided by this: on the
# CPU, TensorFlow's scatter copies what it adds to, so that with small blocks time would grow with
# the square of the image. With the blocks above, an input of 16 MB took 1.15 times as long.
_SCATTER_SHARE = 2

# The image is padded with zeros so that every corner of every position has a row in the table:
# positions lie in [-1, size), those outside are moved to -2, and the corners of -2 are zeros too.
_PAD_BEFORE, _PAD_AFTER = 2, 1
_OUTSIDE = -2

# A size: an integer, or a scalar tensor where the shape is known at run time only.
_Size = Any


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

    Beside a padded copy of the input, the forward pass needs a few tens of megabytes however large
    the input is; its first gradients need about 8 times the input. Converting to TFLite needs a
    known height and width. Sizes that are unknown when a function is traced must leave
    `batch * height * width * deformable_groups`, of the padded input, below 2^31.

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

        # Shapes of unknown rank passed the checks: from here on the rank is known.
        inputs, filters, offset, mask, bias = (
            None if tensor is None else tf.ensure_shape(tensor, [None] * rank)
            for tensor, rank in zip(tensors, (4, 4, 4, 4, 1), strict=True)
        )
        compute_type = tf.float64 if out_type == tf.float64 else tf.float32
        inputs, filters, offset, mask, bias = (
            None if tensor is None else tf.cast(tensor, compute_type)
            for tensor in (inputs, filters, offset, mask, bias)
        )
        if arguments.data_format == "channels_first":
            inputs, offset, mask = (
                None if image is None else tf.transpose(image, (0, 2, 3, 1))
                for image in (inputs, offset, mask)
            )
        inputs, filters, offset, mask, bias = _checked_at_run_time(
            _make_plan(arguments, inputs, filters), inputs, filters, offset, mask, bias
        )
        outputs = _convolve(arguments, inputs, filters, offset, mask)
        if bias is not None:
            outputs += bias
        outputs = tf.cast(outputs, out_type)
        if arguments.data_format == "channels_first":
            outputs = tf.transpose(outputs, (0, 3, 1, 2))
        return outputs


def _checked_at_run_time(plan: _Plan, inputs, filters, offset, mask, bias):
    """The tensors, to be had only if the sizes that nobody knew before are right too.

    A wrong shape of the right size would otherwise be reshaped into one that means nothing.
    """
    groups = plan.arguments.deformable_groups
    samples = groups * plan.taps
    tensors = {"inputs": inputs, "filters": filters, "offset": offset, "mask": mask, "bias": bias}
    expected = {
        "filters": (*plan.kernel_size, plan.in_channels // plan.groups, plan.out_channels),
        "offset": (plan.batch, *plan.out_size, 2 * samples),
        "mask": (plan.batch, *plan.out_size, samples),
        "bias": (plan.out_channels,),
    }
    checks = []
    if not _all_known(plan.out_size):
        checks.append(
            tf.debugging.Assert(
                tf.reduce_all(tf.stack(plan.out_size) > 0),
                [
                    f"{_OP}: the padded input must be at least as large as the dilated kernel; "
                    "received an input of height and width",
                    tf.stack(plan.in_size),
                ],
            )
        )
    for name, sizes in expected.items():
        tensor = tensors[name]
        if tensor is None or _all_known((*_sizes(tensor), *sizes)):
            continue
        wanted, received = tf.stack(sizes), tf.shape(tensor)
        checks.append(
            tf.debugging.Assert(
                tf.reduce_all(wanted == received),
                [f"{_OP}: {name}, channels last, must have shape", wanted, "; received", received],
                summarize=4,
            )
        )
    if not checks:
        return tuple(tensors.values())
    with tf.control_dependencies(checks):
        return tuple(None if x is None else tf.identity(x) for x in tensors.values())


def _convolve(arguments, inputs, filters, offset, mask):
    """The convolution without bias, channels_last, in the type it is computed in."""
    plan = _make_plan(arguments, inputs, filters)
    # With one image at least, an empty batch is no special case: its one block is all padding.
    border = [_PAD_BEFORE, _PAD_AFTER]
    table = tf.pad(inputs, [[0, _maximum(1 - plan.batch, 0)], border, border, [0, 0]])
    table = tf.reshape(table, (-1, plan.group_channels))
    tensors = [table, _group_filters(plan, filters), _flatten_sampling(plan, offset)]
    if mask is not None:
        tensors.append(_flatten_sampling(plan, mask))
    outputs = _sample_and_multiply(plan, *tensors)
    return tf.reshape(outputs, (plan.batch, *plan.out_size, plan.out_channels))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The sizes of one convolution. Pairs are (height, width)."""

    arguments: _arguments.ConvolutionArguments
    batch: _Size
    in_size: tuple[_Size, _Size]
    in_channels: _Size
    out_channels: _Size
    kernel_size: tuple[_Size, _Size]
    out_size: tuple[_Size, _Size]
    padding_before: tuple[_Size, _Size]
    deformable_groups: int  # a multiple or a divisor of the groups

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
    def pixels(self) -> _Size:
        """Of the output, in all images."""
        return self.batch * self.out_pixels

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
        """The type of indices: int32 unless the sizes are known to need more.

        Sizes that are tensors are int32 too, because TFLite divides nothing else.
        """
        height, width = self.table_size
        table_rows = _maximum(self.batch, 1) * height * width * self.deformable_groups
        if any(tf.is_tensor(size) for size in (table_rows, self.pixels, self.taps)):
            return tf.int32
        return tf.int32 if max(table_rows, 2 * self.pixels) < 2**31 else tf.int64


def _make_plan(arguments, inputs, filters) -> _Plan:
    batch, in_height, in_width, in_channels = _sizes(inputs)
    kernel_height, kernel_width, _, out_channels = _sizes(filters)
    in_size, kernel_size = (in_height, in_width), (kernel_height, kernel_width)
    out_size = _arguments.output_size(arguments, in_size, kernel_size)
    (top, _), (left, _) = _arguments.padding_amounts(arguments, in_size, kernel_size)
    deformable_groups = arguments.deformable_groups
    if arguments.groups % deformable_groups:
        # Offsets are repeated, see _flatten_sampling, until every group has a whole number of them.
        deformable_groups = math.lcm(arguments.groups, deformable_groups)
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
    )


def _flatten_sampling(plan: _Plan, tensor):
    """The offset or the mask as `[pixels, deformable_groups * taps * (2 or 1)]`."""
    groups = plan.arguments.deformable_groups
    repeats = plan.deformable_groups // groups
    channels = _sizes(tensor)[3]
    if repeats > 1:
        tensor = tf.reshape(tensor, (plan.pixels, groups, channels // groups))
        tensor = tf.repeat(tensor, repeats, axis=1)
    return tf.reshape(tensor, (plan.pixels, channels * repeats))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The output pixels of all images, one after the other, cut into `count` times `pixels`.

    The last block may reach beyond the last image.
    """

    count: _Size
    pixels: _Size
    beyond: _Size  # pixels beyond the last image

    def split(self, tensor, padding_value: float = 0.0):
        """Cuts `[pixels, values]` into `[blocks, pixels, values]`."""
        tensor = tf.pad(tensor, [[0, self.beyond], [0, 0]], constant_values=padding_value)
        return tf.reshape(tensor, (self.count, self.pixels, _sizes(tensor)[1]))

    def join(self, tensor):
        """Undoes `split`."""
        pixels = self.count * self.pixels
        return tf.reshape(tensor, (pixels, _sizes(tensor)[2]))[: pixels - self.beyond]


def _block_limit(plan: _Plan, dtype: tf.DType) -> _Size:
    """Pixels whose samples take `_BLOCK_BYTES`."""
    return _BLOCK_BYTES // (plan.taps * plan.in_channels * dtype.size)


def _make_blocks(plan: _Plan, span: _Size, limit: _Size) -> _Blocks:
    """Blocks that are equal parts of `span` pixels and have at most `limit`."""
    parts = _maximum(_divide_up(span, _maximum(limit, 1)), 1)
    pixels = _maximum(_divide_up(span, parts), 1)
    count = _maximum(_divide_up(plan.pixels, pixels), 1)
    return _Blocks(count, pixels, count * pixels - plan.pixels)


def _sample_and_multiply(plan: _Plan, *tensors):
    """The output `[pixels, out_channels]` of table, filters, offset and perhaps mask.

    Its gradient is written out, block by block like the output: TensorFlow's own would keep the
    samples, corner values and weights of every block.
    """

    @tf.custom_gradient
    def sample_and_multiply(table, filters, offset, mask=None):
        # Where only the batch is unknown, blocks are parts of an image: their shape is known then,
        # which TFLite needs of a loop.
        only_batch = tf.is_tensor(plan.batch) and not tf.is_tensor(plan.out_pixels)
        span = plan.out_pixels if only_batch else plan.pixels
        blocks = _make_blocks(plan, span, _block_limit(plan, table.dtype))
        grid = _make_grid(plan, blocks, table.dtype)
        offset_blocks, mask_blocks = _split_sampling(blocks, offset, mask)

        def block_output(i, _):
            position = _locate(plan, grid, i, offset_blocks[i])
            weights = _modulated_weights(position, None if mask is None else mask_blocks[i])
            samples = _weighted_sum(weights, _corner_values(plan, table, position))
            output = tf.matmul(_group_samples(plan, blocks, samples), filters)
            return [], [_ungroup_outputs(plan, blocks, output)]

        _, outputs = _for_each_block(blocks, block_output, [], [plan.out_channels], table.dtype)

        def gradient(outputs_gradient):
            return _gradients(plan, table, filters, offset, mask, outputs_gradient)

        return blocks.join(outputs[0]), gradient

    return sample_and_multiply(*tensors)


def _gradients(plan: _Plan, table, filters, offset, mask, outputs_gradient):
    """The gradients of `_sample_and_multiply` for its tensors."""
    in_pixels = plan.batch * plan.in_size[0] * plan.in_size[1]
    limit = in_pixels // (_SCATTER_SHARE * plan.taps)
    limit = _maximum(limit, _block_limit(plan, table.dtype))
    blocks = _make_blocks(plan, plan.pixels, limit)
    grid = _make_grid(plan, blocks, table.dtype)
    offset_blocks, mask_blocks = _split_sampling(blocks, offset, mask)
    output_gradients = blocks.split(outputs_gradient)

    def block_gradients(i, sums):
        table_gradient, filters_gradient = sums
        position = _locate(plan, grid, i, offset_blocks[i])
        block_mask = None if mask is None else mask_blocks[i]
        weights = _modulated_weights(position, block_mask)
        values = _corner_values(plan, table, position)
        output_gradient = _group_outputs(plan, blocks, output_gradients[i])

        samples = _group_samples(plan, blocks, _weighted_sum(weights, values))
        filters_gradient += tf.matmul(samples, output_gradient, transpose_a=True)
        samples_gradient = tf.matmul(output_gradient, filters, transpose_b=True)
        samples_gradient = _ungroup_samples(plan, blocks, samples_gradient)
        for step, weight in zip(plan.corner_steps, weights, strict=True):
            table_gradient = tf.tensor_scatter_nd_add(
                table_gradient,
                tf.reshape(position.rows + step, (-1, 1)),
                tf.reshape(weight, (-1, 1)) * samples_gradient,
            )

        # What each corner's weight adds to the loss, as [pixels, deformable_groups * taps].
        low_low, low_high, high_low, high_high = (
            tf.reshape(tf.reduce_sum(value * samples_gradient, axis=-1), (blocks.pixels, -1))
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
        gradient_offset = tf.reshape(gradient_offset, (blocks.pixels, -1))
        return [table_gradient, filters_gradient], [gradient_offset, *sampling_gradients]

    sums = [tf.zeros_like(table), tf.zeros_like(filters)]
    values = [_sizes(tensor)[1] for tensor in (offset, mask) if tensor is not None]
    sums, sampling_gradients = _for_each_block(blocks, block_gradients, sums, values, table.dtype)
    return [*sums, *(blocks.join(gradient) for gradient in sampling_gradients)]


def _split_sampling(blocks: _Blocks, offset, mask):
    """The blocks of offset and mask; beyond the last image, samples of nothing."""
    offset_blocks = blocks.split(offset, padding_value=math.inf)
    return offset_blocks, None if mask is None else blocks.split(mask)


def _for_each_block(blocks: _Blocks, body, sums, values, dtype: tf.DType):
    """Runs `body(i, sums) -> (sums, results)` for each block `i`, one after the other.

    Returns the last sums, and the results of all blocks stacked. A result is [pixels, values], with
    `values` of each given. Where the shapes say that there is one block, there is no loop.
    """
    if isinstance(blocks.count, int) and blocks.count == 1:
        sums, results = body(0, sums)
        return sums, [result[tf.newaxis] for result in results]

    def step(i, sums, arrays):
        sums, results = body(i, sums)
        arrays = [array.write(i, result) for array, result in zip(arrays, results, strict=True)]
        return i + 1, sums, arrays

    shapes = [(_known(blocks.pixels), _known(size)) for size in values]
    arrays = [tf.TensorArray(dtype, blocks.count, element_shape=shape) for shape in shapes]
    _, sums, arrays = tf.while_loop(
        lambda i, *_: i < blocks.count,
        step,
        (0, sums, arrays),
        parallel_iterations=1,
        maximum_iterations=blocks.count,
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


def _group_samples(plan: _Plan, blocks: _Blocks, samples):
    whole, terms = plan.groups // plan.divided, plan.merged * plan.taps
    channels = plan.group_channels // plan.divided
    samples = tf.reshape(samples, (blocks.pixels, whole, terms, plan.divided, channels))
    samples = tf.transpose(samples, (1, 3, 0, 2, 4))
    return tf.reshape(samples, (plan.groups, blocks.pixels, terms * channels))


def _ungroup_samples(plan: _Plan, blocks: _Blocks, samples):
    whole, terms = plan.groups // plan.divided, plan.merged * plan.taps
    channels = plan.group_channels // plan.divided
    samples = tf.reshape(samples, (whole, plan.divided, blocks.pixels, terms, channels))
    return tf.reshape(tf.transpose(samples, (2, 0, 3, 1, 4)), (-1, plan.group_channels))


def _group_outputs(plan: _Plan, blocks: _Blocks, outputs):
    features = plan.out_channels // plan.groups
    outputs = tf.reshape(outputs, (blocks.pixels, plan.groups, features))
    return tf.transpose(outputs, (1, 0, 2))


def _ungroup_outputs(plan: _Plan, blocks: _Blocks, outputs):
    outputs = tf.transpose(outputs, (1, 0, 2))
    return tf.reshape(outputs, (blocks.pixels, plan.out_channels))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What the sampling positions of all blocks share."""

    block_pixels: _Size
    pixels: tf.Tensor  # [block pixels, 1], the output pixels of the first block
    group: tf.Tensor  # [1, deformable_groups * taps], the deformable group
    tap_y: tf.Tensor  # likewise, from the position of the first tap, in input pixels
    tap_x: tf.Tensor


def _make_grid(plan: _Plan, blocks: _Blocks, dtype: tf.DType) -> _Grid:
    index = tf.range(plan.deformable_groups * plan.taps, dtype=plan.index_type)[tf.newaxis]
    group, tap = index // plan.taps, index % plan.taps
    kernel_width = plan.kernel_size[1]
    dilation_height, dilation_width = plan.arguments.dilations
    return _Grid(
        block_pixels=blocks.pixels,
        pixels=tf.range(blocks.pixels, dtype=plan.index_type)[:, tf.newaxis],
        group=group,
        tap_y=tf.cast(tap // kernel_width * dilation_height, dtype),
        tap_x=tf.cast(tap % kernel_width * dilation_width, dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Position:
    """Where the samples of a block are, `[block pixels, deformable_groups * taps]` each."""

    rows: tf.Tensor  # rows of the table that hold the (low y, low x) corners, flat
    fraction_y: tf.Tensor
    fraction_x: tf.Tensor


def _locate(plan: _Plan, grid: _Grid, i, offset) -> _Position:
    pixels = grid.pixels + tf.cast(i, plan.index_type) * grid.block_pixels
    image = tf.minimum(pixels // plan.out_pixels, _maximum(plan.batch, 1) - 1)
    pixels -= image * plan.out_pixels
    out_width = plan.out_size[1]
    (stride_height, stride_width), (top, left) = plan.arguments.strides, plan.padding_before
    first_y = tf.cast(pixels // out_width * stride_height - top, offset.dtype)
    first_x = tf.cast(pixels % out_width * stride_width - left, offset.dtype)

    offset_y, offset_x = tf.unstack(tf.reshape(offset, (grid.block_pixels, -1, 2)), axis=-1)
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


# Four gathers, four products and their sum. Measured instead, in the forward pass of layers with 8
# to 256 channels per deformable group: one gather of all four corners from a table four times as
# wide, then a batched product [1, 4] x [4, channels] took 1.2 to 1.6 times as long, a product and a
# sum over an axis 1.2 to 1.5, four slices 1.4 to 1.8, one product [taps, 4 taps] x [4 taps,
# channels] per pixel 1.4 to 4. In the gradients, one scatter of all corners took 0.85 (narrow
# layers) to 1.7 times as long and four times the memory; one of the four updates end to end, the
# same time.


def _corner_values(plan: _Plan, table, position: _Position):
    return [tf.gather(table, position.rows + step) for step in plan.corner_steps]


def _weighted_sum(weights, values):
    products = (
        tf.reshape(weight, (-1, 1)) * value for weight, value in zip(weights, values, strict=True)
    )
    return tf.add_n(list(products))


def _sizes(tensor) -> list[_Size]:
    """The sizes of a tensor, integers where they are known."""
    static = tensor.shape.as_list()
    if None not in static:
        return static
    dynamic = tf.shape(tensor)
    return [dynamic[i] if size is None else size for i, size in enumerate(static)]


def _all_known(sizes: Iterable[_Size]) -> bool:
    return not any(map(tf.is_tensor, sizes))


def _known(size: _Size) -> int | None:
    return None if tf.is_tensor(size) else size


def _maximum(a: _Size, b: _Size) -> _Size:
    return tf.maximum(a, b) if tf.is_tensor(a) or tf.is_tensor(b) else max(a, b)


def _divide_up(a: _Size, b: _Size) -> _Size:
    return (a + b - 1) // b
