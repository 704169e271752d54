"""Finds the native libraries, checks that they fit the running TensorFlow, and loads them.

Separate because everything native comes through here: a library that does not fit is an error that
says what to do, never a silent way around it.
"""

import functools
import pathlib

import tensorflow as tf

_OP_LIBRARY = "libtf_mdcn_ops.so"
_XLA_LIBRARY = "libtf_mdcn_xla.so"


def op_library_path() -> str:
    """The path of the op library, for `TF_LoadLibrary` in programs without Python.

    Returns:
        The absolute path of the shared library that registers the ops and their CPU kernels. It
        needs `libtensorflow_framework.so.2` of the TensorFlow version that it was built with.

    Raises:
        ImportError: If the library is not where it was installed.
    """
    path = pathlib.Path(__file__).resolve().parent / _OP_LIBRARY
    if not path.is_file():
        raise ImportError(
            _not_loaded(f"{_OP_LIBRARY} is missing from {path.parent}.", _built_with())
        )
    return str(path)


@functools.cache
def load():
    """Loads the op library into TensorFlow, once.

    Returns:
        The module of generated op functions.

    Raises:
        ImportError: If the library was built for another minor version of TensorFlow, is missing,
            or cannot be loaded. It names both versions and the command that mends it.
    """
    built_with = _built_with()
    if _minor_version(built_with) != _minor_version(tf.__version__):
        raise ImportError(_not_loaded("The two minor versions must be the same.", built_with))
    path = op_library_path()
    try:
        return tf.load_op_library(path)
    except (tf.errors.OpError, OSError) as error:
        raise ImportError(_not_loaded(str(error), built_with)) from error


@functools.cache
def xla_error() -> str | None:
    """Loads the library that compiles the ops under XLA, once. Everything else works without it.

    Returns:
        `None` when it is loaded, or why it is not.
    """
    path = pathlib.Path(__file__).resolve().parent / _XLA_LIBRARY
    if not path.is_file():
        return (
            f"{_XLA_LIBRARY} was not built: TF_MDCN_XLA was 0, or the headers of the TensorFlow it "
            "was built with are incomplete, as those of 2.19 are"
        )
    try:
        tf.load_library(str(path))
    except (tf.errors.OpError, OSError) as error:
        return str(error)
    return None


def core():
    """The pybind11 module: the core without TensorFlow, and what is known of the build.

    Raises:
        ImportError: If it is missing or cannot be loaded, as `load`.
    """
    try:
        from tf_mdcn import _core
    except ImportError as error:
        raise ImportError(_not_loaded(str(error), built_with=None)) from error
    return _core


def _built_with() -> str:
    return core().build_information()["tensorflow"]


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]


def _not_loaded(why: str, built_with: str | None) -> str:
    built = f"was built with TensorFlow {built_with}" if built_with else "is not built"
    minor = ".".join(_minor_version(built_with or tf.__version__))
    return (
        f"tf_mdcn: the native library cannot be loaded: it {built}, and TensorFlow "
        f"{tf.__version__} is running. {why} To build it for the running version, in the sources "
        "of tf_mdcn: pip install --no-build-isolation --no-deps --force-reinstall . ; to get the "
        f'version it was built with: pip install "tensorflow=={minor}.*"'
    )
