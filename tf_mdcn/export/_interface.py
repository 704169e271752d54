"""A Keras model as a function of named tensors: what every road out of Python starts from.

Separate because the roads must agree on names, on shapes and on which implementation they trace.
"""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tf_mdcn.ops import use_implementation

_OP_PREFIX = "Mdcn>"


@dataclasses.dataclass(frozen=True)
class Interface:
    """What goes into a model, by name, and how to call the model with it."""

    model: keras.Model
    arguments: list[Any]  # the call's positional arguments, with a spec in place of every tensor
    inputs: list[tf.TensorSpec]  # those specs in order, named

    def call(self, *tensors: Any) -> dict[str, Any]:
        """The outputs of inference by name, for the inputs in order."""
        outputs = self.model(*keras.tree.pack_sequence_as(self.arguments, list(tensors)))
        if isinstance(outputs, dict):
            return outputs
        outputs = keras.tree.flatten(outputs)
        if isinstance(self.model, keras.Sequential):
            names = [self.model.layers[-1].name]
        else:  # a functional model knows; a subclassed one does not
            names = getattr(self.model, "output_names", None) or []
        if len(set(names)) != len(outputs):
            names = [f"output_{i}" for i in range(len(outputs))]
        return dict(zip(names, outputs, strict=True))


def describe(operation: str, model: Any, input_signature: Any = None) -> Interface:
    """The interface of a model.

    Args:
        operation: What opens every error message, such as `"tf_mdcn.export.onnx"`.
        model: A built Keras model.
        input_signature: As in `keras.Model.export`: the list of the call's arguments, with a
            `tf.TensorSpec` or `keras.InputSpec` in place of every tensor. `None` takes the inputs
            that a functional or sequential model was made with, at any batch size.

    Raises:
        TypeError: If `model` is no Keras model, or `input_signature` is no list or holds something
            else than specs.
        ValueError: If the model is not built, or is subclassed and comes without a signature.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"{operation}: model must be a keras.Model; received {model!r}")
    if not model.built:
        raise ValueError(
            f"{operation}: model must be built, by calling it once or by model.build(shape); "
            f"received {model.name!r}, which is not"
        )
    if input_signature is None:
        if isinstance(model, keras.Sequential):
            input_signature = model.inputs
        elif hasattr(model, "output_names"):
            input_signature = [model.input]
        else:
            raise ValueError(
                f"{operation}: input_signature must be given for a subclassed model: the list of "
                "its call's arguments, a tf.TensorSpec for every tensor; received None for "
                f"{model.name!r}"
            )
    if not isinstance(input_signature, (list, tuple)):
        raise TypeError(
            f"{operation}: input_signature must be the list of the call's arguments, such as "
            f"[tf.TensorSpec(...)]; received {input_signature!r}"
        )
    inputs = [
        _named_spec(operation, x, i) for i, x in enumerate(keras.tree.flatten(input_signature))
    ]
    if len({spec.name for spec in inputs}) != len(inputs):
        names = ", ".join(spec.name for spec in inputs)
        raise ValueError(f"{operation}: inputs must have different names; received {names}")
    return Interface(model, keras.tree.pack_sequence_as(input_signature, inputs), inputs)


def trace(operation: str, interface: Interface, implementation: str) -> Any:
    """The model as a `tf.function` with one trace, of the native op or of standard ops.

    Raises:
        ValueError: If native ops remain in a portable graph.
    """
    function = tf.function(interface.call, input_signature=interface.inputs, autograph=False)
    with use_implementation(implementation):
        graph = function.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    native = sorted({node.name for node in nodes if node.op.startswith(_OP_PREFIX)})
    if implementation == "portable" and native:
        raise ValueError(
            f"{operation}: a portable model must hold standard ops only; received the native op in "
            f"{', '.join(native)}. A tf.function inside a model keeps the implementation that it "
            "was first called with: load or build the model anew, and call it only under "
            'tf_mdcn.use_implementation("portable")'
        )
    return function


def _named_spec(operation: str, x: Any, position: int) -> tf.TensorSpec:
    if isinstance(x, keras.KerasTensor):
        return tf.TensorSpec([None, *x.shape[1:]], x.dtype, x.name)
    if isinstance(x, (tf.TensorSpec, keras.InputSpec)) and x.shape is not None and x.dtype:
        return tf.TensorSpec(x.shape, x.dtype, x.name or f"input_{position}")
    raise TypeError(
        f"{operation}: input_signature must hold a tf.TensorSpec or keras.InputSpec with a shape "
        f"and a dtype for every tensor; received {x!r}"
    )
