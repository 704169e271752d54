"""What was built and what is running, for error reports."""

import platform
from typing import Any

import keras
import tensorflow as tf

from tf_mdcn import _library


def build_info() -> dict[str, Any]:
    """What the native library was built with, and what it runs on.

    Returns:
        A dict with the keys `tf_mdcn`, `tensorflow_built_with`, `tensorflow_running`, `keras`,
        `python`, `machine`, `compiler`, `cpu_instruction_sets` (compiled in and run by this
        machine, best first), `cpu_instruction_set` (the chosen one; the environment variable
        `TF_MDCN_CPU_ISA` forces another), `cuda` (the CUDA version of the kernels, or `None`),
        `cuda_architectures`, `xla` (whether XLA compiles the op: to its native kernels on CPUs, to
        standard operations elsewhere) and `xla_error` (why it does not, or `None`).

    Raises:
        ImportError: If the native module cannot be loaded.
        ValueError: If `TF_MDCN_CPU_ISA` names an instruction set that is not available.

    Example:

    >>> import tf_mdcn
    >>> tf_mdcn.build_info()["cpu_instruction_sets"][-1]
    'baseline'
    """
    from tf_mdcn import __version__

    core = _library.core()
    information = core.build_information()
    return {
        "tf_mdcn": __version__,
        "tensorflow_built_with": information["tensorflow"],
        "tensorflow_running": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiler": information["compiler"],
        "cpu_instruction_sets": core.instruction_sets(),
        "cpu_instruction_set": core.chosen_instruction_set(),
        "cuda": information["cuda"],
        "cuda_architectures": information["cuda_architectures"],
        "xla": _library.xla_error() is None,
        "xla_error": _library.xla_error(),
    }
