"""The implementations under one interface: the floor (tf.nn.conv2d), ours, and the peers that are
installed. Each gets the tensors in the layout it likes best, before any clock runs.
"""

from __future__ import annotations

import abc
import importlib.metadata

import numpy as np
from oracle import Case

# The gradients of a training step, in order; the floor has none for the last two.
GRADIENTS = ("inputs", "filters", "offset", "mask")


class UnsupportedError(Exception):
    """What this implementation does not do, and why: a gap in the table, not an error."""


class Implementation(abc.ABC):
    """One implementation on one case. `forward` and `step` are what is timed; results stay on the
    device and in the implementation's own layout until `numpy` is asked for them.
    """

    name: str
    package: str

    @abc.abstractmethod
    def __init__(self, case: Case, output_gradient: np.ndarray, threads: int, device: str):
        """Prepares the tensors of the case; raises UnsupportedError for what it cannot do."""

    @abc.abstractmethod
    def forward(self):
        """The output."""

    def step(self):
        """The output and the gradients in the order of GRADIENTS."""
        raise UnsupportedError("no gradients")

    def synchronize(self) -> None:  # noqa: B027  (most have nothing to wait for)
        """Waits for what forward and step have started."""

    @abc.abstractmethod
    def numpy(self, result, name: str) -> np.ndarray:
        """ "output", or the gradient of `name`: float64, channels last."""

    @classmethod
    def version(cls) -> str | None:
        """Of the package; None where it is not installed."""
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None


class TensorFlowImplementation(Implementation):
    package = "tensorflow"
    sources: tuple[str, ...] = GRADIENTS

    def __init__(self, case, output_gradient, threads, device):
        import tensorflow as tf

        self.case, self.device = case, device
        with tf.device("GPU:0" if device == "gpu" else "CPU:0"):
            self.tensors = {name: tf.identity(tensor) for name, tensor in case.tensors.items()}
            self.output_gradient = tf.identity(output_gradient)

        @tf.function(jit_compile=False)
        def forward(tensors):
            return self.call(tf, tensors)

        @tf.function(jit_compile=False)
        def step(tensors, output_gradient):
            # The output is returned and its gradient random: nothing can be pruned.
            with tf.GradientTape() as tape:
                sources = [tensors[name] for name in self.sources]
                tape.watch(sources)
                output = self.call(tf, tensors)
            return [output, *tape.gradient(output, sources, output_gradient)]

        self._forward, self._step = forward, step
        self._synchronize = tf.test.experimental.sync_devices if device == "gpu" else None

    @abc.abstractmethod
    def call(self, tf, tensors):
        """The output, from tensors in the graph."""

    def forward(self):
        return self._forward(self.tensors)

    def step(self):
        return self._step(self.tensors, self.output_gradient)

    def synchronize(self):
        if self._synchronize:
            self._synchronize()

    def numpy(self, result, name):
        return result.numpy().astype(np.float64)


class Floor(TensorFlowImplementation):
    """A plain convolution of the same shape: no sampling, the same product."""

    name = "tf.nn.conv2d"
    sources = ("inputs", "filters")

    def call(self, tf, tensors):
        padding = [(0, 0), *self.case.padding, (0, 0)]
        return tf.nn.conv2d(
            tensors["inputs"],
            tensors["filters"],
            self.case.strides,
            padding,
            dilations=self.case.dilations,
        )

    def step(self):
        if self.case.dilations != (1, 1) and self.device == "cpu":
            raise UnsupportedError("TensorFlow has no gradient of a dilated conv2d on the CPU")
        return super().step()


class Ours(TensorFlowImplementation):
    name = "tf_mdcn"
    package = "tf_mdcn"

    def call(self, tf, tensors):
        import tf_mdcn

        return tf_mdcn.modulated_deform_conv2d(**tensors, **self.case.arguments)


class Portable(Ours):
    """The same in standard ops; to check against where no peer has gradients, or by name."""

    name = "portable"

    def call(self, tf, tensors):
        import tf_mdcn

        return tf_mdcn.reference.modulated_deform_conv2d(**tensors, **self.case.arguments)


def channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(image, -1, 1))


class ChannelsFirstRuntime(Implementation):
    """What the inference runtimes on NumPy arrays share; filters are [out, in, height, width]."""

    def __init__(self, case, output_gradient, threads, device):
        if device != "cpu":
            raise UnsupportedError("measured on the CPU only")
        self.tensors = {
            "X": channels_first(case.inputs),
            "W": np.ascontiguousarray(np.transpose(case.filters, (3, 2, 0, 1))),
            "offset": channels_first(case.offset),
            "mask": channels_first(case.mask),
        }
        self.load(case, threads)

    @abc.abstractmethod
    def load(self, case: Case, threads: int) -> None:
        """Prepares a model of the case for `forward`."""

    def numpy(self, result, name):
        return np.moveaxis(np.asarray(result), 1, -1).astype(np.float64)


class OnnxRuntime(ChannelsFirstRuntime):
    name = package = "onnxruntime"

    def load(self, case, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads must not spin into the next implementation's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(
                self.model(case), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its classes are many, and private
            raise UnsupportedError(f"no kernel: {str(error).splitlines()[0][:80]}") from error

    def model(self, case: Case) -> bytes:
        from onnx import helper

        (top, bottom), (left, right) = case.padding
        node = helper.make_node(
            "DeformConv",
            ["X", "W", "offset", "", "mask"],
            ["Y"],
            kernel_shape=case.filters.shape[:2],
            strides=case.strides,
            pads=[top, left, bottom, right],
            dilations=case.dilations,
            group=case.groups,
            offset_group=case.deformable_groups,
        )
        element = helper.np_dtype_to_tensor_dtype(case.inputs.dtype)
        graph = helper.make_graph(
            [node],
            "deform_conv",
            [
                helper.make_tensor_value_info(name, element, tensor.shape)
                for name, tensor in self.tensors.items()
            ],
            [helper.make_tensor_value_info("Y", element, [None] * 4)],
        )
        opset = helper.make_opsetid("", 19)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        return model.SerializeToString()

    def forward(self):
        return self.session.run(None, self.tensors)[0]


class OpenVino(ChannelsFirstRuntime):
    name = package = "openvino"

    def load(self, case, threads):
        import openvino
        from openvino import opset8

        if self.tensors["X"].dtype != np.float32:
            raise UnsupportedError("measured in float32 only")
        # Built by hand: its ONNX front end (2026.4) knows no DeformConv.
        nodes = {k: opset8.parameter(v.shape, v.dtype, name=k) for k, v in self.tensors.items()}
        (top, bottom), (left, right) = case.padding
        # Constant filters, as in a model that serves: it may pack them once.
        output = opset8.deformable_convolution(
            nodes["X"],
            nodes["offset"],
            opset8.constant(self.tensors["W"]),
            list(case.strides),
            [top, left],
            [bottom, right],
            list(case.dilations),
            mask=nodes["mask"],
            auto_pad="EXPLICIT",
            group=case.groups,
            deformable_group=case.deformable_groups,
            bilinear_interpolation_pad=True,
        )
        variables = [nodes[name] for name in ("X", "offset", "mask")]
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        model = openvino.Model([output], variables, "deform_conv")
        self.request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        for index, name in enumerate(("X", "offset", "mask")):
            tensor = openvino.Tensor(self.tensors[name], shared_memory=True)
            self.request.set_input_tensor(index, tensor)

    def forward(self):
        self.request.infer()
        return self.request.get_output_tensor(0).data


class TorchVision(Implementation):
    name = package = "torchvision"

    def __init__(self, case, output_gradient, threads, device):
        import torch
        import torchvision

        if case.inputs.dtype not in (np.float32, np.float64):
            raise UnsupportedError("positions in 16 bits; under autocast it computes in float32")
        if device == "gpu" and not torch.cuda.is_available():
            raise UnsupportedError("PyTorch sees no GPU")
        torch.set_num_threads(threads)
        self.torch, self.case = torch, case
        self.function = torchvision.ops.deform_conv2d
        self.device = "cuda" if device == "gpu" else "cpu"
        arrays = [channels_first(case.inputs), np.transpose(case.filters, (3, 2, 0, 1))]
        arrays += [channels_first(case.offset), channels_first(case.mask)]
        self.tensors = [self.tensor(a).requires_grad_() for a in arrays]
        self.output_gradient = self.tensor(channels_first(output_gradient))

    def tensor(self, array):
        return self.torch.tensor(np.ascontiguousarray(array), device=self.device)

    def call(self):
        inputs, filters, offset, mask = self.tensors
        return self.function(
            inputs,
            offset,
            filters,
            stride=self.case.strides,
            padding=(self.case.padding[0][0], self.case.padding[1][0]),
            dilation=self.case.dilations,
            mask=mask,
        )

    def forward(self):
        with self.torch.no_grad():
            return self.call()

    def step(self):
        output = self.call()
        return [output, *self.torch.autograd.grad(output, self.tensors, self.output_gradient)]

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def numpy(self, result, name):
        array = result.detach().cpu().to(self.torch.float64).numpy()
        return np.transpose(array, (2, 3, 1, 0)) if name == "filters" else np.moveaxis(array, 1, -1)


IMPLEMENTATIONS: list[type[Implementation]] = [Floor, Ours, OnnxRuntime, OpenVino, TorchVision]
BY_NAME: dict[str, type[Implementation]] = {
    kind.name: kind for kind in [*IMPLEMENTATIONS, Portable]
}
