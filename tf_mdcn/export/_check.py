"""Runs what was exported, in its own runtime, and compares it with the model.

Separate from the writing, so that it sees files as any other reader does.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_mdcn.export._interface import describe

_UNKNOWN_BATCH, _UNKNOWN_PX = 2, 64


def largest_difference(
    model: keras.Model,
    path: str | os.PathLike,
    road: str,
    input_signature: Any = None,
) -> float:
    """The largest difference of an exported model from the original, on random inputs.

    Sizes that are unknown in the file are taken to be 2 for the batch and 64 for the rest.

    Args:
        model: The model.
        path: What was written.
        road: `"saved_model"`, `"portable"`, `"tflite"` or `"onnx"`.
        input_signature: What the model was exported with.

    Returns:
        Over all outputs, the largest absolute difference divided by the largest absolute value of
        that output.

    Raises:
        ImportError: If ONNX Runtime is needed and not installed.
        ValueError: If ONNX Runtime has no kernel for the model, as for a layer in float64.
    """
    interface = describe("tf_mdcn.export", model, input_signature)
    shapes, run = _RUNTIMES[road](os.fspath(path))
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in interface.inputs:
        fixed = shapes.get(spec.name, spec.shape.as_list())
        defaults = [_UNKNOWN_BATCH] + [_UNKNOWN_PX] * (len(fixed) - 1)
        shape = [size or default for size, default in zip(fixed, defaults, strict=True)]
        whole = spec.dtype.is_integer or spec.dtype.is_bool
        values = rng.integers(0, 2, shape) if whole else rng.normal(size=shape)
        inputs[spec.name] = values.astype(spec.dtype.as_numpy_dtype)
    expected, actual = interface.call(*map(tf.constant, inputs.values())), run(inputs)
    return max(_difference(actual[name], expected[name]) for name in expected)


def _difference(actual: Any, expected: Any) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    if actual.shape != expected.shape:
        return np.inf
    error = np.max(np.abs(actual - expected), initial=0.0)
    with np.errstate(divide="ignore"):
        return float(error and error / np.max(np.abs(expected)))


_Runtime = tuple[dict[str, list[int]], Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]]


def _load_saved_model(path: str) -> _Runtime:
    serve = tf.saved_model.load(path).signatures["serving_default"]
    return {}, lambda inputs: serve(**{name: tf.constant(x) for name, x in inputs.items()})


def _load_tflite(path: str) -> _Runtime:
    runner = tf.lite.Interpreter(path).get_signature_runner()
    details = runner.get_input_details()
    shapes = {name: detail["shape"].tolist() for name, detail in details.items()}
    return shapes, lambda inputs: runner(**inputs)


def _load_onnx(path: str) -> _Runtime:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "tf_mdcn.export: checking an ONNX model needs the package onnxruntime; received an "
            "environment without it. To install it: pip install 'tf_mdcn[onnx]'"
        ) from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own have no base but this
        raise ValueError(
            f"tf_mdcn.export: {path} must be a model that ONNX Runtime runs; received {error}"
        ) from error
    names = [output.name for output in session.get_outputs()]
    return {}, lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


_RUNTIMES = {
    "saved_model": _load_saved_model,
    "portable": _load_saved_model,
    "tflite": _load_tflite,
    "onnx": _load_onnx,
}
