"""The arguments of a modulated deformable convolution: normalised once, checked, errors worded.

Separate because the op, its portable twin and the layer must accept, refuse and say the same. The
rules and the words are those of cc/core/geometry.cc, which checks again below Python.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NoReturn

import tensorflow as tf

_MAX_INT32 = 2**31 - 1
_PADDING_RULE = (
    'padding must be "valid", "same", an integer, (height, width) or ((top, bottom), (left, '
    "right)), of integers between 0 and 2^31 - 1"
)
_DATA_FORMATS = ("channels_last", "channels_first")
_TYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_HALF_TYPES = (tf.float16, tf.bfloat16)
_FILTERS_RULE = "[kernel_height, kernel_width, in_channels / groups, out_channels]"

# A dimension, or the dimensions of a shape; None where they are unknown.
_Size = int | None
_Shape = list[_Size] | None


@dataclasses.dataclass(frozen=True)
class ConvolutionArguments:
    """What the user chose, in one form. Pairs are (height, width)."""

    strides: tuple[int, int]
    padding: str  # "VALID", "SAME" or "EXPLICIT"
    explicit_paddings: tuple[int, int, int, int]  # top, bottom, left, right; 0 unless EXPLICIT
    data_format: str  # "channels_last" or "channels_first"
    dilations: tuple[int, int]
    groups: int
    deformable_groups: int


def normalize_arguments(
    op: str,
    *,
    strides: Any,
    padding: Any,
    data_format: Any,
    dilations: Any,
    groups: Any,
    deformable_groups: Any,
) -> ConvolutionArguments:
    """Brings the arguments of the public functions into one form.

    Args:
        op: What opens every error message, such as `"ModulatedDeformConv2D"`.
        strides: An integer or a pair of them, at least 1.
        padding: `"valid"` or `"same"` in any case, an integer, `(height, width)` or
            `((top, bottom), (left, right))`, at least 0.
        data_format: `"channels_last"` or `"channels_first"`.
        dilations: An integer or a pair of them, at least 1.
        groups: An integer, at least 1.
        deformable_groups: An integer, at least 1.

    Returns:
        The `ConvolutionArguments`.

    Raises:
        ValueError: If an argument breaks its rule; bools and floats are not integers.
    """
    if data_format not in _DATA_FORMATS:
        _refuse(op, 'data_format must be "channels_last" or "channels_first"', repr(data_format))
    padding, explicit_paddings = _normalize_padding(op, padding)
    return ConvolutionArguments(
        strides=normalize_pair(op, "strides", strides),
        padding=padding,
        explicit_paddings=explicit_paddings,
        data_format=data_format,
        dilations=normalize_pair(op, "dilations", dilations),
        groups=normalize_count(op, "groups", groups),
        deformable_groups=normalize_count(op, "deformable_groups", deformable_groups),
    )


def check_dtypes(
    op: str, inputs: Any, filters: Any, offset: Any, mask: Any = None, bias: Any = None
) -> None:
    """Refuses types that no implementation takes.

    Args:
        op: What opens every error message.
        inputs: The type of the input, a `tf.DType` or what `tf.as_dtype` takes.
        filters: The type of the filters.
        offset: The type of the offset.
        mask: The type of the mask; `None` without a mask.
        bias: The type of the bias; `None` without a bias.

    Raises:
        TypeError: If `inputs` is not a floating-point type of the op, `filters` or `bias` has
            another type than `inputs`, `offset` has neither the type of `inputs` nor float32
            beside half precision, or `mask` has another type than `offset`.
    """
    types = {"inputs": inputs, "filters": filters, "offset": offset, "mask": mask, "bias": bias}
    types = {name: tf.as_dtype(dtype) for name, dtype in types.items() if dtype is not None}
    inputs = types["inputs"]
    if inputs not in _TYPES:
        rule = "inputs must be float16, bfloat16, float32 or float64"
        _refuse(op, rule, inputs.name, error=TypeError)

    def require(name: str, rule: str, *allowed: tf.DType) -> None:
        if name in types and types[name] not in allowed:
            names = " or ".join(dtype.name for dtype in allowed)
            _refuse(op, f"{name} must have {rule} = {names}", types[name].name, error=TypeError)

    require("filters", "the type of inputs", inputs)
    if inputs in _HALF_TYPES:
        require("offset", "the type of inputs or float32", inputs, tf.float32)
    else:
        require("offset", "the type of inputs", inputs)
    require("mask", "the type of offset", types["offset"])
    require("bias", "the type of inputs", inputs)


def check_shapes(
    op: str,
    arguments: ConvolutionArguments,
    inputs: Any,
    filters: Any,
    offset: Any,
    mask: Any = None,
    bias: Any = None,
) -> None:
    """Refuses shapes that are certainly wrong.

    Args:
        op: What opens every error message.
        arguments: The normalised arguments.
        inputs: The shape of the input, a `tf.TensorShape` or what makes one; it may be unknown,
            wholly (`tf.TensorShape(None)`) or in some dimensions. So may the others.
        filters: The shape of the filters.
        offset: The shape of the offset.
        mask: The shape of the mask; `None` without a mask.
        bias: The shape of the bias; `None` without a bias.

    Raises:
        ValueError: If a rank or a dimension breaks its rule, or two of them contradict each other.
    """

    def layout(height: Any, width: Any, channels: Any) -> list[Any]:
        if arguments.data_format == "channels_last":
            return [height, width, channels]
        return [channels, height, width]

    def image_rule(height: str, width: str, channels: str) -> str:
        return f"[batch, {', '.join(layout(height, width, channels))}]"

    def read_image(shape: _Shape) -> tuple[_Size, _Size, _Size, _Size]:
        if shape is None:
            return None, None, None, None
        if arguments.data_format == "channels_last":
            batch, height, width, channels = shape
        else:
            batch, channels, height, width = shape
        return batch, height, width, channels

    groups, deformable_groups = arguments.groups, arguments.deformable_groups
    inputs_rule = image_rule("in_height", "in_width", "in_channels")
    sampling_channels = "deformable_groups * kernel_height * kernel_width"
    offset_rule = image_rule("out_height", "out_width", f"2 * {sampling_channels}")
    mask_rule = image_rule("out_height", "out_width", sampling_channels)
    inputs = _read_shape(op, "inputs", inputs_rule, inputs, 4)
    filters = _read_shape(op, "filters", _FILTERS_RULE, filters, 4)
    offset = _read_shape(op, "offset", offset_rule, offset, 4)
    mask = None if mask is None else _read_shape(op, "mask", mask_rule, mask, 4)
    bias = None if bias is None else _read_shape(op, "bias", "[out_channels]", bias, 1)

    batch, in_height, in_width, in_channels = read_image(inputs)
    kernel_height = kernel_width = group_in_channels = out_channels = None
    if filters is not None:
        kernel_height, kernel_width, group_in_channels, out_channels = filters
        if any(size is not None and not 1 <= size <= _MAX_INT32 for size in filters):
            rule = "filters must have dimensions between 1 and 2^31 - 1"
            _refuse(op, rule, f"shape {_shape_string(filters)}")
    taps = _times(kernel_height, kernel_width)
    if taps is not None and taps > _MAX_INT32:
        rule = "filters must have at most 2^31 - 1 kernel taps"
        _refuse(op, rule, f"shape {_shape_string(filters)}")

    if in_channels == 0:
        rule = "inputs must have at least one channel"
        _refuse(op, rule, f"shape {_shape_string(inputs)}")
    if in_channels is None:
        in_channels = _times(group_in_channels, groups)
    for name, parts, whole, size in (
        ("groups", groups, "in_channels", in_channels),
        ("groups", groups, "out_channels", out_channels),
        ("deformable_groups", deformable_groups, "in_channels", in_channels),
    ):
        if size is not None and size % parts != 0:
            _refuse(op, f"{name} must divide {whole}", f"{name}={parts}, {whole}={size}")
    group_in_channels = None if in_channels is None else in_channels // groups
    expected = [kernel_height, kernel_width, group_in_channels, out_channels]
    _check_agrees(op, "filters", _FILTERS_RULE, expected, filters)

    out_size = output_size(arguments, (in_height, in_width), (kernel_height, kernel_width))
    _check_fits(op, arguments, "height", 0, in_height, kernel_height, out_size[0])
    _check_fits(op, arguments, "width", 1, in_width, kernel_width, out_size[1])

    # The offset and the mask may know what the input does not, and must agree with it and each
    # other.
    out_height, out_width = out_size
    for name, rule, channels, shape in (
        ("offset", offset_rule, _times(taps, 2 * deformable_groups), offset),
        ("mask", mask_rule, _times(taps, deformable_groups), mask),
    ):
        expected = [batch, *layout(out_height, out_width, channels)]
        _check_agrees(op, name, rule, expected, shape)
        received_batch, received_height, received_width, _ = read_image(shape)
        batch = received_batch if batch is None else batch
        out_height = received_height if out_height is None else out_height
        out_width = received_width if out_width is None else out_width
    _check_agrees(op, "bias", "[out_channels]", [out_channels], bias)


def output_size(
    arguments: ConvolutionArguments,
    in_size: tuple[_Size, _Size],
    kernel_size: tuple[_Size, _Size],
) -> tuple[_Size, _Size]:
    """The height and width of the output.

    Args:
        arguments: The normalised arguments.
        in_size: Height and width of the input: integers, scalar tensors, or `None` where unknown.
        kernel_size: Height and width of the kernel, likewise.

    Returns:
        Height and width, each `None` where it cannot be told; below 1 where the padded input is
        smaller than the dilated kernel, which `check_shapes` refuses.
    """

    def axis_size(axis: int) -> _Size:
        size, kernel, stride = in_size[axis], kernel_size[axis], arguments.strides[axis]
        if size is None:
            return None
        if arguments.padding == "SAME":
            return (size - 1) // stride + 1
        if kernel is None:
            return None
        before, after = arguments.explicit_paddings[2 * axis : 2 * axis + 2]
        return (size + before + after - _extent(arguments, axis, kernel)) // stride + 1

    return axis_size(0), axis_size(1)


def padding_amounts(
    arguments: ConvolutionArguments, in_size: tuple[Any, Any], kernel_size: tuple[Any, Any]
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The pixels of padding around the input.

    Args:
        arguments: The normalised arguments.
        in_size: Height and width of the input, integers or scalar tensors.
        kernel_size: Height and width of the kernel, integers or scalar tensors.

    Returns:
        `((top, bottom), (left, right))`, scalar tensors where `"same"` padding depends on sizes
        that are tensors, integers otherwise.
    """
    if arguments.padding != "SAME":
        top, bottom, left, right = arguments.explicit_paddings
        return (top, bottom), (left, right)

    def same(axis: int) -> tuple[Any, Any]:
        size, kernel, stride = in_size[axis], kernel_size[axis], arguments.strides[axis]
        total = (size - 1) // stride * stride + _extent(arguments, axis, kernel) - size
        total = tf.maximum(total, 0) if tf.is_tensor(total) else max(total, 0)
        before = total // 2
        return before, total - before  # the odd pixel after, as in tf.nn.conv2d

    return same(0), same(1)


def _refuse(op: str, rule: str, received: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {rule}; received {received}")


def _is_integer(value: Any, minimum: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return minimum <= int(value) <= _MAX_INT32


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def normalize_count(op: str, name: str, value: Any) -> int:
    if not _is_integer(value, minimum=1):
        _refuse(op, f"{name} must be an integer between 1 and 2^31 - 1", repr(value))
    return int(value)


def normalize_pair(op: str, name: str, value: Any) -> tuple[int, int]:
    pair = value if _is_pair(value) else (value, value)
    if not all(_is_integer(size, minimum=1) for size in pair):
        rule = f"{name} must be an integer or 2 integers between 1 and 2^31 - 1"
        _refuse(op, rule, repr(value))
    return int(pair[0]), int(pair[1])


def _normalize_padding(op: str, padding: Any) -> tuple[str, tuple[int, int, int, int]]:
    if isinstance(padding, str) and padding.upper() in ("VALID", "SAME"):
        return padding.upper(), (0, 0, 0, 0)
    pair = padding if _is_pair(padding) else (padding, padding)
    if all(_is_pair(amounts) for amounts in pair):
        amounts = (*pair[0], *pair[1])
    else:
        amounts = (pair[0], pair[0], pair[1], pair[1])
    if not all(_is_integer(amount, minimum=0) for amount in amounts):
        _refuse(op, _PADDING_RULE, repr(padding))
    top, bottom, left, right = (int(amount) for amount in amounts)
    return "EXPLICIT", (top, bottom, left, right)


def _extent(arguments: ConvolutionArguments, axis: int, kernel: Any) -> Any:
    """The pixels that the dilated kernel spans."""
    return (kernel - 1) * arguments.dilations[axis] + 1


def _times(a: _Size, b: _Size) -> _Size:
    return None if a is None or b is None else a * b


def _shape_string(shape: list[_Size]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _read_shape(op: str, name: str, rule: str, shape: Any, rank: int) -> _Shape:
    shape = tf.TensorShape(shape)
    if shape.rank is None:
        return None
    sizes = shape.as_list()
    if shape.rank != rank:
        _refuse(op, f"{name} must have rank {rank}, {rule}", f"shape {_shape_string(sizes)}")
    return sizes


def _check_agrees(op: str, name: str, rule: str, expected: list[_Size], received: _Shape) -> None:
    if received is None:
        return
    for wanted, size in zip(expected, received, strict=True):
        if wanted is not None and size is not None and wanted != size:
            _refuse(
                op,
                f"{name} must have shape {rule} = {_shape_string(expected)}",
                _shape_string(received),
            )


def _check_fits(
    op: str,
    arguments: ConvolutionArguments,
    axis_name: str,
    axis: int,
    size: _Size,
    kernel: _Size,
    out_size: _Size,
) -> None:
    """Refuses an axis on which there is no output."""
    if arguments.padding == "SAME":
        if size == 0:
            _refuse(op, "inputs must have at least one pixel", f"in_{axis_name}=0")
    elif size is not None and out_size is not None and (size == 0 or out_size < 1):
        padding = sum(arguments.explicit_paddings[2 * axis : 2 * axis + 2])
        _refuse(
            op,
            "the padded input must be at least as large as the dilated kernel",
            f"in_{axis_name}={size}, padding {padding}, dilated kernel_{axis_name}="
            f"{_extent(arguments, axis, kernel)}",
        )
