// The OpKernels for the CPU: inputs validated, outputs and scratch allocated, then the core on
// TensorFlow's intra-op threads.
#include "core/cpu/convolution.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/denormal.h"
#include "tensorflow/core/platform/threadpool.h"
#include "tf/op_inputs.h"

namespace mdcn {
namespace {

using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;

class IntraOpPool : public cpu::WorkerPool {
 public:
  explicit IntraOpPool(OpKernelContext* context)
      : threads_(*context->device()->tensorflow_cpu_worker_threads()) {}

  int workers() const override { return threads_.num_threads; }

  void Run(int count, const std::function<void(int)>& body) override {
    // TensorFlow's threads flush subnormals, the caller may not: all workers must round alike.
    const auto run = [&](int64_t begin, int64_t end) {
      const ::tensorflow::port::ScopedFlushDenormal flush;
      for (int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
    };
    if (count <= 1) {
      run(0, count);
      return;
    }
    constexpr int64_t kCost = 1 << 30;  // of a worker: high enough for a thread each
    threads_.workers->ParallelFor(count, kCost, run);
  }

 private:
  const ::tensorflow::DeviceBase::CpuWorkerThreads& threads_;
};

template <typename Operation>
void RunOperation(OpKernelContext* context, const Geometry& geometry,
                  const typename Operation::Tensors& tensors) {
  cpu::InstructionSet instruction_set;
  OP_REQUIRES_OK(context, ToTensorFlow(cpu::ChooseInstructionSet(&instruction_set)));
  IntraOpPool pool(context);
  const Operation operation(geometry, instruction_set, pool.workers());
  Tensor workspace;
  OP_REQUIRES_OK(
      context,
      context->allocate_temp(::tensorflow::DT_INT8,
                             ::tensorflow::TensorShape({operation.workspace_bytes()}), &workspace));
  operation.Run(tensors, pool, reinterpret_cast<char*>(workspace.flat<int8_t>().data()));
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
    RunOperation<cpu::Forward<CoreType<T>, CoreType<TOffset>>>(
        context, inputs.geometry,
        {Data<T>(inputs.input), Data<T>(inputs.filters), Data<TOffset>(inputs.offset),
         Data<TOffset>(inputs.mask), Data<T>(inputs.bias), MutableData<T>(output)});
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
    RunOperation<cpu::InputGradient<CoreType<T>, CoreType<TOffset>>>(
        context, inputs.geometry,
        {Data<T>(inputs.input), Data<T>(inputs.filters), Data<TOffset>(inputs.offset),
         Data<TOffset>(inputs.mask), Data<T>(inputs.output_gradient),
         MutableData<T>(input_gradient), MutableData<TOffset>(offset_gradient),
         MutableData<TOffset>(mask_gradient)});
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
    RunOperation<cpu::FilterGradient<CoreType<T>, CoreType<TOffset>>>(
        context, inputs.geometry,
        {Data<T>(inputs.input), Data<TOffset>(inputs.offset), Data<TOffset>(inputs.mask),
         Data<T>(inputs.output_gradient), MutableData<T>(filters_gradient),
         MutableData<T>(bias_gradient)});
  }
};

#define MDCN_REGISTER_KERNEL(NAME, KERNEL, T, TOFFSET)             \
  REGISTER_KERNEL_BUILDER(Name("Mdcn>" NAME)                       \
                              .Device(::tensorflow::DEVICE_CPU)    \
                              .TypeConstraint<T>("T")              \
                              .TypeConstraint<TOFFSET>("Toffset"), \
                          KERNEL<T, TOFFSET>)
#define MDCN_REGISTER_KERNELS(T, TOFFSET)                                                  \
  MDCN_REGISTER_KERNEL("ModulatedDeformConv2D", ForwardOp, T, TOFFSET);                    \
  MDCN_REGISTER_KERNEL("ModulatedDeformConv2DBackpropInput", InputGradientOp, T, TOFFSET); \
  MDCN_REGISTER_KERNEL("ModulatedDeformConv2DBackpropFilter", FilterGradientOp, T, TOFFSET)

MDCN_FOR_EACH_OP_TYPES(MDCN_REGISTER_KERNELS);

}  // namespace
}  // namespace mdcn
