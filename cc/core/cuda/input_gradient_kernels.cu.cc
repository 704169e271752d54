// The gradient of the input from the gradient of the columns, in two ways: scattered with atomics,
// or gathered in a fixed order from sites sorted by where they sample (deterministic).
#include <algorithm>

#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/sites.h"
#include "core/cuda/tuning.h"
#include "core/cuda/values.h"

namespace mdcn::cuda {
namespace {

// One element per access: the atomics of a warp then fall into as few cache lines as they can.
template <typename T, typename TOffset, typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    ScatterInputGradientKernel(const Sites<Index> sites, int lane_bits,
                               const TOffset* __restrict__ offset, const TOffset* __restrict__ mask,
                               const T* __restrict__ column_gradient,
                               ComputeType<T>* __restrict__ image_gradient) {
  using Real = ComputeType<T>;
  const Index threads = sites.count << lane_bits;
  for (Index thread = GridThread<Index>(); thread < threads; thread += GridThreads<Index>()) {
    const SiteLane<Index> share = FindSiteLane(sites.channels_last, sites.count, lane_bits, thread);
    const Site<Index> site = FindSite(sites, share.site);
    const Position<Real> position = FindPosition<Real>(sites, site, offset);
    const CornerIndices<Index> corners = FindCorners(sites, site, position);
    const SiteColumns<Index> site_columns = FindColumns(sites, site);
    const Corners<Real> weights = BilinearWeights(position.y.fraction, position.x.fraction);
    const Real modulation = FindModulation<Real>(sites, site, mask);
    for (Index channel = Index{share.lane}; channel < sites.channels;
         channel += Index{1} << lane_bits) {
      const Real gradient =
          modulation * Real(ToReal(column_gradient[ColumnIndex(sites, site_columns, channel)]));
      Real* to = image_gradient + channel * sites.channel_step;
      ForEachCorner(sites, corners, weights,
                    [&](Index corner, Real weight) { atomicAdd(to + corner, weight * gradient); });
    }
  }
}

// Cells are numbered [image][deformable group][low y + 1][low x + 1].
template <typename Index>
__device__ __forceinline__ Index CellNumber(const Sites<Index>& sites, Index image,
                                            Index deformable_group, Index y, Index x) {
  return ((image * sites.deformable_groups + deformable_group) * (Index{sites.in_height} + 1) + y) *
             (Index{sites.in_width} + 1) +
         x;
}

// keys[i] = the cell of site i, past all cells if it touches no pixel; values[i] = i.
template <typename Real, typename TOffset, typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    FindCellsKernel(const Sites<Index> sites, const TOffset* __restrict__ offset,
                    Index* __restrict__ keys, Index* __restrict__ values) {
  for (Index number = GridThread<Index>(); number < sites.count; number += GridThreads<Index>()) {
    const Site<Index> site = FindSite(sites, number);
    const Position<Real> position = FindPosition<Real>(sites, site, offset);
    const bool touches = position.y.low >= -1 && position.x.low >= -1;
    keys[number] = touches ? CellNumber<Index>(sites, site.image, site.deformable_group,
                                               Index{position.y.low} + 1, Index{position.x.low} + 1)
                           : CellNumber<Index>(sites, sites.images, 0, 0, 0);
    values[number] = number;
  }
}

// The first index whose key is at least `key`.
template <typename Index>
__device__ __forceinline__ Index LowerBound(const Index* __restrict__ keys, Index count,
                                            Index key) {
  Index begin = 0;
  while (count > 0) {
    const Index half = count / 2;
    const bool below = keys[begin + half] < key;
    begin = below ? begin + half + 1 : begin;
    count = below ? count - half - 1 : half;
  }
  return begin;
}

// Channels that a thread sums at a time, so that a site is located once for all of them; what fits
// the registers.
template <typename Real>
constexpr int kGatherWidth = 16 / sizeof(Real);

template <typename T, typename TOffset, typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    GatherInputGradientKernel(const Sites<Index> sites, int lane_bits,
                              const TOffset* __restrict__ offset, const TOffset* __restrict__ mask,
                              const T* __restrict__ column_gradient,
                              const Index* __restrict__ cells,
                              const Index* __restrict__ sites_by_cell,
                              ComputeType<T>* __restrict__ image_gradient) {
  using Real = ComputeType<T>;
  constexpr int kWidth = kGatherWidth<Real>;
  const Index width = sites.in_width, in_pixels = width * sites.in_height;
  const Index lanes = Index{1} << lane_bits;
  const Index pixels = sites.images * sites.deformable_groups * in_pixels;
  for (Index thread = GridThread<Index>(); thread < pixels << lane_bits;
       thread += GridThreads<Index>()) {
    const SiteLane<Index> share = FindSiteLane(sites.channels_last, pixels, lane_bits, thread);
    const Index part = share.site / in_pixels;
    const Index pixel = share.site - part * in_pixels;
    const Index image = part / sites.deformable_groups;
    const Index deformable_group = part - image * sites.deformable_groups;
    const Index y = pixel / width, x = pixel - y * width;
    Real* to = image_gradient + image * sites.image_step + pixel * sites.in_pixel_step +
               deformable_group * sites.channels * sites.channel_step;
    for (Index first = Index{share.lane}; first < sites.channels; first += kWidth * lanes) {
      Real sums[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const Index channel = first + i * lanes;
        sums[i] = channel < sites.channels ? to[channel * sites.channel_step] : Real(0);
      }
      // Cells (y - 1, x - 1) and (y - 1, x) are neighbours, and so are (y, x - 1) and (y, x).
      for (int below = 0; below < 2; ++below) {
        const Index cell = CellNumber<Index>(sites, image, deformable_group, y + below, x);
        const Index begin = LowerBound(cells, sites.count, cell);
        const Index end = begin + LowerBound(cells + begin, sites.count - begin, cell + 2);
        for (Index at = begin; at < end; ++at) {
          const Site<Index> site = FindSite(sites, sites_by_cell[at]);
          const Position<Real> position = FindPosition<Real>(sites, site, offset);
          const Corners<Real> weights = BilinearWeights(position.y.fraction, position.x.fraction);
          const Real low = below ? weights.low_low : weights.high_low;
          const Real high = below ? weights.low_high : weights.high_high;
          const Real weight = (position.x.low == x ? low : high);
          const Real modulation = FindModulation<Real>(sites, site, mask);
          const SiteColumns<Index> site_columns = FindColumns(sites, site);
          for (int i = 0; i < kWidth; ++i) {
            const Index channel = first + i * lanes;
            if (channel >= sites.channels) continue;
            const Real gradient =
                modulation *
                Real(ToReal(column_gradient[ColumnIndex(sites, site_columns, channel)]));
            sums[i] += weight * gradient;
          }
        }
      }
      for (int i = 0; i < kWidth; ++i) {
        const Index channel = first + i * lanes;
        if (channel < sites.channels) to[channel * sites.channel_step] = sums[i];
      }
    }
  }
}

template <typename Index, typename T, typename TOffset>
Status LaunchScatter(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                     const T* column_gradient, ComputeType<T>* image_gradient) {
  const Sites<Index> sites = MakeSites<Index>(launch.geometry, launch.chunk);
  const int lane_bits = LaneBits(sites.channels, 1, sizeof(ComputeType<T>));
  return LaunchThreads("ScatterInputGradientKernel", ScatterInputGradientKernel<T, TOffset, Index>,
                       int64_t{sites.count} << lane_bits, launch.stream, sites, lane_bits,
                       OffsetOf(launch, sampling.offset), MaskOf(launch, sampling.mask),
                       column_gradient, image_gradient);
}

template <typename Index, typename T, typename TOffset>
Status LaunchGather(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                    const T* column_gradient, ComputeType<T>* image_gradient, void* scratch) {
  const Geometry& geometry = launch.geometry;
  const Sites<Index> sites = MakeSites<Index>(geometry, launch.chunk);
  const TOffset* offset = OffsetOf(launch, sampling.offset);
  Index* const arrays = static_cast<Index*>(scratch);
  SortBuffers<Index> buffers;
  buffers.keys[0] = arrays;
  buffers.values[0] = arrays + int64_t{sites.count};
  buffers.keys[1] = arrays + 2 * int64_t{sites.count};
  buffers.values[1] = arrays + 3 * int64_t{sites.count};
  buffers.counts = arrays + 4 * int64_t{sites.count};
  MDCN_RETURN_IF_ERROR(
      LaunchThreads("FindCellsKernel", FindCellsKernel<ComputeType<T>, TOffset, Index>, sites.count,
                    launch.stream, sites, offset, buffers.keys[0], buffers.values[0]));
  const int64_t last_key =
      launch.chunk.images * geometry.deformable_groups * CellsPerImage(geometry);
  int key_bits = 0;
  while (last_key >> key_bits != 0) ++key_bits;
  MDCN_RETURN_IF_ERROR(SortPairs(buffers, sites.count, key_bits, launch.stream));
  const int lane_bits = LaneBits(sites.channels, 1, sizeof(T));
  const int64_t pixels = launch.chunk.images * geometry.deformable_groups * geometry.in_pixels;
  return LaunchThreads("GatherInputGradientKernel", GatherInputGradientKernel<T, TOffset, Index>,
                       pixels << lane_bits, launch.stream, sites, lane_bits, offset,
                       MaskOf(launch, sampling.mask), column_gradient, buffers.keys[0],
                       buffers.values[0], image_gradient);
}

}  // namespace

template <typename T, typename TOffset>
Status ScatterInputGradient(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                            const T* column_gradient, ComputeType<T>* image_gradient) {
  return launch.index_width == IndexWidth::k32
             ? LaunchScatter<int32_t>(launch, sampling, column_gradient, image_gradient)
             : LaunchScatter<int64_t>(launch, sampling, column_gradient, image_gradient);
}

template <typename T, typename TOffset>
Status GatherInputGradient(const ChunkLaunch& launch, const Sampling<TOffset>& sampling,
                           const T* column_gradient, ComputeType<T>* image_gradient,
                           void* scratch) {
  return launch.index_width == IndexWidth::k32
             ? LaunchGather<int32_t>(launch, sampling, column_gradient, image_gradient, scratch)
             : LaunchGather<int64_t>(launch, sampling, column_gradient, image_gradient, scratch);
}

int64_t SortScratchBytes(int64_t sites, IndexWidth index_width) {
  const int64_t index_bytes = index_width == IndexWidth::k32 ? sizeof(int32_t) : sizeof(int64_t);
  return (4 * sites + SortCountsSize(sites)) * index_bytes;
}

IndexWidth ChooseIndexWidth(const Geometry& g, int64_t images, int64_t rows) {
  const Chunk chunk = {0, images, 0, rows};
  const int64_t elements = std::max({
      images * g.in_pixels * g.in_channels,
      images * g.out_pixels * g.offset_channels,
      chunk.pixels(g) * g.taps * g.in_channels,
      chunk.sites(g),
      images * g.deformable_groups * CellsPerImage(g),
      g.pad_top + (g.out_height - 1) * g.stride_height + (g.kernel_height - 1) * g.dilation_height,
      g.pad_left + (g.out_width - 1) * g.stride_width + (g.kernel_width - 1) * g.dilation_width,
  });
  // Threads are fewer than twice the elements, as lanes are rounded up to a power of two; the last
  // step of a grid-stride loop goes past them by less than as many again.
  return elements < (int64_t{1} << 29) ? IndexWidth::k32 : IndexWidth::k64;
}

#define MDCN_INSTANTIATE(T, TOffset)                                                           \
  template Status ScatterInputGradient(const ChunkLaunch&, const Sampling<TOffset>&, const T*, \
                                       ComputeType<T>*);                                       \
  template Status GatherInputGradient(const ChunkLaunch&, const Sampling<TOffset>&, const T*,  \
                                      ComputeType<T>*, void*);
MDCN_FOR_EACH_TYPE_PAIR(MDCN_INSTANTIATE)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cuda
