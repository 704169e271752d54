// What one instruction set offers: a table of kernels for each pair of types. The kernels are
// compiled from one source (kernels.cc) for each instruction set; they see pointers and plans, and
// know nothing of threads, workspaces or TensorFlow.
#ifndef MDCN_CORE_CPU_KERNEL_TABLE_H_
#define MDCN_CORE_CPU_KERNEL_TABLE_H_

#include <cstdint>

#include "core/cpu/plan.h"
#include "core/geometry.h"
#include "core/types.h"

namespace mdcn::cpu {

// A matrix as the kernels read it: element (depth, column) of `group` is at
// data[depth * depth_stride + column * column_stride].
template <typename T>
struct MatrixView {
  const T* data;
  int64_t depth_stride, column_stride;
};

// The tensors that are sampled. The input is channels-last whatever the geometry's data format.
template <typename T, typename TOffset>
struct SampledTensors {
  const T* input;
  const TOffset* offset;
  const TOffset* mask;  // null: every modulation is 1
};

// Pixels are numbered over the whole batch: image * out_pixels + row * out_width + column.
struct PixelRange {
  int64_t first, count;
};

// What the columns go through: packed filters, sampling and the product of the two, all with the
// same elements. An element is a Real; or, for bfloat16 on machines that multiply it, the pair of
// two consecutive depths (the even one in the low half), which takes the room of one Real. Every
// depth and stride here counts elements, of whatever kind.
template <typename T, typename TOffset>
struct ProductKernels {
  using Real = ComputeType<T>;

  int element_depth;  // depths of an element: 1 or 2

  // Packs depths [0, depth) of columns [0, columns) of a matrix into panels
  // [panel][panel_depth][panel_columns], the last one filled up with zeros. The second row of a
  // pair is half a depth_stride from the first.
  void (*pack)(const MatrixView<T>& matrix, int64_t depth, int64_t columns, int64_t panel_depth,
               Real* panels);

  // c[row][column] (+)= sum over depth of a[row][depth] * b[depth][column]. Columns of c are
  // written in whole vectors. `panel_depth` is the depth with which b was packed.
  void (*multiply)(const Real* a, int64_t a_stride, int64_t rows, const Real* b,
                   int64_t panel_depth, int64_t depth, int64_t columns, Real* c, int64_t c_stride,
                   bool accumulate);

  // Fills the plan's columns for each pixel, masked. `by_squares` says of each image whether it is
  // sampled square by square: its frame must be finite, and it must have at least two rows and
  // columns and less than 2 GiB. `zeros` has in_channels zeros: what a corner outside of another
  // image points to.
  void (*sample)(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
                 const SamplingPlan& plan, PixelRange pixels, const bool* by_squares,
                 const T* zeros, Real* columns, int64_t column_stride);
};

template <typename T, typename TOffset>
struct ConvolutionKernels : ProductKernels<T, TOffset> {
  using Real = ComputeType<T>;

  ProductKernels<T, TOffset> pairs;  // all null where there are none

  int panel_columns;  // in a packed panel: what the product computes side by side
  int row_block;      // rows that the product computes at a time
  int vector_length;  // elements of Real

  // c[row][column] += sum over depth of a[depth][row] * b[depth][column], the sum formed first.
  void (*add_transposed_product)(const Real* a, int64_t a_stride, int64_t rows, const Real* b,
                                 int64_t depth, int64_t columns, Real* c, int64_t c_stride);

  // Whether the outermost two rows and columns of a channels-last image are finite.
  bool (*frame_is_finite)(const T* image, int64_t height, int64_t width, int64_t channels);

  // From the gradient of whole rows of columns: the gradients of offset and mask (null: not wanted)
  // at the plan's positions.
  void (*position_gradients)(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
                             const SamplingPlan& plan, PixelRange pixels, const T* zeros,
                             const Real* column_gradients, int64_t column_stride,
                             TOffset* offset_gradient, TOffset* mask_gradient);

  // Adds to the input gradient (channels-last, whole tensor) what the plan's runs contribute.
  // `dump` has in_channels elements: where corners outside the image go.
  void (*scatter)(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
                  const SamplingPlan& plan, PixelRange pixels, Real* dump,
                  const Real* column_gradients, int64_t column_stride, Real* input_gradient);

  // sums[column] += sum over rows of from[row][column], rows contiguous, in order.
  void (*add_rows)(const T* from, int64_t rows, int64_t columns, Real* sums);

  // Conversions of contiguous elements.
  void (*widen)(const T* from, int64_t count, Real* to);
  void (*narrow)(const Real* from, int64_t count, T* to);
};

struct KernelSet : ConvolutionKernels<float, float>,
                   ConvolutionKernels<double, double>,
                   ConvolutionKernels<Half, Half>,
                   ConvolutionKernels<Half, float>,
                   ConvolutionKernels<BFloat16, BFloat16>,
                   ConvolutionKernels<BFloat16, float> {};

template <typename T, typename TOffset>
const ConvolutionKernels<T, TOffset>& KernelsOf(const KernelSet& set) {
  return set;
}

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_KERNEL_TABLE_H_
