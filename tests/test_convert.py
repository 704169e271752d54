"""Model surgery, and weights to and from torchvision's."""

import inspect
import re
import textwrap
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close

import tf_mdcn.convert
from tf_mdcn import ModulatedDeformConv2D

EPSILON = 2.0**-23


def make_model(data_format="channels_last"):
    """Residual, with a shared layer, a model inside, groups, strides, dilation and BatchNorm."""
    keras.utils.set_random_seed(1)
    options = {"data_format": data_format, "bias_initializer": "random_normal"}
    axis = -1 if data_format == "channels_last" else 1
    shape = (13, 11, 4) if data_format == "channels_last" else (4, 13, 11)
    image = keras.Input(shape, name="image")
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared", **options)
    x = shared(shared(image)) + image
    inner_image = keras.Input((*x.shape[1:],))
    inner = keras.layers.Conv2D(8, (3, 2), strides=(2, 1), groups=2, name="inner", **options)
    x = keras.Model(inner_image, inner(inner_image), name="block")(x)
    x = keras.layers.BatchNormalization(axis=axis, name="norm")(x)
    x = keras.layers.Conv2D(6, 1, activation="relu", name="pointwise", **options)(x)
    x = keras.layers.DepthwiseConv2D(2, data_format=data_format, name="depthwise")(x)
    x = keras.layers.Conv2D(
        5, 2, dilation_rate=2, use_bias=False, name="last", data_format=data_format
    )(x)
    model = keras.Model(image, x, name="backbone")
    model.get_layer("norm").moving_mean.assign(np.random.default_rng(0).normal(size=8))
    return model


def images(model, batch=2):
    return np.random.default_rng(2).normal(size=(batch, *model.input.shape[1:])).astype("float32")


def deformable_names(model):
    return [
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, ModulatedDeformConv2D)
    ]


def test_every_larger_convolution_is_replaced_and_the_model_computes_the_same():
    model = make_model()
    deformable = tf_mdcn.convert.replace_conv2d(model, offset_lr_multiplier=0.1, max_offset=3.0)
    assert deformable_names(deformable) == ["shared", "inner", "last"]
    assert deformable_names(model) == []
    assert deformable.name == "backbone"
    x = images(model)
    expected = model(x).numpy()
    assert_close(deformable(x), expected, 128 * EPSILON * np.max(np.abs(expected)))
    layer = deformable.get_layer("last")
    assert (layer.mask_scale, layer.offset_lr_multiplier, layer.max_offset) == (2.0, 0.1, 3.0)
    assert (layer.dilation_rate, layer.use_bias) == ((2, 2), False)


def test_channels_first():
    # TensorFlow's CPU kernels do not convolve channels_first: the plain layer is compared by its
    # weights.
    image = keras.Input((4, 13, 11))
    plain = keras.layers.Conv2D(6, 3, data_format="channels_first", name="plain", groups=2)
    model = keras.Model(image, plain(image))
    layer = tf_mdcn.convert.replace_conv2d(model).get_layer("plain")
    assert (layer.data_format, layer.groups) == ("channels_first", 2)
    assert np.array_equal(layer.kernel, plain.kernel)


def test_new_offset_branch_is_not_copied_from_anything():
    deformable = tf_mdcn.convert.replace_conv2d(make_model(), ["last"], deformable_groups=3)
    layer = deformable.get_layer("last")
    assert layer.offset_kernel.shape == (2, 2, 6, 36)
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)


@pytest.mark.parametrize(
    "select",
    [["inner"], {"inner"}, lambda layer: layer.groups == 2],
    ids=["list", "set", "function"],
)
def test_select(select):
    model = make_model()
    deformable = tf_mdcn.convert.replace_conv2d(model, select)
    assert deformable_names(deformable) == ["inner"]
    x = images(model)
    expected = model(x).numpy()
    assert_close(deformable(x), expected, 128 * EPSILON * np.max(np.abs(expected)))


def test_subclasses_of_conv2d_stay():
    class Own(keras.layers.Conv2D):
        pass

    model = keras.Sequential([keras.Input((9, 9, 2)), Own(3, 3), keras.layers.Conv2D(3, 3)])
    deformable = tf_mdcn.convert.replace_conv2d(model)
    assert [type(layer) for layer in deformable.layers] == [Own, ModulatedDeformConv2D]


def test_dtype_policy_trainable_and_regularizer_are_kept():
    layer = keras.layers.Conv2D(
        3, 3, dtype="mixed_bfloat16", trainable=False, kernel_regularizer=keras.regularizers.L2(0.5)
    )
    model = keras.Sequential([keras.Input((9, 9, 2)), layer])
    (new,) = tf_mdcn.convert.replace_conv2d(model).layers
    assert new.dtype_policy.name == "mixed_bfloat16"
    assert not new.trainable
    assert new.kernel_regularizer.l2 == 0.5


def test_lora_is_merged_into_the_kernel():
    layer = keras.layers.Conv2D(3, 3)
    model = keras.Sequential([keras.Input((9, 9, 2)), layer])
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    (new,) = tf_mdcn.convert.replace_conv2d(model).layers
    assert np.array_equal(new.kernel, layer.kernel)


def test_deformable_copy_trains():
    deformable = tf_mdcn.convert.replace_conv2d(make_model())
    deformable.compile("sgd", "mse")
    x = images(deformable, 4)
    deformable.fit(x, np.ones((4, *deformable.output.shape[1:])), epochs=1, verbose=0)
    assert np.any(deformable.get_layer("last").offset_kernel)


def test_surgery_errors():
    replace = tf_mdcn.convert.replace_conv2d
    model = make_model()
    with pytest.raises(ValueError, match=r"replace_conv2d: select must choose.*\['norm', 'what'\]"):
        replace(model, ["last", "norm", "what"])
    with pytest.raises(ValueError, match=r"replace_conv2d: select must choose.*at least one"):
        replace(model, lambda layer: False)
    with pytest.raises(ValueError, match=r"replace_conv2d: select must be.*the string 'last'"):
        replace(model, "last")
    with pytest.raises(ValueError, match=r"deformable_groups must divide in_channels; received"):
        replace(model, ["last"], deformable_groups=4)
    with pytest.raises(ValueError, match=r"replace_conv2d: model must be built; received 'empty'"):
        replace(keras.Sequential([keras.layers.Conv2D(3, 3)], name="empty"))

    class Subclassed(keras.Model):
        pass

    with pytest.raises(
        TypeError, match=r"replace_conv2d: model must be a functional or sequential"
    ):
        replace(Subclassed())


ALLOWED = (
    "deformable_groups, modulated, mask_scale, offset_kernel_initializer, offset_bias_initializer, "
    "offset_kernel_regularizer, offset_bias_regularizer, offset_kernel_constraint, "
    "offset_bias_constraint, offset_lr_multiplier, max_offset"
)


@pytest.mark.parametrize(
    "arguments, received",
    [
        ({"filters": 7}, "filters"),
        ({"foo": 1}, "foo"),
        ({"max_offset": 1.0, "name": "x", "foo": 1}, "name, foo"),
    ],
)
def test_layer_arguments_of_other_names_refused(arguments, received):
    def select(layer):
        raise AssertionError("the arguments come before the model")

    with pytest.raises(TypeError) as error:
        tf_mdcn.convert.replace_conv2d(make_model(), select, **arguments)
    assert str(error.value) == (
        f"tf_mdcn.convert.replace_conv2d: layer_arguments must be of {ALLOWED}; received {received}"
    )


def test_layer_arguments_of_wrong_values_refused_in_the_words_of_the_layer():
    with pytest.raises(ValueError, match=r"^ModulatedDeformConv2D: mask_scale must .*received -1$"):
        tf_mdcn.convert.replace_conv2d(make_model(), mask_scale=-1)


def test_every_layer_argument_named_is_taken():
    config = ModulatedDeformConv2D(5, 2).get_config()
    arguments = {name: config[name] for name in ALLOWED.split(", ")}
    assert deformable_names(tf_mdcn.convert.replace_conv2d(make_model(), ["last"], **arguments))


def torch_state(prefix="", name="conv_offset", groups=2, deformable_groups=4):
    rng = np.random.default_rng(3)
    return {
        f"{prefix}weight": rng.normal(size=(6, 8 // groups, 3, 2)).astype("float32"),
        f"{prefix}bias": rng.normal(size=6).astype("float32"),
        f"{prefix}{name}.weight": rng.normal(size=(18 * deformable_groups, 8, 3, 2)).astype(
            "float32"
        ),
        f"{prefix}{name}.bias": rng.normal(size=18 * deformable_groups).astype("float32"),
        "other.weight": np.zeros(3),
    }


def packed_by_hand(state, x, deformable_groups):
    """mmcv's packed layer, computed with ONNX's reference evaluator in PyTorch's orders."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    def run(op, inputs, **attributes):
        names = [f"input_{i}" for i in range(len(inputs))]
        types = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
        node = helper.make_node(op, names, ["output"], **attributes)
        graph = helper.make_graph([node], "one", types, [output])
        opset = helper.make_opsetid("", 19)
        model = helper.make_model(graph, opset_imports=[opset])
        return ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))[0]

    geometry = {"strides": [2, 1], "pads": [1, 0, 1, 0], "kernel_shape": [3, 2]}
    predicted = run("Conv", [x, state["conv_offset.weight"], state["conv_offset.bias"]], **geometry)
    first, second, logits = np.split(predicted, 3, axis=1)  # as mmcv: torch.chunk, torch.cat
    offset, mask = np.concatenate([first, second], axis=1), 1 / (1 + np.exp(-logits))
    return run(
        "DeformConv",
        [x, state["weight"], offset, state["bias"], mask],
        group=2,
        offset_group=deformable_groups,
        **geometry,
    )


def test_weights_of_a_packed_layer_compute_the_same():
    state = torch_state()
    x = np.random.default_rng(4).normal(size=(2, 8, 7, 9)).astype("float32")
    layer = ModulatedDeformConv2D(
        6,
        (3, 2),
        strides=(2, 1),
        padding=(1, 0),
        groups=2,
        deformable_groups=4,
        data_format="channels_first",
    )
    layer.build(x.shape)
    layer.set_weights(list(tf_mdcn.convert.from_torchvision(state).values()))
    expected = packed_by_hand(state, x, 4)
    assert_close(layer(x), expected, 64 * EPSILON * np.max(np.abs(expected)))


def test_there_and_back():
    state = torch_state("layer4.0.conv2.", "offset_conv")
    weights = tf_mdcn.convert.from_torchvision(state, "layer4.0.conv2.", "offset_conv")
    assert list(weights) == ["kernel", "bias", "offset_kernel", "offset_bias"]
    back = tf_mdcn.convert.to_torchvision(weights, "layer4.0.conv2.", "offset_conv")
    assert list(back) == list(state)[:4]
    for name, array in back.items():
        assert np.array_equal(array, state[name])
        assert array.flags.c_contiguous


def test_from_a_layer():
    layer = ModulatedDeformConv2D(6, 3, use_bias=False, modulated=False)
    layer.build((None, 9, 9, 4))
    state = tf_mdcn.convert.to_torchvision(layer)
    assert {name: array.shape for name, array in state.items()} == {
        "weight": (6, 4, 3, 3),
        "conv_offset.weight": (18, 4, 3, 3),
        "conv_offset.bias": (18,),
    }
    assert np.array_equal(state["weight"][5, 2], layer.kernel[:, :, 2, 5])
    again = ModulatedDeformConv2D(6, 3, use_bias=False, modulated=False)
    again.build((None, 9, 9, 4))
    again.set_weights(list(tf_mdcn.convert.from_torchvision(state).values()))
    assert all(np.array_equal(a, b) for a, b in zip(again.weights, layer.weights, strict=True))


def test_offset_convolution_without_bias_gets_zeros():
    state = torch_state()
    del state["conv_offset.bias"], state["bias"]
    weights = tf_mdcn.convert.from_torchvision(state)
    assert list(weights) == ["kernel", "offset_kernel", "offset_bias"]
    assert weights["offset_bias"].shape == (72,) and not np.any(weights["offset_bias"])


def test_bare_convolution_has_no_offset_branch():
    state = {name: array for name, array in torch_state().items() if "offset" not in name}
    assert list(tf_mdcn.convert.from_torchvision(state)) == ["kernel", "bias"]


def test_weights_errors():
    read, write = tf_mdcn.convert.from_torchvision, tf_mdcn.convert.to_torchvision
    with pytest.raises(
        ValueError, match=r"from_torchvision: state must have 'a\.weight'; received b"
    ):
        read({"b": 0}, "a.")
    with pytest.raises(
        ValueError, match=r"from_torchvision: state must have 'weight'; received no weights$"
    ):
        read({})
    with pytest.raises(ValueError, match=r"weight must have 4 axes; received \[3, 4\]"):
        read({"weight": np.zeros((3, 4))})
    with pytest.raises(
        ValueError, match=r"must have the kernel size of weight = \[3, 2\].*\[1, 1\]"
    ):
        read({**torch_state(), "conv_offset.weight": np.zeros((72, 8, 1, 1))})
    with pytest.raises(ValueError, match=r"to_torchvision: weights must have 'kernel'; received b"):
        write({"b": 0})
    with pytest.raises(
        ValueError, match=r"to_torchvision: weights must have 'kernel'; received no weights$"
    ):
        write({})
    with pytest.raises(
        ValueError, match=r"to_torchvision: kernel must have 4 axes; received \[3\]"
    ):
        write({"kernel": np.zeros(3)})
    with pytest.raises(
        ValueError, match=r"to_torchvision: the layer must be built; received 'new'"
    ):
        write(ModulatedDeformConv2D(3, 3, name="new"))


def test_variables_are_taken_too():
    kernel = tf.Variable(np.zeros((3, 2, 4, 6), np.float32))
    assert tf_mdcn.convert.to_torchvision({"kernel": kernel})["weight"].shape == (6, 4, 3, 2)


def test_wrong_types_refused():
    read, write = tf_mdcn.convert.from_torchvision, tf_mdcn.convert.to_torchvision

    class DeformConv2d:  # a module in the place of its state_dict()
        pass

    for value, received in [
        (DeformConv2d(), "an object of type DeformConv2d"),
        (None, "None"),
        (["weight"], "an object of type list"),
    ]:
        with pytest.raises(TypeError) as error:
            read(value)
        assert str(error.value) == (
            "tf_mdcn.convert.from_torchvision: state must be a mapping from names to arrays, such "
            f"as module.state_dict(); received {received}"
        )
    for value, received in [
        (keras.layers.Conv2D(3, 3), "an object of type Conv2D"),
        (None, "None"),
        (["kernel"], "an object of type list"),
    ]:
        with pytest.raises(TypeError) as error:
            write(value)
        assert str(error.value) == (
            "tf_mdcn.convert.to_torchvision: weights must be a ModulatedDeformConv2D or a mapping "
            f"from names to arrays; received {received}"
        )


class Tensor:
    """As PyTorch's: NumPy reads it only without gradient, on the CPU, and not of bfloat16."""

    def __init__(self, array, dtype="float32", requires_grad=False, device="cpu"):
        self.array, self.dtype = array, dtype
        self.requires_grad, self.device = requires_grad, device

    def detach(self):
        return Tensor(self.array, self.dtype, False, self.device)

    def float(self):
        return Tensor(self.array, "float32", self.requires_grad, self.device)

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.device != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy.")
        if self.dtype == "bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_are_read(dtype, requires_grad):
    state = torch_state()
    expected = tf_mdcn.convert.from_torchvision(state)
    tensors = {name: Tensor(array, dtype, requires_grad) for name, array in state.items()}
    weights = tf_mdcn.convert.from_torchvision(tensors)
    assert list(weights) == list(expected)
    for name, array in weights.items():
        assert array.dtype == np.float32 and np.array_equal(array, expected[name])


def test_tensors_elsewhere_refused():
    value = Tensor(np.zeros((3, 4, 3, 3)), device="cuda:0")
    with pytest.raises(TypeError) as error:
        tf_mdcn.convert.from_torchvision({"a.weight": value}, "a.")
    assert str(error.value) == (
        "tf_mdcn.convert.from_torchvision: a.weight must be an array, or a tensor in the memory of "
        "the CPU; received an object of type Tensor: can't convert cuda:0 device type tensor to "
        "numpy."
    )


def test_bfloat16_layer_gives_float32():
    layer = ModulatedDeformConv2D(6, 3, dtype="bfloat16")
    layer.build((None, 9, 9, 4))
    assert layer.kernel.dtype == "bfloat16"
    state = tf_mdcn.convert.to_torchvision(layer)
    assert {array.dtype.name for array in state.values()} == {"float32"}
    assert np.array_equal(state["weight"][5, 2], np.asarray(layer.kernel)[:, :, 2, 5])
    assert (
        tf_mdcn.convert.to_torchvision({"kernel": np.zeros((3, 3, 1, 1), np.float16)})[
            "weight"
        ].dtype
        == np.float16
    )


class Module:
    """As PyTorch's: load_state_dict takes the names that the module has, no more and no fewer."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        assert list(state) == list(self.state)
        self.state = state


def run_what_the_docstring_says(function, block, **names):
    """Runs the indented code of the given number that stands before the docstring's "Args:"."""
    text = inspect.cleandoc(function.__doc__).split("Args:")[0]
    code = textwrap.dedent(re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)[block])
    names = {**vars(tf_mdcn.convert), **names}
    exec(code, names)


def test_plain_modules_as_the_docstrings_say():
    """A plain module has two of the layer's four weights; each side's loading takes only all."""
    packed = torch_state(deformable_groups=1)
    plain = Module({name: packed[name] for name in ("weight", "bias")})
    layer = ModulatedDeformConv2D(6, (3, 2), groups=2, offset_bias_initializer="ones")
    layer.build((None, 9, 9, 8))
    read, write = tf_mdcn.convert.from_torchvision, tf_mdcn.convert.to_torchvision
    with pytest.raises(ValueError, match="length 2, but the layer was expecting 4"):
        run_what_the_docstring_says(read, 1, module=plain, layer=layer)
    run_what_the_docstring_says(read, 0, module=plain, layer=layer)
    assert np.array_equal(layer.kernel[:, :, 3, 5], plain.state["weight"][5, 3])
    assert np.array_equal(layer.bias, plain.state["bias"])
    assert np.all(np.asarray(layer.offset_bias) == 1)
    new = Module(dict.fromkeys(plain.state))
    torch = types.SimpleNamespace(from_numpy=np.asarray)
    run_what_the_docstring_says(write, 0, module=new, layer=layer, torch=torch)
    assert all(np.array_equal(new.state[name], array) for name, array in plain.state.items())


def test_packed_modules_as_the_docstrings_say():
    state = torch_state(deformable_groups=1)
    del state["other.weight"]
    layer = ModulatedDeformConv2D(6, (3, 2), groups=2)
    layer.build((None, 9, 9, 8))
    run_what_the_docstring_says(
        tf_mdcn.convert.from_torchvision, 1, module=Module(state), layer=layer
    )
    back = tf_mdcn.convert.to_torchvision(layer)
    assert list(back) == list(state)
    assert all(np.array_equal(back[name], array) for name, array in state.items())
