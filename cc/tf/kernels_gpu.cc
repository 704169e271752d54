// The OpKernels for the GPU: inputs validated and workspace allocated as on the CPU, then the
// core's CUDA driver on the op's stream, with TensorFlow's own BLAS for the matrix products.
// Compiled by the C++ compiler; nvcc never sees TensorFlow.
#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "core/cuda/convolution.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/kernels/numeric_options_utils.h"
#include "tensorflow/core/util/determinism.h"
#include "tf/op_inputs.h"
#include "xla/stream_executor/blas.h"
#include "xla/stream_executor/device_memory.h"
#include "xla/stream_executor/stream.h"
#include "xla/stream_executor/stream_executor.h"

namespace mdcn {
namespace {

namespace se = ::stream_executor;

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

// BLAS on the op's stream; TensorFlow's settings decide on TensorFloat-32 and determinism.
template <typename T>
class BlasProduct : public cuda::MatrixProduct<CoreType<T>> {
 public:
  explicit BlasProduct(se::Stream* stream) : stream_(stream) {}

  Status Multiply(const cuda::MatrixProductCall<CoreType<T>>& call) override {
    se::blas::BlasSupport* const blas = stream_->parent()->AsBlas();
    if (blas == nullptr) return Status::Internal("ModulatedDeformConv2D: the GPU has no BLAS");
    const cuda::GemmArguments<CoreType<T>> gemm = cuda::ToColumnMajor(call);
    const int64_t largest =
        std::max({gemm.m, gemm.n, gemm.k, gemm.lda, gemm.ldb, gemm.ldc, gemm.batch});
    if (largest > std::numeric_limits<int>::max()) {
      return Status::InvalidArgument(
          "ModulatedDeformConv2D: on a GPU, images must have at most 2^31 - 1 pixels and filters "
          "as many rows; received a matrix product with a size of " +
          std::to_string(largest));
    }
    const se::blas::Transpose transpose_a = Transpose(gemm.transpose_a);
    const se::blas::Transpose transpose_b = Transpose(gemm.transpose_b);
    const auto a = Address(gemm.a), b = Address(gemm.b);
    auto c = Address(gemm.c);
    const int lda = static_cast<int>(gemm.lda), ldb = static_cast<int>(gemm.ldb);
    const int ldc = static_cast<int>(gemm.ldc), batch = static_cast<int>(gemm.batch);
    const Scale alpha = Scale(1), beta = Scale(gemm.accumulate ? 1 : 0);
    const auto options = ::tensorflow::GetNumericOptions();
    constexpr auto kContext = se::blas::CallContext::kNone;
    const absl::Status status =
        batch == 1 ? blas->BlasGemm(stream_, transpose_a, transpose_b, gemm.m, gemm.n, gemm.k,
                                    alpha, a, lda, b, ldb, beta, &c, ldc, options, kContext)
                   : blas->BlasGemmStridedBatched(stream_, transpose_a, transpose_b, gemm.m, gemm.n,
                                                  gemm.k, alpha, a, lda, gemm.stride_a, b, ldb,
                                                  gemm.stride_b, beta, &c, ldc, gemm.stride_c,
                                                  batch, options, kContext);
    if (status.ok()) return Status();
    return Status::Internal("ModulatedDeformConv2D: the matrix product failed: " +
                            std::string(status.message()));
  }

 private:
  using Scale = std::conditional_t<std::is_same_v<T, double>, double, float>;

  static se::blas::Transpose Transpose(bool transpose) {
    return transpose ? se::blas::Transpose::kTranspose : se::blas::Transpose::kNoTranspose;
  }

  // BLAS takes addresses without sizes; it only reads what it multiplies.
  static se::DeviceMemory<T> Address(const CoreType<T>* data) {
    return se::DeviceMemory<T>(se::DeviceMemoryBase(const_cast<CoreType<T>*>(data)));
  }

  se::Stream* const stream_;
};

// Runs one of the driver's functions in a workspace of the size that it asks for.
template <typename T, typename Function>
void RunOnStream(OpKernelContext* context, int64_t workspace_bytes, const Function& function) {
  Tensor workspace;
  OP_REQUIRES_OK(context,
                 context->allocate_temp(::tensorflow::DT_INT8,
                                        ::tensorflow::TensorShape({workspace_bytes}), &workspace));
  se::Stream* const stream = context->op_device_context()->stream();
  BlasProduct<T> product(stream);
  const cuda::Execution<CoreType<T>> execution = {
      static_cast<cuda::Stream>(stream->platform_specific_handle().stream), &product,
      workspace.flat<int8_t>().data(), workspace_bytes};
  OP_REQUIRES_OK(context, ToTensorFlow(function(execution)));
}

cuda::Options MakeOptions() {
  cuda::Options options;
  options.deterministic = ::tensorflow::OpDeterminismRequired();
  return options;
}

template <typename T, typename TOffset>
class ForwardOp : public ModulatedDeformConv2DOp {
 public:
  explicit ForwardOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DOp(context, kForwardName) {}

  void Compute(OpKernelContext* context) override {
    OpInputs inputs;
    OP_REQUIRES_OK(context, ReadInputs(context, &inputs));
    Tensor* output;
    OP_REQUIRES_OK(context, AllocateOutput(context, inputs, &output));
    const cuda::Options options = MakeOptions();
    const cuda::ForwardTensors<CoreType<T>, CoreType<TOffset>> tensors = {
        Data<T>(inputs.input),
        Data<T>(inputs.filters),
        {Data<TOffset>(inputs.offset), Data<TOffset>(inputs.mask)},
        Data<T>(inputs.bias),
        MutableData<T>(output)};
    RunOnStream<T>(context, cuda::ForwardWorkspaceBytes<CoreType<T>>(inputs.geometry, options),
                   [&](const auto& execution) {
                     return cuda::Forward(inputs.geometry, tensors, options, execution);
                   });
  }
};

template <typename T, typename TOffset>
class InputGradientOp : public ModulatedDeformConv2DOp {
 public:
  explicit InputGradientOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DOp(context, kInputGradientName) {}

  void Compute(OpKernelContext* context) override {
    OpInputs inputs;
    OP_REQUIRES_OK(context, ReadInputs(context, &inputs));
    Tensor *input_gradient, *offset_gradient, *mask_gradient = nullptr;
    OP_REQUIRES_OK(context, AllocateInputGradients(context, inputs, &input_gradient,
                                                   &offset_gradient, &mask_gradient));
    const cuda::Options options = MakeOptions();
    const cuda::InputGradientTensors<CoreType<T>, CoreType<TOffset>> tensors = {
        Data<T>(inputs.input),
        Data<T>(inputs.filters),
        {Data<TOffset>(inputs.offset), Data<TOffset>(inputs.mask)},
        Data<T>(inputs.output_gradient),
        MutableData<T>(input_gradient),
        MutableData<TOffset>(offset_gradient),
        MutableData<TOffset>(mask_gradient)};
    RunOnStream<T>(context,
                   cuda::InputGradientWorkspaceBytes<CoreType<T>>(inputs.geometry, options),
                   [&](const auto& execution) {
                     return cuda::InputGradient(inputs.geometry, tensors, options, execution);
                   });
  }
};

template <typename T, typename TOffset>
class FilterGradientOp : public ModulatedDeformConv2DOp {
 public:
  explicit FilterGradientOp(OpKernelConstruction* context)
      : ModulatedDeformConv2DOp(context, kFilterGradientName) {}

  void Compute(OpKernelContext* context) override {
    OpInputs inputs;
    OP_REQUIRES_OK(context, ReadInputs(context, &inputs));
    Tensor *filters_gradient, *bias_gradient = nullptr;
    OP_REQUIRES_OK(context,
                   AllocateFilterGradients(context, inputs, &filters_gradient, &bias_gradient));
    const cuda::Options options = MakeOptions();
    const cuda::FilterGradientTensors<CoreType<T>, CoreType<TOffset>> tensors = {
        Data<T>(inputs.input),
        {Data<TOffset>(inputs.offset), Data<TOffset>(inputs.mask)},
        Data<T>(inputs.output_gradient),
        MutableData<T>(filters_gradient),
        MutableData<T>(bias_gradient)};
    RunOnStream<T>(context,
                   cuda::FilterGradientWorkspaceBytes<CoreType<T>>(inputs.geometry, options),
                   [&](const auto& execution) {
                     return cuda::FilterGradient(inputs.geometry, tensors, options, execution);
                   });
  }
};

#define MDCN_REGISTER_KERNELS(T, TOFFSET)                                  \
  REGISTER_KERNEL_BUILDER(Name("Mdcn>ModulatedDeformConv2D")               \
                              .Device(::tensorflow::DEVICE_GPU)            \
                              .TypeConstraint<T>("T")                      \
                              .TypeConstraint<TOFFSET>("Toffset"),         \
                          ForwardOp<T, TOFFSET>);                          \
  REGISTER_KERNEL_BUILDER(Name("Mdcn>ModulatedDeformConv2DBackpropInput")  \
                              .Device(::tensorflow::DEVICE_GPU)            \
                              .TypeConstraint<T>("T")                      \
                              .TypeConstraint<TOFFSET>("Toffset"),         \
                          InputGradientOp<T, TOFFSET>);                    \
  REGISTER_KERNEL_BUILDER(Name("Mdcn>ModulatedDeformConv2DBackpropFilter") \
                              .Device(::tensorflow::DEVICE_GPU)            \
                              .TypeConstraint<T>("T")                      \
                              .TypeConstraint<TOFFSET>("Toffset")          \
                              .HostMemory("filters_shape"),                \
                          FilterGradientOp<T, TOFFSET>)

MDCN_FOR_EACH_OP_TYPES(MDCN_REGISTER_KERNELS);

}  // namespace
}  // namespace mdcn
