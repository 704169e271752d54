"""TFLite files in the TFLite interpreter, held to the Keras model that they came from."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_model import EPSILON, OUTPUTS, expected_outputs, make_images, make_model, rounding_bound
from oracle import assert_close

import tf_mdcn.export
from tf_mdcn import ModulatedDeformConv2D

pytestmark = pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")


def interpret(path, **inputs):
    return tf.lite.Interpreter(str(path)).get_signature_runner()(**inputs)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model in the three kinds of weights, at batch size 2."""
    model, folder = make_model(), tmp_path_factory.mktemp("tflite")
    signature = [tf.TensorSpec(make_images(2).shape, tf.float32, "image")]
    for weights in ("float32", "float16", "int8"):
        path = folder / weights
        tf_mdcn.export.tflite(model, path, weights=weights, input_signature=signature)
    return model, folder


def test_float32(files):
    model, folder = files
    x = make_images(2)
    outputs, expected = interpret(folder / "float32", image=x), expected_outputs(model, x)
    for name in OUTPUTS:
        assert_close(outputs[name], expected[name], rounding_bound(expected[name], x), name)


def test_float16_weights(files):
    model, folder = files
    x = make_images(2)
    outputs, expected = interpret(folder / "float16", image=x), expected_outputs(model, x)
    for name in OUTPUTS:
        # A weight is off by half an epsilon of float16, which every layer adds, and moves samples
        # by as much of the offsets, which are below 8 pixels.
        bound = 8 * 3 * 2.0**-11 * float(np.max(np.abs(expected[name])))
        assert_close(outputs[name], expected[name], bound, name)
        exact = rounding_bound(expected[name], x)
        assert np.max(np.abs(outputs[name] - expected[name])) > exact  # weights are not float32
    sizes = {name: (folder / name).stat().st_size for name in ("float32", "float16")}
    assert sizes["float16"] < 0.65 * sizes["float32"]


def test_dynamic_range_quantisation_holds_accuracy(files):
    model, folder = files
    x = make_images(2)
    outputs, expected = interpret(folder / "int8", image=x), expected_outputs(model, x)
    for name in OUTPUTS:
        error = np.sqrt(np.mean((outputs[name] - expected[name]) ** 2))
        assert error < 0.02 * np.std(expected[name]), name
    types = {t["dtype"] for t in tf.lite.Interpreter(str(folder / "int8")).get_tensor_details()}
    assert np.int8 in types


@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_builtin_ops_only(files, weights):
    interpreter = tf.lite.Interpreter(str(files[1] / weights))
    ops = {op["op_name"] for op in interpreter._get_ops_details()}
    assert "GATHER" in ops
    assert not [op for op in ops if op.startswith(("Flex", "Mdcn", "CUSTOM"))]


def test_batch_is_1_by_default(tmp_path):
    image = keras.Input((90, 90, 32), name="image")  # large enough for more than one block
    model = keras.Model(image, ModulatedDeformConv2D(4, 3, name="features")(image))
    tf_mdcn.export.tflite(model, tmp_path / "model.tflite")
    x = np.random.default_rng(0).normal(size=(1, 90, 90, 32)).astype("float32")
    outputs, expected = interpret(tmp_path / "model.tflite", image=x)["features"], model(x).numpy()
    assert_close(outputs, expected, 2 * 90 * EPSILON * float(np.max(np.abs(expected))))


def test_errors(tmp_path):
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=r'tflite: weights must be "float32".*received \'half\''):
        tf_mdcn.export.tflite(make_model(), path, weights="half")
    message = r"tflite: every size but the batch's must be known.*received image of shape \(None, N"
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.tflite(make_model(None, None), path)
    with pytest.raises(TypeError, match=r"tflite: model must be a keras.Model; received 'model'"):
        tf_mdcn.export.tflite("model", path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("policy", "received"),
    [("float64", "float64"), ("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("inside", [False, True], ids=["layer", "function"])
def test_compute_must_be_float32(tmp_path, policy, received, activation, inside):
    """Also inside a tf.function, between casts that hide it."""
    image = keras.Input((7, 9, 4), name="image")
    layer = ModulatedDeformConv2D(6, 3, activation=activation, dtype=policy)
    if inside:
        layer.build((None, 7, 9, 4))
        function = tf.function(lambda x: tf.cast(layer(x), tf.float32))
        model = keras.Model(image, keras.layers.Lambda(function, output_shape=(5, 7, 6))(image))
    else:
        model = keras.Model(image, layer(image))
    path = tmp_path / "model.tflite"
    message = rf"^tf_mdcn.export.tflite: model must compute in float32; received {received} in "
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.tflite(model, path)
    assert not path.exists()


def test_casts_from_other_types_are_no_compute(tmp_path):
    """An input of another type, which the first layer casts, converts."""
    image = keras.Input((7, 9, 4), dtype="float64", name="image")
    model = keras.Model(image, ModulatedDeformConv2D(6, 3, name="features")(image))
    tf_mdcn.export.tflite(model, tmp_path / "model.tflite")
    x = make_images(1, 7, 9).astype("float64")
    outputs, expected = interpret(tmp_path / "model.tflite", image=x)["features"], model(x).numpy()
    assert_close(outputs, expected, 2 * 9 * EPSILON * float(np.max(np.abs(expected))))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_float16_refuses_images_whose_positions_it_cannot_hold(tmp_path, data_format):
    shape = (4, 2049, 1) if data_format == "channels_last" else (1, 4, 2049)
    image = keras.Input(shape, name="image")
    model = keras.Model(image, ModulatedDeformConv2D(1, 3, data_format=data_format)(image))
    message = r"tflite: with float16 weights.*at most 2048 pixels.*received 4 x 2049 in"
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.tflite(model, tmp_path / "model.tflite", weights="float16")
