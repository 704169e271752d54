"""The roads out of the notebook, side by side in one process: a model of three layers, exported and
run in its own runtime, and its training step with and without XLA. Every output is compared with
the model's before any clock runs. Needs `pip install '.[onnx,bench]'`.

    python tests/benchmarks/roads.py
    python tests/benchmarks/roads.py --threads 2 --rounds 9
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import onnxruntime
import openvino
import tensorflow as tf
from bench import environment, print_environment

import tf_mdcn
import tf_mdcn.export

IMAGES = ((4, 64, 64, 128), (8, 28, 28, 256), (16, 32, 32, 32))  # batch, height, width, channels
Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    arguments.device, arguments.dtype = "cpu", "float32"
    print_environment(environment(arguments))
    for shape in IMAGES:
        with tempfile.TemporaryDirectory() as folder:
            roads = exported(shape, pathlib.Path(folder), arguments.threads)
            report(shape, "inference", measure(roads, arguments.rounds))
        report(shape, "training step", measure(training_steps(shape), arguments.rounds))


def layers_of(kind: type, channels: int, **keywords) -> list[keras.layers.Layer]:
    return [
        kind(channels, 3, padding="same", activation="relu", **keywords, name=f"layer{i}")
        for i in range(3)
    ]


def deformable_layers(channels: int) -> list[keras.layers.Layer]:
    """Layers whose offsets are about N(0, 2), as after training."""
    return layers_of(
        tf_mdcn.ModulatedDeformConv2D,
        channels,
        offset_kernel_initializer=keras.initializers.RandomNormal(stddev=0.02, seed=1),
        offset_bias_initializer=keras.initializers.RandomNormal(stddev=2.0, seed=2),
    )


def only(outputs: dict) -> object:
    (output,) = outputs.values()
    return output


def exported(shape: tuple[int, ...], folder: pathlib.Path, threads: int) -> Calls:
    """What runs each road's file; "native" first. All but the plain convolution agree with it."""
    keras.utils.set_random_seed(0)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tensor = tf.constant(image)
    model = keras.Sequential([keras.Input(shape[1:], name="image"), *deformable_layers(shape[-1])])
    fixed = [tf.TensorSpec(shape, tf.float32, "image")]

    calls: Calls = {}
    for name, portable in (("native", False), ("portable", True)):
        path = str(folder / name)
        tf_mdcn.export.saved_model(model, path, portable=portable)
        loaded = tf.saved_model.load(path)
        calls[name] = lambda loaded=loaded: only(loaded.serve(tensor))

    onnx = str(folder / "model.onnx")
    tf_mdcn.export.onnx(model, onnx)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options)
    calls["ONNX Runtime"] = lambda: session.run(None, {"image": image})[0]
    core = openvino.Core()
    core.add_extension(tf_mdcn.export.openvino_extension())
    compiled = core.compile_model(
        onnx, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    calls["OpenVINO"] = lambda: compiled({"image": image})[0]

    for weights in ("float32", "float16", "int8"):
        path = str(folder / f"{weights}.tflite")
        tf_mdcn.export.tflite(model, path, weights=weights, input_signature=fixed)
        runner = tf.lite.Interpreter(path, num_threads=threads).get_signature_runner()
        calls[f"TFLite {weights}"] = lambda runner=runner: only(runner(image=image))

    expected = np.asarray(model(tensor))
    for name, call in calls.items():
        difference = np.std(np.asarray(call()) - expected) / np.std(expected)
        limit = (
            5e-2 if name.endswith(("16", "8")) else 1e-3
        )  # weights of 16 and 8 bits move samples
        assert difference < limit, f"{name} differs from the model by {difference:.2g}"

    plain = keras.Sequential([keras.Input(shape[1:]), *layers_of(keras.layers.Conv2D, shape[-1])])
    function = tf.function(plain)
    calls["plain Conv2D"] = lambda: function(tensor)
    return calls


def training_steps(shape: tuple[int, ...]) -> Calls:
    """Steps of a model in which the layers sit between convolutions and element-wise operations."""
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    calls: Calls = {}
    for name, jit_compile in (("without XLA", False), ("with XLA", True)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(shape[1:])])
        for i, layer in enumerate(deformable_layers(shape[-1])):
            model.add(keras.layers.Conv2D(shape[-1], 1, activation="gelu", name=f"before{i}"))
            model.add(layer)
            model.add(keras.layers.LayerNormalization(name=f"after{i}"))
        model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=jit_compile)
        calls[name] = lambda model=model: model.train_on_batch(image, image)
    losses = [float(call()) for call in calls.values()]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], f"XLA changes the loss: {losses}"
    return calls


def measure(calls: Calls, rounds: int) -> dict[str, float]:
    """Median seconds of the calls, in turns, after two that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def report(shape: tuple[int, ...], what: str, seconds: dict[str, float]) -> None:
    batch, height, width, channels = shape
    print(f"{what}, {batch}x{height}x{width}, {channels} channels")
    first = next(iter(seconds.values()))
    for name, median in seconds.items():
        print(f"  {name:16}{median * 1e3:9.1f} ms {median / first:6.2f}")
    print(flush=True)


if __name__ == "__main__":
    main()
