"""The definition of modulated deformable convolution in plain NumPy loops, in float64, and the
random cases that tests run. It shares no code with tf_mdcn, so that a mistake there is not
repeated here; every implementation (native, portable, exported, emulated CUDA) is held to it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution: its tensors and arguments, as `modulated_deform_conv2d` takes them."""

    inputs: np.ndarray
    filters: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    strides: tuple[int, int] = (1, 1)
    padding: Any = "valid"  # "valid", "same" or ((top, bottom), (left, right))
    data_format: str = "channels_last"
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    deformable_groups: int = 1

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors by argument name, without the absent ones."""
        names = ("inputs", "filters", "offset", "mask", "bias")
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that go with the tensors."""
        names = ("strides", "padding", "data_format", "dilations", "groups", "deformable_groups")
        return {name: getattr(self, name) for name in names}

    def replace(self, **changes: Any) -> Case:
        """The case with other values for some fields."""
        return dataclasses.replace(self, **changes)

    def cast(self, dtype: Any, sampling_dtype: Any = None) -> Case:
        """The case with its tensors in `dtype`, offset and mask in `sampling_dtype`."""
        sampling = ("offset", "mask")
        return self.replace(
            **{
                name: tensor.astype((sampling_dtype or dtype) if name in sampling else dtype)
                for name, tensor in self.tensors.items()
            }
        )

    def channels_first(self) -> Case:
        """A channels_last case with the channel axis of its image tensors moved to 1."""
        assert self.data_format == "channels_last"
        images = {
            name: np.moveaxis(tensor, -1, 1)
            for name, tensor in self.tensors.items()
            if name in ("inputs", "offset", "mask")
        }
        return self.replace(data_format="channels_first", **images)


def random_case(
    seed: int = 0,
    *,
    batch: int = 2,
    in_size: tuple[int, int] = (7, 9),
    in_channels: int = 12,
    out_channels: int = 10,
    kernel_size: tuple[int, int] = (3, 2),
    strides: tuple[int, int] = (2, 1),
    padding: Any = ((1, 0), (2, 1)),
    dilations: tuple[int, int] = (2, 1),
    groups: int = 2,
    deformable_groups: int = 3,
    offset_scale: float = 2.0,
    with_mask: bool = True,
    with_bias: bool = True,
) -> Case:
    """A channels_last case of random float64 tensors, by default asymmetric in everything.

    Offsets are normal with a standard deviation of `offset_scale` pixels, so that samples fall
    inside, on the border and outside. They stay 1/16 away from whole numbers, where the derivative
    jumps: numeric gradients may take small steps, and rounding to half precision jumps nowhere.
    """
    rng = np.random.default_rng(seed)
    taps = kernel_size[0] * kernel_size[1]
    out_height, out_width = _output_size(in_size, kernel_size, strides, padding, dilations)
    offset = offset_scale * rng.normal(
        size=(batch, out_height, out_width, 2 * deformable_groups * taps)
    )
    whole = np.floor(offset)
    offset = whole + np.clip(offset - whole, 1 / 16, 15 / 16)
    return Case(
        inputs=rng.normal(size=(batch, *in_size, in_channels)),
        filters=rng.normal(size=(*kernel_size, in_channels // groups, out_channels)),
        offset=offset,
        mask=rng.uniform(size=(*offset.shape[:3], deformable_groups * taps)) if with_mask else None,
        bias=rng.normal(size=out_channels) if with_bias else None,
        strides=strides,
        padding=padding,
        dilations=dilations,
        groups=groups,
        deformable_groups=deformable_groups,
    )


def assert_close(actual: Any, expected: Any, bound: float, what: str = "") -> None:
    """Fails, naming the worst element, where `actual` is further than `bound` from `expected`.

    NaN and infinities must stand in the same places. `rounding_bound` derives a bound.
    """
    actual, expected = (np.asarray(array).astype(np.float64) for array in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    if not actual.size:
        return
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
    worst = np.unravel_index(np.argmax(error), error.shape)
    position = tuple(int(index) for index in worst)
    assert error[worst] <= bound, (
        f"{what}: {np.count_nonzero(error > bound)} of {error.size} elements differ by more than "
        f"{bound:.3g}; worst at {position}: {actual[worst]!r} instead of {expected[worst]!r}"
    )


def rounding_bound(case: Case, expected: np.ndarray, dtype: Any) -> float:
    """The error that rounding explains in a result of `case` stored in `dtype`, for `assert_close`.

    c * norm * epsilon with c = 4. The norm is the largest expected element: in a sum of n terms of
    random sign, it and the sum of the rounding errors both come from random walks, the latter
    sqrt(n) * epsilon as large. A position is rounded relative to the image's size, and the sample
    moves with it by the slope of the image, which is about its values. Both happen in float32 at
    least; storing the result rounds once more, in `dtype`.
    """
    stored = float(ml_dtypes.finfo(dtype).eps)
    computed = min(stored, float(np.finfo(np.float32).eps))
    offset = _channels_last(case, case.offset)
    terms = max(
        offset[..., 0].size, math.prod(case.filters.shape[:2]) * max(case.filters.shape[2:])
    )
    coordinate = max(_channels_last(case, case.inputs).shape[1:3])
    norm = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
    return 4 * norm * ((math.sqrt(terms) + coordinate) * computed + stored)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradients of a scalar for the five tensors of a case, in their layouts."""

    inputs: np.ndarray
    filters: np.ndarray
    offset: np.ndarray
    mask: np.ndarray | None
    bias: np.ndarray | None


def forward(case: Case) -> np.ndarray:
    """The output, float64, in the layout of the case."""
    walk = _Walk(case)
    output = np.zeros((*walk.offset.shape[:3], walk.filters.shape[3]))
    if walk.bias is not None:
        output += walk.bias
    for sample in walk.samples():
        for channels, features in walk.weight_groups(sample.channels):
            weights = walk.filters[sample.tap][walk.filter_channels(channels), features]
            output[sample.pixel][features] += sample.modulation * (
                walk.value(sample, channels) @ weights
            )
    return _as_stored(case, output)


def gradients(case: Case, output_gradient: np.ndarray) -> Gradients:
    """The gradients of `sum(forward(case) * output_gradient)`, float64, by the analytic formulas.

    The derivative at a whole-number coordinate is the right-hand one, from there to the next pixel.
    """
    walk = _Walk(case)
    output_gradient = _channels_last(case, output_gradient).astype(np.float64)
    inputs, filters, offset = (np.zeros_like(t) for t in (walk.inputs, walk.filters, walk.offset))
    mask = None if walk.mask is None else np.zeros_like(walk.mask)
    for sample in walk.samples():
        image, row, column = sample.pixel
        for channels, features in walk.weight_groups(sample.channels):
            filter_channels = walk.filter_channels(channels)
            value = walk.value(sample, channels)
            feature_gradient = output_gradient[sample.pixel][features]
            weights = walk.filters[sample.tap][filter_channels, features]
            value_gradient = weights @ feature_gradient
            filters[sample.tap][filter_channels, features] += sample.modulation * np.outer(
                value, feature_gradient
            )
            if mask is not None:
                mask[image, row, column, sample.mask_channel] += value @ value_gradient
            value_gradient = value_gradient * sample.modulation
            slope_y, slope_x = walk.slopes(sample, channels)
            offset[image, row, column, 2 * sample.mask_channel] += slope_y @ value_gradient
            offset[image, row, column, 2 * sample.mask_channel + 1] += slope_x @ value_gradient
            for y, x, weight in sample.corners:
                if walk.exists(y, x):
                    inputs[image, y, x, channels] += weight * value_gradient
    return Gradients(
        inputs=_as_stored(case, inputs),
        filters=filters,
        offset=_as_stored(case, offset),
        mask=None if mask is None else _as_stored(case, mask),
        bias=None if walk.bias is None else output_gradient.sum(axis=(0, 1, 2)),
    )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Where one output pixel, deformable group and kernel tap sample the input."""

    pixel: tuple[int, int, int]  # image, output row, output column
    tap: tuple[int, int]  # kernel row, kernel column
    channels: range  # of the deformable group
    mask_channel: int
    modulation: float
    fraction_y: float
    fraction_x: float
    corners: list[tuple[int, int, float]]  # y, x, weight: low low, low high, high low, high high


class _Walk:
    """The tensors of a case in float64 and channels_last, and the samples taken from them."""

    def __init__(self, case: Case):
        self.case = case
        self.inputs, self.offset, self.mask = (
            None if image is None else _channels_last(case, image).astype(np.float64)
            for image in (case.inputs, case.offset, case.mask)
        )
        self.filters = case.filters.astype(np.float64)
        self.bias = None if case.bias is None else case.bias.astype(np.float64)
        kernel_size = self.filters.shape[:2]
        in_size = self.inputs.shape[1:3]
        expected = _output_size(in_size, kernel_size, case.strides, case.padding, case.dilations)
        assert self.offset.shape[1:3] == expected
        top, left = _padding_before(in_size, kernel_size, case)
        self.pad = (top, left)

    def samples(self):
        case = self.case
        kernel_height, kernel_width = self.filters.shape[:2]
        group_channels = self.inputs.shape[3] // case.deformable_groups
        for image, row, column in np.ndindex(*self.offset.shape[:3]):
            for group in range(case.deformable_groups):
                for i, j in np.ndindex(kernel_height, kernel_width):
                    k = group * kernel_height * kernel_width + i * kernel_width + j
                    dy, dx = self.offset[image, row, column, 2 * k : 2 * k + 2]
                    y = row * case.strides[0] - self.pad[0] + i * case.dilations[0] + dy
                    x = column * case.strides[1] - self.pad[1] + j * case.dilations[1] + dx
                    low_y, fraction_y = self.locate(y, self.inputs.shape[1])
                    low_x, fraction_x = self.locate(x, self.inputs.shape[2])
                    yield _Sample(
                        pixel=(image, row, column),
                        tap=(i, j),
                        channels=range(group * group_channels, (group + 1) * group_channels),
                        mask_channel=k,
                        modulation=1.0 if self.mask is None else self.mask[image, row, column, k],
                        fraction_y=fraction_y,
                        fraction_x=fraction_x,
                        corners=[
                            (low_y, low_x, (1 - fraction_y) * (1 - fraction_x)),
                            (low_y, low_x + 1, (1 - fraction_y) * fraction_x),
                            (low_y + 1, low_x, fraction_y * (1 - fraction_x)),
                            (low_y + 1, low_x + 1, fraction_y * fraction_x),
                        ],
                    )

    @staticmethod
    def locate(position: float, size: int) -> tuple[int, float]:
        """The whole number below and the distance from it; outside, -2 and 0 (NaN for NaN)."""
        if math.isnan(position):
            return -2, math.nan
        if not -1 <= position < size:
            return -2, 0.0
        return math.floor(position), position - math.floor(position)

    def weight_groups(self, channels: range):
        """Splits channels at the borders of the weight groups; with the features of each part."""
        in_channels = self.inputs.shape[3] // self.case.groups
        out_channels = self.filters.shape[3] // self.case.groups
        for group in range(self.case.groups):
            start = max(channels.start, group * in_channels)
            stop = min(channels.stop, (group + 1) * in_channels)
            if start < stop:
                features = slice(group * out_channels, (group + 1) * out_channels)
                yield slice(start, stop), features

    def filter_channels(self, channels: slice) -> slice:
        """Where the filters have the channels of one weight group."""
        in_channels = self.filters.shape[2]
        start = channels.start % in_channels
        return slice(start, start + channels.stop - channels.start)

    def exists(self, y: int, x: int) -> bool:
        return 0 <= y < self.inputs.shape[1] and 0 <= x < self.inputs.shape[2]

    def corner_values(self, sample: _Sample, channels: slice) -> list[np.ndarray]:
        image = sample.pixel[0]
        absent = np.zeros(channels.stop - channels.start)
        return [
            self.inputs[image, y, x, channels] if self.exists(y, x) else absent
            for y, x, _ in sample.corners
        ]

    def value(self, sample: _Sample, channels: slice) -> np.ndarray:
        values = self.corner_values(sample, channels)
        return sum(
            weight * value for (_, _, weight), value in zip(sample.corners, values, strict=True)
        )

    def slopes(self, sample: _Sample, channels: slice) -> tuple[np.ndarray, np.ndarray]:
        """The derivatives of the value with respect to y and x."""
        low_low, low_high, high_low, high_high = self.corner_values(sample, channels)
        fraction_y, fraction_x = sample.fraction_y, sample.fraction_x
        return (
            (1 - fraction_x) * (high_low - low_low) + fraction_x * (high_high - low_high),
            (1 - fraction_y) * (low_high - low_low) + fraction_y * (high_high - high_low),
        )


def _channels_last(case: Case, image: np.ndarray) -> np.ndarray:
    return image if case.data_format == "channels_last" else np.moveaxis(image, 1, -1)


def _as_stored(case: Case, image: np.ndarray) -> np.ndarray:
    return image if case.data_format == "channels_last" else np.moveaxis(image, -1, 1)


def _output_size(in_size, kernel_size, strides, padding, dilations) -> tuple[int, int]:
    if padding == "same":
        return tuple(
            math.ceil(size / stride) for size, stride in zip(in_size, strides, strict=True)
        )
    paddings = ((0, 0), (0, 0)) if padding == "valid" else padding
    sizes = []
    for axis in range(2):
        starts = in_size[axis] + sum(paddings[axis]) - dilations[axis] * (kernel_size[axis] - 1)
        sizes.append(len(range(0, starts, strides[axis])))
    return tuple(sizes)


def _padding_before(in_size, kernel_size, case: Case) -> tuple[int, int]:
    if case.padding == "valid":
        return 0, 0
    if case.padding != "same":
        return case.padding[0][0], case.padding[1][0]
    before = []
    for axis in range(2):
        last_start = (math.ceil(in_size[axis] / case.strides[axis]) - 1) * case.strides[axis]
        reach = last_start + case.dilations[axis] * (kernel_size[axis] - 1) + 1
        before.append(max(0, reach - in_size[axis]) // 2)
    return tuple(before)
