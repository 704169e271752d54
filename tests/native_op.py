"""Runs an oracle case through TensorFlow's native op: what all of the op's tests share.

Separate from oracle.py, which must know nothing of the implementation that it judges.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import tensorflow as tf
from oracle import Case, assert_close, rounding_bound

import tf_mdcn
from tf_mdcn import _library

RAW = _library.load()  # the generated functions: the op past Python's checks

# Data type, type of offset and mask.
TYPES = [
    ("float64", "float64"),
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
]


def forward(case: Case) -> np.ndarray:
    """The output of the public function."""
    return tf_mdcn.modulated_deform_conv2d(**case.tensors, **case.arguments).numpy()


def gradients(case: Case, output_gradient: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of `sum(forward(case) * output_gradient)`, by tensor name."""
    tensors = {name: tf.constant(tensor) for name, tensor in case.tensors.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = tf_mdcn.modulated_deform_conv2d(**tensors, **case.arguments)
    found = tape.gradient(output, tensors, output_gradients=tf.constant(output_gradient))
    return {name: gradient.numpy() for name, gradient in found.items()}


def random_output_gradient(case: Case, seed: int = 1) -> np.ndarray:
    """A normal array in the shape and type of the output."""
    batch, *size = case.offset.shape[:3]
    shape = (batch, *size, case.filters.shape[3])
    if case.data_format == "channels_first":
        shape = (batch, case.filters.shape[3], *case.offset.shape[2:])
    return np.random.default_rng(seed).normal(size=shape).astype(case.inputs.dtype)


def random_configuration(seed: int) -> dict[str, Any]:
    """Arguments of `oracle.random_case`: any kernel, stride, padding, dilation and groups."""
    rng = np.random.default_rng(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))

    groups, deformable_groups = (int(rng.integers(1, most + 1)) for most in (3, 4))
    kernel_size, dilations, strides = pair(1, 4), pair(1, 3), pair(1, 3)
    padding = "same" if rng.uniform() < 0.25 else (pair(0, 3), pair(0, 3))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilations, strict=True)]
    in_size = tuple(extent + int(rng.integers(0, 5)) for extent in extents)
    return {
        "batch": int(rng.integers(1, 4)),
        "in_size": in_size,
        "in_channels": int(np.lcm(groups, deformable_groups) * rng.integers(1, 4)),
        "out_channels": groups * int(rng.integers(1, 8)),
        "kernel_size": kernel_size,
        "strides": strides,
        "padding": padding,
        "dilations": dilations,
        "groups": groups,
        "deformable_groups": deformable_groups,
        "offset_scale": float(rng.choice([0.5, 2, 25])),
        "with_mask": bool(rng.uniform() < 0.75),
        "with_bias": bool(rng.uniform() < 0.75),
    }


def with_whole_offsets(case: Case, share: float = 0.5, seed: int = 2) -> Case:
    """The case with some of its offsets at whole numbers, where the derivative jumps."""
    chosen = np.random.default_rng(seed).uniform(size=case.offset.shape) < share
    return case.replace(offset=np.where(chosen, np.round(case.offset), case.offset))


def check_forward_and_gradients(case: Case) -> None:
    """Fails unless the native op agrees with the oracle on a case, in its own types."""
    dtypes = {name: tensor.dtype for name, tensor in case.tensors.items()}
    assert dtypes["inputs"] in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    expected = oracle.forward(case)
    actual = forward(case)
    assert actual.dtype == dtypes["inputs"]
    assert_close(actual, expected, bound_of(case, expected, actual.dtype), "output")
    output_gradient = random_output_gradient(case)
    expected = oracle.gradients(case, output_gradient)
    for name, actual in gradients(case, output_gradient).items():
        wanted = getattr(expected, name)
        assert actual.dtype == dtypes[name]
        assert_close(actual, wanted, bound_of(case, wanted, actual.dtype), f"gradient of {name}")


def bound_of(case: Case, expected: np.ndarray, dtype: Any) -> float:
    """`oracle.rounding_bound` of the elements that are numbers."""
    return rounding_bound(case, expected[np.isfinite(expected)], dtype)
