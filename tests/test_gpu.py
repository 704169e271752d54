"""The op on a GPU against the same op on the CPU, and a Keras layer that trains there.

    pytest -m gpu

Needs a GPU that TensorFlow sees and a build with CUDA, and is skipped without. The variable
TF_MDCN_TEST_DEVICE=CPU:0 runs the same tests there: that checks the tests, not a GPU.
"""

import contextlib
import os
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from native_op import (
    TYPES,
    bound_of,
    random_configuration,
    random_output_gradient,
    with_whole_offsets,
)
from native_op import forward as forward_here
from native_op import gradients as gradients_here
from oracle import Case, assert_close, random_case

from tf_mdcn import ModulatedDeformConv2D, build_info, ops

DEVICE = os.environ.get("TF_MDCN_TEST_DEVICE", "GPU:0")
LAYOUTS = ["channels_last", "channels_first"]


def why_not() -> str | None:
    """Why there is nothing to test; asked without starting TensorFlow's devices."""
    if not DEVICE.startswith("GPU"):
        return None
    if not tf.config.list_physical_devices("GPU"):
        return "TensorFlow sees no GPU"
    if build_info()["cuda"] is None:
        return "tf_mdcn was built without CUDA: TF_MDCN_CUDA=1 pip install . says what is missing"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """TensorFloat-32 has 11 bits: a test of its own."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


@pytest.fixture
def no_other_device():
    """What has no kernel on the device is an error, not moved to another one."""
    before = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(False)
    yield
    tf.config.set_soft_device_placement(before)


def bound_on_gpu(case: Case, expected: np.ndarray, dtype) -> float:
    """`bound_of`, and three more roundings to the type of the inputs.

    On a GPU samples, gradients of samples and, where they are summed, partial products are stored
    in that type too; so even the gradient of a float32 offset has the precision of half inputs.
    """
    norm = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    stored = float(ml_dtypes.finfo(case.inputs.dtype).eps)
    return bound_of(case, expected, dtype) + 3 * 4 * norm * stored


def check(case: Case) -> None:
    """Fails unless the device agrees with the CPU's float64 kernels, forward and all gradients."""
    exact = case.cast(np.float64)
    output_gradient = random_output_gradient(case)
    with tf.device("CPU:0"):
        expected = {"output": forward_here(exact)}
        expected |= gradients_here(exact, output_gradient.astype(np.float64))
    with tf.device(DEVICE):
        actual = {"output": forward_here(case), **gradients_here(case, output_gradient)}
    assert set(actual) == {"output", *case.tensors}
    for name, wanted in expected.items():
        dtype = case.tensors.get(name, case.inputs).dtype
        assert actual[name].dtype == dtype
        assert_close(actual[name], wanted, bound_on_gpu(case, wanted, dtype), name)


def in_layout(case: Case, data_format: str) -> Case:
    return case.channels_first() if data_format == "channels_first" else case


def numpy_dtype(name: str):
    return tf.as_dtype(name).as_numpy_dtype


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize(("dtype", "sampling_dtype"), TYPES)
def test_every_type(dtype, sampling_dtype, data_format):
    """Asymmetric strides, padding, dilations; two groups and three deformable groups."""
    case = with_whole_offsets(random_case(20))
    case = case.cast(numpy_dtype(dtype), numpy_dtype(sampling_dtype))
    check(in_layout(case, data_format))


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("seed", range(30))
def test_random_cases(seed, data_format):
    """A third of them in each of three types; some without mask, some without bias."""
    dtype = ("float32", "float64", "bfloat16")[seed % 3]
    case = with_whole_offsets(random_case(seed, **random_configuration(seed)))
    check(in_layout(case.cast(numpy_dtype(dtype)), data_format))


# In the widest a thread takes 16 bytes of channels at a time.
SHAPES = {
    "one pixel": {
        "batch": 1, "in_size": (1, 1), "kernel_size": (1, 1), "padding": "valid",
        "in_channels": 1, "out_channels": 1, "groups": 1, "deformable_groups": 1,
    },
    "wide": {"in_channels": 96, "out_channels": 64, "groups": 2, "deformable_groups": 3},
    "depthwise": {"in_channels": 6, "out_channels": 12, "groups": 6, "deformable_groups": 2},
    "no mask": {"with_mask": False},
    "no bias": {"with_bias": False},
    "neither": {"with_mask": False, "with_bias": False},
}  # fmt: skip


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, data_format):
    case = random_case(21, **SHAPES[name]).cast(numpy_dtype(dtype))
    check(in_layout(case, data_format))


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_batch(dtype, data_format):
    case = random_case(22).cast(numpy_dtype(dtype))
    empty = {name: case.tensors[name][:0] for name in ("inputs", "offset", "mask")}
    check(in_layout(case.replace(**empty), data_format))


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3, "in_size": (96, 97), "in_channels": 64},
        {"batch": 1, "in_size": (170, 161), "in_channels": 64},
    ],
    ids=["images", "rows"],
)
def test_columns_that_need_several_chunks(changes, data_format):
    """The columns of an image, or of one, are more than the 32 MiB of tuning.h."""
    case = random_case(
        23,
        out_channels=6,
        kernel_size=(3, 3),
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dilations=(1, 1),
        groups=2,
        deformable_groups=1,
        **changes,
    ).cast(np.float32)
    assert case.offset[..., 0].size * 9 * 64 * 4 > 2**25
    check(in_layout(case, data_format))


@pytest.mark.usefixtures("no_other_device")
@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize(("dtype", "sampling_dtype"), TYPES)
def test_offsets_that_are_not_finite(dtype, sampling_dtype, data_format):
    case = random_case(24).cast(numpy_dtype(dtype), numpy_dtype(sampling_dtype))
    offset = case.offset.copy()
    far = min(1e30, float(tf.as_dtype(sampling_dtype).max))
    offset[0, 0, 0, :6] = [np.inf, 0, 0, -np.inf, far, -far]
    offset[1, 1, 2, 3] = np.nan
    check(in_layout(case.replace(offset=offset), data_format))


@pytest.mark.usefixtures("no_other_device")
def test_tensor_float_32_is_the_users_choice():
    """With it float32 products have 11 bits (where the GPU has it), and no fewer."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    case = random_case(25, in_channels=96, out_channels=64).cast(np.float32)
    with tf.device("CPU:0"):
        expected = forward_here(case.cast(np.float64))
    with tf.device(DEVICE):
        actual = forward_here(case)
    # Two rounded factors.
    bound = bound_of(case, expected, np.float32) + 2 * 4 * np.max(np.abs(expected)) * 2.0**-11
    assert_close(actual, expected, bound)


def test_the_op_is_where_its_inputs_are():
    case = random_case(26).cast(np.float32)
    with tf.device(DEVICE):
        tensors = {name: tf.identity(tensor) for name, tensor in case.tensors.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = ops.modulated_deform_conv2d(**tensors, **case.arguments)
    for result in (output, *tape.gradient(output, tensors).values()):
        assert result.device.endswith(f"device:{DEVICE}")


def in_a_fresh_process(script: str) -> str:
    """What a script prints, which sees the device as DEVICE."""
    script = f"import tensorflow as tf\nDEVICE = {DEVICE!r}\n{script}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Many samples meet in each input pixel, so that an order in which they are added shows.
GRADIENTS = """
import tf_mdcn
tf.random.set_seed(1)
with tf.device(DEVICE):
    tensors = [tf.random.stateless_normal(shape, (1, 2)) for shape in (
        (2, 9, 8, 24), (3, 3, 24, 16), (2, 9, 8, 72), (2, 9, 8, 36), (16,))]
    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = tf_mdcn.modulated_deform_conv2d(
                *tensors, padding="same", deformable_groups=4)
        return [output, *tape.gradient(output, tensors, output_gradients=tf.sin(output))]
"""


def test_op_determinism():
    printed = in_a_fresh_process(
        f"""
tf.config.experimental.enable_op_determinism()
tf.config.experimental.enable_tensor_float_32_execution(False)
{GRADIENTS}
    first = [x.numpy().tobytes() for x in gradients()]
    print({{tuple(x.numpy().tobytes() for x in gradients()) == tuple(first) for _ in range(20)}})
"""
    )
    assert printed == "{True}\n"


def test_memory_growth_and_soft_placement():
    printed = in_a_fresh_process(
        f"""
for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)
tf.config.set_soft_device_placement(True)
{GRADIENTS}
on_device = gradients()[0]
with tf.device("GPU:7"):  # that there is not
    elsewhere = tf_mdcn.modulated_deform_conv2d(*tensors, padding="same", deformable_groups=4)
print(on_device.shape == elsewhere.shape and bool(tf.reduce_all(tf.abs(on_device - elsewhere) < 1)))
"""
    )
    assert printed == "True\n"


def small_model() -> keras.Model:
    model = keras.Sequential([keras.Input((16, 16, 3))])
    model.add(ModulatedDeformConv2D(16, 3, padding="same", activation="relu", mask_scale=2.0))
    model.add(ModulatedDeformConv2D(16, 3, strides=2, groups=2, deformable_groups=2))
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(4, dtype="float32"))
    return model


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("strategy", [None, "mirrored"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"], indirect=True)
def test_a_model_trains(policy, strategy):
    """A few steps on four patterns, which any network learns. XLA stays away from a GPU."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    labels = rng.integers(4, size=256)
    images = rng.normal(size=(256, 16, 16, 3)) + rng.normal(size=(4, 1, 1, 3))[labels]
    mirrored = tf.distribute.MirroredStrategy([DEVICE]) if strategy else None
    with mirrored.scope() if mirrored else contextlib.nullcontext():  # where Keras puts it
        model = small_model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile="auto")
        assert not (model.jit_compile and tf.config.list_physical_devices("GPU"))
        offsets_before = model.layers[0].offset_kernel.numpy()
        losses = model.fit(images, labels, batch_size=32, epochs=4, verbose=0).history["loss"]
    if not mirrored:
        assert model.layers[0].kernel.value.device.endswith(f"device:{DEVICE}")
    assert losses[-1] < losses[0] / 2
    assert np.any(model.layers[0].offset_kernel.numpy() != offsets_before)
    assert all(np.all(np.isfinite(weight.numpy())) for weight in model.weights)
