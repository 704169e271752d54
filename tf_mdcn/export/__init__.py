"""Takes a trained model out of Python: SavedModel, TFLite and ONNX. The public names.

Separate from the rest of the package, which training needs and none of which knows of this.
"""

from tf_mdcn.export._onnx import onnx
from tf_mdcn.export._openvino import openvino_extension
from tf_mdcn.export._saved_model import saved_model
from tf_mdcn.export._tflite import tflite

__all__ = ["onnx", "openvino_extension", "saved_model", "tflite"]
