// The ops under XLA: shapes checked while it compiles, then on CPUs a custom call that runs the
// core on the host, and elsewhere XLA's standard operations. In a library of its own, which needs
// libtensorflow_cc: a program that serves models may not have that.
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tf/attributes.h"
#include "tf/xla_hlo.h"
#include "tf/xla_host.h"
#include "xla/hlo/builder/lib/constants.h"
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
using ::xla::PrimitiveType;

// Once, when the library is loaded; a refusal is reported when an op is compiled.
const Status& RegistrationStatus() {
  static const Status* const status = new Status(RegisterHostHandlers(xla::ffi::GetXlaFfiApi()));
  return *status;
}
[[maybe_unused]] const bool kRegistered = RegistrationStatus().ok();

// Dense, the last dimension minor: as the kernels read and write.
xla::Shape Dense(PrimitiveType type, absl::Span<const int64_t> sizes) {
  return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, sizes);
}

// Whether a program for this device calls the handlers of xla_host.h, which run on CPUs.
// TF_MDCN_XLA_LOWERING=hlo does without them there too: tests run what other devices are given.
absl::Status ChooseLowering(const std::string& device, bool* calls_host) {
  const char* const variable = std::getenv("TF_MDCN_XLA_LOWERING");
  const std::string forced = variable == nullptr ? "" : variable;
  if (!forced.empty() && forced != "hlo") {
    return absl::InvalidArgumentError(absl::StrCat(
        "tf_mdcn: the lowering under XLA (TF_MDCN_XLA_LOWERING) must be hlo or nothing; received ",
        forced));
  }
  *calls_host = forced.empty() && device == ::tensorflow::DEVICE_CPU_XLA_JIT;
  return *calls_host ? ToTensorFlow(RegistrationStatus()) : absl::OkStatus();
}

// An op of this family: `target` is what it calls on the host.
class ModulatedDeformConv2DXlaOp : public XlaOpKernel {
 public:
  ModulatedDeformConv2DXlaOp(OpKernelConstruction* context, const char* name, const char* target)
      : XlaOpKernel(context),
        name_(name),
        target_(target),
        device_(context->device_type().type_string()) {
    OP_REQUIRES_OK(context, ReadAttributes(name_, context, &call_.attributes));
    OP_REQUIRES_OK(context, ReadOptional(context, "mask", "num_masks", &call_.has_mask));
    if (name_ != kInputGradientName) {
      OP_REQUIRES_OK(context, ReadOptional(context, "bias", "num_biases", &call_.has_bias));
    }
  }

  void Compile(XlaOpKernelContext* context) override {
    const bool is_gradient = name_ != kForwardName;
    XlaOperands operands;
    TensorShapes shapes;
    const auto read = [&](int index, const char* name, Shape* shape, xla::XlaOp* operand) {
      return ReadOperand(context, index, name, shape, operand);
    };
    OP_REQUIRES_OK(context, read(0, "inputs", &shapes.input, &operands.input));
    if (name_ == kFilterGradientName) {
      OP_REQUIRES_OK(context, context->ConstantInputAsIntVector(1, &shapes.filters.emplace()));
    } else {
      OP_REQUIRES_OK(context, read(1, "filters", &shapes.filters, &operands.filters));
    }
    OP_REQUIRES_OK(context, read(2, "offset", &shapes.offset, &operands.offset));
    int next = 3;
    shapes.has_mask = call_.has_mask;
    if (shapes.has_mask) {
      OP_REQUIRES_OK(context, read(next++, "mask", &shapes.mask, &operands.mask));
    }
    shapes.has_bias = call_.has_bias && !is_gradient;
    if (shapes.has_bias) {
      OP_REQUIRES_OK(context, read(next++, "bias", &shapes.bias, &operands.bias));
    }
    Geometry geometry;
    OP_REQUIRES_OK(context, ToTensorFlow(MakeGeometry(name_, call_.attributes, shapes, &geometry)));
    if (is_gradient) {
      Shape gradient;
      OP_REQUIRES_OK(context, read(next, "out_backprop", &gradient, &operands.output_gradient));
      OP_REQUIRES_OK(context, ToTensorFlow(CheckOutputGradientShape(name_, geometry, *gradient)));
    }

    const PrimitiveType type = context->input_xla_type(0);
    const std::vector<xla::Shape> results =
        Results(shapes, geometry, type, context->input_xla_type(2));
    bool calls_host = false;
    OP_REQUIRES_OK(context, ChooseLowering(device_, &calls_host));
    if (calls_host) {
      OP_REQUIRES_OK(context, CallHost(context, operands, results));
    } else if (geometry.batch == 0) {  // without a pixel to gather
      for (size_t i = 0; i < results.size(); ++i) {
        context->SetOutput(i, xla::Zeros(context->builder(), results[i]));
      }
    } else {
      const std::vector<xla::XlaOp> computed = Hlo(geometry, type, operands);
      for (size_t i = 0; i < results.size(); ++i) {
        context->SetOutput(i, xla::ConvertElementType(computed[i], results[i].element_type()));
      }
    }
  }

 protected:
  const HostCall& call() const { return call_; }

 private:
  // What the op returns; `type` is that of the inputs.
  virtual std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry& geometry,
                                          PrimitiveType type, PrimitiveType offset_type) const = 0;

  // The same in standard operations, in any type, and perhaps more than the op returns.
  virtual std::vector<xla::XlaOp> Hlo(const Geometry& geometry, PrimitiveType type,
                                      const XlaOperands& operands) const = 0;

  absl::Status CallHost(XlaOpKernelContext* context, const XlaOperands& operands,
                        const std::vector<xla::Shape>& results) const {
    std::vector<xla::XlaOp> handles;
    std::vector<xla::Shape> shapes;
    for (xla::XlaOp operand : {operands.input, operands.filters, operands.offset, operands.mask,
                               operands.bias, operands.output_gradient}) {
      if (!operand.valid()) continue;
      const absl::StatusOr<xla::Shape> shape = context->builder()->GetShape(operand);
      TF_RETURN_IF_ERROR(shape.status());
      handles.push_back(operand);
      shapes.push_back(Dense(shape->element_type(), shape->dimensions()));
    }
    const bool one = results.size() == 1;
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), target_, handles,
        one ? results[0] : xla::ShapeUtil::MakeTupleShape(results), shapes, Encode(call_),
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < results.size(); ++i) {
      context->SetOutput(i, one ? call : xla::GetTupleElement(call, i));
    }
    return absl::OkStatus();
  }

  absl::Status ReadOptional(OpKernelConstruction* context, const char* name, const char* attribute,
                            bool* present) const {
    int64_t count;
    TF_RETURN_IF_ERROR(context->GetAttr(attribute, &count));
    TF_RETURN_IF_ERROR(CheckOptional(name_, name, count));
    *present = count == 1;
    return absl::OkStatus();
  }

  absl::Status ReadOperand(XlaOpKernelContext* context, int index, const char* name, Shape* shape,
                           xla::XlaOp* operand) const {
    const absl::StatusOr<xla::Shape> received = context->InputXlaShape(index);
    TF_RETURN_IF_ERROR(received.status());
    if (!received->is_static()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name_, ": ", name, " must have a static shape under XLA; received ",
                       xla::ShapeUtil::HumanString(*received)));
    }
    const auto sizes = received->dimensions();
    shape->emplace(sizes.begin(), sizes.end());
    *operand = context->Input(index);
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
  std::vector<xla::Shape> Results(const TensorShapes&, const Geometry& geometry, PrimitiveType type,
                                  PrimitiveType) const override {
    const Geometry& g = geometry;
    if (g.data_format == DataFormat::kChannelsLast) {
      return {Dense(type, {g.batch, g.out_height, g.out_width, g.out_channels})};
    }
    return {Dense(type, {g.batch, g.out_channels, g.out_height, g.out_width})};
  }

  std::vector<xla::XlaOp> Hlo(const Geometry& geometry, PrimitiveType type,
                              const XlaOperands& operands) const override {
    return ForwardHlo(geometry, type, operands);
  }
};

class InputGradientXlaOp : public ModulatedDeformConv2DXlaOp {
 public:
  explicit InputGradientXlaOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DXlaOp(context, kInputGradientName, kInputGradientTarget) {}

 private:
  std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry&, PrimitiveType type,
                                  PrimitiveType offset_type) const override {
    std::vector<xla::Shape> results = {Dense(type, *shapes.input),
                                       Dense(offset_type, *shapes.offset)};
    if (shapes.has_mask) results.push_back(Dense(offset_type, *shapes.mask));
    return results;
  }

  std::vector<xla::XlaOp> Hlo(const Geometry& geometry, PrimitiveType type,
                              const XlaOperands& operands) const override {
    return InputGradientHlo(geometry, type, operands);
  }
};

class FilterGradientXlaOp : public ModulatedDeformConv2DXlaOp {
 public:
  explicit FilterGradientXlaOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DXlaOp(context, kFilterGradientName, kFilterGradientTarget) {}

 private:
  std::vector<xla::Shape> Results(const TensorShapes& shapes, const Geometry& geometry,
                                  PrimitiveType type, PrimitiveType) const override {
    std::vector<xla::Shape> results = {Dense(type, *shapes.filters)};
    if (call().has_bias) results.push_back(Dense(type, {geometry.out_channels}));
    return results;
  }

  std::vector<xla::XlaOp> Hlo(const Geometry& geometry, PrimitiveType type,
                              const XlaOperands& operands) const override {
    return FilterGradientHlo(geometry, type, operands);
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
