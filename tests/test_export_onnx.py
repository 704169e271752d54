"""ONNX models in ONNX Runtime and OpenVINO, held to the Keras model that they came from."""

import collections
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import tensorflow as tf
from export_model import OUTPUTS, expected_outputs, make_images, make_model, rounding_bound
from oracle import assert_close, random_case
from oracle import rounding_bound as op_bound

import tf_mdcn.export
from tf_mdcn import ModulatedDeformConv2D, modulated_deform_conv2d


def run_onnxruntime(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def run_openvino(path, inputs):
    core = openvino.Core()
    core.add_extension(tf_mdcn.export.openvino_extension())
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    outputs = core.compile_model(path, "CPU", precise)(inputs)
    return {output.get_any_name(): value for output, value in outputs.items()}


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def op_counts(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def deform_conv_type(path):
    """The type that the one DeformConv of a file computes in."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    (node,) = (node for node in graph.node if node.op_type == "DeformConv")
    types = {x.name: x.type.tensor_type.elem_type for x in [*graph.value_info, *graph.output]}
    return types[node.output[0]]


@pytest.fixture(scope="module", params=[(19, "fixed"), (22, "any")], ids=lambda p: f"{p[0]}-{p[1]}")
def exported(request, tmp_path_factory):
    """The model in an opset, of one size or of any, and images to run it on."""
    opset, size = request.param
    model = make_model() if size == "fixed" else make_model(None, None)
    path = str(tmp_path_factory.mktemp("onnx") / "model.onnx")
    tf_mdcn.export.onnx(model, path, opset=opset)
    images = [make_images(3), make_images(1, seed=1)]
    if size == "any":
        images.append(make_images(2, 40, 38, seed=2))
    return model, path, opset, images


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtime_computes_what_the_model_does(exported, runtime):
    model, path, _, images = exported
    for x in images:
        outputs = RUNTIMES[runtime](path, {"image": x})
        expected = expected_outputs(model, x)
        for name in OUTPUTS:
            assert_close(outputs[name], expected[name], rounding_bound(expected[name], x), name)


def test_file_is_standard(exported):
    _, path, opset, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    assert model.ir_version == {19: 9, 22: 10}[opset]
    assert {node.domain for node in model.graph.node} == {""}
    assert [x.name for x in model.graph.input] == ["image"]
    assert {x.name for x in model.graph.output} == set(OUTPUTS)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # any batch size


def test_one_deform_conv_for_every_layer_and_no_transposition_between_them(exported):
    counts = op_counts(exported[1])
    assert counts["DeformConv"] == 3
    assert counts["Transpose"] == 2  # of the input, and of the output that is an image


def test_attributes(tmp_path):
    image = keras.Input((9, 11, 4))
    layer = ModulatedDeformConv2D(
        6, (3, 2), strides=(2, 1), padding=((1, 0), (2, 3)), dilation_rate=(1, 2), groups=2
    )
    path = str(tmp_path / "model.onnx")
    tf_mdcn.export.onnx(keras.Model(image, layer(image)), path)
    (node,) = (node for node in onnx.load(path).graph.node if node.op_type == "DeformConv")
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "strides": [2, 1],
        "pads": [1, 2, 0, 3],
        "dilations": [1, 2],
        "group": 2,
        "offset_group": 1,
        "kernel_shape": [3, 2],
    }
    assert len(node.input) == 5


class Op(keras.layers.Layer):
    """The bare op, with offset and mask as inputs of the model."""

    def __init__(self, case):
        super().__init__(dtype=case.inputs.dtype.name)
        self.case = case

    def call(self, inputs):
        bias = self.case.bias
        return modulated_deform_conv2d(
            inputs[0],
            tf.constant(self.case.filters),
            inputs[1],
            inputs[2] if len(inputs) > 2 else None,
            None if bias is None else tf.constant(bias),
            **self.case.arguments,
        )


OP_CASES = {
    "asymmetric": random_case(),
    "without mask": random_case(with_mask=False),
    "without bias": random_case(with_bias=False),
    "without both": random_case(with_mask=False, with_bias=False),
    "same": random_case(padding="same", strides=(3, 2), kernel_size=(2, 5), dilations=(1, 1)),
    "valid": random_case(padding="valid", groups=1, deformable_groups=1),
    "channels_first": random_case().channels_first(),
    "float64": random_case(),
    "float16": random_case(),
    "half with float32 offsets": random_case(),
}


@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.parametrize("size", ["fixed", "any"])
def test_op(tmp_path, name, size):
    types = {"float64": ("float64",), "float16": ("float16",)}
    types["half with float32 offsets"] = ("float16", "float32")
    case = OP_CASES[name].cast(*types.get(name, ("float32",)))
    tensors = {key: x for key, x in case.tensors.items() if key in ("inputs", "offset", "mask")}
    spatial = slice(1, 3) if case.data_format == "channels_last" else slice(2, 4)
    specs = []
    for key, x in tensors.items():
        shape = [None, *x.shape[1:]]
        if size == "any":
            shape[spatial] = [None, None]
        specs.append(keras.Input(shape[1:], name=key, dtype=x.dtype.name))
    model = keras.Model(specs, Op(case)(specs))
    path = str(tmp_path / "model.onnx")
    tf_mdcn.export.onnx(model, path)
    expected = model([tf.constant(x) for x in tensors.values()]).numpy()
    (received,) = run_onnxruntime(path, tensors).values()
    assert received.dtype == expected.dtype
    bound = op_bound(case.cast("float64"), expected, expected.dtype)
    assert_close(received, expected, bound, name)
    counts = op_counts(path)
    assert counts["DeformConv"] == 1
    # No position has less than float32, whatever the tensors are.
    wanted = onnx.TensorProto.DOUBLE if name == "float64" else onnx.TensorProto.FLOAT
    assert deform_conv_type(path) == wanted
    if case.data_format == "channels_first":
        assert counts["Transpose"] == 0


def test_bfloat16_is_refused(tmp_path):
    image = keras.Input((9, 11, 4), name="image")
    layer = ModulatedDeformConv2D(6, 3, dtype="mixed_bfloat16", name="half")
    with pytest.raises(ValueError, match=r"onnx: tensors must have a type.*received bfloat16 in"):
        tf_mdcn.export.onnx(keras.Model(image, layer(image)), tmp_path / "model.onnx", opset=22)


def test_mixed_precision_layer(tmp_path):
    image = keras.Input((9, 11, 4), dtype="float16", name="image")
    layer = ModulatedDeformConv2D(6, 3, dtype="mixed_float16", offset_bias_initializer="normal")
    model = keras.Model(image, layer(image))
    path = str(tmp_path / "model.onnx")
    tf_mdcn.export.onnx(model, path)
    x = make_images(2, 9, 11).astype("float16")
    (received,) = run_onnxruntime(path, {"image": x}).values()
    expected = model(x).numpy()
    assert_close(received, expected, 2 * 2.0**-10 * np.max(np.abs(expected)))


def test_what_onnx_has_no_counterpart_for_is_named(tmp_path):
    image = keras.Input((8, 8, 3))
    features = ModulatedDeformConv2D(4, 3)(image)
    outputs = keras.layers.Lambda(lambda x: tf.linalg.svd(x, compute_uv=False))(features)
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"onnx: every operation must have.*a model with Svd"):
        tf_mdcn.export.onnx(keras.Model(image, outputs), path)
    assert not path.exists()


@pytest.mark.parametrize("opset", [18, 23, 19.0, True, "19"])
def test_opset_must_be_one_that_is_tested(tmp_path, opset):
    message = rf"onnx: opset must be an integer between 19.*22; received {opset!r}"
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.onnx(make_model(), tmp_path / "model.onnx", opset=opset)


def test_opset_may_be_any_integer_type(tmp_path):
    path = str(tmp_path / "model.onnx")
    image = keras.Input((7, 9, 4), name="image")
    model = keras.Model(image, ModulatedDeformConv2D(6, 3)(image))
    tf_mdcn.export.onnx(model, path, opset=np.int64(20))
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 20


def test_onnxruntime_has_no_float64_convolution(tmp_path):
    """What the docstring says of float64 layers: the file is valid, ONNX Runtime lacks its Conv."""
    path = str(tmp_path / "model.onnx")
    image = keras.Input((7, 9, 4), dtype="float64", name="image")
    model = keras.Model(image, ModulatedDeformConv2D(6, 3, dtype="float64")(image))
    tf_mdcn.export.onnx(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*\bConv\("):
        run_onnxruntime(path, {})


def test_absent_packages_are_errors_that_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r"without tf2onnx.*pip install 'tf_mdcn\[onnx\]'"):
        tf_mdcn.export.onnx(make_model(), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"openvino_extension: .*pip install openvino"):
        tf_mdcn.export.openvino_extension()
