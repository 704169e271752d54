// The forward half of the convolution: samples the input at every site of a chunk and writes the
// columns that the filters multiply.
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/sites.h"
#include "core/cuda/tuning.h"
#include "core/cuda/values.h"

namespace mdcn::cuda {
namespace {

template <typename T, typename TOffset, typename Index, int kWidth>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    SampleKernel(const Sites<Index> sites, int lane_bits, const T* __restrict__ input,
                 const TOffset* __restrict__ offset, const TOffset* __restrict__ mask,
                 T* __restrict__ columns) {
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
    // What the corners outside the image add: 0, or NaN where the position is NaN.
    const Real nothing = Real(0) * weights.low_low;
    for (Index channel = Index{share.lane} * kWidth; channel < sites.channels;
         channel += Index{kWidth} << lane_bits) {
      const T* from = input + channel * sites.channel_step;
      Real sum[kWidth];
      for (int i = 0; i < kWidth; ++i) sum[i] = nothing;
      ForEachCorner(sites, corners, weights, [&](Index corner, Real weight) {
        Real values[kWidth];
        Load<kWidth>(from + corner, values);
        for (int i = 0; i < kWidth; ++i) sum[i] += weight * values[i];
      });
      for (int i = 0; i < kWidth; ++i) sum[i] *= modulation;
      Store<kWidth>(sum, columns + ColumnIndex(sites, site_columns, channel));
    }
  }
}

template <typename Index, int kWidth, typename T, typename TOffset>
Status LaunchSample(const ChunkLaunch& launch, const T* input, const Sampling<TOffset>& sampling,
                    T* columns) {
  const Sites<Index> sites = MakeSites<Index>(launch.geometry, launch.chunk);
  const int lane_bits = LaneBits(sites.channels, kWidth, sizeof(T));
  return LaunchThreads("SampleKernel", SampleKernel<T, TOffset, Index, kWidth>,
                       int64_t{sites.count} << lane_bits, launch.stream, sites, lane_bits,
                       InputOf(launch, input), OffsetOf(launch, sampling.offset),
                       MaskOf(launch, sampling.mask), columns);
}

}  // namespace

template <typename T, typename TOffset>
Status Sample(const ChunkLaunch& launch, const T* input, const Sampling<TOffset>& sampling,
              T* columns) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool wide = PacksFit(launch.geometry, kWidth, InputOf(launch, input), columns);
  if (launch.index_width == IndexWidth::k32) {
    return wide ? LaunchSample<int32_t, kWidth>(launch, input, sampling, columns)
                : LaunchSample<int32_t, 1>(launch, input, sampling, columns);
  }
  return wide ? LaunchSample<int64_t, kWidth>(launch, input, sampling, columns)
              : LaunchSample<int64_t, 1>(launch, input, sampling, columns);
}

#define MDCN_INSTANTIATE(T, TOffset) \
  template Status Sample(const ChunkLaunch&, const T*, const Sampling<TOffset>&, T*);
MDCN_FOR_EACH_TYPE_PAIR(MDCN_INSTANTIATE)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cuda
