#include "core/cpu/convolution.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/cpu/layout.h"

namespace mdcn::cpu {
namespace {

int64_t TotalPixels(const Geometry& geometry) { return geometry.batch * geometry.out_pixels; }

// ---- Tuning. Each function is pure; none of the choices changes a result. ----

// What a tile's buffer may take of a core's L2 cache, of which the smallest in use have 512 KiB.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kMaxTilePixels = 96;

// Columns that are sampled before they are multiplied: whole taps where they fit.
int64_t MaxColumns(const Geometry& geometry, int64_t column_bytes) {
  const int64_t limit = kTileBytes / (kMaxTilePixels * column_bytes);
  const int64_t channels = geometry.group_in_channels;
  const int64_t all = ColumnCount(geometry);
  if (all <= limit) return all;
  if (channels > limit) return RoundUp(CeilDivide(channels, CeilDivide(channels, limit)), 16);
  const int64_t rows = limit / channels;  // (group, tap) pairs
  const int64_t total_rows = geometry.groups * geometry.taps;
  return CeilDivide(total_rows, CeilDivide(total_rows, rows)) * channels;  // evenly
}

// Rows a little apart in the cache: a power of two of bytes between rows would let them fall into
// the same few sets.
int64_t RowStride(int64_t columns) { return RoundUp(columns, 16) + 16; }

// Where there are few pixels and many filters, the filters are cut up instead of the pixels: packed
// as a whole, and read again for every tile, they would take longer than the product's second
// reading of the columns. What is packed and multiplied at a time stays in L2: 64 KiB of floats.
constexpr int64_t kFewPixels = 256;
constexpr int64_t kAllColumnsBytes = 4 * 1024 * 1024;
constexpr int64_t kBlockDepth = 256;
constexpr int64_t kBlockPanels = 4;

bool HasFewPixels(const Geometry& geometry, int64_t real_bytes) {
  const int64_t pixels = TotalPixels(geometry), columns = ColumnCount(geometry);
  return pixels <= kFewPixels && pixels * columns * real_bytes <= kAllColumnsBytes &&
         geometry.filters_size() * real_bytes > kTileBytes;
}

// Pixels of a tile: whole row blocks, at most `most`, and few tiles shared out evenly.
int64_t TilePixels(int64_t pixels, int64_t row_block, int64_t most, int workers) {
  const int64_t blocks = std::max<int64_t>(1, CeilDivide(pixels, row_block));
  const int64_t most_blocks = std::max<int64_t>(1, most / row_block);
  int64_t tiles = CeilDivide(blocks, most_blocks);
  if (tiles < 8 * workers) tiles = RoundUp(tiles, workers);
  return CeilDivide(blocks, tiles) * row_block;
}

// Tile `tile` of `tiles` that share out pixels in whole row blocks, as evenly as that goes.
PixelRange Tile(int64_t pixels, int64_t row_block, int64_t tiles, int64_t tile) {
  const int64_t blocks = CeilDivide(pixels, row_block);
  const int64_t first = tile * blocks / tiles * row_block;
  const int64_t end = std::min(pixels, (tile + 1) * blocks / tiles * row_block);
  return {first, end - first};
}

// Which images are sampled square by square (kernel_table.h).
template <typename T, typename TOffset>
void ChooseSquares(const Geometry& geometry, const ConvolutionKernels<T, TOffset>& kernels,
                   const T* channels_last_input, WorkerPool& pool, bool* by_squares) {
  const int64_t height = geometry.in_height, width = geometry.in_width;
  const int64_t image_size = geometry.in_pixels * geometry.in_channels;
  const bool possible =
      height >= 2 && width >= 2 &&
      image_size * static_cast<int64_t>(sizeof(T)) <= std::numeric_limits<int32_t>::max();
  pool.RunJobs(geometry.batch, [&](int64_t image, int) {
    by_squares[image] =
        possible && kernels.frame_is_finite(channels_last_input + image * image_size, height, width,
                                            geometry.in_channels);
  });
}

// Pairs where the machine has them and no plan can cut one: plans end where a group or a deformable
// group does, or after the MaxColumns, even where these are.
template <typename T, typename TOffset>
const ProductKernels<T, TOffset>& ChooseProduct(const Geometry& geometry,
                                                const ConvolutionKernels<T, TOffset>& kernels) {
  const bool even =
      geometry.group_in_channels % 2 == 0 && geometry.deformable_group_channels % 2 == 0;
  return even && kernels.pairs.element_depth == 2 ? kernels.pairs : kernels;
}

template <typename Element>
void SetZero(Element* elements, int64_t count) {
  std::memset(static_cast<void*>(elements), 0, count * sizeof(Element));
}

}  // namespace

// ---- Forward ----

template <typename T, typename TOffset>
Forward<T, TOffset>::Forward(const Geometry& geometry, const InstructionSet& instruction_set,
                             int workers)
    : geometry_(geometry),
      kernels_(KernelsOf<T, TOffset>(*instruction_set.kernels)),
      product_(ChooseProduct(geometry_, kernels_)) {
  const int64_t filters = geometry.group_out_channels;
  padded_group_filters_ = RoundUp(filters, kernels_.panel_columns);
  const int64_t padded_filters = geometry.groups * padded_group_filters_;
  const int64_t most_pixels = std::clamp<int64_t>(
      kTileBytes / (padded_filters * static_cast<int64_t>(sizeof(Real))), 24, kMaxTilePixels);
  tile_pixels_ = TilePixels(TotalPixels(geometry), kernels_.row_block, most_pixels, workers);
  const int64_t max_columns = MaxColumns(geometry, sizeof(Real) / product_.element_depth);
  plans_ = PlanColumns(geometry, 0, ColumnCount(geometry), max_columns);
  in_place_ =
      std::is_same_v<T, Real> && !ChannelsFirst(geometry) && filters % kernels_.vector_length == 0;
  const int64_t panels_of_worker = padded_filters / kernels_.panel_columns / workers;
  block_filters_ = std::clamp<int64_t>(panels_of_worker, 1, kBlockPanels) * kernels_.panel_columns;
  by_filters_ = in_place_ && panels_of_worker > 0 && HasFewPixels(geometry, sizeof(Real));

  if (ChannelsFirst(geometry)) channels_last_input_ = layout_.Add<T>(geometry.input_size());
  by_squares_ = layout_.Add<bool>(geometry.batch);
  zeros_ = layout_.Add<T>(geometry.in_channels);
  initial_row_ = layout_.Add<Real>(padded_filters);
  if (by_filters_) {
    column_stride_ = RowStride(ColumnCount(geometry));
    columns_ = layout_.Add<Real>(TotalPixels(geometry) * column_stride_);
    packed_filters_ = layout_.Add<Real>(kBlockDepth * block_filters_, workers);
    return;
  }
  column_stride_ = RowStride(max_columns / product_.element_depth);
  columns_ = layout_.Add<Real>(tile_pixels_ * column_stride_, workers);
  packed_filters_ = layout_.Add<Real>(padded_filters * geometry.taps * geometry.group_in_channels /
                                      product_.element_depth);
  if (!in_place_) {
    sums_ = layout_.Add<Real>(tile_pixels_ * padded_filters, workers);
    narrow_row_ = layout_.Add<T>(geometry.out_channels, workers);
  }
}

template <typename T, typename TOffset>
void Forward<T, TOffset>::Run(const Tensors& tensors, WorkerPool& pool, char* workspace) const {
  if (geometry_.output_size() == 0) return;
  const int64_t group_filters = geometry_.group_out_channels;
  SetZero(zeros_.In(workspace), geometry_.in_channels);

  const int64_t group_stride = in_place_ ? group_filters : padded_group_filters_;
  Real* initial_row = initial_row_.In(workspace);
  SetZero(initial_row, geometry_.groups * padded_group_filters_);
  for (int64_t group = 0; tensors.bias != nullptr && group < geometry_.groups; ++group) {
    kernels_.widen(tensors.bias + group * group_filters, group_filters,
                   initial_row + group * group_stride);
  }

  const SampledTensors<T, TOffset> sampled{
      ChannelsLast(geometry_, tensors.input, geometry_.in_channels, geometry_.in_pixels, pool,
                   channels_last_input_.In(workspace)),
      tensors.offset, tensors.mask};
  ChooseSquares(geometry_, kernels_, sampled.input, pool, by_squares_.In(workspace));
  if (by_filters_) {
    RunByFilters(sampled, tensors, pool, workspace);
  } else {
    RunByTiles(sampled, tensors, pool, workspace);
  }
}

template <typename T, typename TOffset>
void Forward<T, TOffset>::RunByTiles(const SampledTensors<T, TOffset>& sampled,
                                     const Tensors& tensors, WorkerPool& pool,
                                     char* workspace) const {
  const int64_t group_filters = geometry_.group_out_channels;
  PackAll(
      kernels_, product_, geometry_.groups,
      geometry_.taps * geometry_.group_in_channels / product_.element_depth, group_filters, pool,
      [&](int64_t group) {
        return MatrixView<T>{tensors.filters + group * group_filters,
                             product_.element_depth * geometry_.out_channels, 1};
      },
      packed_filters_.In(workspace));
  const int64_t pixels = TotalPixels(geometry_);
  const int64_t tiles = CeilDivide(pixels, tile_pixels_);
  pool.RunJobs(tiles, [&](int64_t tile, int worker) {
    RunTile(sampled, tensors, Tile(pixels, kernels_.row_block, tiles, tile), workspace, worker);
  });
}

template <typename T, typename TOffset>
void Forward<T, TOffset>::RunTile(const SampledTensors<T, TOffset>& sampled, const Tensors& tensors,
                                  PixelRange pixels, char* workspace, int worker) const {
  const int64_t filters = geometry_.out_channels, group_filters = geometry_.group_out_channels;
  const int64_t element_depth = product_.element_depth;
  const int64_t depth = geometry_.taps * geometry_.group_in_channels / element_depth;
  const int64_t sums_group = in_place_ ? group_filters : padded_group_filters_;
  const int64_t sums_stride = geometry_.groups * sums_group;
  Real* sums;
  if constexpr (std::is_same_v<T, Real>) {
    sums = in_place_ ? tensors.output + pixels.first * filters : sums_.In(workspace, worker);
  } else {
    sums = sums_.In(workspace, worker);
  }
  for (int64_t p = 0; p < pixels.count; ++p) {
    std::memcpy(sums + p * sums_stride, initial_row_.In(workspace), sums_stride * sizeof(Real));
  }

  Real* columns = columns_.In(workspace, worker);
  for (const SamplingPlan& plan : plans_) {
    product_.sample(geometry_, sampled, plan, pixels, by_squares_.In(workspace),
                    zeros_.In(workspace), columns, column_stride_);
    for (const GroupPiece& piece : plan.pieces) {
      const Real* packed = packed_filters_.In(workspace) +
                           piece.group * depth * padded_group_filters_ +
                           piece.depth_begin / element_depth * kernels_.panel_columns;
      product_.multiply(columns + piece.column / element_depth, column_stride_, pixels.count,
                        packed, depth, piece.depth / element_depth, group_filters,
                        sums + piece.group * sums_group, sums_stride, /*accumulate=*/true);
    }
  }
  if (in_place_) return;

  T* row = narrow_row_.In(workspace, worker);
  for (int64_t p = 0; p < pixels.count; ++p) {
    const int64_t pixel = pixels.first + p;
    T* to = ChannelsFirst(geometry_) ? row : tensors.output + pixel * filters;
    for (int64_t group = 0; group < geometry_.groups; ++group) {
      kernels_.narrow(sums + p * sums_stride + group * sums_group, group_filters,
                      to + group * group_filters);
    }
    if (!ChannelsFirst(geometry_)) continue;
    T* image = tensors.output + pixel / geometry_.out_pixels * filters * geometry_.out_pixels;
    for (int64_t filter = 0; filter < filters; ++filter) {
      image[filter * geometry_.out_pixels + pixel % geometry_.out_pixels] = row[filter];
    }
  }
}

template <typename T, typename TOffset>
void Forward<T, TOffset>::RunByFilters(const SampledTensors<T, TOffset>& sampled,
                                       const Tensors& tensors, WorkerPool& pool,
                                       char* workspace) const {
  if constexpr (std::is_same_v<T, Real>) {  // sums are formed in place
    const int64_t filters = geometry_.out_channels, group_filters = geometry_.group_out_channels;
    const int64_t depth = geometry_.taps * geometry_.group_in_channels;
    const int64_t pixels = TotalPixels(geometry_);
    const int64_t tiles = CeilDivide(pixels, tile_pixels_);
    Real* columns = columns_.In(workspace);
    pool.RunJobs(tiles, [&](int64_t job, int) {
      const PixelRange tile = Tile(pixels, kernels_.row_block, tiles, job);
      Real* tile_columns = columns + tile.first * column_stride_;
      for (const SamplingPlan& plan : plans_) {
        kernels_.sample(geometry_, sampled, plan, tile, by_squares_.In(workspace),
                        zeros_.In(workspace), tile_columns, column_stride_);
        tile_columns += plan.columns;
      }
    });
    const int64_t blocks = CeilDivide(group_filters, block_filters_);
    pool.RunJobs(geometry_.groups * blocks, [&](int64_t job, int worker) {
      const int64_t group = job / blocks, first = job % blocks * block_filters_;
      const int64_t count = std::min(block_filters_, group_filters - first);
      const int64_t filter = group * group_filters + first;
      Real* packed = packed_filters_.In(workspace, worker);
      Real* sums = tensors.output + filter;
      for (int64_t p = 0; p < pixels; ++p) {
        std::memcpy(sums + p * filters, initial_row_.In(workspace) + filter, count * sizeof(Real));
      }
      for (int64_t begin = 0; begin < depth; begin += kBlockDepth) {
        const int64_t block_depth = std::min(kBlockDepth, depth - begin);
        kernels_.pack({tensors.filters + begin * filters + filter, filters, 1}, block_depth, count,
                      block_depth, packed);
        kernels_.multiply(columns + group * depth + begin, column_stride_, pixels, packed,
                          block_depth, block_depth, count, sums, filters, /*accumulate=*/true);
      }
    });
  }
}

// ---- Gradients of input, offset and mask ----

template <typename T, typename TOffset>
InputGradient<T, TOffset>::InputGradient(const Geometry& geometry,
                                         const InstructionSet& instruction_set, int workers)
    : geometry_(geometry), kernels_(KernelsOf<T, TOffset>(*instruction_set.kernels)) {
  const int64_t group_columns = geometry.taps * geometry.group_in_channels;
  const int64_t padded_group_columns = RoundUp(group_columns, kernels_.panel_columns);
  column_stride_ = RowStride(geometry.groups * group_columns);
  const int64_t row_bytes = column_stride_ * sizeof(Real);
  const int64_t pixels = TotalPixels(geometry);
  tile_pixels_ =
      TilePixels(pixels, kernels_.row_block,
                 std::clamp<int64_t>(kTileBytes / row_bytes, 24, kMaxTilePixels), workers);
  // A band of a few tiles for each worker, so that the two phases of a band seldom wait.
  constexpr int64_t kBandBytes = 1536 * 1024;
  const int64_t band_tiles =
      workers * std::max<int64_t>(1, kBandBytes / (tile_pixels_ * row_bytes));
  band_pixels_ =
      std::min(band_tiles, std::max<int64_t>(1, CeilDivide(pixels, tile_pixels_))) * tile_pixels_;

  plans_ = PlanPositions(geometry, 0, geometry.in_channels);
  // Owners' channels end at cache lines, if possible also at deformable groups, whose positions
  // then need to be found by one owner only.
  const int64_t line = 64 / sizeof(Real);
  int64_t owned = RoundUp(CeilDivide(geometry.in_channels, workers), line);
  if (geometry.deformable_group_channels % line == 0) {
    owned = std::min(geometry.in_channels, RoundUp(owned, geometry.deformable_group_channels));
    if (CeilDivide(geometry.in_channels, owned) < std::min<int64_t>(workers, 2)) {
      owned = RoundUp(CeilDivide(geometry.in_channels, workers), line);
    }
  }
  for (int64_t begin = 0; begin < geometry.in_channels; begin += owned) {
    scatter_plans_.push_back(
        PlanPositions(geometry, begin, std::min(geometry.in_channels, begin + owned)));
  }

  if (ChannelsFirst(geometry)) {
    channels_last_input_ = layout_.Add<T>(geometry.input_size());
    channels_last_output_gradient_ = layout_.Add<T>(geometry.output_size());
  }
  if (ChannelsFirst(geometry) || !std::is_same_v<T, Real>) {
    input_gradient_ = layout_.Add<Real>(geometry.input_size());
  }
  zeros_ = layout_.Add<T>(geometry.in_channels);
  packed_filters_ =
      layout_.Add<Real>(geometry.groups * padded_group_columns * geometry.group_out_channels);
  column_gradients_ = layout_.Add<Real>(band_pixels_ * column_stride_);
  if (!std::is_same_v<T, Real>) {
    wide_output_gradient_ = layout_.Add<Real>(tile_pixels_ * geometry.out_channels, workers);
  }
  dump_ = layout_.Add<Real>(geometry.in_channels, workers);
}

template <typename T, typename TOffset>
void InputGradient<T, TOffset>::Run(const Tensors& tensors, WorkerPool& pool,
                                    char* workspace) const {
  if (geometry_.input_size() == 0) return;
  const int64_t filters = geometry_.out_channels, group_filters = geometry_.group_out_channels;
  const int64_t group_columns = geometry_.taps * geometry_.group_in_channels;
  const int64_t padded_group_columns = RoundUp(group_columns, kernels_.panel_columns);
  Real* packed = packed_filters_.In(workspace);
  PackAll(
      kernels_, kernels_, geometry_.groups, group_filters, group_columns, pool,
      [&](int64_t group) {
        return MatrixView<T>{tensors.filters + group * group_filters, 1, filters};
      },
      packed);
  SetZero(zeros_.In(workspace), geometry_.in_channels);
  for (int worker = 0; worker < pool.workers(); ++worker) {
    SetZero(dump_.In(workspace, worker), geometry_.in_channels);
  }
  const SampledTensors<T, TOffset> sampled{
      ChannelsLast(geometry_, tensors.input, geometry_.in_channels, geometry_.in_pixels, pool,
                   channels_last_input_.In(workspace)),
      tensors.offset, tensors.mask};
  const T* output_gradient =
      ChannelsLast(geometry_, tensors.output_gradient, filters, geometry_.out_pixels, pool,
                   channels_last_output_gradient_.In(workspace));
  Real* input_gradient;
  if constexpr (std::is_same_v<T, Real>) {
    input_gradient =
        ChannelsFirst(geometry_) ? input_gradient_.In(workspace) : tensors.input_gradient;
  } else {
    input_gradient = input_gradient_.In(workspace);
  }
  pool.RunJobs(geometry_.batch * geometry_.in_height, [&](int64_t row, int) {
    const int64_t row_size = geometry_.in_width * geometry_.in_channels;
    SetZero(input_gradient + row * row_size, row_size);
  });

  Real* column_gradients = column_gradients_.In(workspace);
  const int64_t pixels = TotalPixels(geometry_);
  const int64_t owners = static_cast<int64_t>(scatter_plans_.size());
  for (int64_t band = 0; band < pixels; band += band_pixels_) {
    const int64_t band_end = std::min(pixels, band + band_pixels_);
    pool.RunJobs(CeilDivide(band_end - band, tile_pixels_), [&](int64_t tile, int worker) {
      const int64_t first = band + tile * tile_pixels_;
      const PixelRange range{first, std::min(tile_pixels_, band_end - first)};
      Real* columns = column_gradients + (first - band) * column_stride_;
      const Real* gradient;
      if constexpr (std::is_same_v<T, Real>) {
        gradient = output_gradient + first * filters;
      } else {
        Real* wide = wide_output_gradient_.In(workspace, worker);
        kernels_.widen(output_gradient + first * filters, range.count * filters, wide);
        gradient = wide;
      }
      // In order: whole vectors are written, and what a group writes into the next one is
      // overwritten.
      for (int64_t group = 0; group < geometry_.groups; ++group) {
        kernels_.multiply(gradient + group * group_filters, filters, range.count,
                          packed + group * group_filters * padded_group_columns, group_filters,
                          group_filters, group_columns, columns + group * group_columns,
                          column_stride_, /*accumulate=*/false);
      }
      for (const SamplingPlan& plan : plans_) {
        kernels_.position_gradients(geometry_, sampled, plan, range, zeros_.In(workspace), columns,
                                    column_stride_, tensors.offset_gradient, tensors.mask_gradient);
      }
    });
    const int64_t first_image = band / geometry_.out_pixels;
    const int64_t images = (band_end - 1) / geometry_.out_pixels - first_image + 1;
    pool.RunJobs(images * owners, [&](int64_t job, int worker) {
      const int64_t image = first_image + job / owners;
      const int64_t first = std::max(band, image * geometry_.out_pixels);
      const int64_t end = std::min(band_end, (image + 1) * geometry_.out_pixels);
      // All plans of a pixel before the next pixel: the order of an element's sum must not follow
      // the band.
      const std::vector<SamplingPlan>& plans = scatter_plans_[job % owners];
      const int64_t step = plans.size() > 1 ? 1 : end - first;
      for (int64_t pixel = first; pixel < end; pixel += step) {
        for (const SamplingPlan& plan : plans) {
          kernels_.scatter(geometry_, sampled, plan, {pixel, step}, dump_.In(workspace, worker),
                           column_gradients + (pixel - band) * column_stride_, column_stride_,
                           input_gradient);
        }
      }
    });
  }

  if (ChannelsFirst(geometry_)) {
    ToChannelsFirst(kernels_, input_gradient, geometry_.batch, geometry_.in_channels,
                    geometry_.in_pixels, pool, tensors.input_gradient);
  } else if constexpr (!std::is_same_v<T, Real>) {
    NarrowAll(kernels_, input_gradient, geometry_.input_size(), pool, tensors.input_gradient);
  }
}

// ---- Gradients of filters and bias ----

namespace {

// Pixels whose contribution to a filter's gradient is summed before it is added. Fixed, because it
// decides the order of the sums; short enough for accuracy, long enough to keep sums in registers.
constexpr int64_t kFilterTilePixels = 128;

}  // namespace

template <typename T, typename TOffset>
FilterGradient<T, TOffset>::FilterGradient(const Geometry& geometry,
                                           const InstructionSet& instruction_set, int workers)
    : geometry_(geometry), kernels_(KernelsOf<T, TOffset>(*instruction_set.kernels)) {
  const int64_t columns = ColumnCount(geometry);
  const int64_t most_columns = kTileBytes / (kFilterTilePixels * sizeof(Real));
  const int64_t slice_count = RoundUp(CeilDivide(columns, most_columns), workers);
  const int64_t slice_columns = RoundUp(CeilDivide(columns, slice_count), kernels_.row_block);
  for (int64_t begin = 0; begin < columns; begin += slice_columns) {
    slices_.push_back(
        PlanColumns(geometry, begin, std::min(columns, begin + slice_columns), slice_columns));
  }
  column_stride_ = RowStride(slice_columns);

  if (ChannelsFirst(geometry)) {
    channels_last_input_ = layout_.Add<T>(geometry.input_size());
    channels_last_output_gradient_ = layout_.Add<T>(geometry.output_size());
  }
  if (!std::is_same_v<T, Real>) filters_gradient_ = layout_.Add<Real>(geometry.filters_size());
  by_squares_ = layout_.Add<bool>(geometry.batch);
  zeros_ = layout_.Add<T>(geometry.in_channels);
  columns_ = layout_.Add<Real>(kFilterTilePixels * column_stride_, workers);
  packed_gradient_ = layout_.Add<Real>(
      kFilterTilePixels * RoundUp(geometry.group_out_channels, kernels_.panel_columns), workers);
  bias_sums_ = layout_.Add<Real>(geometry.out_channels, /*copies=*/2);
}

template <typename T, typename TOffset>
void FilterGradient<T, TOffset>::Run(const Tensors& tensors, WorkerPool& pool,
                                     char* workspace) const {
  const int64_t filters = geometry_.out_channels, group_filters = geometry_.group_out_channels;
  const int64_t pixels = TotalPixels(geometry_);
  SetZero(zeros_.In(workspace), geometry_.in_channels);
  const SampledTensors<T, TOffset> sampled{
      ChannelsLast(geometry_, tensors.input, geometry_.in_channels, geometry_.in_pixels, pool,
                   channels_last_input_.In(workspace)),
      tensors.offset, tensors.mask};
  ChooseSquares(geometry_, kernels_, sampled.input, pool, by_squares_.In(workspace));
  const T* output_gradient =
      ChannelsLast(geometry_, tensors.output_gradient, filters, geometry_.out_pixels, pool,
                   channels_last_output_gradient_.In(workspace));
  Real* filters_gradient;
  if constexpr (std::is_same_v<T, Real>) {
    filters_gradient = tensors.filters_gradient;
  } else {
    filters_gradient = filters_gradient_.In(workspace);
  }
  SetZero(filters_gradient, geometry_.filters_size());

  const int64_t slices = static_cast<int64_t>(slices_.size());
  const int64_t bias_jobs = tensors.bias_gradient == nullptr ? 0 : 1;
  pool.RunJobs(slices + bias_jobs, [&](int64_t job, int worker) {
    if (job == slices) {
      SumBias(output_gradient, tensors.bias_gradient, bias_sums_.In(workspace, 0),
              bias_sums_.In(workspace, 1));
      return;
    }
    Real* columns = columns_.In(workspace, worker);
    Real* packed = packed_gradient_.In(workspace, worker);
    for (int64_t first = 0; first < pixels; first += kFilterTilePixels) {
      const PixelRange range{first, std::min(kFilterTilePixels, pixels - first)};
      int64_t packed_group = -1;
      for (const SamplingPlan& plan : slices_[job]) {
        kernels_.sample(geometry_, sampled, plan, range, by_squares_.In(workspace),
                        zeros_.In(workspace), columns, column_stride_);
        for (const GroupPiece& piece : plan.pieces) {
          if (piece.group != packed_group) {
            kernels_.pack(
                {output_gradient + first * filters + piece.group * group_filters, filters, 1},
                range.count, group_filters, range.count, packed);
            packed_group = piece.group;
          }
          kernels_.add_transposed_product(
              columns + piece.column, column_stride_, piece.depth, packed, range.count,
              group_filters,
              filters_gradient + piece.depth_begin * filters + piece.group * group_filters,
              filters);
        }
      }
    }
  });
  if constexpr (!std::is_same_v<T, Real>) {
    NarrowAll(kernels_, filters_gradient, geometry_.filters_size(), pool, tensors.filters_gradient);
  }
}

template <typename T, typename TOffset>
void FilterGradient<T, TOffset>::SumBias(const T* output_gradient, T* bias_gradient, Real* total,
                                         Real* part) const {
  const int64_t filters = geometry_.out_channels, pixels = TotalPixels(geometry_);
  SetZero(total, filters);
  for (int64_t first = 0; first < pixels; first += kFilterTilePixels) {
    const int64_t end = std::min(pixels, first + kFilterTilePixels);
    SetZero(part, filters);
    kernels_.add_rows(output_gradient + first * filters, end - first, filters, part);
    for (int64_t filter = 0; filter < filters; ++filter) total[filter] += part[filter];
  }
  kernels_.narrow(total, filters, bias_gradient);
}

#define MDCN_INSTANTIATE(T, TOffset)        \
  template class Forward<T, TOffset>;       \
  template class InputGradient<T, TOffset>; \
  template class FilterGradient<T, TOffset>;
MDCN_FOR_EACH_TYPE_PAIR(MDCN_INSTANTIATE)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cpu
