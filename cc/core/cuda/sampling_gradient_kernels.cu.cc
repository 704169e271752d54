// The gradients of offset and mask from the gradient of the columns. Each site's sum over channels
// is made by lanes of one warp (channels_last) or by one thread (channels_first): no atomics, and
// the same order in every run.
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/sites.h"
#include "core/cuda/tuning.h"
#include "core/cuda/values.h"

namespace mdcn::cuda {
namespace {

// The sum over a site's lanes, which are neighbours in one warp, in its lane 0.
template <typename Real>
__device__ __forceinline__ Real SumOverLanes(Real value, int lanes) {
  const unsigned own = threadIdx.x % kWarpSize;
  const unsigned members = (lanes == kWarpSize ? 0xffffffffu : (1u << lanes) - 1)
                           << (own / lanes * lanes);
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(members, value, distance, lanes);
  }
  return value;
}

template <typename T, typename TOffset, typename Index, int kWidth>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    SamplingGradientKernel(const Sites<Index> sites, int lane_bits, const T* __restrict__ input,
                           const TOffset* __restrict__ offset, const TOffset* __restrict__ mask,
                           const T* __restrict__ column_gradient,
                           TOffset* __restrict__ offset_gradient,
                           TOffset* __restrict__ mask_gradient) {
  using Real = ComputeType<T>;
  const Index threads = sites.count << lane_bits;
  for (Index thread = GridThread<Index>(); thread < threads; thread += GridThreads<Index>()) {
    const SiteLane<Index> share = FindSiteLane(true, sites.count, lane_bits, thread);
    const Site<Index> site = FindSite(sites, share.site);
    const Position<Real> position = FindPosition<Real>(sites, site, offset);
    const CornerIndices<Index> corners = FindCorners(sites, site, position);
    const SiteColumns<Index> site_columns = FindColumns(sites, site);
    // Value and derivatives are linear in the corners: sum gradient * corner first, weigh then.
    Corners<Real> sums = {0, 0, 0, 0};
    for (Index channel = Index{share.lane} * kWidth; channel < sites.channels;
         channel += Index{kWidth} << lane_bits) {
      Real gradient[kWidth];
      Load<kWidth>(column_gradient + ColumnIndex(sites, site_columns, channel), gradient);
      const T* from = input + channel * sites.channel_step;
      ForEachCorner(sites, corners, sums, [&](Index corner, Real& sum) {
        Real values[kWidth];
        Load<kWidth>(from + corner, values);
        for (int i = 0; i < kWidth; ++i) sum += gradient[i] * values[i];
      });
    }
    const Corners<Real> weights = BilinearWeights(position.y.fraction, position.x.fraction);
    const int lanes = 1 << lane_bits;
    const Real dy = SumOverLanes(DerivativeY(sums, position.x.fraction), lanes);
    const Real dx = SumOverLanes(DerivativeX(sums, position.y.fraction), lanes);
    const Real value =
        SumOverLanes(weights.low_low * sums.low_low + weights.low_high * sums.low_high +
                         weights.high_low * sums.high_low + weights.high_high * sums.high_high,
                     lanes);
    if (share.lane != 0) continue;
    const Real modulation = FindModulation<Real>(sites, site, mask);
    const Index at = OffsetIndex(sites, site);
    FromReal(modulation * dy, &offset_gradient[at]);
    FromReal(modulation * dx, &offset_gradient[at + sites.mask_channel_step]);
    if (mask_gradient != nullptr) FromReal(value, &mask_gradient[MaskIndex(sites, site)]);
  }
}

template <typename Index, int kWidth, typename T, typename TOffset>
Status LaunchSamplingGradient(const ChunkLaunch& launch, const T* input,
                              const Sampling<TOffset>& sampling, const T* column_gradient,
                              TOffset* offset_gradient, TOffset* mask_gradient) {
  const Sites<Index> sites = MakeSites<Index>(launch.geometry, launch.chunk);
  // In channels_first neighbouring threads belong on neighbouring pixels, so one sums alone.
  const int lane_bits = sites.channels_last ? LaneBits(sites.channels, kWidth, sizeof(T)) : 0;
  return LaunchThreads("SamplingGradientKernel", SamplingGradientKernel<T, TOffset, Index, kWidth>,
                       int64_t{sites.count} << lane_bits, launch.stream, sites, lane_bits,
                       InputOf(launch, input), OffsetOf(launch, sampling.offset),
                       MaskOf(launch, sampling.mask), column_gradient,
                       OffsetOf(launch, offset_gradient), MaskOf(launch, mask_gradient));
}

}  // namespace

template <typename T, typename TOffset>
Status SamplingGradient(const ChunkLaunch& launch, const T* input,
                        const Sampling<TOffset>& sampling, const T* column_gradient,
                        TOffset* offset_gradient, TOffset* mask_gradient) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool wide = PacksFit(launch.geometry, kWidth, InputOf(launch, input), column_gradient);
  const auto start = [&](auto launcher) {
    return launcher(launch, input, sampling, column_gradient, offset_gradient, mask_gradient);
  };
  if (launch.index_width == IndexWidth::k32) {
    return wide ? start(LaunchSamplingGradient<int32_t, kWidth, T, TOffset>)
                : start(LaunchSamplingGradient<int32_t, 1, T, TOffset>);
  }
  return wide ? start(LaunchSamplingGradient<int64_t, kWidth, T, TOffset>)
              : start(LaunchSamplingGradient<int64_t, 1, T, TOffset>);
}

#define MDCN_INSTANTIATE(T, TOffset)                                                       \
  template Status SamplingGradient(const ChunkLaunch&, const T*, const Sampling<TOffset>&, \
                                   const T*, TOffset*, TOffset*);
MDCN_FOR_EACH_TYPE_PAIR(MDCN_INSTANTIATE)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cuda
