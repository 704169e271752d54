// The convolution and its gradients on the CPU. Each is planned (tiles, scratch) by its
// constructor, given a workspace by the caller, and run. Partitioning is here; arithmetic is in the
// kernels.
//
// Results do not depend on the number of workers, nor a sample's on the batch it is in: every sum
// has an order that the geometry alone determines.
#ifndef MDCN_CORE_CPU_CONVOLUTION_H_
#define MDCN_CORE_CPU_CONVOLUTION_H_

#include <cstdint>
#include <vector>

#include "core/cpu/dispatch.h"
#include "core/cpu/kernel_table.h"
#include "core/cpu/plan.h"
#include "core/cpu/worker_pool.h"
#include "core/cpu/workspace.h"
#include "core/geometry.h"

namespace mdcn::cpu {

template <typename T, typename TOffset>
struct ForwardTensors {
  const T* input;
  const T* filters;
  const TOffset* offset;
  const TOffset* mask;  // null: DCNv1
  const T* bias;        // null: none
  T* output;
};

template <typename T, typename TOffset>
struct InputGradientTensors {
  const T* input;
  const T* filters;
  const TOffset* offset;
  const TOffset* mask;  // null: DCNv1
  const T* output_gradient;
  T* input_gradient;
  TOffset* offset_gradient;
  TOffset* mask_gradient;  // null without a mask
};

template <typename T, typename TOffset>
struct FilterGradientTensors {
  const T* input;
  const TOffset* offset;
  const TOffset* mask;  // null: DCNv1
  const T* output_gradient;
  T* filters_gradient;
  T* bias_gradient;  // null: not wanted
};

// By tiles of pixels: each is sampled and, chunk by chunk of its columns, multiplied by the
// filters, which were packed before. Or, where there are few pixels, by filters: all columns are
// sampled before, and each block of the filters is packed by who multiplies it. The sums are the
// same.
template <typename T, typename TOffset>
class Forward {
 public:
  using Real = ComputeType<T>;
  using Tensors = ForwardTensors<T, TOffset>;

  Forward(const Geometry& geometry, const InstructionSet& instruction_set, int workers);
  int64_t workspace_bytes() const { return layout_.bytes(); }
  // `workspace` is aligned to 64 bytes; the pool has at most the planned number of workers.
  void Run(const Tensors& tensors, WorkerPool& pool, char* workspace) const;

 private:
  void RunByTiles(const SampledTensors<T, TOffset>& sampled, const Tensors& tensors,
                  WorkerPool& pool, char* workspace) const;
  void RunByFilters(const SampledTensors<T, TOffset>& sampled, const Tensors& tensors,
                    WorkerPool& pool, char* workspace) const;
  void RunTile(const SampledTensors<T, TOffset>& sampled, const Tensors& tensors, PixelRange pixels,
               char* workspace, int worker) const;

  const Geometry geometry_;
  const ConvolutionKernels<T, TOffset>& kernels_;
  const ProductKernels<T, TOffset>& product_;
  int64_t tile_pixels_;
  int64_t column_stride_;         // in elements
  int64_t padded_group_filters_;  // filters of a group, in whole panels
  int64_t block_filters_;         // that are packed at a time, by filters
  std::vector<SamplingPlan> plans_;
  bool in_place_;  // sums are formed in the output itself
  bool by_filters_;
  WorkspaceLayout layout_;
  Region<bool> by_squares_;
  Region<T> channels_last_input_, zeros_, narrow_row_;
  Region<Real> packed_filters_, initial_row_, columns_, sums_;
};

// The gradients of input, offset and mask. The pixels are taken in bands: first, tile by tile, the
// gradient of the band's columns, and from it those of offset and mask; then the scatter into the
// input gradient, where each worker owns some channels of an image. So there are no atomics and no
// copies, and every sum runs over pixels in their order.
template <typename T, typename TOffset>
class InputGradient {
 public:
  using Real = ComputeType<T>;
  using Tensors = InputGradientTensors<T, TOffset>;

  InputGradient(const Geometry& geometry, const InstructionSet& instruction_set, int workers);
  int64_t workspace_bytes() const { return layout_.bytes(); }
  void Run(const Tensors& tensors, WorkerPool& pool, char* workspace) const;

 private:
  const Geometry geometry_;
  const ConvolutionKernels<T, TOffset>& kernels_;
  int64_t tile_pixels_, band_pixels_;
  int64_t column_stride_;
  std::vector<SamplingPlan> plans_;                       // of all channels
  std::vector<std::vector<SamplingPlan>> scatter_plans_;  // of each owner's channels
  WorkspaceLayout layout_;
  Region<T> channels_last_input_, channels_last_output_gradient_, zeros_;
  Region<Real> input_gradient_, packed_filters_, column_gradients_, wide_output_gradient_, dump_;
};

// The gradients of filters and bias. Each worker owns some rows of the filters and goes through all
// pixels; what a tile of pixels contributes is summed first, then added.
template <typename T, typename TOffset>
class FilterGradient {
 public:
  using Real = ComputeType<T>;
  using Tensors = FilterGradientTensors<T, TOffset>;

  FilterGradient(const Geometry& geometry, const InstructionSet& instruction_set, int workers);
  int64_t workspace_bytes() const { return layout_.bytes(); }
  void Run(const Tensors& tensors, WorkerPool& pool, char* workspace) const;

 private:
  void SumBias(const T* output_gradient, T* bias_gradient, Real* total, Real* part) const;

  const Geometry geometry_;
  const ConvolutionKernels<T, TOffset>& kernels_;
  int64_t column_stride_;
  std::vector<std::vector<SamplingPlan>> slices_;
  WorkspaceLayout layout_;
  Region<bool> by_squares_;
  Region<T> channels_last_input_, channels_last_output_gradient_, zeros_;
  Region<Real> filters_gradient_, columns_, packed_gradient_, bias_sums_;
};

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_CONVOLUTION_H_
