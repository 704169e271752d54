// The ops under XLA: shapes checked while it compiles, then a custom call that runs the core on the
// host. In a library of its own, which needs libtensorflow_cc: a program that serves models may not
// have that.
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tf/attributes.h"
#include "tf/xla_host.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

// Exported by every version; the header that declares it includes a good part of XLA.
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
}

namespace mdcn {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::XlaOpKernel;
using ::tensorflow::XlaOpKernelContext;

// Once, when the library is loaded; a refusal is reported when an op is compiled.
const Status& RegistrationStatus() {
  static const Status* const status = new Status(RegisterHostHandlers(xla::ffi::GetXlaFfiApi()));
  return *status;
}
[[maybe_unused]] const bool kRegistered = RegistrationStatus().ok();

// Dense, the last dimension minor: as the kernels read and write.
xla::Shape Dense(xla::PrimitiveType type, const std::vector<int64_t>& sizes) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, sizes);
}

// An op of this family, compiled into a call of `target`.
class ModulatedDeformConv2DXlaOp : public XlaOpKernel {
 public:
  ModulatedDeformConv2DXlaOp(OpKernelConstruction* context, const char* name, const char* target)
      : XlaOpKernel(context),
        name_(name),
        target_(target),
        device_(context->device_type().type_string()) {
    OP_REQUIRES_OK(context, ToTensorFlow(RegistrationStatus()));
    OP_REQUIRES_OK(context, ReadAttributes(name_, context, &call_.attributes));
    OP_REQUIRES_OK(context, ReadOptional(context, "mask", "num_masks", &call_.has_mask));
    if (name_ != kInputGradientName) {
      OP_REQUIRES_OK(context, ReadOptional(context, "bias", "num_biases", &call_.has_bias));
    }
  }

  void Compile(XlaOpKernelContext* context) override {
    // Unimplemented: a cluster that TensorFlow formed by itself then runs without XLA.
    OP_REQUIRES(
        context, device_ == ::tensorflow::DEVICE_CPU_XLA_JIT,
        absl::UnimplementedError(absl::StrCat(
            name_, ": XLA compiles the native op for CPUs only; received the device ", device_,
            ". Do without jit_compile, or trace the function or build the model "
            "inside tf_mdcn.use_implementation(\"portable\")")));
    const bool is_gradient = name_ != kForwardName;
    Operands operands;
    TensorShapes shapes;
    const auto add = [&](int index, const char* name, Shape* shape) {
      return AddOperand(context, index, name, shape, &operands);
    };
    OP_REQUIRES_OK(context, add(0, "inputs", &shapes.input));
    if (name_ == kFilterGradientName) {
      OP_REQUIRES_OK(context, context->ConstantInputAsIntVector(1, &shapes.filters.emplace()));
    } else {
      OP_REQUIRES_OK(context, add(1, "filters", &shapes.filters));
    }
    OP_REQUIRES_OK(context, add(2, "offset", &shapes.offset));
    int next = 3;
    shapes.has_mask = call_.has_mask;
    if (shapes.has_mask) OP_REQUIRES_OK(context, add(next++, "mask", &shapes.mask));
    shapes.has_bias = call_.has_bias && !is_gradient;
    if (shapes.has_bias) OP_REQUIRES_OK(context, add(next++, "bias", &shapes.bias));
    Geometry geometry;
    OP_REQUIRES_OK(context, ToTensorFlow(MakeGeometry(name_, call_.attributes, shapes, &geometry)));
    if (is_gradient) {
      Shape gradient;
      OP_REQUIRES_OK(context, add(next, "out_backprop", &gradient));
      OP_REQUIRES_OK(context, ToTensorFlow(CheckOutputGradientShape(name_, geometry, *gradient)));
    }

    const std::vector<xla::Shape> results =
        Results(shapes, geometry, context->input_xla_type(0), context->input_xla_type(2));
    const bool one = results.size() == 1;
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), target_, operands.handles,
        one ? results[0] : xla::ShapeUtil::MakeTupleShape(results), operands.shapes, Encode(call_),
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < results.size(); ++i) {
      context->SetOutput(i, one ? call : xla::GetTupleElement(call, i));
    }
  }

 protected:
  const HostCall& call() const { return call_; }

 private:
  struct Operands {
    std::vector<xla::XlaOp> handles;
    std::vector<xla::Shape> shapes;
  };

  // What the call returns; `type` is that of the inputs.
  virtual std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry& geometry,
                                          xla::PrimitiveType type,
                                          xla::PrimitiveType offset_type) const = 0;

  absl::Status ReadOptional(OpKernelConstruction* context, const char* name, const char* attribute,
                            bool* present) const {
    int64_t count;
    TF_RETURN_IF_ERROR(context->GetAttr(attribute, &count));
    TF_RETURN_IF_ERROR(CheckOptional(name_, name, count));
    *present = count == 1;
    return absl::OkStatus();
  }

  absl::Status AddOperand(XlaOpKernelContext* context, int index, const char* name, Shape* shape,
                          Operands* operands) const {
    const absl::StatusOr<xla::Shape> received = context->InputXlaShape(index);
    TF_RETURN_IF_ERROR(received.status());
    if (!received->is_static()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ": ", name, " must have a static shape under XLA; received ",
                       xla::ShapeUtil::HumanString(*received)));
    }
    const auto sizes = received->dimensions();
    shape->emplace(sizes.begin(), sizes.end());
    operands->handles.push_back(context->Input(index));
    operands->shapes.push_back(Dense(received->element_type(), **shape));
    return absl::OkStatus();
  }

  const std::string name_, target_, device_;
  HostCall call_;
};

class ForwardXlaOp : public ModulatedDeformConv2DXlaOp {
 public:
  explicit ForwardXlaOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DXlaOp(context, kForwardName, kForwardTarget) {}

 private:
  std::vector<xla::Shape> Results(const TensorShapes&, const Geometry& geometry,
                                  xla::PrimitiveType type, xla::PrimitiveType) const override {
    const Geometry& g = geometry;
    if (g.data_format == DataFormat::kChannelsLast) {
      return {Dense(type, {g.batch, g.out_height, g.out_width, g.out_channels})};
    }
    return {Dense(type, {g.batch, g.out_channels, g.out_height, g.out_width})};
  }
};

class InputGradientXlaOp : public ModulatedDeformConv2DXlaOp {
 public:
  explicit InputGradientXlaOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DXlaOp(context, kInputGradientName, kInputGradientTarget) {}

 private:
  std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry&,
                                  xla::PrimitiveType type,
                                  xla::PrimitiveType offset_type) const override {
    std::vector<xla::Shape> results = {Dense(type, *shapes.input),
                                       Dense(offset_type, *shapes.offset)};
    if (shapes.has_mask) results.push_back(Dense(offset_type, *shapes.mask));
    return results;
  }
};

class FilterGradientXlaOp : public ModulatedDeformConv2DXlaOp {
 public:
  explicit FilterGradientXlaOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DXlaOp(context, kFilterGradientName, kFilterGradientTarget) {}

 private:
  std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry& geometry,
                                  xla::PrimitiveType type, xla::PrimitiveType) const override {
    std::vector<xla::Shape> results = {Dense(type, *shapes.filters)};
    if (call().has_bias) results.push_back(Dense(type, {geometry.out_channels}));
    return results;
  }
};

REGISTER_XLA_OP(Name("Mdcn>ModulatedDeformConv2D"), ForwardXlaOp);
REGISTER_XLA_OP(Name("Mdcn>ModulatedDeformConv2DBackpropInput"), InputGradientXlaOp);
REGISTER_XLA_OP(
    Name("Mdcn>ModulatedDeformConv2DBackpropFilter").CompileTimeConstantInput("filters_shape"),
    FilterGradientXlaOp);

// TensorFlow makes OpKernels of these registrations when it first compiles anything, and not again.
// Where it has, as in a program that used XLA before it loaded this library, they are made here.
template <typename Kernel>
void AddKernel(const char* op) {
  for (const std::string& device : ::tensorflow::XlaOpRegistry::BackendNames()) {
    // The registrar keeps the definition and hands the kernel to the global registry.
    ::tensorflow::kernel_factory::OpKernelRegistrar(
        ::tensorflow::KernelDefBuilder(op).Device(device.c_str()).Build(), "XlaJitOp",
        [](OpKernelConstruction* context) -> ::tensorflow::OpKernel* {
          return new Kernel(context);
        });
  }
}

[[maybe_unused]] const bool kKernelsAdded = [] {
  const ::tensorflow::KernelList kernels = ::tensorflow::GetRegisteredKernelsForOp("Identity");
  for (const ::tensorflow::KernelDef& kernel : kernels.kernel()) {
    if (kernel.device_type() != ::tensorflow::DEVICE_CPU_XLA_JIT) continue;
    AddKernel<ForwardXlaOp>("Mdcn>ModulatedDeformConv2D");
    AddKernel<InputGradientXlaOp>("Mdcn>ModulatedDeformConv2DBackpropInput");
    AddKernel<FilterGradientXlaOp>("Mdcn>ModulatedDeformConv2DBackpropFilter");
    return true;
  }
  return false;
}();

}  // namespace
}  // namespace mdcn
