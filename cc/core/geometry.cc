#include "core/geometry.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <utility>

namespace mdcn {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// "[2, -1, 8]".
template <typename Values>
std::string ListString(const Values& values) {
  std::string text = "[";
  for (int64_t value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

template <typename... Parts>
Status Invalid(const std::string& op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  return Status::InvalidArgument(message.str());
}

// A size that may be unknown, with arithmetic that stays unknown.
int64_t Times(int64_t a, int64_t b) { return a == kUnknown || b == kUnknown ? kUnknown : a * b; }

// Takes over `other` where nothing was known yet.
void Merge(int64_t* size, int64_t other) {
  if (*size == kUnknown) *size = other;
}

// The four dimensions of an image tensor, wherever its layout has them.
struct ImageShape {
  int64_t batch = kUnknown, height = kUnknown, width = kUnknown, channels = kUnknown;
};

std::vector<int64_t> Arrange(DataFormat format, const ImageShape& shape) {
  if (format == DataFormat::kChannelsLast) {
    return {shape.batch, shape.height, shape.width, shape.channels};
  }
  return {shape.batch, shape.channels, shape.height, shape.width};
}

std::string LayoutString(DataFormat format, const std::string& height, const std::string& width,
                         const std::string& channels) {
  if (format == DataFormat::kChannelsLast) {
    return "[batch, " + height + ", " + width + ", " + channels + "]";
  }
  return "[batch, " + channels + ", " + height + ", " + width + "]";
}

Status CheckDimensions(const std::string& op, const std::string& name, const std::string& rule,
                       const Shape& shape, size_t rank) {
  if (!shape) return Status();
  if (shape->size() != rank) {
    return Invalid(op, name, " must have rank ", rank, ", ", rule, "; received shape ",
                   ShapeString(shape));
  }
  for (int64_t size : *shape) {
    if (size < kUnknown) {
      return Invalid(op, name, " must have no negative dimension; received ", ShapeString(shape));
    }
  }
  return Status();
}

ImageShape ReadImageShape(DataFormat format, const Shape& shape) {
  if (!shape) return {};
  const std::vector<int64_t>& sizes = *shape;
  if (format == DataFormat::kChannelsLast) return {sizes[0], sizes[1], sizes[2], sizes[3]};
  return {sizes[0], sizes[2], sizes[3], sizes[1]};
}

// Refuses `received` where it contradicts what is known of `expected`.
Status CheckAgrees(const std::string& op, const std::string& name, const std::string& rule,
                   const std::vector<int64_t>& expected, const Shape& received) {
  if (!received) return Status();
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t a = expected[i], b = (*received)[i];
    if (a != kUnknown && b != kUnknown && a != b) {
      return Invalid(op, name, " must have shape ", rule, " = ", ShapeString(expected),
                     "; received ", ShapeString(received));
    }
  }
  return Status();
}

// One spatial axis: the size of the output and the padding before it. A known output that would be
// empty or negative is an error, as in tf.nn.conv2d; an input of size 0 is refused with it.
Status InferAxis(const std::string& op, const std::string& axis, const Attributes& attributes,
                 int axis_index, int64_t input, int64_t kernel, int64_t* output,
                 int64_t* pad_before) {
  const int64_t stride = attributes.strides[axis_index];
  const int64_t dilation = attributes.dilations[axis_index];
  *output = kUnknown;
  *pad_before = 0;
  int64_t pad_total = 0;
  if (attributes.padding == Padding::kExplicit) {
    *pad_before = attributes.explicit_paddings[2 * axis_index];
    pad_total = *pad_before + attributes.explicit_paddings[2 * axis_index + 1];
  }
  if (input == kUnknown) return Status();
  if (attributes.padding == Padding::kSame) {
    if (input == 0) {
      return Invalid(op, "inputs must have at least one pixel; received in_", axis, "=0");
    }
    *output = (input - 1) / stride + 1;
    if (kernel == kUnknown) return Status();
    const int64_t extent = (kernel - 1) * dilation + 1;
    *pad_before = std::max<int64_t>(0, (*output - 1) * stride + extent - input) / 2;
    return Status();
  }
  if (kernel == kUnknown) return Status();
  const int64_t extent = (kernel - 1) * dilation + 1;
  if (input == 0 || input + pad_total < extent) {
    return Invalid(
        op, "the padded input must be at least as large as the dilated kernel; received ", "in_",
        axis, "=", input, ", padding ", pad_total, ", dilated kernel_", axis, "=", extent);
  }
  *output = (input + pad_total - extent) / stride + 1;
  return Status();
}

// All that shapes and attributes say together; unknown where they are silent.
struct Inferred {
  ImageShape input, output;
  int64_t kernel_height = kUnknown, kernel_width = kUnknown, group_in_channels = kUnknown;
  int64_t pad_top = 0, pad_left = 0;
};

Status Infer(const std::string& op, const Attributes& attributes, const TensorShapes& shapes,
             Inferred* inferred) {
  MDCN_RETURN_IF_ERROR(CheckAttributes(op, attributes));
  const DataFormat format = attributes.data_format;
  const std::string input_rule = LayoutString(format, "in_height", "in_width", "in_channels");
  const std::string filters_rule =
      "[kernel_height, kernel_width, in_channels / groups, out_channels]";
  const std::string offset_rule = LayoutString(
      format, "out_height", "out_width", "2 * deformable_groups * kernel_height * kernel_width");
  const std::string mask_rule = LayoutString(format, "out_height", "out_width",
                                             "deformable_groups * kernel_height * kernel_width");
  MDCN_RETURN_IF_ERROR(CheckDimensions(op, "inputs", input_rule, shapes.input, 4));
  MDCN_RETURN_IF_ERROR(CheckDimensions(op, "filters", filters_rule, shapes.filters, 4));
  MDCN_RETURN_IF_ERROR(CheckDimensions(op, "offset", offset_rule, shapes.offset, 4));
  if (shapes.has_mask) MDCN_RETURN_IF_ERROR(CheckDimensions(op, "mask", mask_rule, shapes.mask, 4));
  if (shapes.has_bias) {
    MDCN_RETURN_IF_ERROR(CheckDimensions(op, "bias", "[out_channels]", shapes.bias, 1));
  }

  ImageShape input = ReadImageShape(format, shapes.input);
  ImageShape output;
  int64_t kernel_height = kUnknown, kernel_width = kUnknown, group_in_channels = kUnknown;
  if (shapes.filters) {
    const std::vector<int64_t>& filters = *shapes.filters;
    kernel_height = filters[0];
    kernel_width = filters[1];
    group_in_channels = filters[2];
    output.channels = filters[3];
    // The bound keeps every product of sizes below in range.
    for (int64_t size : filters) {
      if (size == 0 || size > kMaxInt32) {
        return Invalid(op, "filters must have dimensions between 1 and 2^31 - 1; received shape ",
                       ShapeString(shapes.filters));
      }
    }
    if (Times(kernel_height, kernel_width) > kMaxInt32) {
      return Invalid(op, "filters must have at most 2^31 - 1 kernel taps; received shape ",
                     ShapeString(shapes.filters));
    }
  }

  const int64_t groups = attributes.groups, deformable_groups = attributes.deformable_groups;
  if (input.channels == 0) {
    return Invalid(op, "inputs must have at least one channel; received shape ",
                   ShapeString(shapes.input));
  }
  Merge(&input.channels, Times(group_in_channels, groups));
  const auto check_divides = [&](const char* what, int64_t parts, const char* whole,
                                 int64_t size) -> Status {
    if (size == kUnknown || size % parts == 0) return Status();
    return Invalid(op, what, " must divide ", whole, "; received ", what, "=", parts, ", ", whole,
                   "=", size);
  };
  MDCN_RETURN_IF_ERROR(check_divides("groups", groups, "in_channels", input.channels));
  MDCN_RETURN_IF_ERROR(check_divides("groups", groups, "out_channels", output.channels));
  MDCN_RETURN_IF_ERROR(
      check_divides("deformable_groups", deformable_groups, "in_channels", input.channels));
  MDCN_RETURN_IF_ERROR(CheckAgrees(
      op, "filters", filters_rule,
      {kernel_height, kernel_width, input.channels == kUnknown ? kUnknown : input.channels / groups,
       output.channels},
      shapes.filters));

  int64_t pad_top = 0, pad_left = 0;
  MDCN_RETURN_IF_ERROR(InferAxis(op, "height", attributes, 0, input.height, kernel_height,
                                 &output.height, &pad_top));
  MDCN_RETURN_IF_ERROR(
      InferAxis(op, "width", attributes, 1, input.width, kernel_width, &output.width, &pad_left));
  output.batch = input.batch;

  // The offset and the mask may know what the input does not, and must agree with it and each
  // other.
  const int64_t mask_channels = Times(Times(kernel_height, kernel_width), deformable_groups);
  const auto check_sampling = [&](const char* name, const std::string& rule, int64_t channels,
                                  const Shape& shape) -> Status {
    ImageShape expected = output;
    expected.channels = channels;
    MDCN_RETURN_IF_ERROR(CheckAgrees(op, name, rule, Arrange(format, expected), shape));
    const ImageShape received = ReadImageShape(format, shape);
    Merge(&output.batch, received.batch);
    Merge(&output.height, received.height);
    Merge(&output.width, received.width);
    return Status();
  };
  MDCN_RETURN_IF_ERROR(
      check_sampling("offset", offset_rule, Times(mask_channels, 2), shapes.offset));
  if (shapes.has_mask) {
    MDCN_RETURN_IF_ERROR(check_sampling("mask", mask_rule, mask_channels, shapes.mask));
  }
  if (shapes.has_bias) {
    MDCN_RETURN_IF_ERROR(CheckAgrees(op, "bias", "[out_channels]", {output.channels}, shapes.bias));
    if (shapes.bias) Merge(&output.channels, (*shapes.bias)[0]);
  }
  *inferred = {input, output, kernel_height, kernel_width, group_in_channels, pad_top, pad_left};
  return Status();
}

// The largest element is 8 bytes and kernels pad rows, so sizes stay well below 2^63.
constexpr int64_t kMaxElements = int64_t{1} << 58;

Status CheckSize(const std::string& op, const std::string& name,
                 const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product > kMaxElements) {
      return Invalid(op, name, " must have at most 2^58 elements; received shape ",
                     ListString(sizes));
    }
  }
  return Status();
}

}  // namespace

std::string ShapeString(const Shape& shape) {
  if (!shape) return "unknown";
  std::string text = "[";
  for (int64_t size : *shape) {
    text += (text.size() > 1 ? ", " : "") + (size == kUnknown ? "?" : std::to_string(size));
  }
  return text + "]";
}

Status CheckAttributes(const std::string& op, const Attributes& attributes) {
  const auto check_pair = [&](const char* name, const std::array<int64_t, 2>& pair) -> Status {
    for (int64_t value : pair) {
      if (value < 1 || value > kMaxInt32) {
        return Invalid(op, name, " must be 2 integers between 1 and 2^31 - 1; received ",
                       ListString(pair));
      }
    }
    return Status();
  };
  MDCN_RETURN_IF_ERROR(check_pair("strides", attributes.strides));
  MDCN_RETURN_IF_ERROR(check_pair("dilations", attributes.dilations));
  for (int64_t value : attributes.explicit_paddings) {
    if (value < 0 || value > kMaxInt32) {
      return Invalid(op, "explicit_paddings must be 4 integers [top, bottom, left, right] between ",
                     "0 and 2^31 - 1; received ", ListString(attributes.explicit_paddings));
    }
    if (value != 0 && attributes.padding != Padding::kExplicit) {
      return Invalid(op, "explicit_paddings must be empty or 0 unless padding is EXPLICIT; ",
                     "received ", ListString(attributes.explicit_paddings));
    }
  }
  const auto check_count = [&](const char* name, int64_t value) -> Status {
    if (value >= 1 && value <= kMaxInt32) return Status();
    return Invalid(op, name, " must be an integer between 1 and 2^31 - 1; received ", value);
  };
  MDCN_RETURN_IF_ERROR(check_count("groups", attributes.groups));
  return check_count("deformable_groups", attributes.deformable_groups);
}

Status InferOutputShape(const std::string& op, const Attributes& attributes,
                        const TensorShapes& shapes, std::vector<int64_t>* output) {
  Inferred inferred;
  MDCN_RETURN_IF_ERROR(Infer(op, attributes, shapes, &inferred));
  *output = Arrange(attributes.data_format, inferred.output);
  return Status();
}

Status MakeGeometry(const std::string& op, const Attributes& attributes, const TensorShapes& shapes,
                    Geometry* geometry) {
  // Sizes first: the products that inference forms must not overflow.
  const auto check_known = [&](const char* name, const Shape& shape) -> Status {
    if (!shape) return Status::Internal(op + ": the shape of " + name + " must be known");
    for (int64_t size : *shape) {
      if (size == kUnknown) {
        return Invalid(op, name, " must have no negative dimension; received ", ListString(*shape));
      }
    }
    return CheckSize(op, name, *shape);
  };
  MDCN_RETURN_IF_ERROR(check_known("inputs", shapes.input));
  MDCN_RETURN_IF_ERROR(check_known("filters", shapes.filters));
  MDCN_RETURN_IF_ERROR(check_known("offset", shapes.offset));
  if (shapes.has_mask) MDCN_RETURN_IF_ERROR(check_known("mask", shapes.mask));
  if (shapes.has_bias) MDCN_RETURN_IF_ERROR(check_known("bias", shapes.bias));

  Inferred inferred;
  MDCN_RETURN_IF_ERROR(Infer(op, attributes, shapes, &inferred));
  const ImageShape &in = inferred.input, &out = inferred.output;
  // Whole-number coordinates are int32 in every kernel, padding and far taps included.
  const auto check_reach = [&](const char* axis, int64_t size, int64_t pads, int64_t kernel,
                               int64_t dilation) -> Status {
    const int64_t reach = size + pads + (kernel - 1) * dilation;
    if (reach < kMaxInt32) return Status();
    return Invalid(op, "in_", axis, " + padding + (kernel_", axis,
                   " - 1) * dilation must be below ", "2^31 - 1; received ", reach);
  };
  const auto& pads = attributes.explicit_paddings;
  MDCN_RETURN_IF_ERROR(check_reach("height", in.height, pads[0] + pads[1], inferred.kernel_height,
                                   attributes.dilations[0]));
  MDCN_RETURN_IF_ERROR(check_reach("width", in.width, pads[2] + pads[3], inferred.kernel_width,
                                   attributes.dilations[1]));
  MDCN_RETURN_IF_ERROR(CheckSize(op, "the output", Arrange(attributes.data_format, out)));
  MDCN_RETURN_IF_ERROR(
      CheckSize(op, "a row of samples",
                {out.width, inferred.kernel_height, inferred.kernel_width, in.channels}));

  *geometry = Geometry{
      attributes.data_format,
      in.batch,
      in.height,
      in.width,
      in.channels,
      inferred.kernel_height,
      inferred.kernel_width,
      out.height,
      out.width,
      out.channels,
      attributes.strides[0],
      attributes.strides[1],
      attributes.dilations[0],
      attributes.dilations[1],
      inferred.pad_top,
      inferred.pad_left,
      attributes.groups,
      attributes.deformable_groups,
      /*taps=*/inferred.kernel_height * inferred.kernel_width,
      /*in_pixels=*/in.height * in.width,
      /*out_pixels=*/out.height * out.width,
      /*group_in_channels=*/in.channels / attributes.groups,
      /*group_out_channels=*/out.channels / attributes.groups,
      /*deformable_group_channels=*/in.channels / attributes.deformable_groups,
      /*offset_channels=*/2 * attributes.deformable_groups * inferred.kernel_height *
          inferred.kernel_width,
      /*mask_channels=*/attributes.deformable_groups * inferred.kernel_height *
          inferred.kernel_width,
  };
  return Status();
}

Status CheckOutputGradientShape(const std::string& op, const Geometry& geometry,
                                const std::vector<int64_t>& shape) {
  const std::vector<int64_t> expected =
      Arrange(geometry.data_format,
              {geometry.batch, geometry.out_height, geometry.out_width, geometry.out_channels});
  if (shape == expected) return Status();
  return Invalid(op, "out_backprop must have the output's shape ", ListString(expected),
                 "; received ", ListString(shape));
}

}  // namespace mdcn
