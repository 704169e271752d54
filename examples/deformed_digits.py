"""Deformable against plain convolutions on deformed handwritten digits, from training to serving.

The digits that scikit-learn ships are placed on a larger canvas, rotated, scaled and sheared at
random. Small networks learn to read them: one of plain convolutions, the same with
ModulatedDeformConv2D in its last two stages, and one of plain convolutions that is widened to at
least as many parameters. Data, schedule and seeds are the same for all of them.

    python examples/deformed_digits.py [folder]

prints a table of test accuracies, and leaves in the folder a picture of where the deformable
network samples and the network itself as a SavedModel, which a fresh process then loads and serves.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
from matplotlib.figure import Figure
from scipy import ndimage

import tf_mdcn
from tf_mdcn.visualize import plot_sampling

CANVAS = 28
ROTATION_DEGREES = 45.0
SCALE = (1.0, 2.2)
SHEAR = 0.4
TRAIN_IMAGES = 4000
TEST_PLACEMENTS = 4
EPOCHS = 8
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
# (late width, deformable). 79 is the least width at which the plain network has as many
# parameters as the deformable one.
NETWORKS = {
    "plain": (64, False),
    "plain, widened": (79, False),
    "deformable": (64, True),
}


def place(digits, rng):
    """Puts 8x8 digits on the canvas, each deformed at random and wholly visible."""
    images = np.zeros((len(digits), CANVAS, CANVAS, 1), "float32")
    for image, digit in zip(images, digits, strict=True):
        angle = np.radians(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
        scale = np.exp(rng.uniform(*np.log(SCALE)))
        cosine, sine, shear = np.cos(angle), np.sin(angle), rng.uniform(-SHEAR, SHEAR)
        forward = scale * np.array([[cosine, -sine], [sine, cosine]]) @ [[1, shear], [0, 1]]
        half = np.minimum(np.abs(forward).sum(axis=1) * 4, CANVAS / 2)
        center = rng.uniform(half, CANVAS - half) - 0.5
        backward = np.linalg.inv(forward)
        image[..., 0] = ndimage.affine_transform(
            digit, backward, offset=3.5 - backward @ center, output_shape=image.shape[:2], order=1
        )
    return images


def split_digits():
    """Training and test digits with their labels: no digit is in both."""
    digits = sklearn.datasets.load_digits()
    images = digits.images.astype("float32") / 16
    return sklearn.model_selection.train_test_split(
        images, digits.target, test_size=1 / 3, stratify=digits.target, random_state=0
    )


def build(late_width, deformable):
    def stage(x, filters, strides, deformable, name):
        arguments = {"strides": strides, "padding": "same", "use_bias": False, "name": name}
        if deformable:
            # mask_scale=2 starts as exactly the plain convolution. The paper's 0.1 times the
            # learning rate would change nothing under Adam, which divides it out again.
            x = tf_mdcn.ModulatedDeformConv2D(filters, 3, mask_scale=2.0, **arguments)(x)
        else:
            x = keras.layers.Conv2D(filters, 3, **arguments)(x)
        return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))

    inputs = keras.Input((CANVAS, CANVAS, 1))
    x = stage(inputs, 16, 1, False, "stage1")
    x = stage(x, 32, 2, False, "stage2")
    x = stage(x, late_width, 2, deformable, "stage3")
    x = stage(x, late_width, 1, deformable, "stage4")
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def train(model, images, labels):
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - WARMUP_STEPS, warmup_target=LEARNING_RATE, warmup_steps=WARMUP_STEPS
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=BATCH_SIZE, epochs=EPOCHS)


def draw(model, images, axes):
    """Where stage 4 samples for the output position at the middle of each digit."""
    layer = model.get_layer("stage4")
    features = keras.Model(model.inputs, layer.input)(images)
    rows, columns = np.indices(images.shape[1:3])
    for index, (image, ax) in enumerate(zip(images[..., 0], axes, strict=True)):
        middle = np.array([np.average(rows, weights=image), np.average(columns, weights=image)])
        position = (middle + 0.5) * features.shape[1] / CANVAS
        plot_sampling(layer, features, position.astype(int), image=image, sample=index, ax=ax)
        limits = {"xlim": (-5, CANVAS + 4), "ylim": (CANVAS + 4, -5)}
        ax.set(xticks=[], yticks=[], facecolor="black", **limits)


def serve(model_path, images_path, predictions_path):
    """What a server does: importing tf_mdcn has brought the op, the SavedModel has the rest."""
    served = tf.saved_model.load(model_path)
    np.save(predictions_path, served.serve(np.load(images_path)))


def serve_in_a_fresh_process(model, images, folder):
    """Exports, serves and compares; returns the largest difference between logits."""
    exported, sent, received = (folder / n for n in ("saved_model", "sent.npy", "received.npy"))
    model.export(exported, verbose=False)
    np.save(sent, images)
    command = [sys.executable, __file__, "--serve", exported, sent, received]
    subprocess.run([str(part) for part in command], check=True)
    served, expected = np.load(received), model.predict(images, verbose=0)
    difference = np.abs(served - expected).max()
    if difference > 1e-4 * np.abs(expected).max():
        raise SystemExit(f"The served logits are wrong: they differ by {difference}.")
    return difference


def print_table(parameters, accuracies):
    seeds = range(len(next(iter(accuracies.values()))))
    headings = ["network", "parameters", *(f"seed {s}" for s in seeds), "mean", "spread"]
    print(f"\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name, values in accuracies.items():
        numbers = [*values, np.mean(values), np.ptp(values)]
        cells = [name, f"{parameters[name]:,}", *(f"{100 * number:.1f}%" for number in numbers)]
        print(f"| {' | '.join(cells)} |")
    best_plain = max(np.mean(accuracies[name]) for name in ("plain", "plain, widened"))
    lead = 100 * (np.mean(accuracies["deformable"]) - best_plain)
    verdict = "wins" if lead > 0 else "does NOT win"
    print(f"\nThe deformable network {verdict}: {lead:+.1f} points over the better plain one.")


def main(folder, seeds):
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    train_digits, test_digits, train_labels, test_labels = split_digits()
    test_images = place(np.repeat(test_digits, TEST_PLACEMENTS, 0), np.random.default_rng(1000))
    test_labels = np.repeat(test_labels, TEST_PLACEMENTS)
    shown = [np.flatnonzero(test_labels == digit)[digit] for digit in (2, 3, 4, 5, 8)]
    print(
        f"{TRAIN_IMAGES} training images of {len(train_digits)} digits and {len(test_images)} test "
        f"images of {len(test_digits)} others on {CANVAS}x{CANVAS} pixels; rotated by up to "
        f"{ROTATION_DEGREES:g} degrees, scaled {SCALE[0]:g} to {SCALE[1]:g} times, sheared by up "
        f"to {SHEAR:g}.\n{EPOCHS} epochs of Adam, batches of {BATCH_SIZE}, learning rate "
        f"{LEARNING_RATE:g} with {WARMUP_STEPS} steps of warm-up, then cosine decay."
    )

    parameters, accuracies = {}, {name: [] for name in NETWORKS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        chosen = rng.integers(0, len(train_digits), TRAIN_IMAGES)
        images, labels = place(train_digits[chosen], rng), train_labels[chosen]
        for name, (late_width, deformable) in NETWORKS.items():
            print(f"\nseed {seed}, {name}")
            keras.utils.set_random_seed(seed)
            model = build(late_width, deformable)
            figure = None
            if deformable and seed == 0:
                figure = Figure(figsize=(2.2 * len(shown), 4.6))
                axes = figure.subplots(2, len(shown))
                draw(model, test_images[shown], axes[0])
            train(model, images, labels)
            _, accuracy = model.evaluate(test_images, test_labels, batch_size=256, verbose=0)
            parameters[name] = model.count_params()
            accuracies[name].append(accuracy)
            print(f"test accuracy {accuracy:.4f}")
            if figure is not None:
                draw(model, test_images[shown], axes[1])
                axes[0, 0].set_ylabel("before training")
                axes[1, 0].set_ylabel("after training")
                figure.tight_layout()
                figure.savefig(folder / "sampling.png", dpi=120)
                served_model = model

    print_table(parameters, accuracies)
    difference = serve_in_a_fresh_process(served_model, test_images[:64], folder)
    print(
        f"Served from a fresh process: 64 predictions as trained, logits within {difference:.1e}.\n"
        f"Picture: {folder / 'sampling.png'}; SavedModel: {folder / 'saved_model'}.\n"
        f"{time.perf_counter() - started:.0f} seconds."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default="deformed_digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--serve", nargs=3, metavar=("MODEL", "IMAGES", "PREDICTIONS"), help="load and predict"
    )
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
    else:
        main(options.folder, options.seeds)
