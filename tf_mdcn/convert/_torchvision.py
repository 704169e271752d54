"""The weights of torchvision's and mmcv's deformable convolutions, to and from those of the layer.

Separate because the orders of axes are all there is to it: NumPy arrays in, NumPy arrays out, and
PyTorch is not needed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tf_mdcn.layers import ModulatedDeformConv2D

_FROM = "tf_mdcn.convert.from_torchvision"
_TO = "tf_mdcn.convert.to_torchvision"


def from_torchvision(
    state: Mapping[str, Any], prefix: str = "", offset_name: str = "conv_offset"
) -> dict[str, np.ndarray]:
    """The layer's weights from those of a PyTorch module.

    A plain module, `torchvision.ops.DeformConv2d`, has `weight` and perhaps `bias` and is called
    with offset and mask. Its weights are two of the layer's four, so `layer.set_weights` refuses
    them; assign them by name, and the layer's offset branch stays as it is:

        weights = from_torchvision(module.state_dict())
        layer.kernel.assign(weights["kernel"])
        layer.bias.assign(weights["bias"])

    A packed module, such as mmcv's `ModulatedDeformConv2dPack` or one's own, also has the
    convolution `conv_offset`. Its channels are in the order of the layer's `offset_kernel`: first
    the offsets, `(dy, dx)` of every tap, then the mask's logits. mmcv's mask is a sigmoid, which is
    the layer's default, `mask_scale=1.0`. Its weights are all that the layer has:

        layer.set_weights(list(from_torchvision(module.state_dict()).values()))

    Args:
        state: The weights by name, as of `module.state_dict()`: arrays, or tensors in the memory of
            the CPU, of which those of bfloat16 become float32. `weight` has shape `[out_channels,
            in_channels / groups, kernel_height, kernel_width]`, `bias` `[out_channels]`,
            `conv_offset.weight` `[3 * G * K, in_channels, kernel_height, kernel_width]` with G
            deformable groups and K taps (2 * G * K for DCNv1), and `conv_offset.bias`
            `[3 * G * K]`. Others are ignored.
        prefix: What the names begin with, such as `"layer4.0.conv2."`.
        offset_name: The name of the convolution that predicts offset and mask.

    Returns:
        A dict with `kernel`, `bias` if there is one, and `offset_kernel` and `offset_bias` if there
        is a convolution for them, in the order of the layer's weights.

    Raises:
        TypeError: If `state` is not a mapping, such as the module itself, or if a weight cannot be
            made an array.
        ValueError: If there is no `weight`, if a weight has not 4 axes, or if the two convolutions
            have different kernel sizes.

    Example:

    >>> import numpy as np, tf_mdcn
    >>> import tf_mdcn.convert
    >>> layer = tf_mdcn.ModulatedDeformConv2D(16, 3, padding=1)
    >>> layer.build((None, 32, 32, 8))
    >>> plain = {"weight": np.ones([16, 8, 3, 3]), "bias": np.zeros([16])}
    >>> weights = tf_mdcn.convert.from_torchvision(plain)
    >>> _ = layer.kernel.assign(weights["kernel"])
    >>> _ = layer.bias.assign(weights["bias"])
    >>> packed = {
    ...     **plain,
    ...     "conv_offset.weight": np.zeros([27, 8, 3, 3]), "conv_offset.bias": np.zeros([27]),
    ... }
    >>> layer.set_weights(list(tf_mdcn.convert.from_torchvision(packed).values()))
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{_FROM}: state must be a mapping from names to arrays, such as module.state_dict(); "
            f"received {_type_name(state)}"
        )
    names = _torch_names(prefix, offset_name)
    if names["kernel"] not in state:
        raise ValueError(f"{_FROM}: state must have {names['kernel']!r}; received {_names(state)}")
    weights = {
        ours: _to_array(_FROM, name, state[name]) for ours, name in names.items() if name in state
    }
    for name in ("kernel", "offset_kernel"):
        if name in weights:
            _check_rank(_FROM, names[name], weights[name])
            weights[name] = weights[name].transpose(2, 3, 1, 0)
    if "offset_kernel" in weights:
        size, expected = weights["offset_kernel"].shape[:2], weights["kernel"].shape[:2]
        if size != expected:
            raise ValueError(
                f"{_FROM}: {names['offset_kernel']} must have the kernel size of "
                f"{names['kernel']} = {list(expected)}; received {list(size)}"
            )
        filters = weights["offset_kernel"].shape[3]
        weights.setdefault("offset_bias", np.zeros(filters, weights["offset_kernel"].dtype))
    return weights


def to_torchvision(
    weights: ModulatedDeformConv2D | Mapping[str, Any],
    prefix: str = "",
    offset_name: str = "conv_offset",
) -> dict[str, np.ndarray]:
    """The weights of a PyTorch module from those of the layer; undoes `from_torchvision`.

    A layer gives all four, which a packed module takes, such as mmcv's, or one's own with a
    `conv_offset`. A plain `torchvision.ops.DeformConv2d` has `weight` and `bias` alone, and its
    `load_state_dict` refuses the keys of the offset branch:

        state = to_torchvision(layer)
        module.load_state_dict({key: torch.from_numpy(state[key]) for key in ("weight", "bias")})

    They are the weights alone: a `mask_scale` other than 1, or a `max_offset`, is for the module to
    compute.

    Args:
        weights: A built layer, or its weights by name: `kernel` of shape `[kernel_height,
            kernel_width, in_channels / groups, out_channels]`, and `bias`, `offset_kernel` and
            `offset_bias` as far as there are any.
        prefix: What the names shall begin with.
        offset_name: The name of the convolution that predicts offset and mask.

    Returns:
        A dict of contiguous arrays, with the names and shapes that `from_torchvision` reads:
        `weight`, `bias` if the layer has one, `conv_offset.weight` and `conv_offset.bias`.
        bfloat16 becomes float32, for PyTorch takes no bfloat16 arrays. A packed module loads all:
        `module.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()})`.

    Raises:
        TypeError: If `weights` is neither a `ModulatedDeformConv2D` nor a mapping, or if a weight
            cannot be made an array.
        ValueError: If the layer is not built, if there is no `kernel`, or if a kernel has not 4
            axes.

    Example:

    >>> import tf_mdcn
    >>> import tf_mdcn.convert
    >>> layer = tf_mdcn.ModulatedDeformConv2D(16, 3)
    >>> layer.build((None, 32, 32, 8))
    >>> {name: x.shape for name, x in tf_mdcn.convert.to_torchvision(layer).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'weight': (16, 8, 3, 3), 'bias': (16,),
     'conv_offset.weight': (27, 8, 3, 3), 'conv_offset.bias': (27,)}
    """
    if isinstance(weights, ModulatedDeformConv2D):
        if not weights.built:
            raise ValueError(
                f"{_TO}: the layer must be built; received {weights.name!r}, which is not"
            )
        weights = {weight.name: weight.numpy() for weight in weights.weights}
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{_TO}: weights must be a ModulatedDeformConv2D or a mapping from names to arrays; "
            f"received {_type_name(weights)}"
        )
    if "kernel" not in weights:
        raise ValueError(f"{_TO}: weights must have 'kernel'; received {_names(weights)}")
    state = {}
    for ours, name in _torch_names(prefix, offset_name).items():
        if ours not in weights:
            continue
        state[name] = _to_array(_TO, ours, weights[ours])
        if state[name].dtype.name == "bfloat16":
            state[name] = state[name].astype(np.float32)
        if ours.endswith("kernel"):
            _check_rank(_TO, ours, state[name])
            state[name] = np.ascontiguousarray(state[name].transpose(3, 2, 0, 1))
    return state


def _torch_names(prefix: str, offset_name: str) -> dict[str, str]:
    """The names there by the names here, in the order of the layer's weights."""
    return {
        "kernel": f"{prefix}weight",
        "bias": f"{prefix}bias",
        "offset_kernel": f"{prefix}{offset_name}.weight",
        "offset_bias": f"{prefix}{offset_name}.bias",
    }


def _names(weights: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, weights))) or "no weights"


def _type_name(value: Any) -> str:
    # Not the repr: that of a network or of a list of arrays is pages long.
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _to_array(operation: str, name: str, value: Any) -> np.ndarray:
    # By PyTorch's methods, but without PyTorch: NumPy can read no tensor that requires a gradient,
    # and none of bfloat16, which float32 holds exactly.
    if hasattr(value, "detach"):
        value = value.detach()
    try:
        return np.asarray(value)
    except TypeError as error:
        try:
            return np.asarray(value.float())
        except (AttributeError, TypeError):
            raise TypeError(
                f"{operation}: {name} must be an array, or a tensor in the memory of the CPU; "
                f"received {_type_name(value)}: {error}"
            ) from error


def _check_rank(operation: str, name: str, array: np.ndarray) -> None:
    if array.ndim != 4:
        raise ValueError(f"{operation}: {name} must have 4 axes; received {list(array.shape)}")
