// Where positions sample: pixels taken side by side, their positions computed in vectors over taps
// and deformable groups (narrow layers spend much of their time there), and the addresses and
// weights of the corners. No value of the image is read here but those of its frame. Included by
// sample-inl.h only.
//
// There are two ways. Corner by corner, what lies outside the image is read from zeros: right for
// every image, and what the gradients use. Square by square, near the border the four pixels next
// to the position are read instead, some with weight 0: columns are sampled in two thirds of the
// time, and are the same where those pixels, all in the image's frame, are finite.
#ifndef MDCN_CORE_CPU_POSITIONS_INL_H_
#define MDCN_CORE_CPU_POSITIONS_INL_H_

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/cpu/kernel_table.h"
#include "core/cpu/vector-inl.h"
#include "core/sampling.h"

namespace mdcn::cpu::MDCN_ISA {
namespace {

// Pixels side by side in a row of an image.
struct PixelBatch {
  int64_t image, row, column;
  int count;
  int64_t first;  // pixel within the image
};

// An element of an offset-like tensor at (pixel, channel), in either layout.
struct ChannelAddress {
  int64_t image_stride, pixel_stride, channel_stride;

  ChannelAddress(const Geometry& geometry, int64_t channels) {
    const bool last = geometry.data_format == DataFormat::kChannelsLast;
    image_stride = geometry.out_pixels * channels;
    pixel_stride = last ? channels : 1;
    channel_stride = last ? 1 : geometry.out_pixels;
  }

  // Of the first pixel of a batch.
  int64_t operator()(const PixelBatch& batch) const {
    return batch.image * image_stride + batch.first * pixel_stride;
  }
};

// Walks over a range of pixels: calls body(batch) for as many at a time as the plan has room for.
template <typename Body>
MDCN_INLINE void ForEachBatch(const Geometry& geometry, const SamplingPlan& plan, PixelRange pixels,
                              const Body& body) {
  const int64_t pixel = pixels.first % geometry.out_pixels;
  PixelBatch batch{pixels.first / geometry.out_pixels, pixel / geometry.out_width,
                   pixel % geometry.out_width, 0, pixel};
  for (int64_t left = pixels.count; left > 0; left -= batch.count) {
    batch.count = static_cast<int>(
        std::min<int64_t>({plan.batch_pixels, left, geometry.out_width - batch.column}));
    body(batch);
    batch.first += batch.count;
    batch.column += batch.count;
    if (batch.column < geometry.out_width) continue;
    batch.column = 0;
    if (++batch.row < geometry.out_height) continue;
    batch.row = batch.first = 0;
    ++batch.image;
  }
}

// The positions of a batch, pixel by pixel, one array element each. Arrays are computed in whole
// vectors; what follows the last position is never used.
template <typename Real>
struct alignas(64) Positions {
  int32_t low_y[kMaxPositions], low_x[kMaxPositions];
  Real fraction_y[kMaxPositions], fraction_x[kMaxPositions];
  const Real* modulation;  // in the mask itself, or in the array below
  Real modulation_copy[kMaxPositions];
};

template <typename Real>
MDCN_INLINE int WholeVectors(int count) {
  return (count + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

// The channels of the spans at the pixels of a batch, `per_position` for each position, as
// contiguous Reals of which whole vectors can be read: in the tensor itself, which ends at `end`,
// or else in `copy`. Where there is more than one pixel, all channels are one span.
template <typename T, typename Real>
MDCN_INLINE const Real* ReadChannels(const T* pixel, int pixels, const T* end,
                                     int64_t channel_stride, int per_position,
                                     const std::vector<PositionSpan>& spans, Real* copy) {
  if constexpr (std::is_same_v<T, Real>) {
    if (channel_stride == 1 && spans.size() == 1) {
      const Real* first = pixel + per_position * spans[0].mask_channel;
      const int count = per_position * WholeVectors<Real>(pixels * spans[0].count);
      if (end - first >= count) return first;
    }
  }
  Real* to = copy;
  for (const PositionSpan& span : spans) {
    const T* from = pixel + per_position * span.mask_channel * channel_stride;
    const int count = per_position * pixels * span.count;
    if (channel_stride == 1) {
      Widen(from, count, to);
    } else {
      for (int i = 0; i < count; ++i) to[i] = Load<1>(from + i * channel_stride);
    }
    to += count;
  }
  return copy;
}

// Two neighbouring pixels of an axis that both exist, and their weights.
template <typename Real>
struct PixelPair {
  int32_t first;
  Real low, high;
};

// The pair that a position samples, or the nearest one: a pixel that the position does not touch
// weighs 0, exactly; the others weigh what BilinearWeights says, to the last bit. A NaN position
// makes both weights NaN. Comparisons are such that none of this takes a branch.
template <typename Real>
MDCN_INLINE PixelPair<Real> PairOnAxis(Real position, int32_t last) {
  const Real positive = position > Real(0) ? position : Real(0);  // 0 for NaN
  const int32_t first = static_cast<int32_t>(positive < Real(last) ? positive : Real(last));
  const Real distance = position - Real(first);
  const Real to_first = Real(1) + distance, from_first = Real(1) - distance;
  const Real from_second = Real(2) - distance;
  const Real low = to_first < from_first ? to_first : from_first;
  const Real high = distance < from_second ? distance : from_second;
  return {first, low < Real(0) ? Real(0) : low, high < Real(0) ? Real(0) : high};
}

// For each position four pixels in a square, all inside the image: where the first one is, in bytes
// from the image on, and their masked weights.
template <typename Real>
struct alignas(64) Squares {
  int32_t bytes[kMaxPositions];
  Corners<Real> weights[kMaxPositions];
};

// Whether the outermost two rows and columns are finite: all that squares near the border touch
// though their positions do not.
template <typename T>
bool FrameIsFinite(const T* image, int64_t height, int64_t width, int64_t channels) {
  const int64_t row_size = width * channels, side = std::min<int64_t>(2, width) * channels;
  for (int64_t row = 0; row < height; ++row, image += row_size) {
    if (row < 2 || row >= height - 2) {
      if (!IsFinite(image, row_size)) return false;
    } else if (!IsFinite(image, side) || !IsFinite(image + row_size - side, side)) {
      return false;
    }
  }
  return true;
}

template <typename T, typename TOffset>
class Locator {
 public:
  using Real = ComputeType<T>;

  Locator(const Geometry& geometry, const SampledTensors<T, TOffset>& tensors,
          const SamplingPlan& plan)
      : geometry_(geometry),
        tensors_(tensors),
        plan_(plan),
        offset_address_(geometry, geometry.offset_channels),
        mask_address_(geometry, geometry.mask_channels),
        pixels_(geometry.batch * geometry.out_pixels) {}

  void Locate(const PixelBatch& batch, Positions<Real>* positions) const {
    alignas(64) Real offset_copy[2 * kMaxPositions];
    const Inputs inputs = Read(batch, offset_copy, positions->modulation_copy);
    positions->modulation = inputs.modulation;
    LocateAll(inputs, plan_.tap_y.data(), plan_.tap_x.data(), positions);
  }

  void Locate(const PixelBatch& batch, Squares<Real>* squares) const {
    alignas(64) Real offset_copy[2 * kMaxPositions];
    alignas(64) Real modulation_copy[kMaxPositions];
    const Inputs inputs = Read(batch, offset_copy, modulation_copy);
    LocateAll(inputs, plan_.tap_y.data(), plan_.tap_x.data(), squares);
  }

 private:
  // Of a batch, in whole vectors; the corner of the first pixel's kernel, in input pixels.
  struct Inputs {
    int count;
    int32_t y, x;
    const Real *offset, *modulation;
  };

  Inputs Read(const PixelBatch& batch, Real* offset_copy, Real* modulation_copy) const {
    Inputs inputs;
    inputs.count = WholeVectors<Real>(batch.count * plan_.positions);
    inputs.y = static_cast<int32_t>(batch.row * geometry_.stride_height - geometry_.pad_top);
    inputs.x = static_cast<int32_t>(batch.column * geometry_.stride_width - geometry_.pad_left);
    inputs.offset = ReadChannels(tensors_.offset + offset_address_(batch), batch.count,
                                 tensors_.offset + pixels_ * geometry_.offset_channels,
                                 offset_address_.channel_stride, 2, plan_.spans, offset_copy);
    if (tensors_.mask != nullptr) {
      inputs.modulation =
          ReadChannels(tensors_.mask + mask_address_(batch), batch.count,
                       tensors_.mask + pixels_ * geometry_.mask_channels,
                       mask_address_.channel_stride, 1, plan_.spans, modulation_copy);
    } else {
      for (int i = 0; i < inputs.count; ++i) modulation_copy[i] = 1;
      inputs.modulation = modulation_copy;
    }
    return inputs;
  }

  __attribute__((noinline)) void LocateAll(const Inputs& inputs, const int32_t* __restrict tap_y,
                                           const int32_t* __restrict tap_x,
                                           Positions<Real>* __restrict positions) const {
    const Real* __restrict offset = inputs.offset;
    const int32_t height = static_cast<int32_t>(geometry_.in_height);
    const int32_t width = static_cast<int32_t>(geometry_.in_width);
    for (int i = 0; i < inputs.count; ++i) {
      const auto sample_y = SampleAxis<Real>(Real(inputs.y + tap_y[i]) + offset[2 * i], height);
      const auto sample_x = SampleAxis<Real>(Real(inputs.x + tap_x[i]) + offset[2 * i + 1], width);
      positions->low_y[i] = sample_y.low;
      positions->low_x[i] = sample_x.low;
      positions->fraction_y[i] = sample_y.fraction;
      positions->fraction_x[i] = sample_x.fraction;
    }
  }

  __attribute__((noinline)) void LocateAll(const Inputs& inputs, const int32_t* __restrict tap_y,
                                           const int32_t* __restrict tap_x,
                                           Squares<Real>* __restrict squares) const {
    const Real* __restrict offset = inputs.offset;
    const Real* __restrict modulation = inputs.modulation;
    const int32_t last_y = static_cast<int32_t>(geometry_.in_height) - 2;
    const int32_t last_x = static_cast<int32_t>(geometry_.in_width) - 2;
    const int32_t pixel_bytes = static_cast<int32_t>(geometry_.in_channels * sizeof(T));
    const int32_t row_bytes = static_cast<int32_t>(geometry_.in_width) * pixel_bytes;
    for (int i = 0; i < inputs.count; ++i) {
      const auto y = PairOnAxis<Real>(Real(inputs.y + tap_y[i]) + offset[2 * i], last_y);
      const auto x = PairOnAxis<Real>(Real(inputs.x + tap_x[i]) + offset[2 * i + 1], last_x);
      squares->bytes[i] = y.first * row_bytes + x.first * pixel_bytes;
      squares->weights[i].low_low = y.low * x.low * modulation[i];
      squares->weights[i].low_high = y.low * x.high * modulation[i];
      squares->weights[i].high_low = y.high * x.low * modulation[i];
      squares->weights[i].high_high = y.high * x.high * modulation[i];
    }
  }

  const Geometry& geometry_;
  const SampledTensors<T, TOffset>& tensors_;
  const SamplingPlan& plan_;
  const ChannelAddress offset_address_, mask_address_;
  const int64_t pixels_;
};

// Weights of the corners of all positions, masked.
template <typename Real>
struct alignas(64) MaskedWeights {
  Real low_low[kMaxPositions], low_high[kMaxPositions], high_low[kMaxPositions],
      high_high[kMaxPositions];
};

template <typename Real>
__attribute__((noinline)) void WeighCorners(const Positions<Real>& positions, int count,
                                            MaskedWeights<Real>* __restrict weights) {
  for (int i = 0; i < count; ++i) {
    const auto corners = BilinearWeights(positions.fraction_y[i], positions.fraction_x[i]);
    weights->low_low[i] = corners.low_low * positions.modulation[i];
    weights->low_high[i] = corners.low_high * positions.modulation[i];
    weights->high_low[i] = corners.high_low * positions.modulation[i];
    weights->high_high[i] = corners.high_high * positions.modulation[i];
  }
}

MDCN_INLINE int64_t BytesBetween(const void* from, const void* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

// Where the corners of all positions are, in bytes from the image on.
struct alignas(64) CornerOffsets {
  int64_t low_low[kMaxPositions], low_high[kMaxPositions], high_low[kMaxPositions],
      high_high[kMaxPositions];
};

// Without branches, since positions near the border are not predictable: corners outside the image
// are at `nowhere_bytes`. Step is int32_t where a row is that short, because products of 32 bits
// are vectors on every machine.
template <typename Step, typename Real>
__attribute__((noinline)) void LocateCorners(const Positions<Real>& positions, int count,
                                             int32_t height, int32_t width, Step pixel_bytes,
                                             int64_t nowhere_bytes,
                                             CornerOffsets* __restrict offsets) {
  const Step row_bytes = width * pixel_bytes;
  for (int i = 0; i < count; ++i) {
    const int32_t y = positions.low_y[i], x = positions.low_x[i];
    const int64_t at = static_cast<int64_t>(y) * row_bytes + static_cast<int64_t>(x) * pixel_bytes;
    const bool low_y = CornerExists(y, height), high_y = CornerExists(y + 1, height);
    const bool low_x = CornerExists(x, width), high_x = CornerExists(x + 1, width);
    offsets->low_low[i] = low_y & low_x ? at : nowhere_bytes;
    offsets->low_high[i] = low_y & high_x ? at + pixel_bytes : nowhere_bytes;
    offsets->high_low[i] = high_y & low_x ? at + row_bytes : nowhere_bytes;
    offsets->high_high[i] = high_y & high_x ? at + row_bytes + pixel_bytes : nowhere_bytes;
  }
}

template <typename Element, typename Real>
MDCN_INLINE void LocateCorners(const Geometry& geometry, const Positions<Real>& positions,
                               int count, const Element* image, const Element* nowhere,
                               CornerOffsets* offsets) {
  const int32_t height = static_cast<int32_t>(geometry.in_height);
  const int32_t width = static_cast<int32_t>(geometry.in_width);
  const int64_t pixel_bytes = geometry.in_channels * sizeof(Element);
  const int64_t nowhere_bytes = BytesBetween(image, nowhere);
  if (width * pixel_bytes <= std::numeric_limits<int32_t>::max()) {
    LocateCorners<int32_t>(positions, count, height, width, pixel_bytes, nowhere_bytes, offsets);
  } else {
    LocateCorners<int64_t>(positions, count, height, width, pixel_bytes, nowhere_bytes, offsets);
  }
}

}  // namespace
}  // namespace mdcn::cpu::MDCN_ISA

#endif  // MDCN_CORE_CPU_POSITIONS_INL_H_
