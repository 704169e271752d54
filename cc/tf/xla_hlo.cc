#include "tf/xla_hlo.h"

#include <cstdint>
#include <limits>

#include "absl/types/span.h"
#include "tensorflow/core/platform/tensor_float_32_utils.h"
#include "xla/hlo/builder/lib/arithmetic.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/shape_util.h"

namespace mdcn {
namespace {

using ::xla::PrimitiveType;
using ::xla::XlaOp;
using Sizes = std::vector<int64_t>;
using Dimensions = absl::Span<const int64_t>;

// A sample is what one output pixel reads for one kernel tap and one deformable group. Where there
// is one number for each, it is in an array [pixels, taps, deformable_groups], pixels being those
// of all images; the corners follow, [2, 2], low and high y by low and high x; and then the
// channels of the deformable group. With the taps before the deformable groups, a pixel's samples
// are in the order of the filters, whatever the groups.
constexpr int64_t kCornerY = 3, kCornerX = 4, kChannel = 5;

// What one axis has to do with each corner of each sample.
struct AxisCorners {
  XlaOp index;
  XlaOp exists;
  XlaOp weight;
  XlaOp slope;  // the derivative of the weight with respect to the position
};

class Convolution {
 public:
  Convolution(const Geometry& geometry, PrimitiveType type, const XlaOperands& operands)
      : g_(geometry),
        in_(operands),
        builder_(operands.input.builder()),
        real_(type == xla::F64 ? xla::F64 : xla::F32),
        integer_(TableRows() <= std::numeric_limits<int32_t>::max() ? xla::S32 : xla::S64),
        pixels_(g_.batch * g_.out_pixels) {
    const XlaOp first_y = Count(kOutRow) * Integer(g_.stride_height) - Integer(g_.pad_top);
    const XlaOp first_x = Count(kOutColumn) * Integer(g_.stride_width) - Integer(g_.pad_left);
    const XlaOp grid_y = first_y + Count(kKernelRow) * Integer(g_.dilation_height);
    const XlaOp grid_x = first_x + Count(kKernelColumn) * Integer(g_.dilation_width);
    y_ = Locate(ToReal(grid_y) + ToSamples(in_.offset, 0, 2), g_.in_height, kCornerY);
    x_ = Locate(ToReal(grid_x) + ToSamples(in_.offset, 1, 2), g_.in_width, kCornerX);

    XlaOp row = OverCorners(Count(kImage)) * Integer(g_.in_height) + y_.index;
    row = row * Integer(g_.in_width) + x_.index;
    row = row * Integer(g_.deformable_groups) + OverCorners(Count(kDeformableGroup));
    rows_ = xla::Select(xla::And(y_.exists, x_.exists), row, xla::FullLike(row, -1));
    if (in_.mask.valid()) mask_ = OverCorners(ToSamples(in_.mask, 0, 1));
  }

  XlaOp Output() const {
    const XlaOp groups_first = Dot(Samples(), {1, 3}, 2, GroupedFilters(), {0, 1}, 2);
    XlaOp output = xla::Reshape(xla::Transpose(groups_first, {1, 0, 2}), OutputSizes());
    if (in_.bias.valid()) output = xla::Add(output, ToReal(in_.bias), {3});
    return FromChannelsLast(output);
  }

  std::vector<XlaOp> InputGradients() const {
    const XlaOp samples_gradient =
        xla::BroadcastInDim(SamplesGradient(), ChannelSizes(), {0, 1, 2, kChannel});
    // What each corner's weight adds to the loss.
    const XlaOp dots = Sum(CornerValues() * samples_gradient, {kChannel});
    const auto over_corners = [&](XlaOp factors) {
      return Sum(factors * dots, {kCornerY, kCornerX});
    };
    std::vector<XlaOp> gradients = {
        ScatterCorners(OverChannels(Modulated(y_.weight * x_.weight)) * samples_gradient),
        FromSamples({over_corners(Modulated(y_.slope * x_.weight)),
                     over_corners(Modulated(y_.weight * x_.slope))})};
    if (in_.mask.valid()) gradients.push_back(FromSamples({over_corners(y_.weight * x_.weight)}));
    return gradients;
  }

  XlaOp FilterGradient() const {
    const XlaOp groups_first = Dot(Samples(), {0}, 2, GroupedOutputGradient(), {0}, 1);
    return xla::Reshape(xla::Transpose(groups_first, {1, 2, 0, 3}),
                        {g_.kernel_height, g_.kernel_width, g_.group_in_channels, g_.out_channels});
  }

  XlaOp BiasGradient() const { return Sum(ToReal(ToChannelsLast(in_.output_gradient)), {0, 1, 2}); }

 private:
  // ---- Constants and types. ----

  XlaOp Integer(int64_t value) const { return xla::ConstantR0WithType(builder_, integer_, value); }
  XlaOp Real(int64_t value) const { return xla::ConstantR0WithType(builder_, real_, value); }
  XlaOp ToReal(XlaOp x) const { return xla::ConvertElementType(x, real_); }

  // ---- Sizes. ----

  // A row of the table is a pixel's channels of one deformable group.
  int64_t TableRows() const { return g_.batch * g_.in_pixels * g_.deformable_groups; }
  Sizes TableSizes() const { return {TableRows(), g_.deformable_group_channels}; }
  Sizes SampleSizes() const { return {pixels_, g_.taps, g_.deformable_groups}; }
  Sizes CornerSizes() const { return {pixels_, g_.taps, g_.deformable_groups, 2, 2}; }
  Sizes ChannelSizes() const {
    return {pixels_, g_.taps, g_.deformable_groups, 2, 2, g_.deformable_group_channels};
  }
  Sizes OutputSizes() const { return {g_.batch, g_.out_height, g_.out_width, g_.out_channels}; }

  // ---- Shapes changed. ----

  XlaOp ToChannelsLast(XlaOp image) const {
    return g_.data_format == DataFormat::kChannelsLast ? image
                                                       : xla::Transpose(image, {0, 2, 3, 1});
  }
  XlaOp FromChannelsLast(XlaOp image) const {
    return g_.data_format == DataFormat::kChannelsLast ? image
                                                       : xla::Transpose(image, {0, 3, 1, 2});
  }

  // Of an image that has `count` numbers for each sample, the one at `which`.
  XlaOp ToSamples(XlaOp image, int64_t which, int64_t count) const {
    const XlaOp numbers = xla::Reshape(ToReal(ToChannelsLast(image)),
                                       {pixels_, g_.deformable_groups, g_.taps, count});
    const XlaOp chosen = xla::SliceInDim(numbers, which, which + 1, 1, 3);
    return xla::Transpose(xla::Reshape(chosen, {pixels_, g_.deformable_groups, g_.taps}),
                          {0, 2, 1});
  }

  // The image that has these numbers for each sample.
  XlaOp FromSamples(const std::vector<XlaOp>& numbers) const {
    std::vector<XlaOp> parts;
    for (XlaOp part : numbers) {
      parts.push_back(xla::Reshape(xla::Transpose(part, {0, 2, 1}),
                                   {pixels_, g_.deformable_groups, g_.taps, 1}));
    }
    const int64_t channels = g_.mask_channels * static_cast<int64_t>(numbers.size());
    return FromChannelsLast(xla::Reshape(xla::ConcatInDim(builder_, parts, 3),
                                         {g_.batch, g_.out_height, g_.out_width, channels}));
  }

  XlaOp OverCorners(XlaOp samples) const {
    return xla::BroadcastInDim(samples, CornerSizes(), {0, 1, 2});
  }
  XlaOp OverChannels(XlaOp corners) const {
    return xla::BroadcastInDim(corners, ChannelSizes(), {0, 1, 2, kCornerY, kCornerX});
  }

  XlaOp Sum(XlaOp terms, Dimensions dimensions) const {
    return xla::Reduce(terms, Real(0), xla::CreateScalarAddComputation(real_, builder_),
                       dimensions);
  }

  // ---- Positions, as core/sampling.h has them. ----

  enum Counted { kImage, kOutRow, kOutColumn, kKernelRow, kKernelColumn, kDeformableGroup };

  // Which of these each sample has.
  XlaOp Count(Counted what) const {
    const xla::Shape shape = xla::ShapeUtil::MakeShape(
        integer_, {g_.batch, g_.out_height, g_.out_width, g_.kernel_height, g_.kernel_width,
                   g_.deformable_groups});
    return xla::Reshape(xla::Iota(builder_, shape, what), SampleSizes());
  }

  AxisCorners Locate(XlaOp position, int64_t size, int64_t corner_dimension) const {
    const XlaOp touches = xla::And(xla::Ge(position, Real(-1)), xla::Lt(position, Real(size)));
    const XlaOp located = xla::Select(touches, position, xla::FullLike(position, -2));
    const XlaOp low = xla::Floor(located);
    const XlaOp is_nan = xla::Ne(position, position);
    const XlaOp fraction = OverCorners(xla::Select(is_nan, position, located - low));

    const XlaOp corner =
        xla::Iota(builder_, xla::ShapeUtil::MakeShape(integer_, CornerSizes()), corner_dimension);
    const XlaOp is_low = xla::Eq(corner, Integer(0));
    const XlaOp index = OverCorners(xla::ConvertElementType(low, integer_)) + corner;
    const XlaOp exists = xla::And(xla::Ge(index, Integer(0)), xla::Lt(index, Integer(size)));
    return {index, exists, xla::Select(is_low, Real(1) - fraction, fraction),
            xla::Select(is_low, xla::FullLike(fraction, -1), xla::FullLike(fraction, 1))};
  }

  XlaOp Modulated(XlaOp corners) const { return mask_.valid() ? corners * mask_ : corners; }

  // ---- Corners read and written: all four at once, which leaves it to XLA what is fused with
  // what. A corner that does not exist has row -1: XLA takes a gather from there for one from row
  // 0, and leaves a scatter to there out. ----

  XlaOp CornerValues() const {
    const XlaOp table = xla::Reshape(ToChannelsLast(in_.input), TableSizes());
    xla::GatherDimensionNumbers numbers;
    numbers.add_offset_dims(kChannel);
    numbers.add_collapsed_slice_dims(0);
    numbers.add_start_index_map(0);
    numbers.set_index_vector_dim(kChannel);
    const XlaOp values =
        ToReal(xla::Gather(table, rows_, numbers, {1, g_.deformable_group_channels}));
    return xla::Select(OverChannels(xla::Ge(rows_, Integer(0))), values, xla::ZerosLike(values));
  }

  XlaOp ScatterCorners(XlaOp values) const {
    const XlaOp zeros = xla::Broadcast(Real(0), TableSizes());
    xla::ScatterDimensionNumbers numbers;
    numbers.add_update_window_dims(kChannel);
    numbers.add_inserted_window_dims(0);
    numbers.add_scatter_dims_to_operand_dims(0);
    numbers.set_index_vector_dim(kChannel);
    const XlaOp table = xla::Scatter(zeros, rows_, values,
                                     xla::CreateScalarAddComputation(real_, builder_), numbers);
    return FromChannelsLast(
        xla::Reshape(table, {g_.batch, g_.in_height, g_.in_width, g_.in_channels}));
  }

  // ---- The matrix product and what goes into it. ----

  // [pixels, taps, groups, channels]
  XlaOp Samples() const {
    const XlaOp weights = OverChannels(Modulated(y_.weight * x_.weight));
    return xla::Reshape(Sum(CornerValues() * weights, {kCornerY, kCornerX}),
                        {pixels_, g_.taps, g_.groups, g_.group_in_channels});
  }

  // [pixels, taps, deformable_groups, channels]
  XlaOp SamplesGradient() const {
    const XlaOp groups_first = Dot(GroupedOutputGradient(), {2}, 1, GroupedFilters(), {3}, 2);
    return xla::Reshape(xla::Transpose(groups_first, {1, 2, 0, 3}),
                        {pixels_, g_.taps, g_.deformable_groups, g_.deformable_group_channels});
  }

  // [taps, channels, groups, features]
  XlaOp GroupedFilters() const {
    return xla::Reshape(ToReal(in_.filters),
                        {g_.taps, g_.group_in_channels, g_.groups, g_.group_out_channels});
  }

  // [pixels, groups, features]
  XlaOp GroupedOutputGradient() const {
    return xla::Reshape(ToReal(ToChannelsLast(in_.output_gradient)),
                        {pixels_, g_.groups, g_.group_out_channels});
  }

  // Sums over the given dimensions, for each of the groups, which come first in the result; then
  // what is left of `left`, then of `right`.
  XlaOp Dot(XlaOp left, Dimensions left_summed, int64_t left_groups, XlaOp right,
            Dimensions right_summed, int64_t right_groups) const {
    xla::DotDimensionNumbers numbers;
    for (int64_t dimension : left_summed) numbers.add_lhs_contracting_dimensions(dimension);
    for (int64_t dimension : right_summed) numbers.add_rhs_contracting_dimensions(dimension);
    numbers.add_lhs_batch_dimensions(left_groups);
    numbers.add_rhs_batch_dimensions(right_groups);
    // As in TensorFlow's own products.
    const auto precision = ::tensorflow::tensor_float_32_execution_enabled()
                               ? xla::PrecisionConfig::DEFAULT
                               : xla::PrecisionConfig::HIGHEST;
    xla::PrecisionConfig configuration;
    configuration.add_operand_precision(precision);
    configuration.add_operand_precision(precision);
    return xla::DotGeneral(left, right, numbers, &configuration);
  }

  const Geometry& g_;
  const XlaOperands& in_;
  xla::XlaBuilder* const builder_;
  const PrimitiveType real_, integer_;
  const int64_t pixels_;
  AxisCorners y_, x_;
  XlaOp rows_;  // of the table, for each corner
  XlaOp mask_;  // for each corner
};

}  // namespace

std::vector<XlaOp> ForwardHlo(const Geometry& geometry, PrimitiveType type,
                              const XlaOperands& operands) {
  return {Convolution(geometry, type, operands).Output()};
}

std::vector<XlaOp> InputGradientHlo(const Geometry& geometry, PrimitiveType type,
                                    const XlaOperands& operands) {
  return Convolution(geometry, type, operands).InputGradients();
}

std::vector<XlaOp> FilterGradientHlo(const Geometry& geometry, PrimitiveType type,
                                     const XlaOperands& operands) {
  const Convolution convolution(geometry, type, operands);
  return {convolution.FilterGradient(), convolution.BiasGradient()};
}

}  // namespace mdcn
