"""The benchmark: tf.nn.conv2d (the floor), tf_mdcn, and ONNX Runtime, OpenVINO and torchvision
where installed, side by side in one process, verified against each other before any clock runs.

    python tests/benchmarks/bench.py                    every shape, forward and training step
    python tests/benchmarks/bench.py --shapes A,odd --threads 2 --dtype bfloat16 --json out.json
    python tests/benchmarks/bench.py --device gpu       on the first GPU, beside cuDNN's conv2d
    python tests/benchmarks/bench.py --memory           peak memory over inputs and outputs
    python tests/benchmarks/bench.py --scaling          time per pixel, and one thread against two
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # for oracle.py

import ml_dtypes
import numpy as np
from implementations import (
    BY_NAME,
    GRADIENTS,
    IMPLEMENTATIONS,
    Floor,
    Ours,
    Portable,
    UnsupportedError,
)
from oracle import assert_close, rounding_bound
from workloads import MEMORY, SCALING_SIZES, WORKLOADS, Workload, scaling_workload

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
MODES = ("forward", "step")
BLOCK_SECONDS = 0.15  # what an implementation gets at its turn, if one call takes less
SLOW_SECONDS = 10  # after which, and three rounds, an implementation gets no more turns


def main() -> None:
    arguments = parse_arguments()
    start_tensorflow(arguments.threads)
    if arguments.device == "gpu":
        use_the_gpu()
    if arguments.peak:
        print(json.dumps(peak_bytes(arguments.peak, arguments)))
        return
    report: dict[str, Any] = {"environment": environment(arguments)}
    print_environment(report["environment"])
    if arguments.memory:
        report["memory"] = memory(arguments)
    elif arguments.scaling:
        report["scaling"] = scaling(arguments)
    else:
        report["results"] = compare(arguments)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=names)
    parser.add_argument("--only", type=lambda text: text.split(","), help="implementations")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what --memory runs in fresh processes
    arguments = parser.parse_args()
    for name in arguments.shapes:
        if name not in names:
            parser.error(f"--shapes: {name} is none of {', '.join(names)}")
    for name in arguments.only or []:
        if name not in BY_NAME:
            parser.error(f"--only: {name} is none of {', '.join(BY_NAME)}")
    for mode in arguments.modes:
        if mode not in MODES:
            parser.error(f"--modes: {mode} is none of {', '.join(MODES)}")
    if arguments.device == "gpu" and (arguments.memory or arguments.scaling):
        parser.error("--memory and --scaling are for --device cpu")
    return arguments


def start_tensorflow(threads: int) -> None:
    with contextlib.suppress(ImportError):
        import torchvision  # noqa: F401  (imported after TensorFlow, its LLVM crashes)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")  # every shape has functions of its own: retracing is meant


def use_the_gpu() -> None:
    """Ends the run where the op would not run on a GPU; otherwise nothing runs elsewhere."""
    import tensorflow as tf

    import tf_mdcn

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        sys.exit("--device gpu: TensorFlow sees no GPU")
    if tf_mdcn.build_info()["cuda"] is None:
        sys.exit("--device gpu: tf_mdcn was built without CUDA")
    tf.config.set_soft_device_placement(False)
    # PyTorch has its products in float32; the comparison is of like with like.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    for gpu in gpus:  # or TensorFlow takes all memory, and PyTorch finds none
        tf.config.experimental.set_memory_growth(gpu, True)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    import tf_mdcn

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{model or platform.processor()}, {os.cpu_count()} CPUs, {platform.machine()}",
        "device": device_name(arguments.device),
        "instruction_set": tf_mdcn.build_info()["cpu_instruction_set"],
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "load_average": os.getloadavg()[0],
        "versions": {kind.package: kind.version() for kind in IMPLEMENTATIONS if kind.version()},
    }


def device_name(device: str) -> str:
    if device == "cpu":
        return "CPU"
    import tensorflow as tf

    import tf_mdcn

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    build = tf.sysconfig.get_build_info()
    return (
        f"{details.get('device_name')}, without TensorFloat-32; kernels of CUDA "
        f"{tf_mdcn.build_info()['cuda']}, TensorFlow of CUDA {build.get('cuda_version')} and "
        f"cuDNN {build.get('cudnn_version')}"
    )


def print_environment(information: dict[str, Any]) -> None:
    for key, value in information.items():
        if key == "versions":
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        print(f"{key}: {value}")
    print(flush=True)


# ---- Side by side ----


def prepare(workload: Workload, arguments: argparse.Namespace) -> dict[str, Any]:
    """The implementations that are installed and can do this, on the same tensors."""
    case, output_gradient = workload.tensors(DTYPES[arguments.dtype])
    chosen = (
        [BY_NAME[name] for name in arguments.only]
        if arguments.only
        else [kind for kind in IMPLEMENTATIONS if kind.version()]
    )
    prepared = {}
    for kind in chosen:
        try:
            prepared[kind.name] = kind(case, output_gradient, arguments.threads, arguments.device)
        except UnsupportedError as reason:
            print(f"{workload.name}: without {kind.name}: {reason}")
    return prepared


def verify(workload: Workload, arguments: argparse.Namespace) -> None:
    """Ends the run unless the implementations agree, within what rounding explains of each.

    The floor is compared with ours at offset 0 and mask 1, where they are the same function. Where
    no peer has gradients, ours are compared with those of the portable implementation.
    """
    case, output_gradient = workload.tensors(DTYPES[arguments.dtype])
    common = (output_gradient, arguments.threads, arguments.device)
    prepared = prepare(workload, arguments)
    if Ours.name not in prepared:
        return
    ours = prepared[Ours.name]
    output = ours.numpy(ours.forward(), "output")

    def check(expected: np.ndarray, actual: np.ndarray, what: str) -> None:
        bound = 2 * rounding_bound(case, expected, case.inputs.dtype)
        assert_close(actual, expected, bound, f"{workload.name}: {what}")

    peers = {k: v for k, v in prepared.items() if k not in (Ours.name, Floor.name)}
    for name, peer in peers.items():
        check(peer.numpy(peer.forward(), "output"), output, f"output of {name}")
    if "step" in arguments.modes:
        steps = {}
        for name, peer in peers.items():
            try:
                steps[name] = (peer, peer.step())
            except UnsupportedError:
                continue
        if not steps:
            peer = Portable(case, *common)
            steps[Portable.name] = (peer, peer.step())
        mine = ours.step()
        for name, (peer, theirs) in steps.items():
            for index, tensor in enumerate(("output", *GRADIENTS)):
                check(
                    peer.numpy(theirs[index], tensor),
                    ours.numpy(mine[index], tensor),
                    f"{tensor} in the step of {name}",
                )
    plain = case.replace(offset=np.zeros_like(case.offset), mask=np.ones_like(case.mask))
    floor, same = Floor(plain, *common), Ours(plain, *common)
    expected = floor.numpy(floor.forward(), "output")
    check(expected, same.numpy(same.forward(), "output"), "tf.nn.conv2d at offset 0")


def call_time(implementation: Any, mode: str, calls: int = 1) -> float:
    """Seconds for a call; the mean of several, of which none waits for the one before."""
    operation = getattr(implementation, mode)
    implementation.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        operation()
    implementation.synchronize()
    return (time.perf_counter() - start) / calls


def measure(
    prepared: dict[str, Any], mode: str, rounds: int, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of the calls, by implementation: in turns, so that what the machine does besides hits
    all of them. At its turn each first runs untimed, so as to find the caches as it leaves them.

    On a GPU calls are queued, as in training, so that the time to start one hides behind another.
    """
    counts = {}
    for name, implementation in prepared.items():
        try:
            once = min(call_time(implementation, mode) for _ in range(2))  # the first one traces
        except UnsupportedError:
            continue
        counts[name] = max(1, math.ceil(BLOCK_SECONDS / once))
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(rounds):
        for name, count in counts.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > SLOW_SECONDS:
                continue
            if count > 1:  # a call as long as a whole turn warms itself up
                call_time(prepared[name], mode)
            if queued:
                seconds[name].append(call_time(prepared[name], mode, count))
                continue
            # A round counts once, however many calls it had.
            times = [call_time(prepared[name], mode) for _ in range(count)]
            seconds[name].append(statistics.median(times))
    return seconds


def summary(workload: Workload, mode: str, dtype: str, seconds: list[float]) -> dict[str, float]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    flops = workload.forward_flops * (3 if mode == "step" else 1)
    touched_bytes = workload.forward_bytes(np.dtype(DTYPES[dtype]).itemsize)
    result = {
        "median_ms": 1e3 * median,
        "spread": (quartiles[2] - quartiles[0]) / median,
        "gflops": flops / median / 1e9,
    }
    if mode == "forward":
        result["gbytes_per_second"] = touched_bytes / median / 1e9
    return result


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    chosen = [workload for workload in WORKLOADS if workload.name in arguments.shapes]
    results = []
    for workload in chosen:
        verify(workload, arguments)
        prepared = prepare(workload, arguments)
        for mode in arguments.modes:
            queued = arguments.device == "gpu"
            row = {
                name: summary(workload, mode, arguments.dtype, seconds)
                for name, seconds in measure(prepared, mode, arguments.rounds, queued).items()
            }
            floor = row.get(Floor.name)
            for cell in row.values():
                if floor:
                    cell["times_the_floor"] = cell["median_ms"] / floor["median_ms"]
            results.append({"shape": workload.title, "mode": mode, "implementations": row})
            print_details(results[-1])
    for mode in arguments.modes:
        print_table(mode, [result for result in results if result["mode"] == mode])
    return results


def print_details(result: dict[str, Any]) -> None:
    print(f"{result['shape']} ({result['mode']})")
    for name, cell in result["implementations"].items():
        text = f"  {name:13} {cell['median_ms']:9.2f} ms, spread {cell['spread']:4.0%}"
        text += f", {cell['gflops']:7.1f} GFLOP/s"
        if "gbytes_per_second" in cell:
            text += f", {cell['gbytes_per_second']:5.1f} GB/s"
        if "times_the_floor" in cell:
            text += f", {1 / cell['times_the_floor']:4.0%} of the floor's speed"
        print(text, flush=True)


def print_table(mode: str, results: list[dict[str, Any]]) -> None:
    """A Markdown table of medians in ms, with the ratio to the floor in brackets."""
    names = list(dict.fromkeys(name for result in results for name in result["implementations"]))
    title = "forward" if mode == "forward" else "forward + all gradients"
    rows = [[title, *names]]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for result in results:
        row = [result["shape"]]
        for name in names:
            cell = result["implementations"].get(name)
            if cell is None:
                row.append("none")
                continue
            ratio = cell.get("times_the_floor")
            text = f"{cell['median_ms']:.2f}"
            if ratio is not None and name != Floor.name:
                text += f" ({ratio:.2f}x)"
            if ratio is not None:
                ratios[name].append(ratio)
            row.append(text)
        rows.append(row)
    means = [f"{geometric_mean(ratios[name]):.2f}x" if ratios[name] else "" for name in names]
    rows.append(["geometric mean", *means])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for index, row in enumerate(rows):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(statistics.mean(map(math.log, ratios)))


# ---- Fresh processes: memory, threads ----


def run_again(*options: str) -> str:
    """What this program prints when it is run with other options."""
    result = subprocess.run(
        [sys.executable, __file__, *options],
        # Large blocks go back to the system when they are freed: --memory counts none twice.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout


def status_bytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def peak_bytes(what: str, arguments: argparse.Namespace) -> dict[str, int] | None:
    """Of one call: the peak of resident memory, less what was there before and what it returns."""
    name, mode = what.split(":")
    kind = BY_NAME[name]
    common = (arguments.threads, arguments.device)
    dtype = DTYPES[arguments.dtype]
    try:
        warm_up = kind(*scaling_workload((8, 8)).tensors(dtype), *common)
        getattr(warm_up, mode)()  # traces, loads, starts threads
        implementation = kind(*MEMORY.tensors(dtype), *common)
        call = getattr(implementation, mode)
    except UnsupportedError:
        return None
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    result = call()
    implementation.synchronize()
    peak = status_bytes("VmHWM")
    tensors = result if isinstance(result, list) else [result]
    names = ("output", *GRADIENTS)[: len(tensors)]
    itemsize = np.dtype(dtype).itemsize
    returned = sum(
        implementation.numpy(tensor, name).size * itemsize
        for tensor, name in zip(tensors, names, strict=True)
    )
    return {"returned_bytes": returned, "over_bytes": peak - before - returned}


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"{MEMORY.title}: peak memory over inputs and outputs, each in a fresh process")
    names = arguments.only or [kind.name for kind in IMPLEMENTATIONS if kind.version()]
    results = []
    for name in names:
        for mode in arguments.modes:
            options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
            peak = json.loads(run_again("--peak", f"{name}:{mode}", *options))
            if peak is None:
                continue
            results.append({"implementation": name, "mode": mode, **peak})
            over, returned = (peak[key] / 2**20 for key in ("over_bytes", "returned_bytes"))
            print(
                f"  {name:13} {mode:8} {over:8.1f} MiB beside {returned:.1f} MiB returned",
                flush=True,
            )
    return results


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    print("Time per output pixel, 32 -> 32 channels")
    pixels = []
    for size in SCALING_SIZES:
        workload = scaling_workload(size)
        case, output_gradient = workload.tensors(DTYPES[arguments.dtype])
        ours = Ours(case, output_gradient, arguments.threads, arguments.device)
        row = {"size": list(size)}
        for mode in arguments.modes:
            (seconds,) = measure({Ours.name: ours}, mode, arguments.rounds).values()
            row[f"{mode}_ns_per_pixel"] = 1e9 * statistics.median(seconds) / math.prod(size)
        pixels.append(row)
        cells = (f"{mode} {row[f'{mode}_ns_per_pixel']:8.1f} ns" for mode in arguments.modes)
        print(f"  {size[0]:4} x {size[1]:4}: {', '.join(cells)}", flush=True)

    print("One thread against two, in fresh processes")
    times: dict[tuple[str, str], list[float]] = {}
    for threads in (1, 2):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            options = ["--threads", str(threads), "--dtype", arguments.dtype, "--json", file.name]
            options += ["--shapes", "A,B,C,small", "--only", Ours.name]
            run_again(*options, "--rounds", str(arguments.rounds))
            for result in json.loads(pathlib.Path(file.name).read_text())["results"]:
                median = result["implementations"][Ours.name]["median_ms"]
                times.setdefault((result["shape"], result["mode"]), []).append(median)
    speedups = []
    for (shape, mode), (one, two) in times.items():
        speedups.append({"shape": shape, "mode": mode, "one_ms": one, "two_ms": two})
        print(f"  {shape} ({mode}): {one:.2f} -> {two:.2f} ms, {one / two:.2f}x")
    return {"pixels": pixels, "threads": speedups}


if __name__ == "__main__":
    main()
