"""Builds the native libraries with CMake and Ninja against the TensorFlow of the build environment.

Separate from pyproject.toml for what cannot be static: the requirement of the very TensorFlow minor
version (and package) that the libraries were built with.
"""

import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

_ROOT = pathlib.Path(__file__).parent.resolve()


def _tensorflow_distribution() -> importlib.metadata.Distribution:
    """The distribution that provides TensorFlow here, `tensorflow-cpu` included."""
    for name in importlib.metadata.packages_distributions().get("tensorflow", []):
        if name.startswith("tensorflow"):
            return importlib.metadata.distribution(name)
    raise SetupError("tf_mdcn: TensorFlow must be installed in the build environment")


def _tensorflow_requirement() -> str:
    distribution = _tensorflow_distribution()
    major, minor = distribution.version.split(".")[:2]
    return f"{distribution.name}=={major}.{minor}.*"


def _compiler() -> str:
    """The command of the C++ compiler, arguments and a launcher such as ccache included."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SetupError(
            f"tf_mdcn: a C++17 compiler is needed to build the native op; {compiler} was not "
            "found. Install g++ 9 or newer, or set CXX"
        )
    return compiler


class CMakeBuild(build_ext):
    """Runs CMake instead of compiling extension by extension."""

    def run(self) -> None:
        compiler = _compiler()
        import pybind11
        import tensorflow as tf

        output_dir = pathlib.Path(self.get_ext_fullpath("tf_mdcn._core")).parent.resolve()
        build_dir = pathlib.Path(self.build_temp).resolve()
        include_dir = tf.sysconfig.get_include()
        compile_flags = [
            flag
            for flag in tf.sysconfig.get_compile_flags()
            if flag != f"-I{include_dir}" and not flag.startswith("--std=")
        ]
        # Paths of tools are given at every run: pip's build environment is gone at the next one.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TF_MDCN_OUTPUT_DIR": output_dir,
            "TF_MDCN_TF_VERSION": tf.__version__,
            "TF_MDCN_TF_INCLUDE_DIR": include_dir,
            "TF_MDCN_TF_COMPILE_FLAGS": ";".join(compile_flags),
            "TF_MDCN_TF_LINK_FLAGS": ";".join(tf.sysconfig.get_link_flags()),
            "TF_MDCN_XLA": os.environ.get("TF_MDCN_XLA", "1"),
            "TF_MDCN_CUDA": os.environ.get("TF_MDCN_CUDA", "0"),
            "TF_MDCN_CUDA_ARCHS": os.environ.get("TF_MDCN_CUDA_ARCHS", ""),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        commands = (
            ["cmake", "-S", _ROOT / "cc", "-B", build_dir, "-G", "Ninja", *definitions],
            ["cmake", "--build", build_dir],
        )
        for command in commands:
            try:
                subprocess.run(command, check=True, env={**os.environ, "CXX": compiler})
            except (OSError, subprocess.CalledProcessError) as error:
                raise SetupError(f"tf_mdcn: the native build failed: {error}") from error

    def get_outputs(self) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        """Nothing: in an editable installation CMake has written there."""


class NativeDistribution(Distribution):
    """A wheel of this project is always for one platform and Python."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_ext": CMakeBuild},
    distclass=NativeDistribution,
    ext_modules=[Extension("tf_mdcn._core", sources=[])],
    install_requires=[_tensorflow_requirement(), "keras>=3.5"],
)
