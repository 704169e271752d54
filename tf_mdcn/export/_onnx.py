"""ONNX: the op becomes a standard DeformConv, the rest of the model is converted by tf2onnx.

Separate because it alone knows ONNX, whose packages are an extra.
"""

import numbers
import operator
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_mdcn._arguments import ConvolutionArguments, padding_amounts
from tf_mdcn.export._interface import describe, trace

_OPERATION = "tf_mdcn.export.onnx"
_OP = "Mdcn>ModulatedDeformConv2D"
_OPSETS = range(19, 23)  # DeformConv begins with 19; the models of 22 are the last that are tested
# tf2onnx writes opsets up to 18, which has no DeformConv: it makes one in a domain of ours, and
# ONNX's own converter brings the rest to the opset asked for.
_CONVERTER_OPSET, _DOMAIN = 18, "tf_mdcn"
_CHANNELS_FIRST, _CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def onnx(
    model: keras.Model,
    path: str | os.PathLike,
    opset: int = 19,
    *,
    input_signature: Any = None,
) -> None:
    """Writes a model as ONNX, with one `DeformConv` for every deformable convolution.

    Inputs and outputs keep their names and layouts; inputs are called as their `keras.Input`,
    outputs as the layers that made them, or `output_0`, `output_1` where that says nothing.

    ONNX and its runtimes are channels_first: a channels_last model gets transpositions, of which
    those between neighbouring layers cancel. Half precision is computed in float32 inside
    `DeformConv`, as by the native op, whose positions never have less. `"same"` padding with
    strides is computed at run time where the input's size is unknown.

    A float64 model is written as such, but ONNX Runtime runs float64 for the op alone: the offset
    branch of a layer is a `Conv`, of which it has none in float64.

    Args:
        model: A built Keras model.
        path: The file to write.
        opset: The ONNX operator set, 19 to 22.
        input_signature: As in `keras.Model.export`: the list of the call's arguments, with a
            `tf.TensorSpec` or `keras.InputSpec` in place of every tensor. The default takes the
            inputs of a functional or sequential model, at any batch size; unknown heights and
            widths stay unknown. A subclassed model needs it.

    Raises:
        ImportError: If tf2onnx is not installed.
        TypeError: If `model` is no Keras model, or `input_signature` is no list or holds something
            else than specs.
        ValueError: If `opset` is not between 19 and 22; if the model is not built, or is subclassed
            and has no `input_signature`; if it holds operations that have no counterpart in ONNX,
            or bfloat16, which tf2onnx would take for float16.

    Example:

    >>> import keras, tempfile, tf_mdcn
    >>> import tf_mdcn.export
    >>> image = keras.Input((32, 32, 3), name="image")
    >>> model = keras.Model(image, tf_mdcn.ModulatedDeformConv2D(4, 3, name="features")(image))
    >>> path = tempfile.mkdtemp() + "/model.onnx"
    >>> tf_mdcn.export.onnx(model, path)
    >>> import onnx
    >>> [node.op_type for node in onnx.load(path).graph.node].count("DeformConv")
    1

    Source: https://onnx.ai/onnx/operators/onnx__DeformConv.html
    """
    if not isinstance(opset, numbers.Integral) or opset not in _OPSETS:
        raise ValueError(
            f"{_OPERATION}: opset must be an integer between {_OPSETS[0]}, the first with "
            f"DeformConv, and {_OPSETS[-1]}; received {opset!r}"
        )
    opset = operator.index(opset)
    try:
        import onnx
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            f"{_OPERATION}: ONNX needs the packages onnx and tf2onnx; received an environment "
            f"without {error.name}. To install them: pip install 'tf_mdcn[onnx]'"
        ) from error
    interface = describe(_OPERATION, model, input_signature)
    function = trace(_OPERATION, interface, "native")
    _refuse_bfloat16(function.get_concrete_function().graph)
    converted, _ = tf2onnx.convert.from_function(
        function,
        interface.inputs,
        opset=_CONVERTER_OPSET,
        extra_opset=[onnx.helper.make_opsetid(_DOMAIN, 1)],
        custom_op_handlers={_OP: (_convert_op, [])},
        custom_rewriter=[_slice_instead_of_split],
    )
    _refuse_unknown(onnx, converted)
    converted = onnx.version_converter.convert_version(converted, opset)
    for node in _nodes(converted.graph):
        node.domain = "" if node.domain == _DOMAIN else node.domain
    opsets = [entry for entry in converted.opset_import if entry.domain != _DOMAIN]
    del converted.opset_import[:]
    converted.opset_import.extend(opsets)
    converted.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    onnx.checker.check_model(converted, full_check=True)
    onnx.save(converted, os.fspath(path))


def _refuse_bfloat16(graph) -> None:
    for operation in graph.get_operations():
        if any(tensor.dtype == tf.bfloat16 for tensor in operation.outputs):
            raise ValueError(
                f"{_OPERATION}: tensors must have a type that tf2onnx converts; received bfloat16 "
                f"in {operation.name}. Build the model with the dtype policy float32 or "
                "mixed_float16 and give it the weights of this one"
            )


def _nodes(graph) -> Iterator:
    """The nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def _refuse_unknown(onnx, converted) -> None:
    """tf2onnx leaves an operation that it cannot convert as it is."""
    unknown = {
        node.op_type
        for node in _nodes(converted.graph)
        if node.domain == "" and not onnx.defs.has(node.op_type, _CONVERTER_OPSET)
    }
    if unknown:
        raise ValueError(
            f"{_OPERATION}: every operation must have a counterpart in ONNX; received a model with "
            f"{', '.join(sorted(unknown))}"
        )


def _slice_instead_of_split(context, nodes):
    """Writes the splits of images as slices: tf2onnx moves transpositions past those only.

    Without this every layer would keep three transpositions between its offset branch, whose output
    it splits into offset and mask, and its DeformConv.
    """
    for node in nodes:
        if node.type != "SplitV" or not (node.inputs[1].is_const() and node.inputs[2].is_const()):
            continue
        sizes, axis = (x.get_tensor_value(as_list=False) for x in node.inputs[1:])
        shapes, dtype = node.output_shapes, context.get_dtype(node.output[0])
        if shapes[0] is None or len(shapes[0]) != 4 or min(sizes) < 0:
            continue
        ends = np.cumsum(sizes)
        context.remove_node(node.name)
        for output, shape, start, end in zip(node.output, shapes, ends - sizes, ends, strict=True):
            bounds = [_constant(context, [x]) for x in (start, end, axis % 4)]
            context.make_node(
                "Slice", [node.input[0], *bounds], outputs=[output], shapes=[shape], dtypes=[dtype]
            )
    return context.get_nodes()


def _constant(context, values: list[int]) -> str:
    from tf2onnx import utils

    name = utils.make_name("tf_mdcn_constant")
    return context.make_const(name, np.array(values, np.int64)).output[0]


def _convert_op(context, node, name, args):
    """Puts a DeformConv in the place of the op; tf2onnx fixes the arguments of such a handler."""
    del name, args
    _Conversion(context, node).run()


class _Conversion:
    """Makes the ONNX nodes for one node of the op."""

    def __init__(self, context, node):
        self._context = context  # tf2onnx's graph
        self._node = node
        channels_last = node.get_attr_value("data_format") == b"NHWC"
        self._to_onnx = _CHANNELS_FIRST if channels_last else None
        self._from_onnx = _CHANNELS_LAST if channels_last else None
        in_shape = context.get_shape(node.input[0]) or [-1] * 4
        self._in_size = tuple(in_shape[axis] for axis in ((1, 2) if channels_last else (2, 3)))
        self._kernel_size = tuple(context.get_shape(node.input[1])[:2])
        padding = node.get_attr_value("padding").decode()
        explicit_paddings = node.get_attr_value("explicit_paddings") or (0, 0, 0, 0)
        self._arguments = ConvolutionArguments(
            strides=tuple(node.get_attr_value("strides")),
            padding=padding,
            explicit_paddings=tuple(explicit_paddings),
            data_format="channels_last" if channels_last else "channels_first",
            dilations=tuple(node.get_attr_value("dilations")),
            groups=node.get_attr_value("groups"),
            deformable_groups=node.get_attr_value("deformable_groups"),
        )

    def run(self) -> None:
        from onnx import TensorProto

        context, node = self._context, self._node
        out_type, out_shape = context.get_dtype(node.output[0]), context.get_shape(node.output[0])
        double = out_type == TensorProto.DOUBLE
        compute_type = TensorProto.DOUBLE if double else TensorProto.FLOAT

        inputs, filters, offset, *others = (
            self._cast(tensor, compute_type) for tensor in node.input
        )
        mask = others.pop(0) if node.get_attr_value("num_masks") else ""
        bias = others.pop(0) if node.get_attr_value("num_biases") else ""
        inputs, offset, mask = (
            self._transpose(tensor, self._to_onnx) for tensor in (inputs, offset, mask)
        )
        filters = self._transpose(filters, [3, 2, 0, 1])
        pads = self._pads()
        if pads is None:
            inputs, pads = self._pad_at_run_time(inputs), [0, 0, 0, 0]

        tensors = [inputs, filters, offset, bias, mask]
        while not tensors[-1]:
            tensors.pop()
        attributes = {
            "strides": self._arguments.strides,
            "pads": pads,
            "dilations": self._arguments.dilations,
            "group": self._arguments.groups,
            "offset_group": self._arguments.deformable_groups,
            "kernel_shape": self._kernel_size,
        }
        outputs = context.make_node(
            "DeformConv", tensors, attr=attributes, dtypes=[compute_type], domain=_DOMAIN
        ).output[0]
        outputs = self._cast(self._transpose(outputs, self._from_onnx), out_type)
        context.remove_node(node.name)
        context.make_node(
            "Identity", [outputs], outputs=node.output, shapes=[out_shape], dtypes=[out_type]
        )

    def _make(self, op: str, tensors: list[str], **attributes: Any) -> str:
        return self._context.make_node(op, tensors, attr=attributes).output[0]

    def _cast(self, tensor: str, dtype: int) -> str:
        if self._context.get_dtype(tensor) == dtype:
            return tensor
        return self._make("Cast", [tensor], to=dtype)

    def _transpose(self, tensor: str, permutation: list[int] | None) -> str:
        if not tensor or permutation is None:
            return tensor
        return self._make("Transpose", [tensor], perm=permutation)

    def _pads(self) -> list[int] | None:
        """[top, left, bottom, right], or None where they depend on an unknown size."""
        unknown = [size < 0 for size in self._in_size]
        if self._arguments.padding == "SAME" and any(
            size_unknown and stride > 1
            for size_unknown, stride in zip(unknown, self._arguments.strides, strict=True)
        ):
            return None
        # Without strides, "same" padding is the same for every size.
        (top, bottom), (left, right) = padding_amounts(
            self._arguments, tuple(max(size, 1) for size in self._in_size), self._kernel_size
        )
        return [top, left, bottom, right]

    def _pad_at_run_time(self, inputs: str) -> str:
        """Pads with zeros as `padding_amounts` says; DeformConv has no `auto_pad`."""
        strides = _constant(self._context, self._arguments.strides)
        extents = [
            (kernel - 1) * dilation + 1
            for kernel, dilation in zip(self._kernel_size, self._arguments.dilations, strict=True)
        ]
        shape = self._make("Shape", [inputs])
        size = self._make(
            "Slice", [shape, _constant(self._context, [2]), _constant(self._context, [4])]
        )
        steps = self._make(
            "Div", [self._make("Sub", [size, _constant(self._context, [1])]), strides]
        )
        covered = self._make(
            "Add", [self._make("Mul", [steps, strides]), _constant(self._context, extents)]
        )
        total = self._make(
            "Max", [self._make("Sub", [covered, size]), _constant(self._context, [0])]
        )
        before = self._make("Div", [total, _constant(self._context, [2])])
        after = self._make("Sub", [total, before])
        none = _constant(self._context, [0, 0])
        amounts = self._make("Concat", [none, before, none, after], axis=0)
        return self._make("Pad", [inputs, amounts])
