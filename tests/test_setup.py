"""setup.py's decision on the kernels for the GPU, and that its errors say what to do.

The build itself is no test: the installation that all other tests run on is one.
"""

import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest
from setuptools import Distribution
from setuptools.errors import SetupError

_ROOT = pathlib.Path(__file__).parent.parent
NVCC = "/opt/cuda/bin/nvcc"


@pytest.fixture(scope="module")
def setup():
    """The module setup.py, which builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("tf_mdcn_setup", _ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUDA = ("tensorflow", "2.20.1", True)
CPU_ONLY = ("tensorflow-cpu", "2.21.0", False)
INCOMPLETE = ("tensorflow", "2.19.1", True)


@pytest.mark.parametrize(
    ("setting", "nvcc", "tensorflow", "on", "reason"),
    [
        ("auto", NVCC, CUDA, True, f"TF_MDCN_CUDA=auto, {NVCC}, tensorflow 2.20.1 with CUDA"),
        ("1", NVCC, CUDA, True, f"TF_MDCN_CUDA=1, {NVCC}, tensorflow 2.20.1 with CUDA"),
        ("0", NVCC, CUDA, False, "TF_MDCN_CUDA=0"),
        ("0", None, CPU_ONLY, False, "TF_MDCN_CUDA=0"),
        ("auto", None, CUDA, False, "TF_MDCN_CUDA=auto, nvcc was not found"),
        (
            "auto",
            NVCC,
            CPU_ONLY,
            False,
            "TF_MDCN_CUDA=auto, tensorflow-cpu 2.21.0 is built without CUDA",
        ),
        (
            "auto",
            NVCC,
            INCOMPLETE,
            False,
            "TF_MDCN_CUDA=auto, the headers of tensorflow 2.19.1 are incomplete",
        ),
    ],
)
def test_cuda_is_built_where_it_can_be(setup, setting, nvcc, tensorflow, on, reason):
    assert setup.choose_cuda(setting, nvcc, *tensorflow) == setup.CudaChoice(on, reason)


@pytest.mark.parametrize(
    ("setting", "nvcc", "tensorflow", "message"),
    [
        (
            "1",
            None,
            CUDA,
            "TF_MDCN_CUDA=1, but nvcc was not found. Install the CUDA toolkit, 12 or 13, or set "
            "CUDACXX to its nvcc",
        ),
        (
            "1",
            NVCC,
            CPU_ONLY,
            "TF_MDCN_CUDA=1, but tensorflow-cpu 2.21.0 is built without CUDA. Build for a "
            "TensorFlow with CUDA: tensorflow on x86-64 Linux, not tensorflow-cpu",
        ),
        (
            "1",
            NVCC,
            INCOMPLETE,
            "TF_MDCN_CUDA=1, but the headers of tensorflow 2.19.1 are incomplete. Build for "
            "TensorFlow 2.20 or newer",
        ),
        ("on", NVCC, CUDA, "TF_MDCN_CUDA must be auto, 0 or 1; received 'on'"),
    ],
)
def test_what_cannot_be_built_is_an_error(setup, setting, nvcc, tensorflow, message):
    with pytest.raises(SetupError) as error:
        setup.choose_cuda(setting, nvcc, *tensorflow)
    assert str(error.value) == f"tf_mdcn: {message}"


@pytest.fixture
def toolkits(tmp_path):
    """Folders with an nvcc each."""
    names = ("path", "cxx", "home/bin", "cuda_path/bin")
    for name in names:
        compiler = tmp_path / name / "nvcc"
        compiler.parent.mkdir(parents=True)
        compiler.touch(mode=0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"CUDACXX": "{}/cxx/nvcc -v", "PATH": "{}/path", "CUDA_HOME": "{}/home"}, "cxx"),
        ({"CUDACXX": "", "PATH": "/none:{}/path", "CUDA_HOME": "{}/home"}, "path"),
        ({"PATH": "/none", "CUDA_HOME": "{}/home", "CUDA_PATH": "{}/cuda_path"}, "home/bin"),
        ({"PATH": "/none", "CUDA_PATH": "{}/cuda_path"}, "cuda_path/bin"),
        # Who names a compiler means that one.
        ({"CUDACXX": "{}/none/nvcc", "PATH": "{}/path", "CUDA_HOME": "{}/home"}, None),
    ],
)
def test_nvcc_is_found_where_cmake_looks(setup, toolkits, environment, found):
    environment = {name: value.format(toolkits) for name, value in environment.items()}
    wanted = found and str(toolkits / found / "nvcc")
    assert setup.find_nvcc(environment) == wanted


@pytest.fixture
def build(setup, monkeypatch, tmp_path):
    """Runs the build with a CMake that notes what it is given, or fails; returns the notes."""
    fake_pybind11 = types.SimpleNamespace(get_cmake_dir=lambda: "")
    monkeypatch.setitem(sys.modules, "pybind11", fake_pybind11)
    monkeypatch.setattr(setup.shutil, "which", lambda name, path=None: f"/found/{name}")
    monkeypatch.setattr("tensorflow.test.is_built_with_cuda", lambda: True)
    distribution = types.SimpleNamespace(name="tensorflow", version="2.20.1")
    monkeypatch.setattr(setup, "_tensorflow_distribution", lambda: distribution)
    monkeypatch.chdir(tmp_path)

    def run(setting, returncode=0):
        monkeypatch.setenv("TF_MDCN_CUDA", setting)
        notes = []

        def note(command, check, env):
            notes.append((command, env))
            if returncode:
                raise subprocess.CalledProcessError(returncode, command[:1])

        monkeypatch.setattr(setup.subprocess, "run", note)
        extension = setup.Extension("tf_mdcn._core", sources=[])
        command = setup.CMakeBuild(Distribution({"ext_modules": [extension]}))
        command.ensure_finalized()
        command.run()
        return notes

    return run


@pytest.mark.parametrize(("setting", "on"), [("", 1), ("auto", 1), ("1", 1), ("0", 0)])
def test_cmake_is_told(build, monkeypatch, setting, on):
    monkeypatch.delenv("CUDACXX", raising=False)
    (command, environment), _ = build(setting)
    assert f"-DTF_MDCN_CUDA={on}" in command
    (reason,) = (word for word in command if str(word).startswith("-DTF_MDCN_CUDA_REASON="))
    assert reason.startswith(f"-DTF_MDCN_CUDA_REASON=TF_MDCN_CUDA={setting or 'auto'}")
    assert environment.get("CUDACXX") == ("/found/nvcc" if on else None)


@pytest.mark.parametrize("setting", ["auto", "1"])
def test_a_build_that_fails_says_how_to_do_without_nvcc(build, setting):
    with pytest.raises(SetupError) as error:
        build(setting, returncode=1)
    assert str(error.value) == (
        "tf_mdcn: the native build failed: CMake's messages are above. If nvcc failed: "
        "TF_MDCN_CUDA=0 builds without it, for CPUs alone"
    )


def test_a_build_for_cpus_that_fails_does_not_blame_nvcc(build):
    with pytest.raises(SetupError) as error:
        build("0", returncode=1)
    assert str(error.value) == "tf_mdcn: the native build failed: CMake's messages are above"
