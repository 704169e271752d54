"""The command line: `python -m tf_mdcn` reports and checks, `python -m tf_mdcn export` exports.

Separate because nothing imports it. The self-check is for machines that have no tests: it compares
the native kernels with the portable implementation, in which they share no code.
"""

import argparse
import contextlib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from tf_mdcn import _library, build_info, modulated_deform_conv2d, reference
from tf_mdcn.export import _check, onnx, saved_model, tflite
from tf_mdcn.export._interface import describe

_ROADS = ("saved_model", "portable", "tflite", "onnx")
# Differences relative to the largest output. Each road adds in another order, and a position that
# is rounded differently moves its sample; 16 and 8 bit weights differ by what they cannot hold.
_EXPORT_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "int8": 5e-2}

_DRIVER = pathlib.Path("/proc/driver/nvidia/version")  # of the kernel's module
_TYPES = (tf.float64, tf.float32, tf.bfloat16, tf.float16)
_RESULTS = ("output", "inputs", "filters", "offset", "mask", "bias")  # the output, and gradients
_ARGUMENTS: dict[str, Any] = {
    "strides": (2, 1),
    "padding": ((1, 0), (2, 1)),
    "dilations": (2, 1),
    "groups": 2,
    "deformable_groups": 3,
}

# Inputs, filters, offset, mask, bias and the gradient of the output.
_Tensors = Sequence[tf.Tensor]
# The output and the gradients of the first five, for those six.
_Implementation = Callable[[_Tensors], Sequence[tf.Tensor | np.ndarray]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_mdcn",
        description="Without a command: prints the environment report and checks the native "
        "kernels against the portable implementation.",
    )
    commands = parser.add_subparsers(dest="command")
    export = commands.add_parser(
        "export",
        help="export a .keras model and check the result against it",
        description="Exports a model, runs the result in its own runtime on random inputs, and "
        "prints its largest difference from the model.",
    )
    export.add_argument("model", help="the .keras file")
    export.add_argument("path", help="the file, or the folder of a SavedModel, to write")
    export.add_argument(
        "--to",
        choices=_ROADS,
        required=True,
        help="saved_model has the native op; portable is a SavedModel in standard ops",
    )
    export.add_argument("--opset", type=int, help="of ONNX, 19 (the default) to 22")
    export.add_argument(
        "--weights", choices=list(_EXPORT_TOLERANCES), help="of TFLite; float32 by default"
    )
    export.add_argument(
        "--input-shape",
        type=_shape,
        action="append",
        metavar="N,H,W,C",
        help="the shape of an input, ? where unknown, such as ?,480,640,3; once for every input, "
        "in order; by default as the model says, at any batch size",
    )
    export.add_argument(
        "--tolerance",
        type=float,
        help="the largest difference, relative to the largest output, that is no failure; by "
        "default 1e-4, 1e-2 for float16 weights and 5e-2 for int8",
    )
    options = parser.parse_args(arguments)
    if options.command is None:
        return _report_and_check()
    if options.opset is not None and options.to != "onnx":
        export.error("--opset goes with --to onnx")
    if options.weights is not None and options.to != "tflite":
        export.error("--weights goes with --to tflite")
    try:
        return _export(options)
    except (ValueError, TypeError, ImportError, OSError, tf.errors.OpError) as error:
        message = " ".join(str(error).split())
        message = message.replace("input_signature", "input_signature (here --input-shape)")
        export.exit(2, f"{export.prog}: error: {message}\n")


def _export(options: argparse.Namespace) -> int:
    model = keras.saving.load_model(options.model, compile=False)
    keywords: dict[str, Any] = {"input_signature": _signature(model, options.input_shape)}
    weights = options.weights or "float32"
    if options.to == "onnx":
        opset = 19 if options.opset is None else options.opset
        onnx(model, options.path, opset=opset, **keywords)
    elif options.to == "tflite":
        tflite(model, options.path, weights=weights, **keywords)
    else:
        saved_model(model, options.path, portable=options.to == "portable", **keywords)

    difference = _check.largest_difference(model, options.path, options.to, **keywords)
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = _EXPORT_TOLERANCES[weights]
    good = difference <= tolerance  # NaN is not
    print(
        f"{options.path}: {options.to} of {options.model}; largest difference {difference:.2g} of "
        f"the largest output (tolerance {tolerance:.2g}): {'ok' if good else 'FAILED'}"
    )
    return 0 if good else 1


def _shape(text: str) -> list[int | None]:
    if not re.fullmatch(r"(\?|0*[1-9]\d*)(,(\?|0*[1-9]\d*))*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be sizes such as ?,480,640,3; received {text!r}")
    return [None if size == "?" else int(size) for size in text.split(",")]


def _signature(model: keras.Model, shapes: list[list[int | None]] | None) -> list | None:
    if shapes is None:
        return None
    interface = describe("tf_mdcn.export", model)
    if len(shapes) != len(interface.inputs):
        raise ValueError(
            "--input-shape must be given once for every input = "
            f"{len(interface.inputs)}; received {len(shapes)}"
        )
    specs = [
        tf.TensorSpec(shape, spec.dtype, spec.name)
        for shape, spec in zip(shapes, interface.inputs, strict=True)
    ]
    return keras.tree.pack_sequence_as(interface.arguments, specs)


def _report_and_check() -> int:
    gpus = tf.config.list_logical_devices("GPU")
    for name, value in {**build_info(), **_gpu_report()}.items():
        print(f"{name:24}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    if gpus and build_info()["cuda"] is None:
        print("\nThis build has no kernels for the GPU: the op runs on the CPU.")
        gpus = []
    print()

    devices = tf.config.list_logical_devices("CPU")[:1] + gpus
    checked = {f"op on {device.name}": _op_on(device.name) for device in devices}
    if build_info()["xla"]:
        checked["op under XLA"] = tf.function(_op_on("CPU:0"), jit_compile=True)
    for instruction_set in build_info()["cpu_instruction_sets"]:
        checked[f"core, {instruction_set}"] = _core_with(instruction_set)
    with _without_tensor_float_32():
        failures = _compare(checked)
    print(f"{'tolerance':24}{''.join(f'{_tolerance(dtype):12.1e}' for dtype in _TYPES)}")
    print("\n" + "\n".join(["FAILED", *failures] if failures else ["The self-check passed."]))
    return 1 if failures else 0


def _compare(checked: dict[str, _Implementation]) -> list[str]:
    """Prints a table of the largest errors; returns what is wrong."""
    print("Largest error of the output and of the five gradients, each relative to its largest")
    print(f"element:\n{'':24}{''.join(f'{dtype.name:>12}' for dtype in _TYPES)}")
    failures = []
    for name, implementation in checked.items():
        try:
            row = [_errors(implementation, dtype) for dtype in _TYPES]
        except tf.errors.OpError as error:
            print(f"{name:24} does not run")
            failures.append(f"{name}: {error.message}")
            continue
        print(f"{name:24}{''.join(f'{max(errors.values()):12.1e}' for errors in row)}")
        failures += [
            f"{name}, {dtype.name}: {result} is off by {error:.1e}"
            for dtype, errors in zip(_TYPES, row, strict=True)
            for result, error in errors.items()
            if not error <= _tolerance(dtype)
        ]
    return failures


def _gpu_report() -> dict[str, Any]:
    """What a report on a GPU needs beside `build_info`."""
    build = tf.sysconfig.get_build_info()
    driver = _DRIVER.read_text() if _DRIVER.is_file() else ""
    version = re.search(r"\d+\.\d+(\.\d+)*", driver)
    gpus = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = ".".join(map(str, details.get("compute_capability", ("unknown",))))
        gpus.append(f"{details.get('device_name')} (compute capability {capability})")
    return {
        "tensorflow_cuda": build.get("cuda_version"),
        "tensorflow_cudnn": build.get("cudnn_version"),
        "nvidia_driver": version and version[0],
        "gpus": gpus or None,
    }


@contextlib.contextmanager
def _without_tensor_float_32() -> Iterator[None]:
    """On a GPU, products of float32 have the precision of float32."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _op_on(device: str) -> _Implementation:
    def run(tensors):
        with tf.device(device):
            return _with_gradients(modulated_deform_conv2d, tensors)

    return run


def _with_gradients(function: Callable, tensors: _Tensors) -> list[tf.Tensor]:
    *sources, output_gradient = tensors
    with tf.GradientTape() as tape:
        tape.watch(sources)
        output = function(*sources, **_ARGUMENTS)
    return [output, *tape.gradient(output, sources, output_gradients=output_gradient)]


def _core_with(instruction_set: str) -> _Implementation:
    """The kernels without TensorFlow, for one instruction set whichever the op has chosen."""
    core = _library.core()
    ((top, bottom), (left, right)) = _ARGUMENTS["padding"]
    keywords = {
        **_ARGUMENTS,
        "padding": "EXPLICIT",
        "explicit_paddings": (top, bottom, left, right),
        "instruction_set": instruction_set,
        "threads": 2,
    }

    def run(tensors):
        inputs, filters, offset, mask, bias, output_gradient = (x.numpy() for x in tensors)
        output = core.forward(inputs, filters, offset, mask, bias, **keywords)
        of_inputs, of_offset, of_mask = core.input_gradient(
            inputs, filters, offset, mask, output_gradient, **keywords
        )
        of_filters, of_bias = core.filter_gradient(
            inputs, filters.shape, offset, mask, output_gradient, **keywords
        )
        return output, of_inputs, of_filters, of_offset, of_mask, of_bias

    return run


def _errors(implementation: _Implementation, dtype: tf.DType) -> dict[str, float]:
    """The largest error of every result, relative to the result's largest element."""
    tensors = _random_tensors(dtype)
    expected = _with_gradients(
        reference.modulated_deform_conv2d, [tf.cast(x, tf.float64) for x in tensors]
    )
    errors = {}
    for name, wanted, received in zip(_RESULTS, expected, implementation(tensors), strict=True):
        error = np.max(np.abs(np.asarray(received).astype(np.float64) - wanted.numpy()))
        errors[name] = float(error / np.max(np.abs(wanted.numpy())))
    return errors


def _random_tensors(dtype: tf.DType) -> _Tensors:
    """Tensors for `_ARGUMENTS`. Offsets are odd multiples of 1/16 pixel, which every type holds."""
    rng = np.random.default_rng(0)
    sampling = tf.float32 if dtype.size < 4 else dtype
    offset = (2 * rng.integers(-24, 24, (2, 2, 11, 36)) + 1) / 16
    return [
        tf.cast(rng.normal(size=(2, 7, 9, 12)), dtype),
        tf.cast(rng.normal(size=(3, 2, 6, 10)), dtype),
        tf.cast(offset, sampling),
        tf.cast(rng.uniform(size=(2, 2, 11, 18)), sampling),
        tf.cast(rng.normal(size=10), dtype),
        tf.cast(rng.normal(size=(2, 2, 11, 10)), dtype),
    ]


def _tolerance(dtype: tf.DType) -> float:
    """What rounding explains: in the type of the sums, which is float32 at least, and in storing.

    The sums have up to 44 terms of random sign: their error is a few of the former's epsilons. A
    GPU stores samples and their gradients too: three roundings in all, of half an epsilon each.
    """
    computed = np.finfo(np.float64 if dtype == tf.float64 else np.float32).eps
    stored = ml_dtypes.finfo(dtype.as_numpy_dtype).eps
    return float(32 * computed + 1.5 * stored)


if __name__ == "__main__":
    sys.exit(main())
