// The forward pass in bfloat16 as tests/test_bfloat16_pairs.py calls it, with ctypes. The kernels
// are those of the baseline compiled with MDCN_BFLOAT16_PAIRS: they go through pairs, as on a CPU
// that has an instruction for them, on a CPU that has not.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/cpu/convolution.h"
#include "core/cpu/thread_pool.h"

namespace mdcn::cpu {
namespace baseline {
extern const KernelSet kKernels;
}

namespace {

// Whether nothing was written behind the workspace, which is full of NaN before.
template <typename TOffset>
bool RunForward(const Geometry& geometry, int workers, const void* const* tensors, void* output) {
  const Forward<BFloat16, TOffset> forward(geometry, {"pairs", &baseline::kKernels}, workers);
  const int64_t bytes = forward.workspace_bytes();
  const std::unique_ptr<char, void (*)(void*)> workspace(
      static_cast<char*>(std::aligned_alloc(64, bytes / 64 * 64 + 64)), std::free);
  std::memset(workspace.get(), 0xff, bytes / 64 * 64 + 64);
  ThreadPool pool(workers);
  forward.Run({static_cast<const BFloat16*>(tensors[0]), static_cast<const BFloat16*>(tensors[1]),
               static_cast<const TOffset*>(tensors[2]), static_cast<const TOffset*>(tensors[3]),
               static_cast<const BFloat16*>(tensors[4]), static_cast<BFloat16*>(output)},
              pool, workspace.get());
  for (int64_t i = bytes; i < bytes / 64 * 64 + 64; ++i) {
    if (workspace.get()[i] != '\xff') return false;
  }
  return true;
}

}  // namespace
}  // namespace mdcn::cpu

// `attributes`: strides, dilations, paddings (top, bottom, left, right), whether channels come
// first, groups, deformable groups. `shapes`: of inputs, filters, offset, mask and bias, one after
// the other. `tensors`: in the same order; mask and bias may be null. Returns 0 if all went well.
extern "C" int Forward(const int64_t* attributes, const int64_t* shapes, int workers,
                       int offset_is_float, const void* const* tensors, void* output) {
  mdcn::Attributes a;
  a.strides = {attributes[0], attributes[1]};
  a.dilations = {attributes[2], attributes[3]};
  a.padding = mdcn::Padding::kExplicit;
  a.explicit_paddings = {attributes[4], attributes[5], attributes[6], attributes[7]};
  a.data_format =
      attributes[8] ? mdcn::DataFormat::kChannelsFirst : mdcn::DataFormat::kChannelsLast;
  a.groups = attributes[9];
  a.deformable_groups = attributes[10];
  const auto shape = [&](int i, int rank) {
    return std::vector<int64_t>(shapes + 4 * i, shapes + 4 * i + rank);
  };
  const mdcn::TensorShapes tensor_shapes{
      shape(0, 4), shape(1, 4),           shape(2, 4), tensors[3] != nullptr,
      shape(3, 4), tensors[4] != nullptr, shape(4, 1)};
  mdcn::Geometry geometry;
  if (!mdcn::MakeGeometry("Forward", a, tensor_shapes, &geometry).ok()) return 1;
  const auto run =
      offset_is_float ? mdcn::cpu::RunForward<float> : mdcn::cpu::RunForward<mdcn::BFloat16>;
  return run(geometry, workers, tensors, output) ? 0 : 2;
}
