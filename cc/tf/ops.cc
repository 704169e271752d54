// The ops as TensorFlow sees them: signatures, documentation, shape functions.
#include <vector>

#include "core/geometry.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attributes.h"

namespace mdcn {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

Shape ToShape(InferenceContext* context, ShapeHandle handle) {
  if (!context->RankKnown(handle)) return std::nullopt;
  std::vector<int64_t> sizes(context->Rank(handle));
  for (size_t i = 0; i < sizes.size(); ++i) {
    sizes[i] = context->Value(context->Dim(handle, i));  // kUnknown is -1 in both worlds
  }
  return sizes;
}

ShapeHandle ToHandle(InferenceContext* context, const std::vector<int64_t>& sizes) {
  std::vector<::tensorflow::shape_inference::DimensionHandle> dimensions;
  for (int64_t size : sizes) dimensions.push_back(context->MakeDim(size));
  return context->MakeShape(dimensions);
}

// The single tensor of a list input that may be empty.
absl::Status OptionalInput(InferenceContext* context, const char* name, bool* present,
                           Shape* shape) {
  std::vector<ShapeHandle> handles;
  TF_RETURN_IF_ERROR(context->input(name, &handles));
  TF_RETURN_IF_ERROR(CheckOptional(kForwardName, name, handles.size()));
  *present = !handles.empty();
  if (*present) *shape = ToShape(context, handles[0]);
  return absl::OkStatus();
}

absl::Status ForwardShape(InferenceContext* context) {
  Attributes attributes;
  TF_RETURN_IF_ERROR(ReadAttributes(kForwardName, context, &attributes));
  TensorShapes shapes;
  shapes.input = ToShape(context, context->input(0));
  shapes.filters = ToShape(context, context->input(1));
  shapes.offset = ToShape(context, context->input(2));
  TF_RETURN_IF_ERROR(OptionalInput(context, "mask", &shapes.has_mask, &shapes.mask));
  TF_RETURN_IF_ERROR(OptionalInput(context, "bias", &shapes.has_bias, &shapes.bias));
  std::vector<int64_t> output;
  TF_RETURN_IF_ERROR(ToTensorFlow(InferOutputShape(kForwardName, attributes, shapes, &output)));
  context->set_output(0, ToHandle(context, output));
  return absl::OkStatus();
}

// A gradient has its tensor's shape.
absl::Status InputGradientShape(InferenceContext* context) {
  std::vector<ShapeHandle> masks;
  TF_RETURN_IF_ERROR(context->input("mask", &masks));
  TF_RETURN_IF_ERROR(CheckOptional(kInputGradientName, "mask", masks.size()));
  for (int i = 0; i < context->num_outputs(); ++i) {
    constexpr int kInputs[] = {0, 2, 3};  // inputs, offset, mask
    context->set_output(i, context->input(kInputs[i]));
  }
  return absl::OkStatus();
}

absl::Status FilterGradientShape(InferenceContext* context) {
  TF_RETURN_IF_ERROR(
      CheckOptional(kFilterGradientName, "bias_backprop", context->num_outputs() - 1));
  ShapeHandle filters;
  TF_RETURN_IF_ERROR(context->MakeShapeFromShapeTensor(1, &filters));
  TF_RETURN_IF_ERROR(context->WithRank(filters, 4, &filters));
  context->set_output(0, filters);
  if (context->num_outputs() > 1) {
    context->set_output(1, context->Vector(context->Dim(filters, 3)));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mdcn

REGISTER_OP("Mdcn>ModulatedDeformConv2D")
    .Input("inputs: T")
    .Input("filters: T")
    .Input("offset: Toffset")
    .Input("mask: num_masks * Toffset")
    .Input("bias: num_biases * T")
    .Output("output: T")
    .Attr("T: {float, double, half, bfloat16}")
    .Attr("Toffset: {float, double, half, bfloat16}")
    .Attr("num_masks: int >= 0")
    .Attr("num_biases: int >= 0")
    .Attr("strides: list(int) = [1, 1]")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'} = 'VALID'")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .Attr("dilations: list(int) = [1, 1]")
    .Attr("groups: int = 1")
    .Attr("deformable_groups: int = 1")
    .SetShapeFn(mdcn::ForwardShape)
    .Doc(R"doc(
Modulated deformable convolution (DCNv2, arXiv 1811.11168, section 3.1).

For an output position p, kernel tap k with grid position p_k, and deformable group g(c) of input
channel c:

    output[p, o] = bias[o] + sum over k, c of
        filters[k, c, o] * mask[p, g(c), k]
        * inputs(p * stride - pad + p_k * dilation + offset[p, g(c), k], c)

inputs(., c) is bilinear interpolation in which a corner outside the image counts as 0. With K =
kernel_height * kernel_width and G = deformable_groups, shapes are given for NHWC; NCHW moves the last
axis of inputs, offset, mask and output to 1.

inputs: [batch, in_height, in_width, in_channels].
filters: [kernel_height, kernel_width, in_channels / groups, out_channels].
offset: [batch, out_height, out_width, G * K * 2], in input pixels; channel
  (g * K + i * kernel_width + j) * 2 is dy, the next one dx, of tap (i, j) of deformable group g.
mask: none (DCNv1), or one: [batch, out_height, out_width, G * K].
bias: none, or one: [out_channels].
output: [batch, out_height, out_width, out_channels].
Toffset: T, or float where T is half or bfloat16.
strides: of the sampling grid, [height, width].
explicit_paddings: [top, bottom, left, right] if padding is EXPLICIT, else empty.
dilations: of the kernel, [height, width].
groups: of the filters: each sees in_channels / groups channels.
deformable_groups: in_channels / deformable_groups channels share offsets and masks.
)doc");

REGISTER_OP("Mdcn>ModulatedDeformConv2DBackpropInput")
    .Input("inputs: T")
    .Input("filters: T")
    .Input("offset: Toffset")
    .Input("mask: num_masks * Toffset")
    .Input("out_backprop: T")
    .Output("inputs_backprop: T")
    .Output("offset_backprop: Toffset")
    .Output("mask_backprop: num_masks * Toffset")
    .Attr("T: {float, double, half, bfloat16}")
    .Attr("Toffset: {float, double, half, bfloat16}")
    .Attr("num_masks: int >= 0")
    .Attr("strides: list(int) = [1, 1]")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'} = 'VALID'")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .Attr("dilations: list(int) = [1, 1]")
    .Attr("groups: int = 1")
    .Attr("deformable_groups: int = 1")
    .SetShapeFn(mdcn::InputGradientShape)
    .Doc(R"doc(
Gradients of Mdcn>ModulatedDeformConv2D with respect to inputs, offset and mask.

At whole-number coordinates the derivative is the right-hand one: the slope between floor(y) and
floor(y) + 1.

out_backprop: the gradient of the output, in its shape.
)doc");

REGISTER_OP("Mdcn>ModulatedDeformConv2DBackpropFilter")
    .Input("inputs: T")
    .Input("filters_shape: int64")
    .Input("offset: Toffset")
    .Input("mask: num_masks * Toffset")
    .Input("out_backprop: T")
    .Output("filters_backprop: T")
    .Output("bias_backprop: num_biases * T")
    .Attr("T: {float, double, half, bfloat16}")
    .Attr("Toffset: {float, double, half, bfloat16}")
    .Attr("num_masks: int >= 0")
    .Attr("num_biases: int >= 0")
    .Attr("strides: list(int) = [1, 1]")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'} = 'VALID'")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .Attr("dilations: list(int) = [1, 1]")
    .Attr("groups: int = 1")
    .Attr("deformable_groups: int = 1")
    .SetShapeFn(mdcn::FilterGradientShape)
    .Doc(R"doc(
Gradients of Mdcn>ModulatedDeformConv2D with respect to filters and bias.

filters_shape: [kernel_height, kernel_width, in_channels / groups, out_channels].
out_backprop: the gradient of the output, in its shape.
bias_backprop: as many as there were biases: one or none.
)doc");
