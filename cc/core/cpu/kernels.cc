// The kernels of one instruction set. CMake compiles this file once for each, with the compiler's
// flags for it and MDCN_ISA as its name (kernels of two instruction sets must not meet: everything
// in here but the table is local to the unit, and no library template is used).
#include "core/cpu/product-inl.h"
#include "core/cpu/sample-inl.h"
#include "core/cpu/vector-inl.h"

namespace mdcn::cpu::MDCN_ISA {
namespace {

template <typename T, typename TOffset>
constexpr ProductKernels<T, TOffset> Pairs() {
#if defined(MDCN_BFLOAT16_PAIRS)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {2, Pack<T, BFloat16Pair>, Multiply<BFloat16Pair>, Sample<T, TOffset, BFloat16>};
  }
#endif
  return {};
}

template <typename T, typename TOffset>
constexpr ConvolutionKernels<T, TOffset> Table() {
  using Real = ComputeType<T>;
  return {{1, Pack<T, Real>, Multiply<Real>, Sample<T, TOffset, Real>},
          Pairs<T, TOffset>(),
          kPanelColumns<Real>,
          kRowBlock,
          kLanes<Real>,
          AddTransposedProduct<Real>,
          FrameIsFinite<T>,
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
