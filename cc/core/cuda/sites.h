// The arithmetic between a thread's number and the memory it touches: which site it samples, where
// the site's offset, mask, columns and four input corners lie. All that the kernels share about
// layouts is here; what they do with the values is theirs.
#ifndef MDCN_CORE_CUDA_SITES_H_
#define MDCN_CORE_CUDA_SITES_H_

#include <cstdint>

#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/values.h"
#include "core/geometry.h"
#include "core/sampling.h"

namespace mdcn::cuda {

// The geometry of a chunk as kernels take it, by value, in their index type. Images, offsets, masks
// and their gradients are addressed from the chunk's first image on, columns from the chunk's first
// pixel on. A "position" is a deformable group and a tap (g * K + k), a channel of the mask.
template <typename Index>
struct Sites {
  bool channels_last;
  Index count;         // pixels * positions
  Index pixels;        // output pixels in the chunk
  Index image_pixels;  // of these in one image
  Index first_pixel;   // where the chunk starts in its image
  Index positions;     // G * K
  Index images, deformable_groups;
  Index channels;  // C / G, of one deformable group
  Index groups, group_channels;
  Index out_width, taps, kernel_width;
  Index stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
  int32_t in_height, in_width;
  // Distances in memory.
  Index image_step, in_row_step, in_pixel_step, channel_step;
  Index mask_image_step, mask_pixel_step, mask_channel_step;
  Index offset_image_step, offset_pixel_step;  // its channels lie as far apart as the mask's
  Index column_pixel_step, column_row_step;    // a row: group, tap and channel of the group
  Index group_rows_between;                    // rows of a group's other taps
};

template <typename Index>
Sites<Index> MakeSites(const Geometry& g, const Chunk& chunk) {
  const auto index = [](int64_t value) { return static_cast<Index>(value); };
  const bool last = g.data_format == DataFormat::kChannelsLast;
  const int64_t pixels = chunk.pixels(g);
  Sites<Index> sites;
  sites.channels_last = last;
  sites.count = index(chunk.sites(g));
  sites.pixels = index(pixels);
  sites.image_pixels = index(chunk.rows * g.out_width);
  sites.first_pixel = index(chunk.first_row * g.out_width);
  sites.positions = index(g.mask_channels);
  sites.images = index(chunk.images);
  sites.deformable_groups = index(g.deformable_groups);
  sites.channels = index(g.deformable_group_channels);
  sites.groups = index(g.groups);
  sites.group_channels = index(g.group_in_channels);
  sites.out_width = index(g.out_width);
  sites.taps = index(g.taps);
  sites.kernel_width = index(g.kernel_width);
  sites.stride_height = index(g.stride_height);
  sites.stride_width = index(g.stride_width);
  sites.dilation_height = index(g.dilation_height);
  sites.dilation_width = index(g.dilation_width);
  sites.pad_top = index(g.pad_top);
  sites.pad_left = index(g.pad_left);
  sites.in_height = static_cast<int32_t>(g.in_height);
  sites.in_width = static_cast<int32_t>(g.in_width);
  sites.image_step = index(g.in_pixels * g.in_channels);
  sites.in_row_step = index(g.in_width * (last ? g.in_channels : 1));
  sites.in_pixel_step = index(last ? g.in_channels : 1);
  sites.channel_step = index(last ? 1 : g.in_pixels);
  sites.mask_image_step = index(g.out_pixels * g.mask_channels);
  sites.mask_pixel_step = index(last ? g.mask_channels : 1);
  sites.mask_channel_step = index(last ? 1 : g.out_pixels);
  sites.offset_image_step = index(g.out_pixels * g.offset_channels);
  sites.offset_pixel_step = index(last ? g.offset_channels : 1);
  sites.column_pixel_step = index(last ? g.taps * g.in_channels : 1);
  sites.column_row_step = index(last ? 1 : pixels);
  sites.group_rows_between = index((g.taps - 1) * g.group_in_channels);
  return sites;
}

// Pointers to a chunk's first image.
template <typename T>
T* InputOf(const ChunkLaunch& launch, T* input) {
  const Geometry& g = launch.geometry;
  return input + launch.chunk.first_image * g.in_pixels * g.in_channels;
}
template <typename T>
T* OffsetOf(const ChunkLaunch& launch, T* offset) {
  const Geometry& g = launch.geometry;
  return offset + launch.chunk.first_image * g.out_pixels * g.offset_channels;
}
template <typename T>
T* MaskOf(const ChunkLaunch& launch, T* mask) {
  if (mask == nullptr) return nullptr;
  const Geometry& g = launch.geometry;
  return mask + launch.chunk.first_image * g.out_pixels * g.mask_channels;
}

// Cells between four pixels (or three, two, one of them at the border) of an image.
inline int64_t CellsPerImage(const Geometry& g) { return (g.in_height + 1) * (g.in_width + 1); }

template <typename Index>
struct Site {
  Index pixel;        // in the chunk
  Index image;        // in the chunk
  Index image_pixel;  // in the image
  Index position, deformable_group, tap;
};

// Sites are numbered as the columns lie in memory, so that neighbouring threads share cache lines.
template <typename Index>
__device__ __forceinline__ Site<Index> FindSite(const Sites<Index>& sites, Index number) {
  Site<Index> site;
  if (sites.channels_last) {
    site.pixel = number / sites.positions;
    site.position = number - site.pixel * sites.positions;
  } else {
    site.position = number / sites.pixels;
    site.pixel = number - site.position * sites.pixels;
  }
  site.image = site.pixel / sites.image_pixels;
  site.image_pixel = site.pixel - site.image * sites.image_pixels + sites.first_pixel;
  site.deformable_group = site.position / sites.taps;
  site.tap = site.position - site.deformable_group * sites.taps;
  return site;
}

// The share of a thread: `lanes` threads, a power of two, divide the channels of one site.
template <typename Index>
struct SiteLane {
  Index site;
  int lane;
};

// Lanes of a site are neighbours where channels are (always, if `together`), otherwise far apart.
template <typename Index>
__device__ __forceinline__ SiteLane<Index> FindSiteLane(bool together, Index count, int lane_bits,
                                                        Index thread) {
  if (together) return {thread >> lane_bits, static_cast<int>(thread) & ((1 << lane_bits) - 1)};
  const Index lane = thread / count;
  return {thread - lane * count, static_cast<int>(lane)};
}

template <typename Index>
__device__ __forceinline__ Index MaskIndex(const Sites<Index>& sites, const Site<Index>& site) {
  return site.image * sites.mask_image_step + site.image_pixel * sites.mask_pixel_step +
         site.position * sites.mask_channel_step;
}

// Of the offset's dy; dx is one mask_channel_step further.
template <typename Index>
__device__ __forceinline__ Index OffsetIndex(const Sites<Index>& sites, const Site<Index>& site) {
  return site.image * sites.offset_image_step + site.image_pixel * sites.offset_pixel_step +
         2 * site.position * sites.mask_channel_step;
}

// Where a site's samples lie in the columns.
template <typename Index>
struct SiteColumns {
  Index start;          // were the site's weight group the first
  Index first_channel;  // of the site's deformable group
};

template <typename Index>
__device__ __forceinline__ SiteColumns<Index> FindColumns(const Sites<Index>& sites,
                                                          const Site<Index>& site) {
  return {site.tap * sites.group_channels * sites.column_row_step +
              site.pixel * sites.column_pixel_step,
          site.deformable_group * sites.channels};
}

// Of a channel, counted in the site's deformable group; its weight group may be any.
template <typename Index>
__device__ __forceinline__ Index ColumnIndex(const Sites<Index>& sites,
                                             const SiteColumns<Index>& columns, Index channel) {
  Index row = columns.first_channel + channel;
  if (sites.groups != 1) row += row / sites.group_channels * sites.group_rows_between;
  return columns.start + row * sites.column_row_step;
}

template <typename Real>
struct Position {
  AxisSample<Real> y, x;
};

// Where a site samples.
template <typename Real, typename TOffset, typename Index>
__device__ __forceinline__ Position<Real> FindPosition(const Sites<Index>& sites,
                                                       const Site<Index>& site,
                                                       const TOffset* __restrict__ offset) {
  const Index row = site.image_pixel / sites.out_width;
  const Index column = site.image_pixel - row * sites.out_width;
  const Index tap_row = site.tap / sites.kernel_width;
  const Index tap_column = site.tap - tap_row * sites.kernel_width;
  const Index y = row * sites.stride_height - sites.pad_top + tap_row * sites.dilation_height;
  const Index x = column * sites.stride_width - sites.pad_left + tap_column * sites.dilation_width;
  const Index at = OffsetIndex(sites, site);
  return {SampleAxis(Real(y) + Real(ToReal(offset[at])), sites.in_height),
          SampleAxis(Real(x) + Real(ToReal(offset[at + sites.mask_channel_step])), sites.in_width)};
}

template <typename Real, typename TOffset, typename Index>
__device__ __forceinline__ Real FindModulation(const Sites<Index>& sites, const Site<Index>& site,
                                               const TOffset* __restrict__ mask) {
  return mask == nullptr ? Real(1) : Real(ToReal(mask[MaskIndex(sites, site)]));
}

// The four corners of a position: which of them lie inside the image, and the index of the first
// channel of the site's deformable group at low_low, from which the others are one step away.
template <typename Index>
struct CornerIndices {
  Index low_low;
  bool has_low_y, has_high_y, has_low_x, has_high_x;
};

template <typename Real, typename Index>
__device__ __forceinline__ CornerIndices<Index> FindCorners(const Sites<Index>& sites,
                                                            const Site<Index>& site,
                                                            const Position<Real>& position) {
  const int32_t y = position.y.low, x = position.x.low;
  return {site.image * sites.image_step +
              site.deformable_group * sites.channels * sites.channel_step +
              Index{y} * sites.in_row_step + Index{x} * sites.in_pixel_step,
          CornerExists(y, sites.in_height), CornerExists(y + 1, sites.in_height),
          CornerExists(x, sites.in_width), CornerExists(x + 1, sites.in_width)};
}

// Calls function(index, number) for each corner inside the image, with the corner's number.
template <typename Index, typename TCorners, typename Function>
__device__ __forceinline__ void ForEachCorner(const Sites<Index>& sites,
                                              const CornerIndices<Index>& corners,
                                              TCorners& numbers, const Function& function) {
  const Index low_low = corners.low_low, high_low = low_low + sites.in_row_step;
  if (corners.has_low_y && corners.has_low_x) function(low_low, numbers.low_low);
  if (corners.has_low_y && corners.has_high_x) {
    function(low_low + sites.in_pixel_step, numbers.low_high);
  }
  if (corners.has_high_y && corners.has_low_x) function(high_low, numbers.high_low);
  if (corners.has_high_y && corners.has_high_x) {
    function(high_low + sites.in_pixel_step, numbers.high_high);
  }
}

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_SITES_H_
