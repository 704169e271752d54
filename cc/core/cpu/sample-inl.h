// What happens at the positions: the sampling of columns, the gradients of offset and mask, and the
// scatter of the input gradient, all vectorised over channels. Included by kernels.cc only.
#ifndef MDCN_CORE_CPU_SAMPLE_INL_H_
#define MDCN_CORE_CPU_SAMPLE_INL_H_

#include <algorithm>
#include <type_traits>

#include "core/cpu/kernel_table.h"
#include "core/cpu/positions-inl.h"
#include "core/cpu/vector-inl.h"
#include "core/sampling.h"

namespace mdcn::cpu::MDCN_ISA {
namespace {

// The four corners of a position, from a channel on.
template <typename Element>
struct CornerPixels {
  Element *low_low, *low_high, *high_low, *high_high;
};

// Calls body(i, run, corners) for the runs of a pixel, whose positions are from `first` on in the
// batch; i is the run's. Narrow layers have one for each vector or two, so this is a function of
// its own, to keep everything in registers; the body comes by value for the same reason.
template <typename Element, typename Body>
__attribute__((noinline)) void ForEachRun(const Run* run, const Run* end, int64_t first,
                                          const CornerOffsets& offsets, Element* image,
                                          const Body body) {
  for (; run < end; ++run) {
    Element* const channel = image + run->channel;
    const int64_t i = first + run->position;
    const auto corner = [&](const int64_t* bytes) {
      return reinterpret_cast<Element*>(reinterpret_cast<intptr_t>(channel) + bytes[i]);
    };
    body(i, *run,
         CornerPixels<Element>{corner(offsets.low_low), corner(offsets.low_high),
                               corner(offsets.high_low), corner(offsets.high_high)});
  }
}

template <typename Element, typename Body>
MDCN_INLINE void ForEachRun(const SamplingPlan& plan, int pixel, const CornerOffsets& offsets,
                            Element* image, const Body& body) {
  ForEachRun(plan.runs.data(), plan.runs.data() + plan.runs.size(), pixel * plan.positions, offsets,
             image, body);
}

// Calls body with a constant: the number of channels of all runs, or 0 if they are wide or differ.
// Narrow runs of constant length need no loops.
template <typename Real, typename Body>
MDCN_INLINE void WithRunChannels(const SamplingPlan& plan, const Body& body) {
  constexpr int kCount = kLanes<Real>;
  const int64_t channels = plan.runs.empty() ? 0 : plan.runs[0].count;
  for (const Run& run : plan.runs) {
    if (run.count != channels) return body(std::integral_constant<int64_t, 0>());
  }
  if (channels == kCount / 2) return body(std::integral_constant<int64_t, kCount / 2>());
  if (channels == kCount) return body(std::integral_constant<int64_t, kCount>());
  if (channels == 2 * kCount) return body(std::integral_constant<int64_t, 2 * kCount>());
  if (channels == 4 * kCount) return body(std::integral_constant<int64_t, 4 * kCount>());
  body(std::integral_constant<int64_t, 0>());
}

// Four weights that lie side by side take one load.
template <int kCount, typename Real>
MDCN_INLINE Corners<Vector<Real, kCount>> Broadcast(const Corners<Real>& weights) {
#if defined(__AVX512F__)
  if constexpr (kCount * sizeof(Real) == 64 && sizeof(Real) == 4) {
    const __m512 all = _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(&weights.low_low));
    return {_mm512_maskz_permute_ps(0xffff, all, 0x00), _mm512_maskz_permute_ps(0xffff, all, 0x55),
            _mm512_maskz_permute_ps(0xffff, all, 0xaa), _mm512_maskz_permute_ps(0xffff, all, 0xff)};
  }
#endif
#if defined(__AVX2__)
  if constexpr (kCount * sizeof(Real) == 32 && sizeof(Real) == 4) {
    const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(&weights));
    return {_mm256_permute_ps(all, 0x00), _mm256_permute_ps(all, 0x55),
            _mm256_permute_ps(all, 0xaa), _mm256_permute_ps(all, 0xff)};
  }
#endif
  if constexpr (kCount == 4 && sizeof(Real) == 4) {
    const Vector<Real, 4> all = LoadRaw<4>(&weights.low_low);
    using Lanes = Vector<int32_t, 4>;
    return {__builtin_shuffle(all, Lanes{0, 0, 0, 0}), __builtin_shuffle(all, Lanes{1, 1, 1, 1}),
            __builtin_shuffle(all, Lanes{2, 2, 2, 2}), __builtin_shuffle(all, Lanes{3, 3, 3, 3})};
  }
  const Vector<Real, kCount> zero{};
  return {zero + weights.low_low, zero + weights.low_high, zero + weights.high_low,
          zero + weights.high_high};
}

// Fused, the order is low_low, low_high, high_low, high_high: corners that a square was moved to
// are added where those that exist would have been, so that the two ways to sample agree to the
// last bit.
template <typename T, typename V, typename Load>
MDCN_INLINE V SumOfCorners(const CornerPixels<const T>& pixels, const Corners<V>& weights,
                           const Load& load) {
  return weights.low_high * load(pixels.low_high) + weights.low_low * load(pixels.low_low) +
         weights.high_low * load(pixels.high_low) + weights.high_high * load(pixels.high_high);
}

// Channels from `i` on, as many as fill vectors.
template <int kCount, typename T, typename V, typename Column>
MDCN_INLINE int64_t InterpolateVectors(const CornerPixels<const T>& pixels,
                                       const Corners<V>& weights, int64_t i, int64_t channels,
                                       Column* to) {
#pragma GCC unroll 4
  for (; i + kCount <= channels; i += kCount) {
    const auto load = [i](const T* from) { return Load<kCount>(from + i); };
    Store<kCount>(SumOfCorners(pixels, weights, load), to + i);
  }
  return i;
}

// From bfloat16 to bfloat16, two vectors at a time: the even channels and the odd ones. To widen
// and to store neighbours together takes twice as many operations.
template <int kCount>
MDCN_INLINE int64_t InterpolatePairs(const CornerPixels<const BFloat16>& pixels,
                                     const Corners<Vector<float, kCount>>& weights, int64_t i,
                                     int64_t channels, BFloat16* to) {
  using Reals = Vector<float, kCount>;
  for (; i + 2 * kCount <= channels; i += 2 * kCount) {
    const auto load = [i](const BFloat16* from) {
      return BitCast<Vector<BFloat16Pair, kCount>>(LoadRaw<2 * kCount>(&from[i].bits));
    };
    const auto even = [&](const BFloat16* from) { return BitCast<Reals>(load(from) << 16); };
    const auto odd = [&](const BFloat16* from) { return BitCast<Reals>(load(from) & 0xffff0000u); };
    StorePairs<kCount>(SumOfCorners(pixels, weights, even), SumOfCorners(pixels, weights, odd),
                       to + i);
  }
  return i;
}

template <typename Real>
MDCN_INLINE Corners<Real> WeightsAt(const MaskedWeights<Real>& weights, int64_t position) {
  return {weights.low_low[position], weights.low_high[position], weights.high_low[position],
          weights.high_high[position]};
}

// All channels from `i` on: in vectors, then in shorter ones.
template <int kCount, typename T, typename Real, typename Column>
MDCN_INLINE void Interpolate(const CornerPixels<const T>& pixels, const Corners<Real>& weights,
                             int64_t i, int64_t channels, Column* to) {
  if (i + kCount <= channels) {
    const auto vectors = Broadcast<kCount>(weights);
    if constexpr (std::is_same_v<Column, BFloat16> && kCount == kLanes<Real>) {
      i = InterpolatePairs<kCount>(pixels, vectors, i, channels, to);
    }
    i = InterpolateVectors<kCount>(pixels, vectors, i, channels, to);
  }
  if constexpr (kCount > 1) {
    if (i < channels) Interpolate<kCount / 2>(pixels, weights, i, channels, to);
  }
}

// The runs of a pixel, square by square; `bytes` and `weights` are those of its positions.
template <int64_t kRunChannels, typename T, typename Real, typename Column>
__attribute__((noinline)) void SampleSquares(const Run* run, const Run* end, const int32_t* bytes,
                                             const Corners<Real>* weights, const T* image,
                                             int64_t pixel_size, int64_t row_size, Column* to) {
  constexpr int kCount = kLanes<Real>;
  for (; run < end; ++run) {
    const int64_t channels = kRunChannels > 0 ? kRunChannels : run->count;
    const T* const low = reinterpret_cast<const T*>(
        reinterpret_cast<const char*>(image + run->channel) + bytes[run->position]);
    const T* const high = low + row_size;
    const CornerPixels<const T> corners{low, low + pixel_size, high, high + pixel_size};
    Interpolate<kCount>(corners, weights[run->position], 0, channels, to + run->column);
  }
}

// Pixels are first touched in no order that the hardware could foresee. Asked for some rows ahead
// (6 to 16 are alike for offsets ~ N(0, 2)), large images of few channels are sampled a quarter
// faster. Images of many channels gain nothing.
template <typename T>
MDCN_INLINE void PrefetchRowsAhead(const Geometry& geometry, const PixelBatch& batch,
                                   const T* image) {
  constexpr int64_t kRows = 8, kMaxPixelBytes = 256, kLineBytes = 64;
  const int64_t pixel_bytes = geometry.in_channels * static_cast<int64_t>(sizeof(T));
  if (pixel_bytes > kMaxPixelBytes) return;
  const int64_t row = std::min(geometry.in_height - 1, batch.row * geometry.stride_height + kRows);
  const int64_t column = std::min(geometry.in_width - 1, batch.column * geometry.stride_width);
  const int64_t pixels = std::min(geometry.in_width - column, batch.count * geometry.stride_width);
  const char* const line = reinterpret_cast<const char*>(
      image + (row * geometry.in_width + column) * geometry.in_channels);
  for (int64_t i = 0; i < pixels * pixel_bytes; i += kLineBytes) __builtin_prefetch(line + i);
}

// Columns are stored as Column: Reals, or bfloat16s, of which two are a pair.
template <typename T, typename TOffset, typename Column>
void Sample(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
            const SamplingPlan& plan, PixelRange pixels, const bool* by_squares, const T* zeros,
            ComputeType<T>* columns, int64_t column_stride) {
  using Real = ComputeType<T>;
  const Locator<T, TOffset> locator(geometry, tensors, plan);
  column_stride *= sizeof(Real) / sizeof(Column);
  WithRunChannels<Real>(plan, [&](auto run_channels) {
    constexpr int64_t kRunChannels = decltype(run_channels)::value;
    Squares<Real> squares;
    Positions<Real> positions;
    MaskedWeights<Real> weights;
    CornerOffsets offsets;
    auto* to = reinterpret_cast<Column*>(columns);
    ForEachBatch(geometry, plan, pixels, [&](const PixelBatch& batch) {
      const T* image = tensors.input + batch.image * geometry.in_pixels * geometry.in_channels;
      PrefetchRowsAhead(geometry, batch, image);
      if (by_squares[batch.image]) {
        locator.Locate(batch, &squares);
        for (int pixel = 0; pixel < batch.count; ++pixel, to += column_stride) {
          const int first = pixel * plan.positions;
          SampleSquares<kRunChannels>(plan.runs.data(), plan.runs.data() + plan.runs.size(),
                                      squares.bytes + first, squares.weights + first, image,
                                      geometry.in_channels,
                                      geometry.in_width * geometry.in_channels, to);
        }
      } else {
        const int count = WholeVectors<Real>(batch.count * plan.positions);
        locator.Locate(batch, &positions);
        WeighCorners(positions, count, &weights);
        LocateCorners(geometry, positions, count, image, zeros, &offsets);
        for (int pixel = 0; pixel < batch.count; ++pixel, to += column_stride) {
          ForEachRun(
              plan, pixel, offsets, image,
              [=, &weights](int64_t i, const Run& run, const CornerPixels<const T>& corners) {
                Interpolate<kLanes<Real>>(corners, WeightsAt(weights, i), 0, run.count,
                                          to + run.column);
              });
        }
      }
    });
  });
}

// The sums of the lanes of four vectors.
template <int kCount, typename Real>
MDCN_INLINE Corners<Real> SumLanes(const Vector<Real, kCount>& a, const Vector<Real, kCount>& b,
                                   const Vector<Real, kCount>& c, const Vector<Real, kCount>& d) {
  if constexpr (kCount == 1) {
    return {a, b, c, d};
  } else if constexpr (kCount == 2) {
    return {a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
  } else {
    // Pairs of vectors are folded into one, four lanes at a time: {a0 + a2, b0 + b2, a1 + a3, ...}.
    using Index = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
    Vector<Index, kCount> low, high, low_pair, high_pair;
    for (int i = 0; i < kCount; ++i) {
      const int block = i / 4 * 4, lane = i % 4;
      low[i] = block + lane / 2 + (lane % 2) * kCount;
      high[i] = low[i] + 2;
      low_pair[i] = block + lane % 2 + (lane / 2) * kCount;
      high_pair[i] = low_pair[i] + 2;
    }
    const Vector<Real, kCount> ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    const Vector<Real, kCount> cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
    Vector<Real, kCount> sums =
        __builtin_shuffle(ab, cd, low_pair) + __builtin_shuffle(ab, cd, high_pair);
    for (int distance = kCount / 2; distance >= 4; distance /= 2) {
      Vector<Index, kCount> rotated;
      for (int i = 0; i < kCount; ++i) rotated[i] = (i + distance) % kCount;
      sums += __builtin_shuffle(sums, rotated);
    }
    return {sums[0], sums[1], sums[2], sums[3]};
  }
}

// Adds to `sums` the dot products of the corner pixels with the gradient.
template <int kCount, typename T, typename Real>
MDCN_INLINE void AddDotProducts(const CornerPixels<const T>& pixels, const Real* gradient,
                                int64_t i, int64_t channels, Corners<Real>* sums) {
  if (i + kCount <= channels) {
    Vector<Real, kCount> low_low{}, low_high{}, high_low{}, high_high{};
    for (; i + kCount <= channels; i += kCount) {
      const Vector<Real, kCount> g = Load<kCount>(gradient + i);
      low_low += Load<kCount>(pixels.low_low + i) * g;
      low_high += Load<kCount>(pixels.low_high + i) * g;
      high_low += Load<kCount>(pixels.high_low + i) * g;
      high_high += Load<kCount>(pixels.high_high + i) * g;
    }
    const Corners<Real> lanes = SumLanes<kCount, Real>(low_low, low_high, high_low, high_high);
    sums->low_low += lanes.low_low;
    sums->low_high += lanes.low_high;
    sums->high_low += lanes.high_low;
    sums->high_high += lanes.high_high;
  }
  if constexpr (kCount > 1) {
    if (i < channels) AddDotProducts<kCount / 2>(pixels, gradient, i, channels, sums);
  }
}

template <typename T>
MDCN_INLINE void WriteChannels(const ComputeType<T>* from, int count, int64_t stride, T* to) {
  for (int i = 0; i < count; ++i) to[i * stride] = NarrowOne(from[i], T{});
}

template <typename T, typename TOffset>
void PositionGradients(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
                       const SamplingPlan& plan, PixelRange pixels, const T* zeros,
                       const ComputeType<T>* column_gradients, int64_t column_stride,
                       TOffset* offset_gradient, TOffset* mask_gradient) {
  using Real = ComputeType<T>;
  const Locator<T, TOffset> locator(geometry, tensors, plan);
  const ChannelAddress offset_address(geometry, geometry.offset_channels);
  const ChannelAddress mask_address(geometry, geometry.mask_channels);
  Positions<Real> positions;
  CornerOffsets offsets;
  Corners<Real> sums[kMaxPositions];
  alignas(64) Real offset_values[2 * kMaxPositions], mask_values[kMaxPositions];
  ForEachBatch(geometry, plan, pixels, [&](const PixelBatch& batch) {
    const int count = WholeVectors<Real>(batch.count * plan.positions);
    locator.Locate(batch, &positions);
    for (int i = 0; i < count; ++i) sums[i] = {};
    const T* image = tensors.input + batch.image * geometry.in_pixels * geometry.in_channels;
    LocateCorners(geometry, positions, count, image, zeros, &offsets);
    for (int pixel = 0; pixel < batch.count; ++pixel, column_gradients += column_stride) {
      ForEachRun(plan, pixel, offsets, image,
                 [&sums, column_gradients](int64_t i, const Run& run,
                                           const CornerPixels<const T>& corners) {
                   AddDotProducts<kLanes<Real>>(corners, column_gradients + run.column, 0,
                                                run.count, &sums[i]);
                 });
    }
    for (int i = 0; i < count; ++i) {
      const Real fraction_y = positions.fraction_y[i], fraction_x = positions.fraction_x[i];
      const Corners<Real> weights = BilinearWeights(fraction_y, fraction_x);
      mask_values[i] = weights.low_low * sums[i].low_low + weights.low_high * sums[i].low_high +
                       weights.high_low * sums[i].high_low + weights.high_high * sums[i].high_high;
      offset_values[2 * i] = positions.modulation[i] * DerivativeY(sums[i], fraction_x);
      offset_values[2 * i + 1] = positions.modulation[i] * DerivativeX(sums[i], fraction_y);
    }
    int first = 0;
    for (const PositionSpan& span : plan.spans) {
      const int written = batch.count * span.count;
      WriteChannels(offset_values + 2 * first, 2 * written, offset_address.channel_stride,
                    offset_gradient + offset_address(batch) +
                        2 * span.mask_channel * offset_address.channel_stride);
      if (mask_gradient != nullptr) {
        WriteChannels(
            mask_values + first, written, mask_address.channel_stride,
            mask_gradient + mask_address(batch) + span.mask_channel * mask_address.channel_stride);
      }
      first += written;
    }
  });
}

template <int kCount, typename Real>
MDCN_INLINE void AddToCorners(const Real* gradient, const Corners<Real>& weights, int64_t i,
                              int64_t channels, const CornerPixels<Real>& pixels) {
  for (; i + kCount <= channels; i += kCount) {
    const Vector<Real, kCount> g = Load<kCount>(gradient + i);
    const auto add = [&](Real weight, Real* to) {
      Store<kCount>(Load<kCount>(to + i) + weight * g, to + i);
    };
    add(weights.low_low, pixels.low_low);
    add(weights.low_high, pixels.low_high);
    add(weights.high_low, pixels.high_low);
    add(weights.high_high, pixels.high_high);
  }
  if constexpr (kCount > 1) {
    if (i < channels) AddToCorners<kCount / 2>(gradient, weights, i, channels, pixels);
  }
}

template <typename T, typename TOffset>
void Scatter(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
             const SamplingPlan& plan, PixelRange pixels, ComputeType<T>* dump,
             const ComputeType<T>* column_gradients, int64_t column_stride,
             ComputeType<T>* input_gradient) {
  using Real = ComputeType<T>;
  const Locator<T, TOffset> locator(geometry, tensors, plan);
  Positions<Real> positions;
  MaskedWeights<Real> weights;
  CornerOffsets offsets;
  ForEachBatch(geometry, plan, pixels, [&](const PixelBatch& batch) {
    const int count = WholeVectors<Real>(batch.count * plan.positions);
    locator.Locate(batch, &positions);
    WeighCorners(positions, count, &weights);
    Real* image = input_gradient + batch.image * geometry.in_pixels * geometry.in_channels;
    LocateCorners<Real>(geometry, positions, count, image, dump, &offsets);
    for (int pixel = 0; pixel < batch.count; ++pixel, column_gradients += column_stride) {
      ForEachRun(plan, pixel, offsets, image,
                 [&weights, column_gradients](int64_t i, const Run& run,
                                              const CornerPixels<Real>& corners) {
                   AddToCorners<kLanes<Real>>(column_gradients + run.column, WeightsAt(weights, i),
                                              0, run.count, corners);
                 });
    }
  });
}

}  // namespace
}  // namespace mdcn::cpu::MDCN_ISA

#endif  // MDCN_CORE_CPU_SAMPLE_INL_H_
