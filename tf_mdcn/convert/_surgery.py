"""Puts deformable convolutions in the place of plain ones in a Keras model.

Separate because it rebuilds whole models, which nothing else here does.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import keras

from tf_mdcn.layers import ModulatedDeformConv2D

_OPERATION = "tf_mdcn.convert.replace_conv2d"
_LORA = ("lora_rank", "lora_alpha")


def replace_conv2d(
    model: keras.Model,
    select: Callable[[keras.layers.Conv2D], bool] | Collection[str] | None = None,
    **layer_arguments: Any,
) -> keras.Model:
    """A copy of a model in which `ModulatedDeformConv2D` stands in the place of `Conv2D`.

    The new layers have the name, arguments, kernel and bias of the old ones, all other layers are
    copied with their weights, and the copy computes what the model computes, to rounding, until
    it is trained: offsets begin at 0 and the mask at `mask_scale / 2`, which is 1 with the
    `mask_scale=2.0` used here. Models inside the model are searched too. The original is left as
    it is; the copy is not compiled.

    The paper replaces the 3x3 convolutions of the last three stages of a ResNet: the later, the
    better.

    Args:
        model: A functional or sequential model, built.
        select: Which `Conv2D` layers to replace: a function of the layer that tells, or the names
            of layers. The default takes every `Conv2D` with a kernel larger than 1x1. A subclass
            of `Conv2D` is never taken, for it may compute something else.
        **layer_arguments: Arguments of `ModulatedDeformConv2D` for the new layers:
            `deformable_groups`, `modulated`, `mask_scale`, `offset_lr_multiplier`, `max_offset` and
            those that begin with `offset_`. All others come from the `Conv2D`.

    Returns:
        The new model.

    Raises:
        TypeError: If `model` is neither functional nor sequential, or for a layer argument that is
            none of these.
        ValueError: If the model is not built, if `ModulatedDeformConv2D` refuses the value of a
            layer argument, if no `Conv2D` is selected, if `select` names a layer
            that is not a `Conv2D` of the model, or if `deformable_groups` does not divide the input
            channels of a selected layer.

    Example:

    >>> import keras, numpy as np, tf_mdcn
    >>> import tf_mdcn.convert
    >>> model = keras.Sequential([
    ...     keras.Input((16, 16, 3)),
    ...     keras.layers.Conv2D(8, 3, name="first"),
    ...     keras.layers.Conv2D(8, 3, name="second"),
    ... ])
    >>> deformable = tf_mdcn.convert.replace_conv2d(model, ["second"], offset_lr_multiplier=0.1)
    >>> [type(layer).__name__ for layer in deformable.layers]
    ['Conv2D', 'ModulatedDeformConv2D']
    >>> x = np.random.rand(2, 16, 16, 3).astype("float32")
    >>> bool(np.allclose(deformable(x), model(x), atol=1e-5))
    True

    Source: Zhu et al., Deformable ConvNets v2, arXiv:1811.11168, section 4.1.
    """
    if not isinstance(model, keras.Sequential) and not hasattr(model, "output_names"):
        raise TypeError(
            f"{_OPERATION}: model must be a functional or sequential keras.Model; received "
            f"{model!r}"
        )
    if not model.built:
        raise ValueError(
            f"{_OPERATION}: model must be built; received {model.name!r}, which is not"
        )
    _check_layer_arguments(layer_arguments)
    chosen = _chooser(select)
    replaced: list[tuple[keras.layers.Conv2D, ModulatedDeformConv2D]] = []
    copied: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy(layer: keras.Operation) -> keras.Operation:
        if type(layer) is keras.layers.Conv2D and chosen(layer):
            config = {k: v for k, v in layer.get_config().items() if k not in _LORA}
            config = {**config, "mask_scale": 2.0, **layer_arguments}
            new = ModulatedDeformConv2D.from_config(config)
            replaced.append((layer, new))
        else:
            new = layer.__class__.from_config(layer.get_config())
            if isinstance(layer, keras.layers.Layer):
                copied.append((layer, new))
        return new

    result = keras.models.clone_model(model, clone_function=copy, recursive=True)
    found = {layer.name for layer, _ in replaced}
    missing = set() if select is None or callable(select) else set(select) - found
    if missing or not found:
        raise ValueError(
            f"{_OPERATION}: select must choose Conv2D layers of the model, and at least one; "
            f"received {sorted(missing) if missing else select!r}, which chooses none"
        )
    for layer, new in replaced:
        new.kernel.assign(layer.kernel)
        if new.bias is not None:
            new.bias.assign(layer.bias)
    for layer, new in copied:
        new.set_weights(layer.get_weights())
    return result


def _check_layer_arguments(layer_arguments: dict[str, Any]) -> None:
    of_ours, of_conv2d = (
        inspect.signature(layer).parameters
        for layer in (ModulatedDeformConv2D, keras.layers.Conv2D)
    )
    allowed = [name for name in of_ours if name not in of_conv2d]
    refused = [name for name in layer_arguments if name not in allowed]
    if refused:
        raise TypeError(
            f"{_OPERATION}: layer_arguments must be of {', '.join(allowed)}; received "
            f"{', '.join(refused)}"
        )
    # Keras hides what the layer says of a wrong value behind the whole config, from_config being
    # what raises: so once here, directly. The name keeps Keras from counting this layer.
    ModulatedDeformConv2D(1, 1, name="checked", **layer_arguments)


def _chooser(select: Any) -> Callable[[keras.layers.Conv2D], bool]:
    if select is None:
        return lambda layer: layer.kernel_size != (1, 1)
    if callable(select):
        return select
    if isinstance(select, str):
        raise ValueError(
            f"{_OPERATION}: select must be a function of a layer, or a collection of layer names; "
            f"received the string {select!r}"
        )
    return lambda layer: layer.name in select
