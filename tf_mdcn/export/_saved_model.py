"""SavedModel: with the native op, or in standard ops for programs that cannot load it.

Separate from the other roads, which write one file and need packages besides TensorFlow.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_mdcn.export._interface import Interface, describe, trace
from tf_mdcn.ops import use_implementation

_OPERATION = "tf_mdcn.export.saved_model"
_WARMUP_FILE = "tf_serving_warmup_requests"  # the name that TensorFlow Serving looks for
_SIGNATURE = "serving_default"


def saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    portable: bool = False,
    *,
    input_signature: Any = None,
    warmup_inputs: Iterable[Any] = (),
) -> None:
    """Writes a model as a SavedModel for inference.

    The SavedModel has the signature `serving_default` and the function `serve`, which take the
    inputs by name and return the outputs by name: inputs are called as their `keras.Input`, outputs
    as the layers that made them, or `output_0`, `output_1` where that says nothing.

    With the native op it runs wherever the op library is loaded: in Python after `import tf_mdcn`,
    in other programs after `TF_LoadLibrary` on `tf_mdcn.op_library_path()`, in a TensorFlow Serving
    that is built with it. A portable one has standard ops only and runs wherever TensorFlow does,
    the stock `tensorflow_model_server` included, more slowly.

    Args:
        model: A built Keras model.
        path: The folder to write. TensorFlow Serving wants the version as its last part,
            `models/name/1`.
        portable: Whether to write standard ops in place of the native op.
        input_signature: As in `keras.Model.export`: the list of the call's arguments, with a
            `tf.TensorSpec` or `keras.InputSpec` in place of every tensor. The default takes the
            inputs of a functional or sequential model, at any batch size; unknown heights and
            widths stay unknown. A subclassed model needs it.
        warmup_inputs: What TensorFlow Serving predicts before it answers its first request: each
            is what `model.predict` takes. They are written to `assets.extra` with the package
            `tensorflow-serving-api`, in place of those of a model that was there before.

    Raises:
        TypeError: If `model` is no Keras model, or `input_signature` is no list or holds something
            else than specs.
        ValueError: If the model is not built, or is subclassed and has no `input_signature`; if a
            portable model would hold the native op, because it calls a `tf.function` that is
            already traced; if a warm-up input is not what the model takes.
        ImportError: If there are warm-up inputs, and no `tensorflow-serving-api`.

    Example:

    >>> import keras, tempfile, tensorflow as tf, tf_mdcn
    >>> import tf_mdcn.export
    >>> image = keras.Input((None, None, 3), name="image")
    >>> model = keras.Model(image, tf_mdcn.ModulatedDeformConv2D(4, 3, name="features")(image))
    >>> path = tempfile.mkdtemp()
    >>> tf_mdcn.export.saved_model(model, path, portable=True)
    >>> served = tf.saved_model.load(path)
    >>> served.serve(tf.zeros([2, 8, 9, 3]))["features"].shape
    TensorShape([2, 6, 7, 4])
    """
    interface = describe(_OPERATION, model, input_signature)
    requests = [_warmup_request(interface, inputs) for inputs in warmup_inputs]
    implementation = "portable" if portable else "native"
    trace(_OPERATION, interface, implementation)  # refuses before anything is written
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", interface.call, input_signature=interface.inputs)
    # Gradient functions would be dead weight in what is for inference.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    warmup_file = pathlib.Path(path) / "assets.extra" / _WARMUP_FILE
    warmup_file.unlink(missing_ok=True)  # a model that was here may have had other inputs
    with use_implementation(implementation):  # saving traces the endpoint
        archive.write_out(os.fspath(path), options=options, verbose=False)
    if requests:
        warmup_file.parent.mkdir(exist_ok=True)
        with tf.io.TFRecordWriter(str(warmup_file)) as writer:
            for request in requests:
                writer.write(request)


def _warmup_request(interface: Interface, inputs: Any) -> bytes:
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            f"{_OPERATION}: warmup_inputs need the package tensorflow-serving-api; received an "
            "environment without it. To install it: pip install 'tf_mdcn[serving]'"
        ) from error
    arrays = keras.tree.flatten(inputs)
    agree = len(arrays) == len(interface.inputs) and all(
        spec.shape.is_compatible_with(tf.shape(x).numpy())
        for spec, x in zip(interface.inputs, arrays, strict=True)
    )
    if not agree:
        wanted = ", ".join(f"{spec.name}: {spec.shape}" for spec in interface.inputs)
        shapes = ", ".join(str(tf.shape(x).numpy().tolist()) for x in arrays)
        raise ValueError(
            f"{_OPERATION}: warmup_inputs must have the shapes of the inputs = {wanted}; received "
            f"{shapes}"
        )
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = interface.model.name
    request.model_spec.signature_name = _SIGNATURE
    for spec, x in zip(interface.inputs, arrays, strict=True):
        tensor = tf.cast(tf.convert_to_tensor(x), spec.dtype)
        request.inputs[spec.name].CopyFrom(tf.make_tensor_proto(tensor.numpy(), spec.dtype))
    return log.SerializeToString()
