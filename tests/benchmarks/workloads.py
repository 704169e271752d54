"""What is benchmarked: the shapes, and the random tensors of one. Separate from the
implementations, which all get the same tensors.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from oracle import Case


@dataclasses.dataclass(frozen=True)
class Workload:
    """One convolution. Sizes are (height, width); padding keeps the size at stride 1."""

    name: str
    batch: int
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    deformable_groups: int = 1

    @property
    def pad(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    @property
    def out_size(self) -> tuple[int, int]:
        extent = self.dilation * (self.kernel - 1) + 1
        return tuple((size + 2 * self.pad - extent) // self.stride + 1 for size in self.size)

    @property
    def title(self) -> str:
        text = f"{self.name}: {self.batch}x{self.size[0]}x{self.size[1]}, "
        text += f"{self.in_channels} -> {self.out_channels}"
        text += "" if self.kernel == 3 else f", {self.kernel}x{self.kernel}"
        text += "" if self.stride == 1 else f", stride {self.stride}"
        text += "" if self.dilation == 1 else f", dilation {self.dilation}"
        if self.deformable_groups > 1:
            text += f", {self.deformable_groups} deformable groups"
        return text

    @property
    def forward_flops(self) -> float:
        """Of the matrix product alone, as for a plain convolution; a training step has three."""
        outputs = self.batch * math.prod(self.out_size) * self.out_channels
        return 2.0 * outputs * self.kernel**2 * self.in_channels

    def forward_bytes(self, element_bytes: int) -> float:
        """What must be read and written at least once."""
        taps = self.kernel**2
        out_pixels = self.batch * math.prod(self.out_size)
        elements = self.batch * math.prod(self.size) * self.in_channels
        elements += taps * self.in_channels * self.out_channels
        elements += out_pixels * (3 * taps * self.deformable_groups + self.out_channels)
        return float(elements * element_bytes)

    def tensors(self, dtype: np.dtype, seed: int = 0) -> tuple[Case, np.ndarray]:
        """The random tensors of a call, with offsets ~ N(0, 2), and an output gradient."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(dtype)

        taps = self.kernel**2 * self.deformable_groups
        out_shape = (self.batch, *self.out_size)
        fan_in = self.kernel**2 * self.in_channels
        case = Case(
            inputs=normal(self.batch, *self.size, self.in_channels),
            filters=normal(self.kernel, self.kernel, self.in_channels, self.out_channels)
            * np.asarray(fan_in**-0.5, dtype),
            offset=normal(*out_shape, 2 * taps) * np.asarray(2, dtype),
            mask=rng.random((*out_shape, taps), np.float32).astype(dtype),
            strides=(self.stride, self.stride),
            padding=((self.pad, self.pad), (self.pad, self.pad)),
            dilations=(self.dilation, self.dilation),
            deformable_groups=self.deformable_groups,
        )
        return case, normal(*out_shape, self.out_channels)


# A to E are those of the field's published comparisons; the others are what those leave out.
WORKLOADS = [
    Workload("A", 4, (64, 64), 128, 128),
    Workload("B", 8, (28, 28), 256, 256),
    Workload("C", 1, (100, 152), 256, 256),
    Workload("D", 16, (32, 32), 32, 32, deformable_groups=4),
    Workload("E", 2, (56, 56), 64, 64, kernel=5),
    Workload("small", 1, (14, 14), 512, 512),
    Workload("strided", 4, (56, 56), 128, 256, stride=2),
    Workload("dilated", 1, (60, 60), 256, 128, dilation=2),
    Workload("groups", 1, (180, 320), 64, 64, deformable_groups=8),
    Workload("odd", 2, (45, 61), 40, 72),
    Workload("narrow", 1, (270, 480), 16, 16),
    Workload("1x1", 2, (56, 56), 256, 64, kernel=1),
]
# For --scaling and --memory.
SCALING_SIZES = [(32, 32), (64, 64), (135, 240), (270, 480), (540, 960), (1080, 1920)]
MEMORY = Workload("memory", 1, (540, 960), 64, 64)


def scaling_workload(size: tuple[int, int]) -> Workload:
    return Workload(f"{size[0]}x{size[1]}", 1, size, 32, 32)
