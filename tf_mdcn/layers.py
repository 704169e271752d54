"""The Keras layer: owns the weights, predicts offsets and mask, and calls the op with them.

Separate from ops.py, which knows nothing of Keras.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_mdcn import ops
from tf_mdcn._arguments import (
    check_shapes,
    normalize_arguments,
    normalize_count,
    normalize_pair,
    output_size,
    padding_amounts,
)

_OP = "ModulatedDeformConv2D"
_Pair = int | Sequence[int]


@keras.saving.register_keras_serializable(package="tf_mdcn")
class ModulatedDeformConv2D(keras.layers.Layer):
    """Modulated deformable 2D convolution layer (DCNv2).

    A 2D convolution whose kernel taps sample where the layer decides to look. For every output
    position and kernel tap, a second convolution over the input (the offset branch) predicts a
    displacement `(dy, dx)` in input pixels and a modulation scalar (the mask); the tap reads the
    input there by bilinear interpolation and multiplies what it read by the mask. Everything
    else is `keras.layers.Conv2D`, whose arguments it takes with the same meaning.

    A sample outside the image reads 0, corner by corner. Predicted offsets have no bound unless
    `max_offset` is given.

    **Initialisation and learning rate.** The offset branch starts at zero, as in the paper: every
    offset is 0 and every mask `mask_scale * 0.5`, so a new layer computes half a `Conv2D`. Use
    `mask_scale=2.0` to start as exactly the `Conv2D` of the same kernel, which is right when the
    kernel is pretrained or the layer takes the place of a `Conv2D`. The paper trains the branch
    with 0.1 times the learning rate of the network; `offset_lr_multiplier=0.1` does that for
    optimisers whose step is proportional to the gradient (SGD, momentum). Adam and its relatives
    divide the scale of the gradient out again, so with them it changes next to nothing. If
    offsets explode, bound them with `max_offset` or clip gradients.

    **Mixed precision.** Positions are never computed in 16 bits: bfloat16 would place an offset of
    3 pixels to the nearest 1/64 and one of 40 to the nearest 1/4. Under `mixed_float16`,
    `mixed_bfloat16`, `float16` and `bfloat16` the offset branch runs in float32 and hands float32
    offsets and masks to the op, while input, kernel, bias and output have the compute dtype.

    Args:
        filters: int, the number of output channels.
        kernel_size: int or tuple/list of 2 integers, the size of the kernel.
        strides: int or tuple/list of 2 integers. Unlike `Conv2D`, `strides > 1` may be combined
            with `dilation_rate > 1`.
        padding: `"valid"`, `"same"` (case-insensitive, as `Conv2D`: the odd pixel goes to the
            bottom or right), an int, `(pad_height, pad_width)`, or
            `((top, bottom), (left, right))`, in pixels.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        dilation_rate: int or tuple/list of 2 integers, the distance between taps in pixels.
        groups: int, the number of groups in which input channels and filters are split, each
            convolved separately. Must divide both.
        deformable_groups: int, the number of groups of input channels that have offsets and masks
            of their own. Must divide the input channels.
        activation: activation function. `None` applies none.
        use_bias: bool, whether to add a bias.
        kernel_initializer: initializer of the kernel.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of the kernel.
        bias_regularizer: regularizer of the bias.
        activity_regularizer: regularizer of the output.
        kernel_constraint: constraint of the kernel.
        bias_constraint: constraint of the bias.
        modulated: bool. `False` predicts offsets alone, without a mask: DCNv1.
        mask_scale: float > 0. The mask is `mask_scale * sigmoid(logits)`, between 0 and
            `mask_scale`.
        offset_kernel_initializer: initializer of the kernel of the offset branch.
        offset_bias_initializer: initializer of the bias of the offset branch.
        offset_kernel_regularizer: regularizer of the kernel of the offset branch.
        offset_bias_regularizer: regularizer of the bias of the offset branch.
        offset_kernel_constraint: constraint of the kernel of the offset branch.
        offset_bias_constraint: constraint of the bias of the offset branch.
        offset_lr_multiplier: float >= 0. Scales the gradient that reaches `offset_kernel` and
            `offset_bias` through the output of the layer; the paper uses 0.1. The forward pass,
            the gradient that flows through the branch into its input, and the gradient of
            regularizers are not touched.
        max_offset: float > 0 in pixels, or `None`. Bounds every offset by
            `max_offset * tanh(raw / max_offset)`, which leaves small offsets as they are.
        **kwargs: `name`, `dtype`, `trainable` and what else `keras.layers.Layer` takes.

    Call arguments:
        inputs: a 4D tensor, or a list of two, `[x, features]`: `x` is sampled and convolved,
            offsets and mask are predicted from `features`, which has the batch size, height and
            width of `x` and any number of channels (alignment, as in EDVR and BasicVSR++).

    Weights: `kernel` of shape `(kernel_height, kernel_width, channels / groups, filters)`; `bias`
    of shape `(filters,)` if `use_bias`; `offset_kernel` of shape
    `(kernel_height, kernel_width, feature_channels, 3 * G * K)` and `offset_bias` of shape
    `(3 * G * K,)`, with `2 * G * K` in place of `3 * G * K` when not `modulated`, where `G` is
    `deformable_groups` and `K = kernel_height * kernel_width`. The offset branch has the kernel
    size, strides, padding and dilation of the layer. Its channel `(g * K + i * kernel_width + j)
    * 2` is the dy of tap `(i, j)` in deformable group `g`, the next one is its dx; after all the
    offsets, channel `2 * G * K + g * K + i * kernel_width + j` is the logit of its mask.

    Input shape:

    - If `data_format="channels_last"`: a 4D tensor `(batch_size, height, width, channels)`
    - If `data_format="channels_first"`: a 4D tensor `(batch_size, channels, height, width)`

    Output shape:

    - If `data_format="channels_last"`: a 4D tensor `(batch_size, new_height, new_width, filters)`
    - If `data_format="channels_first"`: a 4D tensor `(batch_size, filters, new_height, new_width)`

    Raises:
        ValueError: for an argument out of its range; for `filters` or input channels that `groups`
            does not divide, or input channels that `deformable_groups` does not divide; for an
            input that is not 4D or too small to give any output; for `features` of another
            height or width than `x`.
        RuntimeError: when the backend of Keras is not TensorFlow.

    Example:

    >>> import numpy as np
    >>> import tf_mdcn
    >>> x = np.random.rand(4, 10, 12, 8).astype("float32")
    >>> layer = tf_mdcn.ModulatedDeformConv2D(16, 3, strides=2, padding="same", mask_scale=2.0)
    >>> tuple(layer(x).shape)
    (4, 5, 6, 16)
    >>> [tuple(weight.shape) for weight in layer.weights]
    [(3, 3, 8, 16), (16,), (3, 3, 8, 27), (27,)]
    >>> offset, mask = layer.predict_offset_and_mask(x)
    >>> tuple(offset.shape), tuple(mask.shape)
    ((4, 5, 6, 18), (4, 5, 6, 9))

    Source: Zhu et al., Deformable ConvNets v2: More Deformable, Better Results,
    arXiv:1811.11168, section 3.2; without a mask: Dai et al., Deformable Convolutional Networks,
    arXiv:1703.06211, section 2.1.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: _Pair,
        strides: _Pair = (1, 1),
        padding: str | _Pair | Sequence[Sequence[int]] = "valid",
        data_format: str | None = None,
        dilation_rate: _Pair = (1, 1),
        groups: int = 1,
        deformable_groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        modulated: bool = True,
        mask_scale: float = 1.0,
        offset_kernel_initializer: Any = "zeros",
        offset_bias_initializer: Any = "zeros",
        offset_kernel_regularizer: Any = None,
        offset_bias_regularizer: Any = None,
        offset_kernel_constraint: Any = None,
        offset_bias_constraint: Any = None,
        offset_lr_multiplier: float = 1.0,
        max_offset: float | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"{_OP} needs Keras on the TensorFlow backend; received the backend "
                f"{keras.backend.backend()!r}. Set the environment variable "
                "KERAS_BACKEND=tensorflow before keras is imported."
            )
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.filters = normalize_count(_OP, "filters", filters)
        self.kernel_size = normalize_pair(_OP, "kernel_size", kernel_size)
        self.dilation_rate = normalize_pair(_OP, "dilation_rate", dilation_rate)
        if data_format is None:
            data_format = keras.config.image_data_format()
        self.convolution_arguments = normalize_arguments(
            _OP,
            strides=strides,
            padding=padding,
            data_format=data_format.lower() if isinstance(data_format, str) else data_format,
            dilations=self.dilation_rate,
            groups=groups,
            deformable_groups=deformable_groups,
        )
        self.strides = self.convolution_arguments.strides
        self.padding: str | tuple = self.convolution_arguments.padding.lower()
        if self.padding == "explicit":
            top, bottom, left, right = self.convolution_arguments.explicit_paddings
            self.padding = ((top, bottom), (left, right))
        self.data_format = self.convolution_arguments.data_format
        self.groups = self.convolution_arguments.groups
        self.deformable_groups = self.convolution_arguments.deformable_groups
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.modulated = modulated
        self.mask_scale = _checked_number("mask_scale", mask_scale, positive=True)
        self.offset_kernel_initializer = keras.initializers.get(offset_kernel_initializer)
        self.offset_bias_initializer = keras.initializers.get(offset_bias_initializer)
        self.offset_kernel_regularizer = keras.regularizers.get(offset_kernel_regularizer)
        self.offset_bias_regularizer = keras.regularizers.get(offset_bias_regularizer)
        self.offset_kernel_constraint = keras.constraints.get(offset_kernel_constraint)
        self.offset_bias_constraint = keras.constraints.get(offset_bias_constraint)
        self.offset_lr_multiplier = _checked_number(
            "offset_lr_multiplier", offset_lr_multiplier, positive=False
        )
        if max_offset is not None:
            max_offset = _checked_number("max_offset", max_offset, positive=True)
        self.max_offset = max_offset
        if self.filters % self.groups != 0:
            raise ValueError(
                f"{_OP}: groups must divide filters; received groups={self.groups}, "
                f"filters={self.filters}"
            )

    @property
    def supports_jit(self) -> bool:
        """Whether Keras may compile the layer with XLA; it asks for "auto" and for True."""
        return self._supports_jit and ops.supports_jit()

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self._supports_jit = value

    def build(self, input_shape: Any) -> None:
        inputs_shape, features_shape = _split(input_shape)
        self.compute_output_shape(input_shape)
        channel_axis = self._channel_axis
        channels = inputs_shape[channel_axis]
        feature_channels = features_shape[channel_axis]
        if channels is None or feature_channels is None:
            raise ValueError(
                f"{_OP}: the channels of an input must be known to build the layer; received "
                f"input shape {input_shape}"
            )
        spec = [
            keras.layers.InputSpec(ndim=4, axes={channel_axis: channels}),
            keras.layers.InputSpec(ndim=4, axes={channel_axis: feature_channels}),
        ]
        self.input_spec = spec if _is_nested(input_shape) else spec[0]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*self.kernel_size, channels // self.groups, self.filters),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        # Not cast with the compute dtype: see "Mixed precision" in the docstring.
        offset_filters = (3 if self.modulated else 2) * self._samples
        self.offset_kernel = self.add_weight(
            name="offset_kernel",
            shape=(*self.kernel_size, feature_channels, offset_filters),
            initializer=self.offset_kernel_initializer,
            regularizer=self.offset_kernel_regularizer,
            constraint=self.offset_kernel_constraint,
            autocast=False,
        )
        self.offset_bias = self.add_weight(
            name="offset_bias",
            shape=(offset_filters,),
            initializer=self.offset_bias_initializer,
            regularizer=self.offset_bias_regularizer,
            constraint=self.offset_bias_constraint,
            autocast=False,
        )

    def call(self, inputs: Any) -> tf.Tensor:
        self._check_shapes(inputs)
        inputs, features = _split(inputs)
        offset, mask = self._predict(features)
        outputs = ops.modulated_deform_conv2d(
            inputs,
            keras.ops.cast(self.kernel, inputs.dtype),
            offset,
            mask,
            keras.ops.cast(self.bias, inputs.dtype) if self.use_bias else None,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilations=self.dilation_rate,
            groups=self.groups,
            deformable_groups=self.deformable_groups,
        )
        return self.activation(outputs)

    def predict_offset_and_mask(self, inputs: Any) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Predicts where and how strongly the layer samples, as it does when called.

        The layer is built if it was not yet.

        Args:
            inputs: what the layer is called with: a 4D tensor or array, or `[x, features]`.

        Returns:
            A pair `(offset, mask)`, float32 under a 16-bit compute dtype and of the compute dtype
            otherwise; channels move to axis 1 when `data_format="channels_first"`. `offset` has
            shape `(batch_size, new_height, new_width, 2 * G * K)` and is in input pixels, `(dy,
            dx)` of every tap of every deformable group. `mask` has shape `(batch_size,
            new_height, new_width, G * K)` and is between 0 and `mask_scale`; `None` when the
            layer is not `modulated`.

        Raises:
            ValueError: when the features have other channels than the layer was built for, and
                as on building the layer.
        """
        inputs = keras.tree.map_structure(
            lambda x: self.dtype_policy.convert_input(x, self.autocast, self.input_dtype), inputs
        )
        if not self.built:
            self.build(keras.tree.map_structure(lambda x: tuple(x.shape), inputs))
        self._check_shapes(inputs)
        features = _split(inputs)[1]
        expected, received = self.offset_kernel.shape[2], features.shape[self._channel_axis]
        if received != expected:
            raise ValueError(
                f"{_OP}: offsets are predicted from {expected} channels; received an input with "
                f"{received}, shape {tuple(features.shape)}"
            )
        return self._predict(features)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        inputs_shape, features_shape = _split(input_shape)
        filters_shape = (*self.kernel_size, None, self.filters)
        offset_shape = tf.TensorShape(None)
        check_shapes(_OP, self.convolution_arguments, inputs_shape, filters_shape, offset_shape)
        self._check_features_shape(inputs_shape, features_shape)
        in_size = tuple(inputs_shape[axis] for axis in self._spatial_axes)
        out_size = output_size(self.convolution_arguments, in_size, self.kernel_size)
        if self.data_format == "channels_last":
            return (inputs_shape[0], *out_size, self.filters)
        return (inputs_shape[0], self.filters, *out_size)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "deformable_groups": self.deformable_groups,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "modulated": self.modulated,
            "mask_scale": self.mask_scale,
            "offset_kernel_initializer": keras.initializers.serialize(
                self.offset_kernel_initializer
            ),
            "offset_bias_initializer": keras.initializers.serialize(self.offset_bias_initializer),
            "offset_kernel_regularizer": keras.regularizers.serialize(
                self.offset_kernel_regularizer
            ),
            "offset_bias_regularizer": keras.regularizers.serialize(self.offset_bias_regularizer),
            "offset_kernel_constraint": keras.constraints.serialize(self.offset_kernel_constraint),
            "offset_bias_constraint": keras.constraints.serialize(self.offset_bias_constraint),
            "offset_lr_multiplier": self.offset_lr_multiplier,
            "max_offset": self.max_offset,
        }

    @property
    def _channel_axis(self):
        return -1 if self.data_format == "channels_last" else 1

    @property
    def _spatial_axes(self):
        return (1, 2) if self.data_format == "channels_last" else (2, 3)

    @property
    def _samples(self):
        """Samples per output position: deformable groups times kernel taps."""
        return self.deformable_groups * math.prod(self.kernel_size)

    def _check_shapes(self, inputs):
        """Says in the layer's words what an operation would say in its own."""
        self.compute_output_shape(keras.tree.map_structure(lambda x: tuple(x.shape), inputs))

    def _check_features_shape(self, inputs_shape, features_shape):
        axes = (0, *self._spatial_axes)
        agree = len(features_shape) == 4 and all(
            inputs_shape[axis] is None
            or features_shape[axis] is None
            or inputs_shape[axis] == features_shape[axis]
            for axis in axes
        )
        if not agree:
            raise ValueError(
                f"{_OP}: features must have rank 4 and the batch size, height and width of x = "
                f"{[inputs_shape[axis] for axis in axes]}; received shape {list(features_shape)}"
            )

    def _predict(self, features):
        """Offsets and mask in the layer's data format, at least float32."""
        if self.data_format == "channels_first":
            # TensorFlow convolves channels_first on GPUs alone.
            features = tf.transpose(features, (0, 2, 3, 1))
        dtype = tf.float64 if features.dtype == tf.float64 else tf.float32
        kernel = self._branch_weight(self.offset_kernel, dtype)
        bias = self._branch_weight(self.offset_bias, dtype)
        raw = self._convolve(tf.cast(features, dtype), kernel) + bias
        if self.data_format == "channels_first":
            raw = tf.transpose(raw, (0, 3, 1, 2))
        if not self.modulated:
            return self._bound(raw), None
        offset, logits = tf.split(raw, [2 * self._samples, self._samples], axis=self._channel_axis)
        return self._bound(offset), self.mask_scale * tf.sigmoid(logits)

    def _branch_weight(self, variable, dtype):
        weight = keras.ops.cast(variable, dtype.name)
        if self.offset_lr_multiplier == 1.0:
            return weight
        return _scale_gradient(weight, self.offset_lr_multiplier)

    def _bound(self, offset):
        if self.max_offset is None:
            return offset
        return self.max_offset * tf.tanh(offset / self.max_offset)

    def _convolve(self, features, kernel):
        """The convolution of the offset branch, channels_last."""
        if self.dilation_rate == (1, 1):
            padding = self.convolution_arguments.padding
            if padding == "EXPLICIT":
                padding = [(0, 0), *self.padding, (0, 0)]
            return tf.nn.conv2d(features, kernel, self.strides, padding)
        # TensorFlow's CPU kernels have no gradient of a dilated convolution. tf.nn.convolution
        # rearranges the pixels so that it needs none, but takes neither strides nor paddings.
        in_size = [
            features.shape[axis] if features.shape[axis] is not None else tf.shape(features)[axis]
            for axis in (1, 2)
        ]
        amounts = padding_amounts(self.convolution_arguments, in_size, self.kernel_size)
        padded = tf.pad(features, [(0, 0), *amounts, (0, 0)])
        outputs = tf.nn.convolution(padded, kernel, dilations=self.dilation_rate, padding="VALID")
        return outputs[:, :: self.strides[0], :: self.strides[1]]


def _split(inputs):
    """`(x, features)` of what the layer is called with, tensors or shapes."""
    if not _is_nested(inputs):
        return inputs, inputs
    if len(inputs) != 2:
        raise ValueError(
            f"{_OP}: inputs must be a tensor or the list [x, features]; received a list of "
            f"{len(inputs)}"
        )
    return tuple(inputs)


def _is_nested(inputs):
    """Whether this is a list of tensors or of shapes; a single shape is a list of sizes."""
    return isinstance(inputs, (list, tuple)) and not all(
        size is None or isinstance(size, numbers.Integral) for size in inputs
    )


def _checked_number(name, value, positive):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (value > 0 if positive else value >= 0):
        return float(value)
    raise ValueError(
        f"{_OP}: {name} must be a finite number {'> 0' if positive else '>= 0'}; received {value!r}"
    )


def _scale_gradient(tensor, multiplier):
    """`tensor` itself, bit for bit, with its gradient multiplied by `multiplier`."""

    @tf.custom_gradient
    def identity(x):
        return tf.identity(x), lambda upstream: upstream * multiplier

    return identity(tensor)
