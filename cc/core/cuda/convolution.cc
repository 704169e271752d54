#include "core/cuda/convolution.h"

#include <algorithm>
#include <string>
#include <type_traits>

namespace mdcn::cuda {
namespace {

// 16-bit tensors that are summed over chunks are summed in float.
template <typename T>
constexpr bool kSumsInFloat = !std::is_same_v<T, ComputeType<T>>;

int64_t Align(int64_t bytes) {
  return CeilDivide(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
}

// The parts of a workspace, one after the other. Without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename Element>
  Element* Take(int64_t count) {
    const int64_t start = bytes_;
    bytes_ += Align(count * static_cast<int64_t>(sizeof(Element)));
    return memory_ == nullptr ? nullptr : reinterpret_cast<Element*>(memory_ + start);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// A chunk's size, its index width and its columns; the same for all chunks of a call.
template <typename T>
struct Plan {
  Plan(const Geometry& geometry, const Options& options, int64_t extra_row_bytes,
       Workspace* workspace)
      : size(ChooseChunkSize(geometry,
                             geometry.out_width * geometry.taps * geometry.in_channels *
                                     static_cast<int64_t>(sizeof(T)) +
                                 extra_row_bytes,
                             options.chunk_bytes)),
        index_width(ChooseIndexWidth(geometry, size.images, size.rows)),
        pixels(size.images * size.rows * geometry.out_width),
        columns(workspace->Take<T>(pixels * geometry.taps * geometry.in_channels)) {}

  ChunkSize size;
  IndexWidth index_width;
  int64_t pixels;
  T* columns;
};

template <typename T>
struct ForwardPlan : Plan<T> {
  ForwardPlan(const Geometry& geometry, const Options& options, Workspace* workspace)
      : Plan<T>(geometry, options, 0, workspace) {}
};

template <typename T>
struct InputGradientPlan : Plan<T> {
  InputGradientPlan(const Geometry& geometry, const Options& options, Workspace* workspace)
      : Plan<T>(geometry, options, options.deterministic ? SortRowBytes(geometry) : 0, workspace) {
    if (options.deterministic) {
      sort_scratch = workspace->Take<char>(
          SortScratchBytes(this->pixels * geometry.mask_channels, this->index_width));
    }
    if (kSumsInFloat<T>) {
      sum = workspace->Take<ComputeType<T>>(this->size.images * geometry.in_pixels *
                                            geometry.in_channels);
    }
  }
  static int64_t SortRowBytes(const Geometry& geometry) {
    return SortScratchBytes(geometry.out_width * geometry.mask_channels, IndexWidth::k32);
  }

  char* sort_scratch = nullptr;
  ComputeType<T>* sum = nullptr;  // of the gradient of a chunk's images
};

template <typename T>
struct FilterGradientPlan : Plan<T> {
  FilterGradientPlan(const Geometry& geometry, const Options& options, Workspace* workspace)
      : Plan<T>(geometry, options, 0, workspace),
        bias_scratch(workspace->Take<ComputeType<T>>(BiasGradientScratchSize(geometry))) {
    if (kSumsInFloat<T>) {
      sum = workspace->Take<ComputeType<T>>(geometry.filters_size());
      terms = workspace->Take<T>(geometry.filters_size());
    }
  }

  ComputeType<T>* bias_scratch;
  ComputeType<T>* sum = nullptr;
  T* terms = nullptr;  // one product, before it is added
};

Status CheckWorkspace(int64_t needed_bytes, int64_t received_bytes) {
  if (received_bytes >= needed_bytes) return Status();
  return Status::Internal("ModulatedDeformConv2D: the workspace must have " +
                          std::to_string(needed_bytes) + " bytes; received " +
                          std::to_string(received_bytes));
}

// Calls function(chunk) for each chunk of the images [first_image, first_image + images).
template <typename Function>
Status ForEachRows(const Geometry& geometry, int64_t first_image, int64_t images, int64_t most_rows,
                   const Function& function) {
  for (int64_t row = 0; row < geometry.out_height; row += most_rows) {
    const int64_t rows = std::min(most_rows, geometry.out_height - row);
    MDCN_RETURN_IF_ERROR(function(Chunk{first_image, images, row, rows}));
  }
  return Status();
}

// Calls function(first_image, images) for each block of images.
template <typename Function>
Status ForEachImages(const Geometry& geometry, int64_t most_images, const Function& function) {
  for (int64_t image = 0; image < geometry.batch; image += most_images) {
    MDCN_RETURN_IF_ERROR(function(image, std::min(most_images, geometry.batch - image)));
  }
  return Status();
}

template <typename Function>
Status ForEachChunk(const Geometry& geometry, const ChunkSize& size, const Function& function) {
  return ForEachImages(geometry, size.images, [&](int64_t first_image, int64_t images) {
    return ForEachRows(geometry, first_image, images, size.rows, function);
  });
}

// How far apart the matrices of two images or of two groups are.
struct Steps {
  int64_t left, right, result;
};

// The three products of a chunk. In channels_last the pixels of all of its images are the rows of
// one matrix, so there is one batched call; in channels_first each image is a matrix of its own.
template <typename T>
class ChunkProducts {
 public:
  ChunkProducts(const Geometry& geometry, const Chunk& chunk, MatrixProduct<T>* product)
      : geometry_(geometry),
        channels_last_(geometry.data_format == DataFormat::kChannelsLast),
        images_(channels_last_ ? 1 : chunk.images),
        pixels_(chunk.pixels(geometry) / images_),
        depth_(geometry.taps * geometry.group_in_channels),
        first_pixel_(chunk.first_row * geometry.out_width),
        output_start_(chunk.first_image * geometry.out_pixels * geometry.out_channels +
                      first_pixel_ * (channels_last_ ? geometry.out_channels : 1)),
        product_(product) {}

  // output = columns * filters, or output += columns * filters.
  Status Output(const T* columns, const T* filters, T* output, bool accumulate) const {
    const auto filter = Filters(filters);
    const auto column = Columns(columns);
    const auto out = Outputs(output);
    if (channels_last_) {
      return Multiply({1, pixels_, geometry_.group_out_channels, depth_, column.matrix,
                       filter.matrix, out.matrix, accumulate},
                      {}, {column.group, filter.group, out.group});
    }
    return Multiply({1, geometry_.group_out_channels, pixels_, depth_, Transposed(filter.matrix),
                     column.matrix, out.matrix, accumulate},
                    {0, column.image, out.image}, {filter.group, column.group, out.group});
  }

  // column_gradient = output_gradient * filters^T.
  Status ColumnGradient(const T* output_gradient, const T* filters, T* column_gradient) const {
    const auto filter = Filters(filters);
    const auto column = Columns(column_gradient);
    const auto out = Outputs(output_gradient);
    if (channels_last_) {
      return Multiply({1, pixels_, depth_, geometry_.group_out_channels, out.matrix,
                       Transposed(filter.matrix), column.matrix, false},
                      {}, {out.group, filter.group, column.group});
    }
    return Multiply({1, depth_, pixels_, geometry_.group_out_channels, filter.matrix, out.matrix,
                     column.matrix, false},
                    {0, out.image, column.image}, {filter.group, out.group, column.group});
  }

  // filter_gradient = columns^T * output_gradient, or +=: one call for each image, with
  // after_call() after each.
  template <typename AfterCall>
  Status FilterGradient(const T* columns, const T* output_gradient, T* filter_gradient,
                        bool accumulate, const AfterCall& after_call) const {
    const auto filter = Filters(filter_gradient);
    for (int64_t image = 0; image < images_; ++image) {
      auto column = Columns(columns);
      auto out = Outputs(output_gradient);
      column.matrix.data += image * column.image;
      out.matrix.data += image * out.image;
      // channels_last has pixels x depth in memory, channels_first depth x pixels.
      (channels_last_ ? column.matrix : out.matrix).transposed = true;
      MDCN_RETURN_IF_ERROR(Multiply({1, depth_, geometry_.group_out_channels, pixels_,
                                     column.matrix, out.matrix, filter.matrix, accumulate},
                                    {}, {column.group, out.group, filter.group}));
      MDCN_RETURN_IF_ERROR(after_call());
    }
    return Status();
  }

 private:
  // The matrix of the first image and group, and the distances to the next.
  template <typename Element>
  struct Operand {
    MatrixBatch<Element> matrix;
    int64_t image, group;
  };

  template <typename Element>
  Operand<Element> Filters(Element* filters) const {
    return {{filters, geometry_.out_channels, 0}, 0, geometry_.group_out_channels};
  }

  template <typename Element>
  Operand<Element> Columns(Element* columns) const {
    if (channels_last_) return {{columns, geometry_.groups * depth_, 0}, 0, depth_};
    const int64_t chunk_pixels = images_ * pixels_;
    return {{columns, chunk_pixels, 0}, pixels_, depth_ * chunk_pixels};
  }

  template <typename Element>
  Operand<Element> Outputs(Element* output) const {
    Element* const start = output + output_start_;
    const int64_t group = geometry_.group_out_channels;
    if (channels_last_) return {{start, geometry_.out_channels, 0}, 0, group};
    const int64_t plane = geometry_.out_pixels;
    return {{start, plane, 0}, geometry_.out_channels * plane, group * plane};
  }

  template <typename Element>
  static MatrixBatch<Element> Transposed(MatrixBatch<Element> matrix) {
    matrix.transposed = true;
    return matrix;
  }

  // The product for all images and groups, batched over whichever is more.
  Status Multiply(MatrixProductCall<T> call, const Steps& image, const Steps& group) const {
    const bool image_apart = image.result != 0;
    const int64_t images = image_apart ? images_ : 1;
    const bool batch_groups = geometry_.groups >= images;
    const Steps& inner = batch_groups ? group : image;
    const Steps& outer = batch_groups ? image : group;
    call.batch = batch_groups ? geometry_.groups : images;
    call.left.batch_step = inner.left;
    call.right.batch_step = inner.right;
    call.result.batch_step = inner.result;
    for (int64_t i = 0; i < (batch_groups ? images : geometry_.groups); ++i) {
      MDCN_RETURN_IF_ERROR(product_->Multiply(call));
      call.left.data += outer.left;
      call.right.data += outer.right;
      call.result.data += outer.result;
    }
    return Status();
  }

  const Geometry& geometry_;
  const bool channels_last_;
  const int64_t images_, pixels_, depth_, first_pixel_, output_start_;
  MatrixProduct<T>* const product_;
};

}  // namespace

template <typename T>
int64_t ForwardWorkspaceBytes(const Geometry& geometry, const Options& options) {
  Workspace workspace(nullptr);
  ForwardPlan<T>(geometry, options, &workspace);
  return workspace.bytes();
}

template <typename T>
int64_t InputGradientWorkspaceBytes(const Geometry& geometry, const Options& options) {
  Workspace workspace(nullptr);
  InputGradientPlan<T>(geometry, options, &workspace);
  return workspace.bytes();
}

template <typename T>
int64_t FilterGradientWorkspaceBytes(const Geometry& geometry, const Options& options) {
  Workspace workspace(nullptr);
  FilterGradientPlan<T>(geometry, options, &workspace);
  return workspace.bytes();
}

template <typename T, typename TOffset>
Status Forward(const Geometry& geometry, const ForwardTensors<T, TOffset>& tensors,
               const Options& options, const Execution<T>& execution) {
  Workspace workspace(execution.workspace);
  const ForwardPlan<T> plan(geometry, options, &workspace);
  MDCN_RETURN_IF_ERROR(CheckWorkspace(workspace.bytes(), execution.workspace_bytes));
  const bool has_bias = tensors.bias != nullptr;
  if (has_bias) {
    MDCN_RETURN_IF_ERROR(BroadcastBias(geometry, tensors.bias, tensors.output, execution.stream));
  }
  return ForEachChunk(geometry, plan.size, [&](const Chunk& chunk) -> Status {
    const ChunkLaunch launch = {geometry, chunk, plan.index_width, execution.stream};
    MDCN_RETURN_IF_ERROR(Sample(launch, tensors.input, tensors.sampling, plan.columns));
    return ChunkProducts<T>(geometry, chunk, execution.product)
        .Output(plan.columns, tensors.filters, tensors.output, has_bias);
  });
}

template <typename T, typename TOffset>
Status InputGradient(const Geometry& geometry, const InputGradientTensors<T, TOffset>& tensors,
                     const Options& options, const Execution<T>& execution) {
  Workspace workspace(execution.workspace);
  const InputGradientPlan<T> plan(geometry, options, &workspace);
  MDCN_RETURN_IF_ERROR(CheckWorkspace(workspace.bytes(), execution.workspace_bytes));
  const Stream stream = execution.stream;
  const int64_t image_size = geometry.in_pixels * geometry.in_channels;
  return ForEachImages(
      geometry, plan.size.images, [&](int64_t first_image, int64_t images) -> Status {
        T* const gradient = tensors.input_gradient + first_image * image_size;
        ComputeType<T>* sum = plan.sum;
        if constexpr (!kSumsInFloat<T>) sum = gradient;
        const int64_t sum_bytes =
            images * image_size * static_cast<int64_t>(sizeof(ComputeType<T>));
        MDCN_RETURN_IF_ERROR(SetZero(sum, sum_bytes, stream));
        const auto add_chunk = [&](const Chunk& chunk) -> Status {
          const ChunkLaunch launch = {geometry, chunk, plan.index_width, stream};
          const ChunkProducts<T> products(geometry, chunk, execution.product);
          MDCN_RETURN_IF_ERROR(
              products.ColumnGradient(tensors.output_gradient, tensors.filters, plan.columns));
          MDCN_RETURN_IF_ERROR(SamplingGradient(launch, tensors.input, tensors.sampling,
                                                plan.columns, tensors.offset_gradient,
                                                tensors.mask_gradient));
          return options.deterministic
                     ? GatherInputGradient(launch, tensors.sampling, plan.columns, sum,
                                           plan.sort_scratch)
                     : ScatterInputGradient(launch, tensors.sampling, plan.columns, sum);
        };
        MDCN_RETURN_IF_ERROR(ForEachRows(geometry, first_image, images, plan.size.rows, add_chunk));
        if constexpr (kSumsInFloat<T>) {
          return Convert(sum, images * image_size, gradient, stream);
        }
        return Status();
      });
}

template <typename T, typename TOffset>
Status FilterGradient(const Geometry& geometry, const FilterGradientTensors<T, TOffset>& tensors,
                      const Options& options, const Execution<T>& execution) {
  Workspace workspace(execution.workspace);
  const FilterGradientPlan<T> plan(geometry, options, &workspace);
  MDCN_RETURN_IF_ERROR(CheckWorkspace(workspace.bytes(), execution.workspace_bytes));
  const Stream stream = execution.stream;
  if (tensors.bias_gradient != nullptr) {
    MDCN_RETURN_IF_ERROR(BiasGradient(geometry, tensors.output_gradient, plan.bias_scratch,
                                      tensors.bias_gradient, stream));
  }
  const int64_t count = geometry.filters_size();
  ComputeType<T>* sum = plan.sum;
  if constexpr (!kSumsInFloat<T>) sum = tensors.filter_gradient;
  MDCN_RETURN_IF_ERROR(SetZero(sum, count * static_cast<int64_t>(sizeof(ComputeType<T>)), stream));
  // 16-bit products are written, then added to the sum; others are added by the product itself.
  T* const products = kSumsInFloat<T> ? plan.terms : tensors.filter_gradient;
  const auto after_call = [&]() -> Status {
    if constexpr (kSumsInFloat<T>) return AddTo(plan.terms, count, sum, stream);
    return Status();
  };
  const auto add_chunk = [&](const Chunk& chunk) -> Status {
    const ChunkLaunch launch = {geometry, chunk, plan.index_width, stream};
    MDCN_RETURN_IF_ERROR(Sample(launch, tensors.input, tensors.sampling, plan.columns));
    return ChunkProducts<T>(geometry, chunk, execution.product)
        .FilterGradient(plan.columns, tensors.output_gradient, products, !kSumsInFloat<T>,
                        after_call);
  };
  MDCN_RETURN_IF_ERROR(ForEachChunk(geometry, plan.size, add_chunk));
  if constexpr (kSumsInFloat<T>) return Convert(sum, count, tensors.filter_gradient, stream);
  return Status();
}

#define MDCN_INSTANTIATE(T, TOffset)                                                          \
  template Status Forward(const Geometry&, const ForwardTensors<T, TOffset>&, const Options&, \
                          const Execution<T>&);                                               \
  template Status InputGradient(const Geometry&, const InputGradientTensors<T, TOffset>&,     \
                                const Options&, const Execution<T>&);                         \
  template Status FilterGradient(const Geometry&, const FilterGradientTensors<T, TOffset>&,   \
                                 const Options&, const Execution<T>&);
MDCN_FOR_EACH_TYPE_PAIR(MDCN_INSTANTIATE)
#undef MDCN_INSTANTIATE

#define MDCN_INSTANTIATE(T)                                                         \
  template int64_t ForwardWorkspaceBytes<T>(const Geometry&, const Options&);       \
  template int64_t InputGradientWorkspaceBytes<T>(const Geometry&, const Options&); \
  template int64_t FilterGradientWorkspaceBytes<T>(const Geometry&, const Options&);
MDCN_INSTANTIATE(float)
MDCN_INSTANTIATE(double)
MDCN_INSTANTIATE(Half)
MDCN_INSTANTIATE(BFloat16)
#undef MDCN_INSTANTIATE

}  // namespace mdcn::cuda
