"""OpenVINO: what its reader of ONNX lacks for the models that `onnx` writes.

Separate because it is about another program's reader, not about writing.
"""

from typing import Any

import numpy as np


def openvino_extension() -> Any:
    """The extension with which OpenVINO reads ONNX `DeformConv`.

    OpenVINO computes deformable convolution (its operation `DeformableConvolution-8`), but its
    reader of ONNX has no rule for `DeformConv`: OpenVINO 2026.4 says "No conversion rule found".
    The extension is the rule, with `bilinear_interpolation_pad` on: a corner outside the image
    counts as 0, as everywhere else. It is needed for reading only: a model that is then saved in
    OpenVINO's own format by `openvino.save_model` runs without it.

    Returns:
        An `openvino.frontend.onnx.ConversionExtension`, for `openvino.Core.add_extension`.

    Raises:
        ImportError: If OpenVINO is not installed.

    Example:

    ```python
    core = openvino.Core()
    core.add_extension(tf_mdcn.export.openvino_extension())
    outputs = core.compile_model("model.onnx", "CPU")({"image": image})
    ```
    """
    try:
        from openvino import opset15
        from openvino.frontend.onnx import ConversionExtension
    except ImportError as error:
        raise ImportError(
            "tf_mdcn.export.openvino_extension: OpenVINO must be installed; received an "
            "environment without it. To install it: pip install openvino"
        ) from error

    def convert(node):
        inputs = [node.get_input(i) for i in range(node.get_input_size())]
        image, filters, offset = inputs[:3]
        pads = node.get_attribute("pads", [0, 0, 0, 0])
        outputs = opset15.deformable_convolution(
            image,
            offset,
            filters,
            node.get_attribute("strides", [1, 1]),
            pads[:2],
            pads[2:],
            node.get_attribute("dilations", [1, 1]),
            mask=inputs[4] if len(inputs) > 4 else None,
            group=node.get_attribute("group", 1),
            deformable_group=node.get_attribute("offset_group", 1),
            bilinear_interpolation_pad=True,
        )
        if len(inputs) > 3 and inputs[3].get_node().get_type_name() != "NullNode":
            bias = opset15.reshape(inputs[3], np.array([1, -1, 1, 1]), special_zero=False)
            outputs = opset15.add(outputs, bias)
        return [outputs.output(0)]

    return ConversionExtension("DeformConv", convert)
