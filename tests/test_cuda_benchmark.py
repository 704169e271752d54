"""What of `bench.py --device gpu` needs no GPU: its errors, and when it waits for the device."""

import os
import pathlib
import subprocess
import sys
import types

import pytest
import tensorflow as tf

import tf_mdcn

_BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(_BENCHMARKS / "bench.py"), "--device", "gpu", *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu():
    result = run()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("--device gpu: TensorFlow sees no GPU\n")


@pytest.mark.parametrize("option", ["--memory", "--scaling"])
def test_what_is_measured_on_the_cpu_alone(option):
    result = run(option)
    assert result.returncode == 2
    assert result.stderr.endswith("error: --memory and --scaling are for --device cpu\n")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(_BENCHMARKS)
    import bench

    return bench


def test_without_kernels_for_the_gpu(bench, monkeypatch):
    """The CPU's would be timed, copies to and fro included."""
    gpu = types.SimpleNamespace(name="/physical_device:GPU:0", device_type="GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [gpu])
    monkeypatch.setattr(tf_mdcn, "build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit, match=r"^--device gpu: tf_mdcn was built without CUDA$"):
        bench.use_the_gpu()


class Recorder:
    """An implementation that notes what is asked of it, one letter each."""

    def __init__(self):
        self.calls = ""

    def forward(self):
        self.calls += "f"

    def synchronize(self):
        self.calls += "s"


@pytest.mark.parametrize(("queued", "expected"), [(True, "sfs" + "sfffs"), (False, "sfs" * 4)])
def test_a_gpu_is_waited_for_once_a_round(bench, monkeypatch, queued, expected):
    """After a call that warms up, and two that find how many calls make a round."""
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "BLOCK_SECONDS", 3)
    implementation = Recorder()
    seconds = bench.measure({"name": implementation}, "forward", 1, queued)
    assert implementation.calls == "sfs" * 2 + expected
    assert seconds == {"name": [1 / 3 if queued else 1]}
