"""TFLite: the portable implementation, in builtin ops.

Separate because its converter has rules of its own: fixed sizes, and several kinds of weights.
"""

import os
import pathlib
import tempfile
from typing import Any

import keras
import tensorflow as tf

from tf_mdcn.export._interface import Interface, describe, trace
from tf_mdcn.export._saved_model import saved_model

_OPERATION = "tf_mdcn.export.tflite"
_WEIGHTS = ("float32", "float16", "int8")
_OTHER_TYPES = {x.as_datatype_enum: x.name for x in (tf.float64, tf.float16, tf.bfloat16)}
_MAX_FLOAT16_PX = 2048  # whole numbers beyond it are not exact in float16


def tflite(
    model: keras.Model,
    path: str | os.PathLike,
    weights: str = "float32",
    *,
    input_signature: Any = None,
) -> None:
    """Writes a model as TFLite, in builtin ops only.

    The file has the signature `serving_default`, which takes the inputs by name and returns the
    outputs by name, as a SavedModel of `tf_mdcn.export.saved_model` does.

    The model must compute in float32: most builtin ops know no other type of floating point. Inputs
    may have any type that the model casts.

    Every size is fixed in the file: the converter knows no loop over blocks of unknown shape. A
    batch size that is not given is 1. The sampling positions before their offsets are constants
    in the file: 8 bytes (4 with float16 weights) for each output position, kernel tap and
    deformable group of every layer, beside the weights.

    Args:
        model: A built Keras model.
        path: The file to write.
        weights: How weights are stored: `"float32"`; `"float16"`, half the size, computed in
            float32; or `"int8"`, dynamic-range quantisation: the filters of large enough layers
            are 8-bit, and inputs are quantised as they come where the runtime has a kernel for it.
        input_signature: As in `keras.Model.export`: the list of the call's arguments, with a
            `tf.TensorSpec` or `keras.InputSpec` in place of every tensor. The default takes the
            inputs of a functional or sequential model at batch size 1. A subclassed model, and one
            with unknown heights or widths, needs it.

    Raises:
        TypeError: If `model` is no Keras model, or `input_signature` is no list or holds something
            else than specs.
        ValueError: If `weights` is none of the three; if the model is not built, or is subclassed
            and has no `input_signature`; if a size other than the batch's is unknown; if the model
            computes in float64, float16 or bfloat16, as mixed precision does; if with float16
            weights a layer samples an image of more than 2048 pixels in height or width, whose
            positions float16 cannot hold.

    Example:

    >>> import keras, numpy as np, tempfile, tensorflow as tf, tf_mdcn
    >>> import tf_mdcn.export
    >>> image = keras.Input((8, 9, 3), name="image")
    >>> model = keras.Model(image, tf_mdcn.ModulatedDeformConv2D(4, 3, name="features")(image))
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> tf_mdcn.export.tflite(model, path, weights="float16")
    >>> run = tf.lite.Interpreter(path).get_signature_runner()
    >>> run(image=np.zeros([1, 8, 9, 3], np.float32))["features"].shape
    (1, 6, 7, 4)
    """
    if weights not in _WEIGHTS:
        raise ValueError(
            f'{_OPERATION}: weights must be "float32", "float16" or "int8"; received {weights!r}'
        )
    interface = describe(_OPERATION, model, input_signature)
    specs = [_fixed(spec) for spec in interface.inputs]
    signature = keras.tree.pack_sequence_as(interface.arguments, specs)
    interface = describe(_OPERATION, model, signature)
    _refuse_other_types(interface)
    if weights == "float16":
        _refuse_large_images(interface)
    with tempfile.TemporaryDirectory() as folder:
        saved_model(model, folder, portable=True, input_signature=signature)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if weights != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if weights == "float16":
            converter.target_spec.supported_types = [tf.float16]
        pathlib.Path(path).write_bytes(converter.convert())


def _fixed(spec: tf.TensorSpec) -> tf.TensorSpec:
    """The spec with batch size 1 where it had none."""
    shape = spec.shape.as_list() if spec.shape.rank else []
    if shape[:1] == [None]:
        shape[0] = 1
    if not shape or None in shape:
        raise ValueError(
            f"{_OPERATION}: every size but the batch's must be known, from the model or from "
            f"input_signature; received {spec.name} of shape {spec.shape}"
        )
    return tf.TensorSpec(shape, spec.dtype, spec.name)


def _refuse_other_types(interface: Interface) -> None:
    """The converter's own word for an op that has no kernel of a type is pages of MLIR."""
    # Portable, as a tf.function inside the model keeps the implementation that traces it first.
    graph = trace(_OPERATION, interface, "portable").get_concrete_function().graph.as_graph_def()
    for node in [*graph.node, *(node for f in graph.library.function for node in f.node_def)]:
        dtype = _OTHER_TYPES.get(node.attr["T"].type)
        if dtype and node.op != "Identity":  # which computes nothing, as casts, which have no T
            raise ValueError(
                f"{_OPERATION}: model must compute in float32; received {dtype} in "
                f"{node.name}. Build the model with the dtype policy float32 and give it the "
                "weights of this one"
            )


def _refuse_large_images(interface: Interface) -> None:
    graph = trace(_OPERATION, interface, "native").get_concrete_function().graph
    for operation in graph.get_operations():
        if operation.type != "Mdcn>ModulatedDeformConv2D":
            continue
        shape = operation.inputs[0].shape.as_list()
        size = shape[1:3] if operation.get_attr("data_format") == b"NHWC" else shape[2:]
        if max(size) > _MAX_FLOAT16_PX:
            raise ValueError(
                f"{_OPERATION}: with float16 weights, an image that is sampled must have at most "
                f"{_MAX_FLOAT16_PX} pixels in height and width; received {size[0]} x {size[1]} in "
                f"{operation.name}"
            )
