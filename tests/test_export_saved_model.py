"""SavedModels in fresh processes: the native one with the op library, the portable one without.

What a process without tf_mdcn sees is asked of such a process, once, for it takes seconds to start.
"""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_model import OUTPUTS, expected_outputs, make_images, make_model, rounding_bound
from oracle import assert_close
from tensorflow_serving.apis import prediction_log_pb2

import tf_mdcn.export
from tf_mdcn import ModulatedDeformConv2D

# Runs in a process of its own: serves the portable model without tf_mdcn, as the stock model server
# would, then the native one with it.
_FRESH_PROCESS = """
import json, sys
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow_serving.apis import prediction_log_pb2

portable, native, images_path, results_path = sys.argv[1:]
images = np.load(images_path)
results, report = {}, {}


def serve(model, name):
    for key, x in images.items():
        for output, value in model.signatures["serving_default"](image=tf.constant(x)).items():
            results[f"{name} {key} {output}"] = value.numpy()


def op_library_is_mapped():
    return "tf_mdcn" in open("/proc/self/maps").read()


with open(f"{portable}/saved_model.pb", "rb") as file:
    proto = saved_model_pb2.SavedModel.FromString(file.read())
graph = proto.meta_graphs[0].graph_def
functions = [function.node_def for function in graph.library.function]
nodes = [node for body in [graph.node, *functions] for node in body]
calls = {function.signature.name for function in graph.library.function}
report["nodes"] = len(nodes)
report["unknown_ops"] = sorted(
    {n.op for n in nodes if op_def_registry.get(n.op) is None and n.op not in calls}
)

model = tf.saved_model.load(portable)
serve(model, "portable")
records = tf.data.TFRecordDataset(f"{portable}/assets.extra/tf_serving_warmup_requests")
report["warmup"] = []
for record in records:
    request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
    inputs = {name: tf.make_ndarray(x) for name, x in request.inputs.items()}
    signature = model.signatures[request.model_spec.signature_name]
    outputs = signature(**{name: tf.constant(x) for name, x in inputs.items()})
    results[f"warmup {len(report['warmup'])} logits"] = outputs["logits"].numpy()
    report["warmup"].append(request.model_spec.name)
try:
    tf.saved_model.load(native)
except Exception as error:
    report["native_without_op"] = str(error)
report["tf_mdcn_was_there"] = "tf_mdcn" in sys.modules or op_library_is_mapped()

import tf_mdcn

report["tf_mdcn_is_there"] = op_library_is_mapped()
serve(tf.saved_model.load(native), "native")
np.savez(results_path, **results)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The model of any size, exported both ways and served by a fresh process."""
    folder = tmp_path_factory.mktemp("served")
    model = make_model(None, None)
    images = {"three": make_images(3), "one": make_images(1, 40, 37, seed=1)}
    np.savez(folder / "images.npz", **images)
    paths = {name: folder / name / "1" for name in ("portable", "native")}
    warmup = [make_images(2, seed=2), make_images(1, 48, 35, seed=3)]
    tf_mdcn.export.saved_model(model, paths["portable"], portable=True, warmup_inputs=warmup)
    tf_mdcn.export.saved_model(model, paths["native"])
    script = [sys.executable, "-c", _FRESH_PROCESS, paths["portable"], paths["native"]]
    process = subprocess.run(
        [*script, folder / "images.npz", folder / "results.npz"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    return model, images, warmup, np.load(folder / "results.npz"), report


@pytest.mark.parametrize("name", ["portable", "native"])
def test_fresh_process_serves_any_batch_and_size(served, name):
    model, images, _, results, _ = served
    for key, x in images.items():
        expected = expected_outputs(model, x)
        for output in OUTPUTS:
            bound = rounding_bound(expected[output], x)
            assert_close(results[f"{name} {key} {output}"], expected[output], bound, output)


def test_portable_model_needs_neither_package_nor_op_library(served):
    report = served[-1]
    assert not report["tf_mdcn_was_there"]
    assert report["tf_mdcn_is_there"]  # the question can be answered with yes


def test_portable_model_has_standard_ops_only(served):
    report = served[-1]
    assert report["nodes"] > 200
    assert report["unknown_ops"] == []


def test_native_model_holds_the_op_and_needs_it(served):
    assert "Mdcn>ModulatedDeformConv2D" in served[-1]["native_without_op"]


def test_warmup_requests_are_replayed(served):
    model, _, warmup, results, report = served
    assert report["warmup"] == [model.name] * len(warmup)
    for i, x in enumerate(warmup):
        expected = expected_outputs(model, x)["logits"]
        assert_close(results[f"warmup {i} logits"], expected, rounding_bound(expected, x))


def small_model():
    image = keras.Input((7, 9, 4), name="image")
    return keras.Model(image, ModulatedDeformConv2D(6, 3, name="features")(image))


def test_names_of_inputs_and_outputs(tmp_path):
    first, second = keras.Input((5, 5, 2), name="first"), keras.Input((5, 5, 3), name="second")
    layer = ModulatedDeformConv2D(4, 3, name="aligned")
    model = keras.Model([first, second], layer([first, second]))
    tf_mdcn.export.saved_model(model, tmp_path / "1")
    signature = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    inputs = signature.structured_input_signature[1]
    assert {name: spec.shape.as_list() for name, spec in inputs.items()} == {
        "first": [None, 5, 5, 2],
        "second": [None, 5, 5, 3],
    }
    assert list(signature.structured_outputs) == ["aligned"]


def test_same_layer_twice_gives_numbered_outputs(tmp_path):
    first, second = keras.Input((5, 5, 2), name="first"), keras.Input((5, 5, 2), name="second")
    layer = ModulatedDeformConv2D(4, 3)
    model = keras.Model({"first": first, "second": second}, [layer(first), layer(second)])
    tf_mdcn.export.saved_model(model, tmp_path / "1")
    signature = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    assert sorted(signature.structured_outputs) == ["output_0", "output_1"]
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5, 2)).astype("float32")
    outputs = signature(first=tf.constant(x[0]), second=tf.constant(x[1]))
    assert np.array_equal(outputs["output_1"], layer(x[1]))


def test_dict_outputs_keep_their_names(tmp_path):
    image = keras.Input((5, 5, 2), name="image")
    model = keras.Model(image, {"sum": ModulatedDeformConv2D(4, 3)(image)})
    tf_mdcn.export.saved_model(model, tmp_path / "1")
    assert list(tf.saved_model.load(tmp_path / "1").serve(tf.zeros([1, 5, 5, 2]))) == ["sum"]


def test_sequential_model_and_keras_layer_around_the_export(tmp_path):
    model = keras.Sequential([keras.Input((7, 9, 4)), ModulatedDeformConv2D(6, 3, name="only")])
    tf_mdcn.export.saved_model(model, tmp_path / "1")
    x = make_images(2, 7, 9)
    outputs = keras.layers.TFSMLayer(str(tmp_path / "1"))(x)
    assert np.array_equal(outputs["only"], model(x))


class Subclassed(keras.Model):
    """Calls its layer through a tf.function, which keeps its first trace."""

    def __init__(self):
        super().__init__()
        self.layer = ModulatedDeformConv2D(6, 3)
        self.function = tf.function(self.layer.__call__)

    def call(self, inputs):
        return self.function(inputs)


def test_subclassed_model_needs_a_signature(tmp_path):
    model = Subclassed()
    x = make_images(2, 7, 9)
    expected = model(x)
    message = "saved_model: input_signature must be given for a subclassed model.*received None"
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.saved_model(model, tmp_path / "1")
    signature = [keras.InputSpec(shape=(None, None, None, 4), dtype="float32")]
    tf_mdcn.export.saved_model(model, tmp_path / "1", input_signature=signature)
    served = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    assert np.array_equal(served(input_0=tf.constant(x))["output_0"], expected)


def test_portable_refuses_what_was_traced_before(tmp_path):
    model = Subclassed()
    model(make_images(2, 7, 9))
    signature = [tf.TensorSpec((2, 7, 9, 4), tf.float32, "image")]
    message = "saved_model: a portable model must hold standard ops only; received the native op in"
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.saved_model(model, tmp_path / "1", portable=True, input_signature=signature)


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"saved_model: model must be a keras.Model; received 3"):
        tf_mdcn.export.saved_model(3, tmp_path)
    unbuilt = keras.Sequential([ModulatedDeformConv2D(4, 3)], name="later")
    with pytest.raises(ValueError, match=r"saved_model: model must be built.*received 'later'"):
        tf_mdcn.export.saved_model(unbuilt, tmp_path)
    model = small_model()
    with pytest.raises(TypeError, match=r"input_signature must hold.*received 'image'"):
        tf_mdcn.export.saved_model(model, tmp_path, input_signature=["image"])
    with pytest.raises(TypeError, match=r"input_signature must hold.*received InputSpec"):
        tf_mdcn.export.saved_model(model, tmp_path, input_signature=[keras.InputSpec(ndim=4)])
    bare = tf.TensorSpec((None, 7, 9, 4), tf.float32, "image")
    message = r"saved_model: input_signature must be the list of the call's.*received TensorSpec"
    with pytest.raises(TypeError, match=message):
        tf_mdcn.export.saved_model(model, tmp_path, input_signature=bare)
    twice = [tf.TensorSpec((None, 7, 9, 4), tf.float32, "image")] * 2
    with pytest.raises(ValueError, match="inputs must have different names; received image, image"):
        tf_mdcn.export.saved_model(model, tmp_path, input_signature=twice)
    message = (
        r"saved_model: warmup_inputs must have the shapes of the inputs = image: "
        r"\(None, 7, 9, 4\); received \[2, 5, 9, 4\]"
    )
    with pytest.raises(ValueError, match=message):
        tf_mdcn.export.saved_model(model, tmp_path, warmup_inputs=[make_images(2, 5, 9)])
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"pip install 'tf_mdcn\[serving\]'"):
        tf_mdcn.export.saved_model(model, tmp_path, warmup_inputs=[make_images(2, 7, 9)])
    assert not list(pathlib.Path(tmp_path).iterdir())  # nothing half written


def test_no_warmup_file_without_warmup_inputs(tmp_path):
    tf_mdcn.export.saved_model(small_model(), tmp_path / "1")
    assert not (tmp_path / "1" / "assets.extra").exists()


def test_exporting_again_replaces_the_warmup_requests(tmp_path):
    folder = tmp_path / "1"
    file = folder / "assets.extra" / "tf_serving_warmup_requests"
    x = make_images(2, 7, 9)
    tf_mdcn.export.saved_model(small_model(), folder, warmup_inputs=[x, x])
    tf_mdcn.export.saved_model(small_model(), folder, warmup_inputs=[x])
    assert len(list(tf.data.TFRecordDataset(str(file)))) == 1
    tf_mdcn.export.saved_model(small_model(), folder)
    assert not file.exists()


def test_warmup_casts_to_the_input_type(tmp_path):
    images = np.arange(2 * 7 * 9 * 4, dtype=np.uint8).reshape(2, 7, 9, 4)
    tf_mdcn.export.saved_model(small_model(), tmp_path / "1", warmup_inputs=[images])
    file = tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests"
    (record,) = tf.data.TFRecordDataset(str(file))
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
    written = tf.make_ndarray(log.predict_log.request.inputs["image"])
    assert written.dtype == np.float32 and np.array_equal(written, images)
