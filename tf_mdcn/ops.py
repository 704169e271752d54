"""The op as a Python function, its gradients, and the choice of implementation.

Separate from the layer, which adds weights to it, and from reference.py, its twin in standard ops.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tf_mdcn import _library, reference
from tf_mdcn._arguments import check_dtypes, check_shapes, normalize_arguments

_OP = "ModulatedDeformConv2D"
_IMPLEMENTATIONS = ("native", "portable")
_ATTRIBUTES = (
    "strides",
    "padding",
    "explicit_paddings",
    "data_format",
    "dilations",
    "groups",
    "deformable_groups",
)
_native = _library.load()
_xla_error = _library.xla_error()
_implementation = contextvars.ContextVar("tf_mdcn_implementation", default="native")


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Chooses which implementation is called, or traced, inside the context.

    A `tf.function` or a compiled Keras model keeps the implementation it was traced with.

    Args:
        name: `"native"`, the C++ op, which is the default, or `"portable"`, the same function in
            standard TensorFlow ops (`tf_mdcn.reference`).

    Raises:
        ValueError: If `name` is neither.

    Example:

    >>> import tf_mdcn
    >>> with tf_mdcn.use_implementation("portable"):
    ...     pass  # trace, export or call a model here
    """
    if name not in _IMPLEMENTATIONS:
        raise ValueError(
            f'use_implementation: name must be "native" or "portable"; received {name!r}'
        )
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def current_implementation() -> str:
    """The implementation in use here: `"native"` or `"portable"`."""
    return _implementation.get()


def supports_jit() -> bool:
    """Whether XLA is known to serve the implementation in use here, on every device in sight.

    It runs the native kernels on CPUs only. For other devices it compiles the native op from
    XLA's standard operations, at a speed that nobody has measured: there `tf.function` with
    `jit_compile=True` gets it, and Keras, which asks here, does without XLA.
    """
    if current_implementation() == "portable":
        return True
    devices = {device.device_type for device in tf.config.get_visible_devices()}
    return _xla_error is None and devices == {"CPU"}


def modulated_deform_conv2d(
    inputs: Any,
    filters: Any,
    offset: Any,
    mask: Any = None,
    bias: Any = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    data_format: str = "channels_last",
    dilations: Any = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    name: str | None = None,
) -> tf.Tensor:
    """Modulated deformable 2D convolution (DCNv2).

    A convolution whose taps sample at learned places: tap k of output position p reads the input
    at `p * stride - pad + p_k * dilation + offset[p, k]`, by bilinear interpolation in which a
    corner outside the image counts as 0, and multiplies what it reads by `mask[p, k]`.

    The derivative at whole-number coordinates is the right-hand one, the slope between floor(y) and
    floor(y) + 1. A NaN in `offset` gives NaN at the outputs that use it; infinite and far
    offsets are outside the image.

    Below, `K = kernel_height * kernel_width` and `G = deformable_groups`; shapes are for
    `channels_last`, and `channels_first` moves the channel axis of inputs, offset, mask and output
    to 1.

    Args:
        inputs: Tensor `[batch, in_height, in_width, in_channels]` of float32, float64, float16 or
            bfloat16.
        filters: Tensor `[kernel_height, kernel_width, in_channels / groups, out_channels]` of the
            type of `inputs`.
        offset: Tensor `[batch, out_height, out_width, G * K * 2]`, in input pixels, of the type of
            `inputs`, or float32 beside half precision. Channel
            `(g * K + i * kernel_width + j) * 2` is the dy of tap `(i, j)` in deformable group `g`,
            the next one its dx.
        mask: Tensor `[batch, out_height, out_width, G * K]` of the type of `offset`; channel
            `g * K + i * kernel_width + j`. `None` modulates nothing (DCNv1). Any value will do;
            the paper's are between 0 and 1.
        bias: Tensor `[out_channels]` of the type of `inputs`, or `None`.
        strides: int or pair of ints `(height, width)`, at least 1.
        padding: `"valid"`, `"same"` (as `tf.nn.conv2d`: the odd pixel goes to the bottom or
            right), an int, `(pad_height, pad_width)` or `((top, bottom), (left, right))`.
        data_format: `"channels_last"` or `"channels_first"`.
        dilations: int or pair of ints `(height, width)`, at least 1.
        groups: int; every filter sees `in_channels / groups` channels.
        deformable_groups: int; `in_channels / deformable_groups` channels share their offsets and
            mask.
        name: Name of the operation.

    Returns:
        Tensor `[batch, out_height, out_width, out_channels]` of the type of `inputs`.

    Raises:
        ValueError: If an argument or a shape breaks its rule.
        TypeError: If a type does.

    Example:

    >>> import tensorflow as tf, tf_mdcn
    >>> inputs, filters = tf.random.normal([2, 8, 8, 4]), tf.random.normal([3, 3, 4, 16])
    >>> offset, mask = tf.zeros([2, 6, 6, 18]), tf.ones([2, 6, 6, 9])
    >>> outputs = tf_mdcn.modulated_deform_conv2d(inputs, filters, offset, mask)
    >>> bool(tf.reduce_all(abs(outputs - tf.nn.conv2d(inputs, filters, 1, "VALID")) < 1e-4))
    True

    Source: Zhu et al., Deformable ConvNets v2: More Deformable, Better Results, arXiv:1811.11168,
    section 3.2; without a mask: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211,
    section 2.1.
    """
    if current_implementation() == "portable":
        return reference.modulated_deform_conv2d(
            inputs,
            filters,
            offset,
            mask,
            bias,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilations=dilations,
            groups=groups,
            deformable_groups=deformable_groups,
            name=name,
        )
    arguments = normalize_arguments(
        _OP,
        strides=strides,
        padding=padding,
        data_format=data_format,
        dilations=dilations,
        groups=groups,
        deformable_groups=deformable_groups,
    )
    inputs, filters, offset = (tf.convert_to_tensor(x) for x in (inputs, filters, offset))
    mask, bias = (None if x is None else tf.convert_to_tensor(x) for x in (mask, bias))
    tensors = (inputs, filters, offset, mask, bias)
    check_dtypes(_OP, *(None if x is None else x.dtype for x in tensors))
    check_shapes(_OP, arguments, *(None if x is None else x.shape for x in tensors))
    return _native.mdcn_modulated_deform_conv2d(
        inputs=inputs,
        filters=filters,
        offset=offset,
        mask=[] if mask is None else [mask],
        bias=[] if bias is None else [bias],
        strides=arguments.strides,
        padding=arguments.padding,
        explicit_paddings=arguments.explicit_paddings if arguments.padding == "EXPLICIT" else [],
        data_format="NHWC" if arguments.data_format == "channels_last" else "NCHW",
        dilations=arguments.dilations,
        groups=arguments.groups,
        deformable_groups=arguments.deformable_groups,
        name=name,
    )


@tf.RegisterGradient("Mdcn>ModulatedDeformConv2D")
def _gradient(op, output_gradient):
    inputs, filters, offset = op.inputs[:3]
    num_masks, num_biases = op.get_attr("num_masks"), op.get_attr("num_biases")
    mask = list(op.inputs[3 : 3 + num_masks])
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    of_inputs, of_offset, of_mask = _native.mdcn_modulated_deform_conv2d_backprop_input(
        inputs=inputs,
        filters=filters,
        offset=offset,
        mask=mask,
        out_backprop=output_gradient,
        **attributes,
    )
    of_filters, of_bias = _native.mdcn_modulated_deform_conv2d_backprop_filter(
        inputs=inputs,
        filters_shape=tf.shape(filters, out_type=tf.int64),
        offset=offset,
        mask=mask,
        out_backprop=output_gradient,
        num_biases=num_biases,
        **attributes,
    )
    return [of_inputs, of_filters, of_offset, *of_mask, *of_bias]


def _reference_gradients(op, inputs, filters, offset, mask, bias, output_gradient):
    """The first derivatives by the portable implementation, for differentiating them again."""
    sources = [x for x in (inputs, filters, offset, mask, bias) if x is not None]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        outputs = reference.modulated_deform_conv2d(
            inputs, filters, offset, mask, bias, **_public_arguments(op)
        )
    return tape.gradient(outputs, sources, output_gradients=output_gradient)


def _public_arguments(op) -> dict[str, Any]:
    """The keywords of the public function for an op's attributes."""
    padding = op.get_attr("padding").decode().lower()
    if padding == "explicit":
        top, bottom, left, right = op.get_attr("explicit_paddings")
        padding = ((top, bottom), (left, right))
    channels_last = op.get_attr("data_format") == b"NHWC"
    return {
        "strides": tuple(op.get_attr("strides")),
        "padding": padding,
        "data_format": "channels_last" if channels_last else "channels_first",
        "dilations": tuple(op.get_attr("dilations")),
        "groups": op.get_attr("groups"),
        "deformable_groups": op.get_attr("deformable_groups"),
    }


# Second derivatives have no kernels of their own: the gradient ops are differentiated as their
# twins in standard ops, at the speed and memory of those.


@tf.RegisterGradient("Mdcn>ModulatedDeformConv2DBackpropInput")
def _gradient_of_input_gradient(op, *upstream):
    inputs, filters, offset = op.inputs[:3]
    mask = op.inputs[3] if op.get_attr("num_masks") else None
    output_gradient = op.inputs[-1]
    sources = [x for x in (inputs, filters, offset, mask, output_gradient) if x is not None]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        gradients = _reference_gradients(op, inputs, filters, offset, mask, None, output_gradient)
        del gradients[1]  # of the filters
    return tape.gradient(gradients, sources, output_gradients=list(upstream))


@tf.RegisterGradient("Mdcn>ModulatedDeformConv2DBackpropFilter")
def _gradient_of_filter_gradient(op, *upstream):
    inputs, filters_shape, offset = op.inputs[:3]
    mask = op.inputs[3] if op.get_attr("num_masks") else None
    output_gradient = op.inputs[-1]
    # The gradient of the filters does not depend on the filters, nor that of the bias on the bias.
    filters = tf.zeros(filters_shape, inputs.dtype)
    bias = tf.zeros(filters_shape[3:], inputs.dtype) if op.get_attr("num_biases") else None
    sources = [x for x in (inputs, offset, mask, output_gradient) if x is not None]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        gradients = _reference_gradients(op, inputs, filters, offset, mask, bias, output_gradient)
        gradients = gradients[1:2] + (gradients[-1:] if bias is not None else [])
    of_sources = tape.gradient(gradients, sources, output_gradients=list(upstream))
    return [of_sources[0], None, *of_sources[1:]]
