"""The C program of examples/serve_c: built, and run on both kinds of SavedModel.

It is the C API's view of an export: no Python, and for the portable one no op library either.
"""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from export_model import expected_outputs, make_images, make_model, rounding_bound
from oracle import assert_close
from tensorflow.core.protobuf import saved_model_pb2

import tf_mdcn.export

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "serve_c"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve_c") / "serve"
    assert shutil.which("make"), "make is needed to build examples/serve_c"
    command = ["make", "-C", EXAMPLE, f"PYTHON={sys.executable}", f"OUTPUT={path}"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("exports"), make_model()
    for name in ("native", "portable"):
        tf_mdcn.export.saved_model(model, folder / name, portable=name == "portable")
    return model, folder


def tensor_names(path):
    """The tensors of the signature, as saved_model_cli prints them."""
    proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    signature = proto.meta_graphs[0].signature_def["serving_default"]
    return signature.inputs["image"].name, signature.outputs["features"].name


def serve(program, path, x, *library):
    image, features = tensor_names(path)
    shape = ",".join(map(str, x.shape))
    command = [program, path, image, shape, features, *library]
    return subprocess.run(command, input=x.tobytes(), capture_output=True)


@pytest.mark.parametrize("name", ["native", "portable"])
def test_serves(program, exports, name):
    model, folder = exports
    library = [tf_mdcn.op_library_path()] if name == "native" else []
    x = make_images(2)
    process = serve(program, folder / name, x, *library)
    assert process.returncode == 0, process.stderr.decode()
    shape, *values = process.stdout.decode().split()
    outputs = np.array(values, np.float32).reshape([int(size) for size in shape.split(",")])
    expected = expected_outputs(model, x)["features"]
    assert_close(outputs, expected, rounding_bound(expected, x))


def test_native_model_without_the_library_says_what_is_missing(program, exports):
    process = serve(program, exports[1] / "native", make_images(2))
    assert process.returncode == 1
    assert b"Op type not registered 'Mdcn>ModulatedDeformConv2D'" in process.stderr


def test_too_few_values(program, exports):
    x = make_images(1)
    image, features = tensor_names(exports[1] / "portable")
    command = [program, exports[1] / "portable", image, "2,33,41,4", features]
    process = subprocess.run(command, input=x.tobytes(), capture_output=True)
    assert process.returncode == 1
    assert b"serve: standard input: fewer values than the shape has" in process.stderr
