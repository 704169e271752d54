// What shape functions and kernels (CPU, GPU, XLA) share: the ops' names, their attributes read
// into the core's terms, and errors translated.
#ifndef MDCN_TF_ATTRIBUTES_H_
#define MDCN_TF_ATTRIBUTES_H_

#include <algorithm>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/geometry.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/platform/errors.h"

namespace mdcn {

// What opens every message. The user has called modulated_deform_conv2d or its layer.
inline constexpr char kForwardName[] = "ModulatedDeformConv2D";
inline constexpr char kInputGradientName[] = "ModulatedDeformConv2DBackpropInput";
inline constexpr char kFilterGradientName[] = "ModulatedDeformConv2DBackpropFilter";

inline absl::Status ToTensorFlow(const Status& status) {
  switch (status.code()) {
    case Status::Code::kOk:
      return absl::OkStatus();
    case Status::Code::kInvalidArgument:
      return absl::InvalidArgumentError(status.message());
    case Status::Code::kInternal:
      break;
  }
  return absl::InternalError(status.message());
}

inline absl::Status CheckOptional(const std::string& op, const std::string& name, int64_t count) {
  if (count <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": ", name, " must be one tensor or none; received ", count));
}

// `Context` is an InferenceContext or an OpKernelConstruction.
template <typename Context>
absl::Status ReadAttributes(const std::string& op, Context* context, Attributes* attributes) {
  const auto read_list = [&](const char* name, auto* list, const char* rule) -> absl::Status {
    std::vector<int64_t> values;
    TF_RETURN_IF_ERROR(context->GetAttr(name, &values));
    if (values.empty() && list->size() == 4) return absl::OkStatus();  // no paddings
    if (values.size() != list->size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(op, ": ", name, " must be ", rule, "; received ", ShapeString(values)));
    }
    std::copy(values.begin(), values.end(), list->begin());
    return absl::OkStatus();
  };
  TF_RETURN_IF_ERROR(read_list("strides", &attributes->strides, "2 integers [height, width]"));
  TF_RETURN_IF_ERROR(read_list("dilations", &attributes->dilations, "2 integers [height, width]"));
  TF_RETURN_IF_ERROR(read_list("explicit_paddings", &attributes->explicit_paddings,
                               "4 integers [top, bottom, left, right] or empty"));
  std::string padding, data_format;
  TF_RETURN_IF_ERROR(context->GetAttr("padding", &padding));
  TF_RETURN_IF_ERROR(context->GetAttr("data_format", &data_format));
  attributes->padding = padding == "SAME"    ? Padding::kSame
                        : padding == "VALID" ? Padding::kValid
                                             : Padding::kExplicit;
  attributes->data_format =
      data_format == "NHWC" ? DataFormat::kChannelsLast : DataFormat::kChannelsFirst;
  TF_RETURN_IF_ERROR(context->GetAttr("groups", &attributes->groups));
  TF_RETURN_IF_ERROR(context->GetAttr("deformable_groups", &attributes->deformable_groups));
  return ToTensorFlow(CheckAttributes(op, *attributes));
}

inline std::vector<int64_t> Sizes(const ::tensorflow::TensorShape& shape) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < shape.dims(); ++i) sizes.push_back(shape.dim_size(i));
  return sizes;
}

}  // namespace mdcn

#endif  // MDCN_TF_ATTRIBUTES_H_
