// An OpKernel's inputs, validated: the one way from an OpKernelContext to a Geometry, for CPU and
// GPU.
#ifndef MDCN_TF_OP_INPUTS_H_
#define MDCN_TF_OP_INPUTS_H_

#include <string>
#include <type_traits>
#include <vector>

#include "core/geometry.h"
#include "core/types.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/attributes.h"

namespace mdcn {

// The core's type for one of TensorFlow's, with the same bits.
template <typename T>
struct CoreTypeOf {
  using type = T;
};
template <>
struct CoreTypeOf<Eigen::half> {
  using type = Half;
};
template <>
struct CoreTypeOf<Eigen::bfloat16> {
  using type = BFloat16;
};
template <typename T>
using CoreType = typename CoreTypeOf<T>::type;

template <typename T>
const CoreType<T>* Data(const ::tensorflow::Tensor* tensor) {
  if (tensor == nullptr) return nullptr;
  return reinterpret_cast<const CoreType<T>*>(tensor->flat<T>().data());
}

template <typename T>
CoreType<T>* MutableData(::tensorflow::Tensor* tensor) {
  if (tensor == nullptr) return nullptr;
  return reinterpret_cast<CoreType<T>*>(tensor->flat<T>().data());
}

// The tensors of a call; those that an op does not have are null.
struct OpInputs {
  const ::tensorflow::Tensor* input = nullptr;
  const ::tensorflow::Tensor* filters = nullptr;
  const ::tensorflow::Tensor* offset = nullptr;
  const ::tensorflow::Tensor* mask = nullptr;
  const ::tensorflow::Tensor* bias = nullptr;
  const ::tensorflow::Tensor* output_gradient = nullptr;
  Geometry geometry;
};

// An op of this family: reads its attributes once, its inputs at every call.
class ModulatedDeformConv2DOp : public ::tensorflow::OpKernel {
 public:
  ModulatedDeformConv2DOp(::tensorflow::OpKernelConstruction* context, const char* name)
      : OpKernel(context), name_(name) {
    OP_REQUIRES_OK(context, ReadAttributes(name_, context, &attributes_));
  }

 protected:
  // The forward op's inputs, or, with out_backprop among them, those of a gradient op.
  absl::Status ReadInputs(::tensorflow::OpKernelContext* context, OpInputs* inputs) const {
    TensorShapes shapes;
    TF_RETURN_IF_ERROR(context->input("inputs", &inputs->input));
    TF_RETURN_IF_ERROR(context->input("offset", &inputs->offset));
    shapes.input = Sizes(inputs->input->shape());
    shapes.offset = Sizes(inputs->offset->shape());
    if (name_ == kFilterGradientName) {
      const ::tensorflow::Tensor* filters_shape;
      TF_RETURN_IF_ERROR(context->input("filters_shape", &filters_shape));
      if (filters_shape->dims() != 1) {
        return absl::InvalidArgumentError(
            absl::StrCat(name_, ": filters_shape must be a vector; received ",
                         filters_shape->shape().DebugString()));
      }
      const auto sizes = filters_shape->vec<int64_t>();
      shapes.filters = std::vector<int64_t>(sizes.data(), sizes.data() + sizes.size());
    } else {
      TF_RETURN_IF_ERROR(context->input("filters", &inputs->filters));
      shapes.filters = Sizes(inputs->filters->shape());
    }
    TF_RETURN_IF_ERROR(
        ReadOptional(context, "mask", &inputs->mask, &shapes.has_mask, &shapes.mask));
    if (name_ == kForwardName) {
      TF_RETURN_IF_ERROR(
          ReadOptional(context, "bias", &inputs->bias, &shapes.has_bias, &shapes.bias));
    }
    TF_RETURN_IF_ERROR(ToTensorFlow(MakeGeometry(name_, attributes_, shapes, &inputs->geometry)));
    if (name_ == kForwardName) return absl::OkStatus();
    TF_RETURN_IF_ERROR(context->input("out_backprop", &inputs->output_gradient));
    return ToTensorFlow(
        CheckOutputGradientShape(name_, inputs->geometry, Sizes(inputs->output_gradient->shape())));
  }

  absl::Status AllocateOutput(::tensorflow::OpKernelContext* context, const OpInputs& inputs,
                              ::tensorflow::Tensor** output) const {
    const Geometry& g = inputs.geometry;
    const ::tensorflow::TensorShape shape =
        g.data_format == DataFormat::kChannelsLast
            ? ::tensorflow::TensorShape({g.batch, g.out_height, g.out_width, g.out_channels})
            : ::tensorflow::TensorShape({g.batch, g.out_channels, g.out_height, g.out_width});
    return context->allocate_output(0, shape, output);
  }

  // The mask's stays null where there is no mask.
  absl::Status AllocateInputGradients(::tensorflow::OpKernelContext* context,
                                      const OpInputs& inputs, ::tensorflow::Tensor** of_input,
                                      ::tensorflow::Tensor** of_offset,
                                      ::tensorflow::Tensor** of_mask) const {
    TF_RETURN_IF_ERROR(context->allocate_output(0, inputs.input->shape(), of_input));
    TF_RETURN_IF_ERROR(context->allocate_output(1, inputs.offset->shape(), of_offset));
    if (inputs.mask == nullptr) return absl::OkStatus();
    return context->allocate_output(2, inputs.mask->shape(), of_mask);
  }

  // The bias's stays null where it is not asked for.
  absl::Status AllocateFilterGradients(::tensorflow::OpKernelContext* context,
                                       const OpInputs& inputs, ::tensorflow::Tensor** of_filters,
                                       ::tensorflow::Tensor** of_bias) const {
    const Geometry& g = inputs.geometry;
    ::tensorflow::OpOutputList of_biases;
    TF_RETURN_IF_ERROR(context->output_list("bias_backprop", &of_biases));
    TF_RETURN_IF_ERROR(CheckOptional(name_, "bias_backprop", of_biases.size()));
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, {g.kernel_height, g.kernel_width, g.group_in_channels, g.out_channels}, of_filters));
    if (of_biases.size() == 0) return absl::OkStatus();
    return of_biases.allocate(0, {g.out_channels}, of_bias);
  }

 private:
  absl::Status ReadOptional(::tensorflow::OpKernelContext* context, const char* name,
                            const ::tensorflow::Tensor** tensor, bool* present,
                            Shape* shape) const {
    ::tensorflow::OpInputList list;
    TF_RETURN_IF_ERROR(context->input_list(name, &list));
    TF_RETURN_IF_ERROR(CheckOptional(name_, name, list.size()));
    *present = list.size() == 1;
    if (*present) {
      *tensor = &list[0];
      *shape = Sizes(list[0].shape());
    }
    return absl::OkStatus();
  }

  const std::string name_;
  Attributes attributes_;
};

// The types of inputs and offset that the ops take.
#define MDCN_FOR_EACH_OP_TYPES(MACRO)      \
  MACRO(float, float);                     \
  MACRO(double, double);                   \
  MACRO(Eigen::half, Eigen::half);         \
  MACRO(Eigen::half, float);               \
  MACRO(Eigen::bfloat16, Eigen::bfloat16); \
  MACRO(Eigen::bfloat16, float)

}  // namespace mdcn

#endif  // MDCN_TF_OP_INPUTS_H_
