"""Modulated Deformable Convolution (DCNv2) for TensorFlow and Keras: the public names."""

from tf_mdcn import convert, export, reference, visualize
from tf_mdcn._build_info import build_info
from tf_mdcn._library import op_library_path
from tf_mdcn.layers import ModulatedDeformConv2D
from tf_mdcn.ops import modulated_deform_conv2d, use_implementation

__version__ = "0.1.0"

__all__ = [
    "ModulatedDeformConv2D",
    "build_info",
    "convert",
    "export",
    "modulated_deform_conv2d",
    "op_library_path",
    "reference",
    "use_implementation",
    "visualize",
]
