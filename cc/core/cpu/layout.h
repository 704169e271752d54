// Tensors in another layout, all on a pool's workers: channels last, channels first, narrowed, and
// matrices packed for the product. Separate from the convolutions, which say when.
#ifndef MDCN_CORE_CPU_LAYOUT_H_
#define MDCN_CORE_CPU_LAYOUT_H_

#include <algorithm>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/cpu/plan.h"
#include "core/cpu/worker_pool.h"
#include "core/geometry.h"
#include "core/types.h"

namespace mdcn::cpu {

constexpr int64_t kTransposeBlock = 256;  // pixels of a job

// [N, C, pixels] -> [N, pixels, C].
template <typename T>
void ToChannelsLast(const T* from, int64_t batch, int64_t channels, int64_t pixels,
                    WorkerPool& pool, T* to) {
  const int64_t blocks = CeilDivide(pixels, kTransposeBlock);
  pool.RunJobs(batch * blocks, [&](int64_t job, int) {
    const int64_t image = job / blocks, begin = job % blocks * kTransposeBlock;
    const int64_t end = std::min(pixels, begin + kTransposeBlock);
    for (int64_t first = 0; first < channels; first += 16) {
      const int64_t last = std::min(channels, first + 16);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        for (int64_t channel = first; channel < last; ++channel) {
          to[(image * pixels + pixel) * channels + channel] =
              from[(image * channels + channel) * pixels + pixel];
        }
      }
    }
  });
}

// [N, pixels, C] -> [N, C, pixels], narrowed.
template <typename T, typename TOffset>
void ToChannelsFirst(const ConvolutionKernels<T, TOffset>& kernels, const ComputeType<T>* from,
                     int64_t batch, int64_t channels, int64_t pixels, WorkerPool& pool, T* to) {
  const int64_t blocks = CeilDivide(pixels, kTransposeBlock);
  pool.RunJobs(batch * blocks, [&](int64_t job, int) {
    const int64_t image = job / blocks, begin = job % blocks * kTransposeBlock;
    const int64_t end = std::min(pixels, begin + kTransposeBlock);
    ComputeType<T> line[kTransposeBlock];
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        line[pixel - begin] = from[(image * pixels + pixel) * channels + channel];
      }
      kernels.narrow(line, end - begin, to + (image * channels + channel) * pixels + begin);
    }
  });
}

template <typename T, typename TOffset>
void NarrowAll(const ConvolutionKernels<T, TOffset>& kernels, const ComputeType<T>* from,
               int64_t count, WorkerPool& pool, T* to) {
  constexpr int64_t kBlock = 1 << 16;
  pool.RunJobs(CeilDivide(count, kBlock), [&](int64_t job, int) {
    const int64_t begin = job * kBlock;
    kernels.narrow(from + begin, std::min(kBlock, count - begin), to + begin);
  });
}

// Packs `count` matrices. view(i) is the i-th; jobs follow its contiguous dimension.
template <typename T, typename TOffset, typename View>
void PackAll(const ConvolutionKernels<T, TOffset>& kernels,
             const ProductKernels<T, TOffset>& product, int64_t count, int64_t depth,
             int64_t columns, WorkerPool& pool, const View& view, ComputeType<T>* packed) {
  const int64_t panels = CeilDivide(columns, kernels.panel_columns);
  const bool along_rows = view(0).column_stride == 1;
  const int64_t job_depth = along_rows ? 64 : depth;
  const int64_t job_columns = along_rows ? columns : kernels.panel_columns;
  const int64_t depth_jobs = CeilDivide(depth, job_depth);
  const int64_t jobs = depth_jobs * CeilDivide(columns, job_columns);
  pool.RunJobs(count * jobs, [&](int64_t job, int) {
    const int64_t begin = job % depth_jobs * job_depth;
    const int64_t first = job % jobs / depth_jobs * job_columns;
    MatrixView<T> matrix = view(job / jobs);
    matrix.data += begin * matrix.depth_stride + first * matrix.column_stride;
    product.pack(matrix, std::min(job_depth, depth - begin), std::min(job_columns, columns - first),
                 depth,
                 packed + job / jobs * panels * depth * kernels.panel_columns + first * depth +
                     begin * kernels.panel_columns);
  });
}

inline bool ChannelsFirst(const Geometry& geometry) {
  return geometry.data_format == DataFormat::kChannelsFirst;
}

// The tensor itself, or its copy with the channels last.
template <typename T>
const T* ChannelsLast(const Geometry& geometry, const T* tensor, int64_t channels, int64_t pixels,
                      WorkerPool& pool, T* copy) {
  if (!ChannelsFirst(geometry)) return tensor;
  ToChannelsLast(tensor, geometry.batch, channels, pixels, pool, copy);
  return copy;
}

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_LAYOUT_H_
