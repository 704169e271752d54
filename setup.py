"""Builds the native libraries with CMake and Ninja against the TensorFlow of the build environment.

Separate from pyproject.toml for what cannot be static: the requirement of the very TensorFlow minor
version (and package) that the libraries were built with, and whether there is a GPU part.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping

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


@dataclasses.dataclass(frozen=True)
class CudaChoice:
    """Whether the kernels for the GPU are built, and why."""

    on: bool
    reason: str


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The path of nvcc, or None: CUDACXX if that is set, else PATH, then the toolkit's folders."""
    path = environment.get("PATH", os.defpath)
    if environment.get("CUDACXX"):
        return shutil.which(shlex.split(environment["CUDACXX"])[0], path=path)
    toolkits = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [path, *(os.path.join(toolkit, "bin") for toolkit in toolkits if toolkit)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def choose_cuda(
    setting: str, nvcc: str | None, package: str, version: str, cuda_build: bool
) -> CudaChoice:
    """Decides on the kernels for the GPU.

    Args:
        setting: Of TF_MDCN_CUDA: "auto", "0" or "1".
        nvcc: Its path, or None where there is none.
        package: Of the TensorFlow to build for: "tensorflow", "tensorflow-cpu".
        version: Of that TensorFlow.
        cuda_build: Whether that TensorFlow has CUDA.

    Raises:
        SetupError: If the setting is none of the three, or is 1 where it cannot be.
    """
    if setting not in ("auto", "0", "1"):
        raise SetupError(f"tf_mdcn: TF_MDCN_CUDA must be auto, 0 or 1; received {setting!r}")
    if setting == "0":
        return CudaChoice(False, "TF_MDCN_CUDA=0")
    if nvcc is None:
        missing = "nvcc was not found"
        remedy = "Install the CUDA toolkit, 12 or 13, or set CUDACXX to its nvcc"
    elif not cuda_build:
        missing = f"{package} {version} is built without CUDA"
        remedy = "Build for a TensorFlow with CUDA: tensorflow on x86-64 Linux, not tensorflow-cpu"
    elif [int(part) for part in version.split(".")[:2]] < [2, 20]:
        # As for XLA: its stream_executor.h includes llvm/ADT/ArrayRef.h, which is missing.
        missing = f"the headers of {package} {version} are incomplete"
        remedy = "Build for TensorFlow 2.20 or newer"
    else:
        return CudaChoice(True, f"TF_MDCN_CUDA={setting}, {nvcc}, {package} {version} with CUDA")
    if setting == "1":
        raise SetupError(f"tf_mdcn: TF_MDCN_CUDA=1, but {missing}. {remedy}")
    return CudaChoice(False, f"TF_MDCN_CUDA=auto, {missing}")


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
        distribution = _tensorflow_distribution()
        nvcc = find_nvcc(os.environ)
        cuda = choose_cuda(
            os.environ.get("TF_MDCN_CUDA") or "auto",
            nvcc,
            distribution.name,
            distribution.version,
            tf.test.is_built_with_cuda(),
        )
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
            "TF_MDCN_CUDA": int(cuda.on),
            "TF_MDCN_CUDA_REASON": cuda.reason,
            "TF_MDCN_CUDA_ARCHS": os.environ.get("TF_MDCN_CUDA_ARCHS", ""),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        commands = (
            ["cmake", "-S", _ROOT / "cc", "-B", build_dir, "-G", "Ninja", *definitions],
            ["cmake", "--build", build_dir],
        )
        environment = {**os.environ, "CXX": compiler}
        remedy = ""
        if cuda.on:
            environment["CUDACXX"] = nvcc
            remedy = ". If nvcc failed: TF_MDCN_CUDA=0 builds without it, for CPUs alone"
        for command in commands:
            try:
                subprocess.run(command, check=True, env=environment)
            except (OSError, subprocess.CalledProcessError) as error:
                why = error if isinstance(error, OSError) else "CMake's messages are above"
                raise SetupError(f"tf_mdcn: the native build failed: {why}{remedy}") from error

    def get_outputs(self) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        """Nothing: in an editable installation CMake has written there."""


class NativeDistribution(Distribution):
    """A wheel of this project is always for one platform and Python."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": CMakeBuild},
        distclass=NativeDistribution,
        ext_modules=[Extension("tf_mdcn._core", sources=[])],
        install_requires=[_tensorflow_requirement(), "keras>=3.5"],
    )
