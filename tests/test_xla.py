"""The ops under XLA: compiled functions and models against the same ops uncompiled.

Separate from the tests of the ops: what is compared here is how they are reached, bit for bit.
"""

import hashlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_mdcn
from tf_mdcn import _library, ops

# Not where the library is merely missing: there it should have been built.
pytestmark = pytest.mark.skipif(
    [int(part) for part in tf.__version__.split(".")[:2]] < [2, 20],
    reason="the headers of this TensorFlow do not let the library be built",
)

_TYPES = [
    ("float32", "float32"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
]
_BATCH, _HEIGHT, _WIDTH, _CHANNELS, _FEATURES = 3, 9, 11, 12, 18
_ARGUMENTS = {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "dilations": (1, 2)}


def _tensors(
    dtype="float32",
    offset_dtype="float32",
    data_format="channels_last",
    groups=1,
    deformable_groups=1,
    with_mask=True,
    with_bias=True,
    batch=_BATCH,
    scale=1.0,
    seed=0,
):
    """The tensors of one call, `None` for those it does not have, and its keywords."""
    rng = np.random.default_rng(seed)
    out_height, out_width = (_HEIGHT + 1 - 3) // 2 + 1, _WIDTH + 3 - 2

    def image(channels, height=out_height, width=out_width):
        values = rng.normal(size=(batch, height, width, channels))
        return values if data_format == "channels_last" else np.moveaxis(values, -1, 1)

    inputs = image(_CHANNELS, _HEIGHT, _WIDTH) * scale
    filters = rng.normal(size=(3, 2, _CHANNELS // groups, _FEATURES)) * scale
    offset, mask = 2 * image(deformable_groups * 12), image(deformable_groups * 6)
    bias = rng.normal(size=_FEATURES) * scale
    tensors = [
        tf.constant(inputs, dtype),
        tf.constant(filters, dtype),
        tf.constant(offset, offset_dtype),
        tf.constant(mask, offset_dtype) if with_mask else None,
        tf.constant(bias, dtype) if with_bias else None,
    ]
    arguments = {
        **_ARGUMENTS,
        "data_format": data_format,
        "groups": groups,
        "deformable_groups": deformable_groups,
    }
    return tensors, arguments


def _output_and_gradients(tensors, arguments, jit_compile):
    output = tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
    rng = np.random.default_rng(1)
    output_gradient = tf.constant(rng.normal(size=output.shape), output.dtype)

    @tf.function(jit_compile=jit_compile)
    def run(tensors, output_gradient):
        sources = [tensor for tensor in tensors if tensor is not None]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            output = tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
        return [output, *tape.gradient(output, sources, output_gradients=output_gradient)]

    return run(tensors, output_gradient)


def _assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        differ = a.view(np.uint8) != b.view(np.uint8)
        assert not differ.any(), f"result {i}: {differ.sum()} of {differ.size} bytes differ"


def _hlo(function, *arguments, stage="hlo"):
    return function.experimental_get_compiler_ir(*arguments)(stage=stage)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("dtype", "offset_dtype"), _TYPES)
@pytest.mark.parametrize(
    ("groups", "deformable_groups", "with_mask", "with_bias"),
    [(1, 1, True, True), (2, 3, False, True), (3, 2, True, False), (1, 4, False, False)],
)
def test_same_bits_as_uncompiled(
    dtype, offset_dtype, data_format, groups, deformable_groups, with_mask, with_bias
):
    call = _tensors(
        dtype, offset_dtype, data_format, groups, deformable_groups, with_mask, with_bias
    )
    compiled = _output_and_gradients(*call, jit_compile=True)
    _assert_same_bits(compiled, _output_and_gradients(*call, jit_compile=False))
    assert np.asarray(compiled[0]).astype("float64").std() > 1


def test_same_bits_with_subnormal_products():
    call = _tensors(scale=1e-20, with_bias=False)
    compiled = _output_and_gradients(*call, jit_compile=True)
    _assert_same_bits(compiled, _output_and_gradients(*call, jit_compile=False))
    assert not np.asarray(compiled[0]).any()  # as TensorFlow's ops, flushed to zero
    assert np.asarray(compiled[1]).any()


def test_same_bits_at_special_offsets():
    (inputs, filters, offset, mask, bias), arguments = _tensors()
    values = np.array(offset)
    flat = values.reshape(-1)
    flat[::7], flat[1::31], flat[2::37], flat[3::41] = 0.0, np.nan, np.inf, -1e30
    call = [inputs, filters, tf.constant(values), mask, bias], arguments
    compiled = _output_and_gradients(*call, jit_compile=True)
    _assert_same_bits(compiled, _output_and_gradients(*call, jit_compile=False))


def test_empty_batch():
    call = _tensors(batch=0)
    compiled = _output_and_gradients(*call, jit_compile=True)
    _assert_same_bits(compiled, _output_and_gradients(*call, jit_compile=False))
    assert not np.asarray(compiled[2]).any()


def test_the_native_kernels_are_what_runs():
    tensors, arguments = _tensors()

    @tf.function(jit_compile=True)
    def forward(*tensors):
        return tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)

    assert 'custom_call_target="tf_mdcn.forward"' in _hlo(forward, *tensors)


def test_an_unused_gradient_is_pruned():
    tensors, arguments = _tensors()

    @tf.function(jit_compile=True)
    def gradient_of_filters(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors[1])
            output = tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
        return tape.gradient(output, tensors[1])

    hlo = _hlo(gradient_of_filters, *tensors, stage="optimized_hlo")
    assert "tf_mdcn.filter_gradient" in hlo
    assert "tf_mdcn.input_gradient" not in hlo


def test_inside_a_larger_function():
    """Around it only what is exact: transpositions, which invite other layouts, and signs."""
    tensors, arguments = _tensors()

    def run(inputs, filters, offset, mask, bias):
        inputs = tf.transpose(tf.concat([inputs, -inputs], axis=0), (0, 2, 1, 3))[:, ::-1]
        inputs = tf.transpose(inputs, (0, 2, 1, 3))
        offset, mask = tf.tile(offset, (2, 1, 1, 1)), tf.tile(mask, (2, 1, 1, 1))
        filters = tf.transpose(tf.reverse(filters, (3,)), (1, 0, 2, 3))
        filters = tf.transpose(filters, (1, 0, 2, 3))
        outputs = tf_mdcn.modulated_deform_conv2d(inputs, filters, offset, mask, bias, **arguments)
        return [tf.transpose(tf.nn.relu(outputs), (0, 3, 1, 2)), -outputs[1]]

    compiled = tf.function(run, jit_compile=True)(*tensors)
    _assert_same_bits(compiled, tf.function(run)(*tensors))


def test_unknown_shapes():
    _, arguments = _tensors()

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec(None)] * 5)
    def run(*tensors):
        return tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)

    for batch in (1, 2):
        tensors, _ = _tensors(batch=batch)
        expected = tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
        _assert_same_bits([run(*tensors)], [expected])


def test_wrong_shapes_are_refused_in_the_house_form():
    tensors, arguments = _tensors()

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec(None)] * 5)
    def run(*tensors):
        return tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)

    tensors[2] = tensors[2][..., :10]
    rule = r"ModulatedDeformConv2D: offset must have shape .* = \[3, 4, 12, 12\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=rule + r"; received \[3, 4, 12, 10\]"):
        run(*tensors)


def test_a_wrong_output_gradient_is_refused():
    (inputs, filters, offset, mask, _), _ = _tensors()
    native = _library.load()

    @tf.function(jit_compile=True)
    def run(output_gradient):
        return native.mdcn_modulated_deform_conv2d_backprop_input(
            inputs=inputs,
            filters=filters,
            offset=offset,
            mask=[mask],
            out_backprop=output_gradient,
            strides=(2, 1),
            padding="EXPLICIT",
            explicit_paddings=(1, 0, 2, 1),
            dilations=(1, 2),
        )

    message = (
        r"BackpropInput: out_backprop must have .* \[3, 4, 12, 18\]; received \[3, 4, 12, 17\]"
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(tf.zeros([3, 4, 12, 17]))


def test_dynamic_shapes_are_refused():
    tensors, arguments = _tensors()

    @tf.function(jit_compile=True)
    def run(keep, inputs, filters, offset, mask, bias):
        inputs, offset, mask = (tf.boolean_mask(x, keep) for x in (inputs, offset, mask))
        return tf_mdcn.modulated_deform_conv2d(inputs, filters, offset, mask, bias, **arguments)

    with pytest.raises(tf.errors.OpError, match="inputs must have a static shape under XLA"):
        run(tf.constant([True, False, True]), *tensors)


def test_second_derivatives():
    tensors, arguments = _tensors("float64", "float64", groups=2, deformable_groups=3)

    def run(*tensors):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                output = tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
                loss = tf.reduce_sum(tf.sin(output))
            penalty = sum(tf.reduce_sum(g**2) for g in inner.gradient(loss, tensors))
        return outer.gradient(penalty, tensors)

    compiled = tf.function(run, jit_compile=True)(*tensors)
    for actual, expected in zip(compiled, tf.function(run)(*tensors), strict=True):
        # Sums of at most 10,000 terms of the size of the largest element.
        bound = 1e4 * np.finfo(np.float64).eps * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def _model(jit_compile):
    keras.utils.set_random_seed(5)
    layers = [
        keras.Input((10, 12, 3)),
        keras.layers.Conv2D(8, 3, activation="relu", dtype="float64"),
        tf_mdcn.ModulatedDeformConv2D(
            12,
            3,
            groups=2,
            deformable_groups=4,
            offset_kernel_initializer="he_normal",
            dtype="float64",
        ),
        keras.layers.Activation("relu", dtype="float64"),
        keras.layers.GlobalAveragePooling2D(dtype="float64"),
        keras.layers.Dense(2, dtype="float64"),
    ]
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


def test_a_compiled_model_trains_as_an_uncompiled_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 10, 12, 3)), rng.normal(size=(8, 2))
    models = [_model(jit_compile) for jit_compile in (True, False)]
    initial = models[0].get_weights()
    losses = [
        model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]
        for model in models
    ]
    assert models[0].jit_compile and not models[1].jit_compile
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)  # reported in float32
    assert losses[0][-1] < losses[0][0]
    # Six steps, each adding to a rounding error of a few thousand terms.
    for actual, expected, before in zip(
        models[0].get_weights(), models[1].get_weights(), initial, strict=True
    ):
        assert np.abs(actual - before).max() > 1e-6
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(models[0].predict(x, verbose=0), models[1](x), atol=1e-6)


def test_the_library_is_loaded():
    information = tf_mdcn.build_info()
    assert (information["xla"], information["xla_error"]) == (True, None)


def test_supports_jit(monkeypatch):
    layer = tf_mdcn.ModulatedDeformConv2D(4, 3)
    assert ops.supports_jit() and layer.supports_jit

    class Gpu:
        device_type = "GPU"

    devices = [*tf.config.get_visible_devices(), Gpu()]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: devices)
    assert not ops.supports_jit() and not layer.supports_jit
    with tf_mdcn.use_implementation("portable"):
        assert ops.supports_jit() and layer.supports_jit


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(_library, "_XLA_LIBRARY", "libtf_mdcn_absent.so")
    error = _library.xla_error.__wrapped__()
    assert "libtf_mdcn_absent.so was not built" in error
    monkeypatch.setattr(_library, "_XLA_LIBRARY", "_library.py")
    assert "_library.py" in _library.xla_error.__wrapped__()
    monkeypatch.setattr(ops, "_xla_error", error)
    assert not ops.supports_jit()
    monkeypatch.setattr(ops._library, "xla_error", lambda: error)
    information = tf_mdcn.build_info()
    assert (information["xla"], information["xla_error"]) == (False, error)


def test_keras_chooses_by_the_layer(monkeypatch):
    monkeypatch.setattr(ops, "_xla_error", "not here")
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        assert not _model(jit_compile=True).jit_compile


# ---- In fresh processes: what is decided once in each. ----


def _digest(results):
    digest = hashlib.sha256()
    for result in results:
        digest.update(np.asarray(result).tobytes())
    return digest.hexdigest()


def _side_by_side(jit_compile):
    """Independent convolutions, which XLA may run at the same time on the threads they share."""
    calls = [_tensors(seed=seed, groups=2, deformable_groups=3) for seed in range(4)]

    @tf.function(jit_compile=jit_compile)
    def run(all_tensors):
        return [
            tf_mdcn.modulated_deform_conv2d(*tensors, **arguments)
            for tensors, (_, arguments) in zip(all_tensors, calls, strict=True)
        ]

    for _ in range(20):
        results = run([tensors for tensors, _ in calls])
    return results


def _in_fresh_process(mode, before="", **environment):
    """What this file prints when it is run in that mode, after the code `before`."""
    run = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", f"{before}\n{run}", mode]
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


# Enough for all threads to work at once.
_MANY = 100


def _expected_digest():
    results = _output_and_gradients(*_tensors(batch=_MANY), jit_compile=False)
    return _digest([*results, *_side_by_side(jit_compile=False)])


@pytest.mark.parametrize("threads", ["1", "5"])
def test_any_number_of_threads_gives_the_same_bits(threads):
    assert _in_fresh_process(f"threads={threads}") == _expected_digest()


def test_loaded_after_xla_was_used():
    """TensorFlow registers what XLA compiles at its first use, and not again by itself."""
    before = "import tensorflow as tf; tf.function(lambda x: x + 1, jit_compile=True)(1.0)"
    assert _in_fresh_process("late", before) == _expected_digest()


def test_clusters_that_tensorflow_forms():
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"
    assert _in_fresh_process("clusters", TF_XLA_FLAGS=flags) == _expected_digest()


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode.startswith("threads="):
        tf.config.threading.set_intra_op_parallelism_threads(int(mode.split("=")[1]))
    jit_compile = None if mode == "clusters" else True
    results = _output_and_gradients(*_tensors(batch=_MANY), jit_compile=jit_compile)
    print(_digest([*results, *_side_by_side(jit_compile)]))
