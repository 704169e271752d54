"""The command line: report, self-check and export, and that they fail when they should."""

import doctest
import importlib
import os
import re
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_model import make_model

from tf_mdcn import ModulatedDeformConv2D, __main__, build_info
from tf_mdcn.export import _check


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.keras"
    make_model(None, None).save(path)
    return str(path)


def test_report_and_self_check_pass(capsys):
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    for name, value in {**build_info(), **__main__._gpu_report()}.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert str(value) in line or isinstance(value, list)
    assert "op on /device:CPU:0" in printed
    assert ("op under XLA" in printed) == build_info()["xla"]
    for instruction_set in build_info()["cpu_instruction_sets"]:
        assert f"core, {instruction_set} " in printed
    assert printed.splitlines()[-1] == "The self-check passed."


@pytest.mark.parametrize("broken", range(6))
def test_self_check_finds_what_is_wrong(capsys, monkeypatch, broken):
    """Each result in turn is off, in one type and one implementation."""
    right = __main__._core_with

    def wrong(instruction_set):
        def run(tensors):
            results = [np.array(x) for x in right(instruction_set)(tensors)]
            if instruction_set == "baseline" and tensors[0].dtype == tf.float32:
                results[broken].flat[-1] += 1e-4 * np.max(np.abs(results[broken]))
            return results

        return run

    monkeypatch.setattr(__main__, "_core_with", wrong)
    assert __main__.main([]) == 1
    failures = capsys.readouterr().out.split("FAILED\n")[1].splitlines()
    name = __main__._RESULTS[broken]
    assert len(failures) == 1
    assert failures[0].startswith(f"core, baseline, float32: {name} is off by 1.0e-04")


def test_self_check_finds_nan(capsys, monkeypatch):
    def broken(instruction_set):
        def run(tensors):
            return [np.full(x.shape, np.nan) for x in [tensors[5], *tensors[:5]]]

        return run

    monkeypatch.setattr(__main__, "_core_with", broken)
    assert __main__.main([]) == 1
    assert "output is off by nan" in capsys.readouterr().out


FAKE_GPU = "/job:localhost/CPU:0"


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A GPU in all reports, whose work the CPU does: FAKE_GPU is another name of it."""
    for name in ("list_logical_devices", "list_physical_devices"):
        right = getattr(tf.config, name)

        def listed(kind=None, right=right):
            return [types.SimpleNamespace(name=FAKE_GPU)] if kind == "GPU" else right(kind)

        monkeypatch.setattr(tf.config, name, listed)
    details = {"device_name": "NVIDIA X1", "compute_capability": (9, 0)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release")
    monkeypatch.setattr(__main__, "_DRIVER", driver)
    information = build_info()

    def built_with(cuda):
        monkeypatch.setattr(__main__, "build_info", lambda: {**information, "cuda": cuda})

    built_with("13.0")
    return built_with


def test_the_gpu_is_reported_and_checked(capsys, monkeypatch, fake_gpu):
    precisions = []
    right = __main__._errors

    def noted(*arguments):
        precisions.append(tf.config.experimental.tensor_float_32_execution_enabled())
        return right(*arguments)

    monkeypatch.setattr(__main__, "_errors", noted)
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    assert f"{'nvidia_driver':24}570.86.15\n" in printed
    assert f"{'gpus':24}NVIDIA X1 (compute capability 9.0)\n" in printed
    assert f"{'cuda':24}13.0\n" in printed
    assert "\nop on /device:CPU:0 " in printed and f"\nop on {FAKE_GPU} " in printed
    assert not any(precisions)
    assert tf.config.experimental.tensor_float_32_execution_enabled()


def test_a_gpu_without_kernels_is_said_to_be_idle(capsys, fake_gpu):
    fake_gpu(None)
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    assert "This build has no kernels for the GPU: the op runs on the CPU.\n" in printed
    assert FAKE_GPU not in printed


def test_a_gpu_on_which_the_op_does_not_run_fails(capsys, monkeypatch, fake_gpu):
    right = __main__._op_on

    def broken(device):
        def run(tensors):
            raise tf.errors.InternalError(None, None, "no kernel image is available")

        return run if device == FAKE_GPU else right(device)

    monkeypatch.setattr(__main__, "_op_on", broken)
    assert __main__.main([]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^op on {FAKE_GPU} +does not run$", printed, re.MULTILINE)
    assert f"FAILED\nop on {FAKE_GPU}: no kernel image is available\n" in printed


@pytest.mark.parametrize(
    ("road", "options"),
    [
        ("saved_model", []),
        ("portable", []),
        ("onnx", ["--opset", "22"]),
        ("tflite", ["--input-shape", "1,33,41,4"]),
        ("tflite", ["--input-shape", "1,33,41,4", "--weights", "float16"]),
    ],
)
def test_export(model_file, tmp_path, capsys, road, options):
    path = str(tmp_path / "exported")
    assert __main__.main(["export", model_file, "--to", road, path, *options]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(f"{path}: {road} of {model_file}; largest difference ")
    assert printed.endswith(": ok")
    difference = float(printed.split("largest difference ")[1].split()[0])
    assert difference < (5e-3 if "float16" in options else 2e-5)


def test_export_that_differs_fails(model_file, tmp_path, capsys, monkeypatch):
    wrong = {"logits": np.zeros((2, 5)), "features": np.full(3, np.nan)}
    monkeypatch.setitem(_check._RUNTIMES, "saved_model", lambda path: ({}, lambda inputs: wrong))
    path = str(tmp_path / "exported")
    assert __main__.main(["export", model_file, "--to", "saved_model", path]) == 1
    assert capsys.readouterr().out.strip().endswith("FAILED")


@pytest.mark.parametrize(("tolerance", "status"), [("0.4", 1), ("0.6", 0)])
def test_tolerance_is_the_users(model_file, tmp_path, capsys, monkeypatch, tolerance, status):
    monkeypatch.setattr(_check, "largest_difference", lambda *_, **__: 0.5)
    arguments = ["export", model_file, "--to", "saved_model", str(tmp_path / "exported")]
    assert __main__.main([*arguments, "--tolerance", tolerance]) == status
    assert (
        f"difference 0.5 of the largest output (tolerance {tolerance})" in capsys.readouterr().out
    )


_SIZES = "argument --input-shape: must be sizes such as ?,480,640,3; received "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tflite", "--opset", "19"], "--opset goes with --to onnx"),
        (["--to", "onnx", "--weights", "int8"], "--weights goes with --to tflite"),
        (["--to", "torch"], "invalid choice: 'torch'"),
        (["--to", "onnx", "--input-shape", "a,b"], _SIZES + "'a,b'"),
        (["--to", "onnx", "--input-shape", "1,0,8,4"], _SIZES + "'1,0,8,4'"),
    ],
)
def test_options_that_do_not_fit(model_file, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["export", model_file, "path", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "--opset", "18"], r"tf_mdcn.export.onnx: opset must be .*; received 18"),
        (["--to", "onnx", "--opset", "0"], r"tf_mdcn.export.onnx: opset must be .*; received 0"),
        (
            ["--to", "tflite"],
            r".*must be known.*input_signature \(here --input-shape\); received image of shape .*",
        ),
        (
            ["--to", "onnx", *["--input-shape", "1,8,8,4"] * 2],
            "--input-shape must be given once for every input = 1; received 2",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    model_file, tmp_path, capsys, options, message
):
    path = tmp_path / "exported"
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["export", model_file, str(path), *options])
    assert not path.exists()
    assert exit_.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"python -m tf_mdcn export: error: {message}", said)


def test_what_onnxruntime_cannot_run_is_said_in_one_line(tmp_path, capsys):
    layer = ModulatedDeformConv2D(2, 3, dtype="float64")
    model = keras.Sequential([keras.Input((8, 8, 4), dtype="float64"), layer])
    model.save(tmp_path / "model.keras")
    path = str(tmp_path / "model.onnx")
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["export", str(tmp_path / "model.keras"), path, "--to", "onnx"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: tf_mdcn.export: {path} must be a model that ONNX Runtime runs" in said


def test_absent_files_and_packages_are_said_in_one_line(model_file, tmp_path, capsys, monkeypatch):
    exported, absent = str(tmp_path / "exported"), str(tmp_path / "absent.keras")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    for arguments, message in [
        ([absent, exported, "--to", "onnx"], absent),
        ([model_file, exported, "--to", "onnx"], "pip install 'tf_mdcn[onnx]'"),
        ([model_file, str(file / "exported"), "--to", "saved_model"], str(file)),
    ]:
        with pytest.raises(SystemExit) as exit_:
            __main__.main(["export", *arguments])
        assert exit_.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("python -m tf_mdcn export: error: ") and message in said


def test_difference_is_relative_to_each_output():
    assert _check._difference([1.0, -8.0], [1.0, -10.0]) == pytest.approx(0.2)
    assert _check._difference([0.0], [0.0]) == 0
    assert _check._difference([1.0], [0.0]) == np.inf
    assert np.isnan(_check._difference([np.nan], [1.0]))
    assert _check._difference([1.0, 2.0], [1.0]) == np.inf


def test_integer_inputs_are_checked_too(tmp_path):
    image = keras.Input((9, 9, 3), dtype="uint8", name="image")
    outputs = ModulatedDeformConv2D(4, 3)(keras.layers.Rescaling(1 / 255)(image))
    path = tmp_path / "model.keras"
    keras.Model(image, outputs).save(path)
    exported = str(tmp_path / "exported")
    assert __main__.main(["export", str(path), "--to", "saved_model", exported]) == 0


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize(
    "name",
    [
        "convert._surgery",
        "convert._torchvision",
        "export._onnx",
        "export._saved_model",
        "export._tflite",
    ],
)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"tf_mdcn.{name}"))
    assert results.attempted > 0 and results.failed == 0


def test_as_a_command():
    """In a process of its own, as users run it, with another instruction set chosen."""
    command = [sys.executable, "-m", "tf_mdcn"]
    environment = {**os.environ, "TF_MDCN_CPU_ISA": "baseline"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert f"{'cpu_instruction_set':24}baseline\n" in process.stdout
    assert process.stdout.endswith("The self-check passed.\n")
