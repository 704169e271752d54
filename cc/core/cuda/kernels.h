// What the CUDA kernels offer the host: one launcher for each, on a chunk of output rows. No CUDA
// header is needed to call them; Half, BFloat16 and the stream are plain types here.
//
// T is the type of input, filters and output, TOffset that of offset and mask; see
// MDCN_FOR_EACH_TYPE_PAIR. All pointers are device pointers to whole tensors unless said otherwise.
// A launcher only enqueues work on the stream.
#ifndef MDCN_CORE_CUDA_KERNELS_H_
#define MDCN_CORE_CUDA_KERNELS_H_

#include <cstdint>

#include "core/geometry.h"
#include "core/status.h"
#include "core/types.h"

struct CUstream_st;

namespace mdcn::cuda {

using Stream = ::CUstream_st*;  // cudaStream_t

// Output rows [first_row, first_row + rows) of images [first_image, first_image + images). More
// than one image comes only with all of its rows.
struct Chunk {
  int64_t first_image, images;
  int64_t first_row, rows;

  int64_t pixels(const Geometry& geometry) const { return images * rows * geometry.out_width; }
  // A sample is taken at each site: a pixel, a deformable group and a tap.
  int64_t sites(const Geometry& geometry) const {
    return pixels(geometry) * geometry.mask_channels;
  }
};

// The integers that kernels index with. 64 bits cost registers and instructions.
enum class IndexWidth { k32, k64 };

// The narrowest width in which no index of a kernel overflows for a chunk of this size.
IndexWidth ChooseIndexWidth(const Geometry& geometry, int64_t images, int64_t rows);

struct ChunkLaunch {
  const Geometry& geometry;
  Chunk chunk;
  IndexWidth index_width;
  Stream stream;
};

// Where to sample. Without a mask (nullptr, DCNv1) every modulation is 1.
template <typename TOffset>
struct Sampling {
  const TOffset* offset;
  const TOffset* mask;
};

// The columns of a chunk hold mask * sample for every pixel, group, tap and channel of the group,
// in the order that lets the matrix product run without a transposition in memory:
//   channels_last:  [pixels, groups, taps, C / groups]   (threads and memory run along channels)
//   channels_first: [groups, taps, C / groups, pixels]   (threads and memory run along pixels)
// where pixels counts the chunk's output pixels, images outermost.
template <typename T, typename TOffset>
Status Sample(const ChunkLaunch& launch, const T* input, const Sampling<TOffset>& sampling,
              T* columns);

// From the gradient of the columns: the gradients of the chunk's offsets and mask (which may be
// nullptr), each written once, summed over channels without atomics.
template <typename T, typename TOffset>
Status SamplingGradient(const ChunkLaunch& launch, const T* input,
                        const Sampling<TOffset>& sampling, const T* column_gradient,
                        TOffset* offset_gradient, TOffset* mask_gradient);

// From the gradient of the columns: adds to the input gradient of the chunk's images
// (`image_gradient` points at the first of them) with atomics, in no fixed order.
template <typename T, typename TOffset>
Status ScatterInputGradient(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                            const T* column_gradient, ComputeType<T>* image_gradient);

// The same sum in a fixed order, without atomics on floating point: sites are sorted by the cell
// between four pixels in which they sample (a stable radix sort), and each input element gathers
// from the four cells around its pixel, found by bisection, in site order. Sorting costs
// O(sites * log(cells)) whatever the channels, gathering O(4 * sites * channels) as scattering
// does. `scratch` takes SortScratchBytes and nothing else is allocated.
template <typename T, typename TOffset>
Status GatherInputGradient(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                           const T* column_gradient, ComputeType<T>* image_gradient, void* scratch);
int64_t SortScratchBytes(int64_t sites, IndexWidth index_width);

// The stable sort by itself: (key, value) pairs by the lowest `key_bits` bits of non-negative keys.
// Pairs come in and go out in keys[0] and values[0]; keys[1], values[1] and counts are scratch.
template <typename Index>
struct SortBuffers {
  Index* keys[2];
  Index* values[2];
  Index* counts;  // SortCountsSize(count)
};
int64_t SortCountsSize(int64_t count);
template <typename Index>
Status SortPairs(const SortBuffers<Index>& buffers, int64_t count, int key_bits, Stream stream);

// output[n, p, f] = bias[f], for the matrix product to add to.
template <typename T>
Status BroadcastBias(const Geometry& geometry, const T* bias, T* output, Stream stream);

// bias_gradient[f] = the sum of output_gradient[n, p, f] over n and p, in a fixed order. `scratch`
// holds BiasGradientScratchSize elements.
template <typename T>
Status BiasGradient(const Geometry& geometry, const T* output_gradient, ComputeType<T>* scratch,
                    T* bias_gradient, Stream stream);
int64_t BiasGradientScratchSize(const Geometry& geometry);

// sum[i] += terms[i], and values[i] = sum[i], for 16-bit tensors that are summed in float.
template <typename T>
Status AddTo(const T* terms, int64_t count, ComputeType<T>* sum, Stream stream);
template <typename T>
Status Convert(const ComputeType<T>* sum, int64_t count, T* values, Stream stream);

Status SetZero(void* data, int64_t bytes, Stream stream);

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_KERNELS_H_
