"""What surrounds the op: finding and loading the native libraries and what is said when they do not
fit, the report of the build, the public names, and the docstrings' examples.
"""

import doctest
import importlib.util
import inspect
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_mdcn
from tf_mdcn import _library

PACKAGE = pathlib.Path(tf_mdcn.__file__).parent
MINOR_VERSION = ".".join(tf.__version__.split(".")[:2])
OP_LIBRARY = "libtf_mdcn_ops.so"
FAKE_CORE = """
def build_information():
    return {"tensorflow": "9.87.6", "compiler": "", "cuda": None, "cuda_architectures": []}
"""
# Imports the package from each of the folders, and prints what happens.
IMPORTER = """
import json, sys
import tensorflow
# An editable installation would find what a copy lacks.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
messages = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        import tf_mdcn
        messages[folder] = "imported from " + tf_mdcn.__file__
    except Exception as error:
        messages[folder] = type(error).__name__ + ": " + str(error)
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "tf_mdcn"]:
        del sys.modules[name]
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def import_messages(tmp_path_factory):
    """What the import says of copies of the package, each broken in its own way."""

    def another_version(package, core):
        core.unlink()
        (package / "_core.py").write_text(FAKE_CORE)

    def no_core(package, core):
        core.unlink()

    def broken_core(package, core):
        core.write_bytes(b"not a library")

    def no_op_library(package, core):
        (package / OP_LIBRARY).unlink()

    def broken_op_library(package, core):
        (package / OP_LIBRARY).write_bytes(b"not a library")

    broken = (another_version, no_core, broken_core, no_op_library, broken_op_library)
    folders = {}
    for break_it in broken:
        folder = tmp_path_factory.mktemp(break_it.__name__)
        package = shutil.copytree(
            PACKAGE, folder / "tf_mdcn", ignore=shutil.ignore_patterns("__pycache__")
        )
        break_it(package, next(package.glob("_core*.so")))
        folders[break_it.__name__] = str(folder)
    result = subprocess.run(
        [sys.executable, "-c", IMPORTER, *folders.values()],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    messages = json.loads(result.stdout)
    return {name: messages[folder] for name, folder in folders.items()}


@pytest.mark.parametrize(
    "broken, built_with, why",
    [
        (
            "another_version",
            "was built with TensorFlow 9.87.6",
            "The two minor versions must be the same.",
        ),
        ("no_core", "is not built", "cannot import name '_core'"),
        ("broken_core", "is not built", "file too short|invalid ELF header"),
        (
            "no_op_library",
            f"was built with TensorFlow {tf.__version__}",
            f"{OP_LIBRARY} is missing from ",
        ),
        (
            "broken_op_library",
            f"was built with TensorFlow {tf.__version__}",
            "file too short|invalid ELF header",
        ),
    ],
)
def test_a_library_that_does_not_fit(import_messages, broken, built_with, why):
    """An ImportError with both versions, the reason and the command; nothing runs without it."""
    mended = "9.87" if broken == "another_version" else MINOR_VERSION
    message = import_messages[broken]
    assert message.startswith(
        f"ImportError: tf_mdcn: the native library cannot be loaded: it {built_with}, and "
        f"TensorFlow {tf.__version__} is running. "
    )
    assert re.search(why, message), message
    assert message.endswith(
        " To build it for the running version, in the sources of tf_mdcn: pip install "
        "--no-build-isolation --no-deps --force-reinstall . ; to get the version it was built "
        f'with: pip install "tensorflow=={mended}.*"'
    )


def test_the_op_library_is_where_it_says():
    path = tf_mdcn.op_library_path()
    assert os.path.isabs(path)
    assert pathlib.Path(path).name == OP_LIBRARY
    assert pathlib.Path(path).read_bytes()[:4] == b"\x7fELF"


def test_loading_twice_is_loading_once():
    assert _library.load() is _library.load()
    assert tf.load_op_library(tf_mdcn.op_library_path()) is _library.load()


def test_the_op_library_registers_three_ops():
    names = {name for name in dir(_library.load()) if name.startswith("mdcn_")}
    forward = "mdcn_modulated_deform_conv2d"
    functions = {forward, f"{forward}_backprop_input", f"{forward}_backprop_filter"}
    assert names == functions | {f"{name}_eager_fallback" for name in functions}


def test_every_op_and_argument_is_documented():
    library = _library.load()
    for function in (
        library.mdcn_modulated_deform_conv2d,
        library.mdcn_modulated_deform_conv2d_backprop_input,
        library.mdcn_modulated_deform_conv2d_backprop_filter,
    ):
        assert "odulated" in function.__doc__
    forward = library.mdcn_modulated_deform_conv2d.__doc__
    for argument in ("inputs", "filters", "offset", "mask", "bias", "strides", "dilations"):
        assert f"{argument}: " in forward


def test_build_info():
    information = tf_mdcn.build_info()
    assert set(information) >= {
        "tf_mdcn",
        "tensorflow_built_with",
        "tensorflow_running",
        "keras",
        "python",
        "machine",
        "compiler",
        "cpu_instruction_sets",
        "cpu_instruction_set",
        "cuda",
        "cuda_architectures",
        "xla",
    }
    assert information["tf_mdcn"] == tf_mdcn.__version__
    assert information["tensorflow_running"] == tf.__version__
    assert information["tensorflow_built_with"].startswith(MINOR_VERSION + ".")
    assert information["keras"] == keras.__version__
    assert information["python"] == platform.python_version()
    assert information["machine"] == platform.machine()
    assert re.match(r"\w+ \d+\.\d+", information["compiler"])
    assert information["cpu_instruction_set"] in information["cpu_instruction_sets"]
    assert information["cpu_instruction_sets"][-1] == "baseline"
    assert isinstance(information["xla"], bool)
    json.dumps(information)  # plain values, for reports


PUBLIC_NAMES = {
    "ModulatedDeformConv2D",
    "build_info",
    "modulated_deform_conv2d",
    "op_library_path",
    "reference",
    "use_implementation",
}


def test_public_names():
    assert set(tf_mdcn.__all__) >= PUBLIC_NAMES
    for name in tf_mdcn.__all__:
        assert getattr(tf_mdcn, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize(
    "function", [tf_mdcn.modulated_deform_conv2d, tf_mdcn.reference.modulated_deform_conv2d]
)
def test_signature_of_the_function(function):
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == [
        "inputs",
        "filters",
        "offset",
        "mask",
        "bias",
    ]
    assert defaults == {
        "mask": None,
        "bias": None,
        "strides": 1,
        "padding": "valid",
        "data_format": "channels_last",
        "dilations": 1,
        "groups": 1,
        "deformable_groups": 1,
        "name": None,
    }


def public_modules():
    return [
        module
        for module in {inspect.getmodule(getattr(tf_mdcn, name)) for name in tf_mdcn.__all__}
        if module.__name__.startswith("tf_mdcn")
    ]


@pytest.mark.parametrize("module", sorted(public_modules(), key=lambda m: m.__name__), ids=str)
def test_examples_in_docstrings(module):
    failures, _ = doctest.testmod(module, report=True)
    assert failures == 0


@pytest.mark.parametrize(
    "name", ["ModulatedDeformConv2D", "build_info", "modulated_deform_conv2d", "use_implementation"]
)
def test_public_docstrings_have_an_example(name):
    examples = doctest.DocTestParser().get_examples(getattr(tf_mdcn, name).__doc__)
    assert examples, name


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# use_implementation


def one_call():
    return tf_mdcn.modulated_deform_conv2d(
        tf.ones([1, 4, 4, 2]), tf.ones([3, 3, 2, 3]), tf.zeros([1, 2, 2, 18])
    )


def uses_the_native_op() -> bool:
    with tf.Graph().as_default() as graph:
        one_call()
    return any(op.type == "Mdcn>ModulatedDeformConv2D" for op in graph.get_operations())


def test_use_implementation_nests_and_ends():
    assert uses_the_native_op()
    with tf_mdcn.use_implementation("portable"):
        assert not uses_the_native_op()
        with tf_mdcn.use_implementation("native"):
            assert uses_the_native_op()
        assert not uses_the_native_op()
        portable = one_call().numpy()
    assert uses_the_native_op()
    np.testing.assert_array_equal(one_call(), portable)  # small whole numbers: no rounding


def test_use_implementation_ends_with_an_error_too():
    with pytest.raises(KeyError, match="mine"), tf_mdcn.use_implementation("portable"):
        raise KeyError("mine")
    assert uses_the_native_op()


def test_use_implementation_refuses_other_names():
    message = 'use_implementation: name must be "native" or "portable"; received \'cuda\''
    with (
        pytest.raises(ValueError, match=re.escape(message) + "$"),
        tf_mdcn.use_implementation("cuda"),
    ):
        pass


def test_the_package_is_the_installed_one():
    """Not a folder that happens to be where the tests run."""
    assert importlib.util.find_spec("tf_mdcn").origin == tf_mdcn.__file__
