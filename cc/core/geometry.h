// The sizes of one modulated deformable convolution: attributes and tensor shapes as a caller has
// them, the checks on both, and the immutable `Geometry` that every kernel (CPU, CUDA) takes.
#ifndef MDCN_CORE_GEOMETRY_H_
#define MDCN_CORE_GEOMETRY_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/status.h"

namespace mdcn {

enum class DataFormat { kChannelsLast, kChannelsFirst };
enum class Padding { kValid, kSame, kExplicit };

// What the user chose. Pairs are {height, width}.
struct Attributes {
  std::array<int64_t, 2> strides = {1, 1};
  std::array<int64_t, 2> dilations = {1, 1};
  Padding padding = Padding::kValid;
  std::array<int64_t, 4> explicit_paddings = {0, 0, 0, 0};  // top, bottom, left, right
  DataFormat data_format = DataFormat::kChannelsLast;
  int64_t groups = 1;
  int64_t deformable_groups = 1;
};

constexpr int64_t kUnknown = -1;

// A shape whose rank (nullopt) or some of whose dimensions (kUnknown) may be unknown.
using Shape = std::optional<std::vector<int64_t>>;

struct TensorShapes {
  Shape input;            // [N, H, W, C] or [N, C, H, W]
  Shape filters;          // [kh, kw, C / groups, F]
  Shape offset;           // [N, Ho, Wo, G * K * 2] or [N, G * K * 2, Ho, Wo]
  bool has_mask = false;  // without: DCNv1, every modulation is 1
  Shape mask;             // [N, Ho, Wo, G * K] or [N, G * K, Ho, Wo]
  bool has_bias = false;
  Shape bias;  // [F]
};

// Every size that a kernel needs, all int64. Built only by MakeGeometry, which has checked that the
// sizes agree and that no tensor's byte count overflows; nothing changes it afterwards.
struct Geometry {
  DataFormat data_format;
  int64_t batch, in_height, in_width, in_channels;
  int64_t kernel_height, kernel_width;
  int64_t out_height, out_width, out_channels;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  int64_t pad_top, pad_left;
  int64_t groups, deformable_groups;

  // Derived.
  int64_t taps;                       // K = kernel_height * kernel_width
  int64_t in_pixels;                  // in one image
  int64_t out_pixels;                 // in one image
  int64_t group_in_channels;          // C / groups
  int64_t group_out_channels;         // F / groups
  int64_t deformable_group_channels;  // C / deformable_groups
  int64_t offset_channels;            // 2 * G * K
  int64_t mask_channels;              // G * K

  int64_t input_size() const { return batch * in_pixels * in_channels; }
  int64_t filters_size() const { return taps * group_in_channels * out_channels; }
  int64_t offset_size() const { return batch * out_pixels * offset_channels; }
  int64_t mask_size() const { return batch * out_pixels * mask_channels; }
  int64_t output_size() const { return batch * out_pixels * out_channels; }
};

// Checks the attributes alone. `op` opens every message ("ModulatedDeformConv2D").
Status CheckAttributes(const std::string& op, const Attributes& attributes);

// Infers the output shape from shapes that may be partly unknown, and refuses what is certainly
// wrong. The output always has rank 4.
Status InferOutputShape(const std::string& op, const Attributes& attributes,
                        const TensorShapes& shapes, std::vector<int64_t>* output);

// The one factory of Geometry; every shape must be fully known.
Status MakeGeometry(const std::string& op, const Attributes& attributes, const TensorShapes& shapes,
                    Geometry* geometry);

// Checks the shape of the gradient that arrives at the output.
Status CheckOutputGradientShape(const std::string& op, const Geometry& geometry,
                                const std::vector<int64_t>& shape);

// "[2, 8, ?, 18]", or "unknown".
std::string ShapeString(const Shape& shape);

}  // namespace mdcn

#endif  // MDCN_CORE_GEOMETRY_H_
