"""Brings what others made to tf_mdcn, and takes it back: Keras models, torchvision's weights.

Separate from the layer, which needs to know of neither. The public names.
"""

from tf_mdcn.convert._surgery import replace_conv2d
from tf_mdcn.convert._torchvision import from_torchvision, to_torchvision

__all__ = ["from_torchvision", "replace_conv2d", "to_torchvision"]
