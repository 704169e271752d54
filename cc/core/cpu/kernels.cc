// The kernels of one instruction set. CMake compiles this file once for each, with the compiler's
// flags for it and MDCN_ISA as its name (kernels of two instruction sets must not meet: everything
// in here but the table is local to the unit, and no library template is used).
#include "core/cpu/product-inl.h"
#include "core/cpu/sample-inl.h"
#include "core/cpu/vector-inl.h"

namespace mdcn::cpu::MDCN_ISA {
namespace {

template <typename T, typename TOffset>
constexpr ConvolutionKernels<T, TOffset> Table() {
  using Real = ComputeType<T>;
  return {kPanelColumns<Real>,
          kRowBlock,
          kLanes<Real>,
          Pack<T>,
          Multiply<Real>,
          AddTransposedProduct<Real>,
          FrameIsFinite<T>,
          Sample<T, TOffset>,
          PositionGradients<T, TOffset>,
          Scatter<T, TOffset>,
          AddRows<T>,
          Widen<T>,
          Narrow<T>};
}

}  // namespace

extern const KernelSet kKernels;
const KernelSet kKernels = {Table<float, float>(),       Table<double, double>(),
                            Table<Half, Half>(),         Table<Half, float>(),
                            Table<BFloat16, BFloat16>(), Table<BFloat16, float>()};

}  // namespace mdcn::cpu::MDCN_ISA
