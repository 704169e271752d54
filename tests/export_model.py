"""The model that the tests of exports and of serving share, its inputs, and what rounding explains.

Separate because every road out of Python is tested on the same model: strides, groups, deformable
groups, mask_scale, max_offset, dilation, asymmetric padding, a layer without mask and bias, two
outputs, and offsets that reach beyond the border.
"""

import keras
import numpy as np

from tf_mdcn import ModulatedDeformConv2D

SIZE = (33, 41)
LAYERS = 3
OUTPUTS = ("logits", "features")
EPSILON = 2.0**-23


def make_model(height=SIZE[0], width=SIZE[1]):
    """A model of images `[batch, height, width, 4]`, with trained-looking offsets."""
    keras.utils.set_random_seed(0)
    branch = {
        "offset_kernel_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=1),
        "offset_bias_initializer": keras.initializers.RandomNormal(stddev=1.5, seed=2),
    }
    normal = keras.initializers.RandomNormal(stddev=0.5, seed=3)
    image = keras.Input((height, width, 4), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    x = ModulatedDeformConv2D(
        12,
        3,
        strides=2,
        padding="same",
        groups=2,
        deformable_groups=4,
        activation="relu",
        bias_initializer=normal,
        mask_scale=2.0,
        max_offset=6.0,
        name="first",
        **branch,
    )(x)
    x = ModulatedDeformConv2D(
        8,
        (3, 2),
        padding=((1, 0), (2, 1)),
        dilation_rate=(2, 1),
        use_bias=False,
        modulated=False,
        name="second",
        **branch,
    )(x)
    x = keras.layers.BatchNormalization(beta_initializer=normal)(x)
    features = ModulatedDeformConv2D(
        8,
        3,
        strides=(2, 1),
        padding=1,
        groups=2,
        deformable_groups=2,
        bias_initializer=normal,
        name="features",
        **branch,
    )(x)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    logits = keras.layers.Dense(5, bias_initializer=normal, name="logits")(pooled)
    return keras.Model(image, [logits, features], name="deformable")


def make_images(batch, height=SIZE[0], width=SIZE[1], seed=0):
    return np.random.default_rng(seed).normal(size=(batch, height, width, 4)).astype("float32")


def expected_outputs(model, images):
    """The model's own outputs by name."""
    return dict(zip(OUTPUTS, (x.numpy() for x in model(images)), strict=True))


def rounding_bound(expected, images, epsilon=EPSILON):
    """What rounding explains in a float32 output of the model, for `oracle.assert_close`.

    A position is rounded relative to the size of the image, and the sample moves with it by the
    slope of the image, which is about its values; every deformable layer adds as much. c = 2.
    """
    return 2 * LAYERS * max(images.shape[1:3]) * epsilon * float(np.max(np.abs(expected)))
