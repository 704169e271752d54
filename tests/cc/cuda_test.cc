// Tests of the CUDA kernels and their driver, run on the CPU by the emulation: every kernel, type,
// layout, index width and gradient path against cuda_oracle.h. `cuda_test NAME...` runs the named
// tests, `cuda_test --list` names them; tests/test_cuda_emulation.py builds it with sanitizers.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/cuda/convolution.h"
#include "core/cuda/kernels.h"
#include "core/cuda/tuning.h"
#include "core/geometry.h"
#include "cuda_oracle.h"
#include "cuda_runtime.h"

namespace {

using mdcn::BFloat16;
using mdcn::ComputeType;
using mdcn::DataFormat;
using mdcn::Geometry;
using mdcn::Half;
using mdcn::Status;
using mdcn::cuda::Chunk;
using mdcn::cuda::ChunkLaunch;
using mdcn::cuda::IndexWidth;
using mdcn::cuda::Sampling;
using oracle::Number;
using oracle::Problem;
using oracle::Tensor;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- Failures -----------------------------------------------------------------------------------

int failures = 0;
std::string context;

void Fail(const std::string& what) {
  // The rest would say the same.
  if (++failures <= 20) std::printf("FAILED [%s] %s\n", context.c_str(), what.c_str());
}

void Expect(bool condition, const std::string& what) {
  if (!condition) Fail(what);
}

void ExpectOk(const Status& status) {
  if (!status.ok()) Fail("status: " + status.message());
}

// ---- Element types ------------------------------------------------------------------------------

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr const char* kName = "float";
  static constexpr double kUnit = 0x1p-24, kSmallest = 0;
};
template <>
struct Traits<double> {
  static constexpr const char* kName = "double";
  static constexpr double kUnit = 0x1p-53, kSmallest = 0;
};
template <>
struct Traits<Half> {
  static constexpr const char* kName = "half";
  static constexpr double kUnit = 0x1p-11, kSmallest = 0x1p-25;
};
template <>
struct Traits<BFloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr double kUnit = 0x1p-8, kSmallest = 0;
};

double Decode(float value) { return value; }
double Decode(double value) { return value; }
double Decode(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
double Decode(Half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  double magnitude = exponent == 31  ? (mantissa != 0 ? kNan : kInfinity)
                     : exponent == 0 ? std::ldexp(mantissa, -24)
                                     : std::ldexp(1024 + mantissa, exponent - 25);
  return value.bits >> 15 ? -magnitude : magnitude;
}

// The nearest, found among all values; of two as near, the even one.
template <typename T16>
T16 EncodeBySearch(double value) {
  const auto of_bits = [](uint32_t bits) { return T16{static_cast<uint16_t>(bits)}; };
  uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  uint32_t infinity = 0;
  while (!std::isinf(Decode(of_bits(infinity)))) infinity += 0x80;
  if (std::isnan(value)) return of_bits(0x7fff);
  if (std::isinf(value)) return of_bits(sign | infinity);
  uint32_t low = 0, high = infinity;  // decode(low) <= value < decode(high)
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (Decode(of_bits(middle)) <= value ? low : high) = middle;
  }
  const double below = Decode(of_bits(low));
  const double step = below - (low > 0 ? Decode(of_bits(low - 1)) : -Decode(of_bits(1)));
  const double above = high == infinity ? below + step : Decode(of_bits(high));
  const bool up = value - below > above - value || (value - below == above - value && low % 2 == 1);
  return of_bits(sign | (up ? high : low));
}

template <typename T>
T Encode(double value) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value);
  } else {
    return EncodeBySearch<T>(value);
  }
}

// ---- Memory -------------------------------------------------------------------------------------

// Device memory of exactly this size, all NaN; starts `misalignment` elements past a boundary.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count, int misalignment = 0) : count_(count), skip_(misalignment) {
    const size_t bytes = std::max<size_t>(1, (count + skip_) * sizeof(T));
    if (posix_memalign(&memory_, 256, bytes) != 0) std::abort();
    std::memset(memory_, 0xff, bytes);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory_); }

  T* data() { return static_cast<T*>(memory_) + skip_; }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  bool SameBits(Array& other) { return std::memcmp(data(), other.data(), count_ * sizeof(T)) == 0; }

 private:
  int64_t count_;
  int skip_;
  void* memory_;
};

enum class Layout { kChannelsLast, kChannelsFirst };

// Where an element of an image tensor lies.
int64_t Place(Layout layout, int n, int c, int y, int x, int channels, int height, int width) {
  if (layout == Layout::kChannelsLast) {
    return ((int64_t{n} * height + y) * width + x) * channels + c;
  }
  return ((int64_t{n} * channels + c) * height + y) * width + x;
}

template <typename Element, typename Function>
void ForEachElement(const Tensor<Element>& tensor, const Function& function) {
  for (int n = 0; n < tensor.n; ++n)
    for (int c = 0; c < tensor.c; ++c)
      for (int y = 0; y < tensor.h; ++y)
        for (int x = 0; x < tensor.w; ++x) function(n, c, y, x);
}

template <typename T>
void Write(const Tensor<double>& tensor, Layout layout, Array<T>* array) {
  ForEachElement(tensor, [&](int n, int c, int y, int x) {
    (*array)[Place(layout, n, c, y, x, tensor.c, tensor.h, tensor.w)] =
        Encode<T>(tensor(n, c, y, x));
  });
}

// ---- Comparison ---------------------------------------------------------------------------------

// The largest error of a sum that was made in ComputeType<T> and rounded to T `roundings` times on
// the way, each time by at most a unit of its magnitude.
template <typename T>
struct Tolerance {
  int roundings;
  int inner_terms = 16;  // of the sums whose sum it is
  double operator()(const Number& number) const {
    const double accumulate = (number.terms + inner_terms) * Traits<ComputeType<T>>::kUnit;
    return number.magnitude * (1.01 * roundings * Traits<T>::kUnit + accumulate) +
           Traits<T>::kSmallest * roundings * 4 * (number.terms + 1);
  }
};

class Comparison {
 public:
  explicit Comparison(const char* what) : what_(what) {}
  ~Comparison() {
    if (worst_ > 1) Fail(message_);
  }

  void Check(double received, const Number& expected, double tolerance, const char* at_format,
             int a, int b, int c, int d) {
    double badness = 0;
    if (std::isnan(expected.value) || std::isnan(received)) {
      badness = std::isnan(expected.value) == std::isnan(received) ? 0 : kInfinity;
    } else if (received != expected.value) {
      badness = std::fabs(received - expected.value) / tolerance;
    }
    if (!(badness > worst_)) return;
    worst_ = badness;
    char at[100], text[300];
    std::snprintf(at, sizeof(at), at_format, a, b, c, d);
    std::snprintf(text, sizeof(text), "%s at %s: expected %.9g, received %.9g, tolerance %.3g",
                  what_, at, expected.value, received, tolerance);
    message_ = text;
  }

 private:
  const char* what_;
  double worst_ = 0;
  std::string message_;
};

template <typename TElement, typename TTolerance>
void Compare(const char* what, Array<TElement>* array, Layout layout,
             const Tensor<Number>& expected, const TTolerance& tolerance) {
  Comparison comparison(what);
  ForEachElement(expected, [&](int n, int c, int y, int x) {
    const Number& number = expected(n, c, y, x);
    comparison.Check(
        Decode((*array)[Place(layout, n, c, y, x, expected.c, expected.h, expected.w)]), number,
        tolerance(number), "[image %d, channel %d, y %d, x %d]", n, c, y, x);
  });
}

// ---- Problems -----------------------------------------------------------------------------------

enum class Offsets { kZero, kFinite, kAny };

struct Case {
  const char* name;
  oracle::Sizes sizes;
  bool has_mask;
  int misalignment;  // of the input, in elements
  bool for_driver;   // the others have nothing new for it
  Offsets offsets = Offsets::kAny;
};

// "wide" is wide enough for vectors of 8 channels, though a deformable group lies in both groups;
// in the two "split" ones vectors would cross from one into another.
const std::vector<Case>& Cases() {
  static const std::vector<Case> cases = {
      {"asymmetric", {3, 9, 7, 6, 3, 2, 4, 2, 1, 2, 1, 2, 1, 1, 2, 2, 3}, true, 0, true},
      {"wide", {2, 5, 4, 48, 2, 2, 6, 1, 1, 1, 1, 1, 0, 0, 1, 2, 3}, true, 0, true},
      {"remainders", {2, 4, 5, 30, 1, 3, 4, 1, 2, 1, 2, 0, 0, 2, 2, 2, 3}, true, 0, false},
      {"group split", {1, 3, 4, 24, 2, 1, 2, 1, 1, 1, 1, 0, 0, 0, 0, 2, 1}, true, 0, false},
      {"deformable split", {1, 3, 4, 24, 1, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 2}, true, 0, false},
      {"misaligned", {1, 4, 4, 16, 2, 2, 2, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1}, true, 1, false},
      {"no mask", {1, 6, 5, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, false, 0, true},
      {"many channels", {1, 3, 3, 70, 1, 1, 2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}, true, 0, false},
      {"all inside",
       {2, 5, 5, 3, 1, 1, 2, 2, 2, 1, 1, 0, 0, 0, 0, 1, 1},
       true,
       0,
       false,
       Offsets::kZero},
      {"one pixel", {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}, true, 0, true},
      {"empty batch", {0, 5, 4, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0, 1, 1, 2}, true, 0, true},
  };
  return cases;
}

// All values have few bits, so that every type holds them exactly, and positions are exact.
Problem MakeProblem(const oracle::Sizes& s, bool has_mask, Offsets offsets, bool has_bias) {
  std::mt19937 random(12345);
  const auto number = [&](int most, int parts) {
    return static_cast<double>(static_cast<int>(random() % (2 * most + 1)) - most) / parts;
  };
  const auto fill = [&](int n, int c, int h, int w) {
    Tensor<double> tensor(n, c, h, w);
    for (double& element : tensor.elements) element = number(64, 32);
    return tensor;
  };
  Problem problem;
  problem.sizes = s;
  problem.has_mask = has_mask;
  problem.input = fill(s.images, s.in_channels, s.in_height, s.in_width);
  problem.filters = fill(s.kernel_height, s.kernel_width, s.in_channels / s.groups, s.out_channels);
  const int positions = s.deformable_groups * s.taps();
  problem.mask = fill(s.images, positions, s.out_height(), s.out_width());
  problem.output_gradient = fill(s.images, s.out_channels, s.out_height(), s.out_width());
  if (has_bias) {
    for (int f = 0; f < s.out_channels; ++f) problem.bias.push_back(number(64, 32));
  }
  problem.offset = Tensor<double>(s.images, 2 * positions, s.out_height(), s.out_width());
  ForEachElement(problem.offset, [&](int n, int c, int oy, int ox) {
    const int tap = c / 2 % s.taps();
    const int base = c % 2 == 0
                         ? oy * s.stride_height - s.top + tap / s.kernel_width * s.dilation_height
                         : ox * s.stride_width - s.left + tap % s.kernel_width * s.dilation_width;
    const int size = c % 2 == 0 ? s.in_height : s.in_width;
    double& offset = problem.offset(n, c, oy, ox);
    if (offsets == Offsets::kZero) return;
    offset = number(48, 16);
    const int kinds = offsets == Offsets::kAny ? 30 : 20;
    switch (random() % kinds) {
      case 0:
      case 1:
        offset = std::floor(offset);
        break;
      case 2:
        offset = -1 - base;
        break;
      case 3:
        offset = size - 1 - base;
        break;
      case 4:
        offset = size - base;
        break;
      case 5:
        offset = -base - 1 + 0.0625;
        break;
      case 6:
        offset = size - 0.0625 - base;
        break;
      case 7:
        offset = 0;
        break;
      case 20:
        offset = kNan;
        break;
      case 21:
        offset = kInfinity;
        break;
      case 22:
        offset = -kInfinity;
        break;
      case 23:
        offset = 1e30;
        break;
      case 24:
        offset = -1e30;
        break;
      default:
        break;
    }
  });
  return problem;
}

Geometry MakeGeometryOf(const oracle::Sizes& s, Layout layout) {
  mdcn::Attributes attributes;
  attributes.strides = {s.stride_height, s.stride_width};
  attributes.dilations = {s.dilation_height, s.dilation_width};
  attributes.padding = mdcn::Padding::kExplicit;
  attributes.explicit_paddings = {s.top, s.bottom, s.left, s.right};
  attributes.data_format =
      layout == Layout::kChannelsLast ? DataFormat::kChannelsLast : DataFormat::kChannelsFirst;
  attributes.groups = s.groups;
  attributes.deformable_groups = s.deformable_groups;
  const auto shape = [&](int64_t c, int64_t h, int64_t w) {
    return layout == Layout::kChannelsLast ? std::vector<int64_t>{s.images, h, w, c}
                                           : std::vector<int64_t>{s.images, c, h, w};
  };
  mdcn::TensorShapes shapes;
  shapes.input = shape(s.in_channels, s.in_height, s.in_width);
  shapes.filters = std::vector<int64_t>{s.kernel_height, s.kernel_width, s.in_channels / s.groups,
                                        s.out_channels};
  shapes.offset = shape(2 * s.deformable_groups * s.taps(), s.out_height(), s.out_width());
  Geometry geometry;
  ExpectOk(mdcn::MakeGeometry("Test", attributes, shapes, &geometry));
  return geometry;
}

// A problem's tensors in device memory.
template <typename T, typename TOffset>
struct DeviceTensors {
  DeviceTensors(const Problem& problem, Layout layout, int misalignment)
      : geometry(MakeGeometryOf(problem.sizes, layout)),
        input(geometry.input_size(), misalignment),
        filters(geometry.filters_size()),
        offset(geometry.offset_size()),
        mask(geometry.mask_size()),
        bias(geometry.out_channels),
        output_gradient(geometry.output_size()),
        sampling{offset.data(), problem.has_mask ? mask.data() : nullptr} {
    Write(problem.input, layout, &input);
    Write(problem.filters, Layout::kChannelsFirst, &filters);  // as it is: [kh, kw, C / groups, F]
    Write(problem.offset, layout, &offset);
    Write(problem.mask, layout, &mask);
    Write(problem.output_gradient, layout, &output_gradient);
    for (size_t f = 0; f < problem.bias.size(); ++f) bias[f] = Encode<T>(problem.bias[f]);
  }

  Geometry geometry;
  Array<T> input, filters;
  Array<TOffset> offset, mask;
  Array<T> bias, output_gradient;
  Sampling<TOffset> sampling;
};

CUstream_st* TestStream() { return reinterpret_cast<CUstream_st*>(64); }

// ---- Loops over what must all work --------------------------------------------------------------

template <typename First, typename Second>
struct TypePair {
  using T = First;
  using TOffset = Second;
};

template <typename Function>
void ForEachTypePair(const Function& function) {
  function(TypePair<float, float>());
  function(TypePair<double, double>());
  function(TypePair<Half, Half>());
  function(TypePair<Half, float>());
  function(TypePair<BFloat16, BFloat16>());
  function(TypePair<BFloat16, float>());
}

template <typename Function>
void ForEachLayout(const Function& function) {
  function(Layout::kChannelsLast);
  function(Layout::kChannelsFirst);
}

std::string Describe(const Case& test_case, Layout layout) {
  return std::string(test_case.name) +
         (layout == Layout::kChannelsLast ? ", channels_last" : ", channels_first");
}

// Every case, type pair, layout and index width, each with chunks that cut it differently; calls
// function(problem, tensors, launch). Devices, and so grids, of several odd sizes take turns.
template <typename Function>
void ForEachKernelCase(const Function& function) {
  int turn = 0;
  for (const Case& test_case : Cases()) {
    const Problem problem =
        MakeProblem(test_case.sizes, test_case.has_mask, test_case.offsets, /*has_bias=*/false);
    ForEachLayout([&](Layout layout) {
      ForEachTypePair([&](auto pair) {
        using T = typename decltype(pair)::T;
        using TOffset = typename decltype(pair)::TOffset;
        DeviceTensors<T, TOffset> tensors(problem, layout, test_case.misalignment);
        const Geometry& g = tensors.geometry;
        std::vector<Chunk> chunks = {{0, g.batch, 0, g.out_height}};
        if (g.batch > 0 && g.out_height > 2) chunks.push_back({g.batch - 1, 1, 1, 2});
        for (IndexWidth width : {IndexWidth::k32, IndexWidth::k64}) {
          for (const Chunk& chunk : chunks) {
            ++turn;
            cuda_emulation::SetSchedule(turn % 3);
            cuda_emulation::SetDevice({1, turn % 2 == 0 ? 3 : 5});
            context = Describe(test_case, layout) + ", " + Traits<T>::kName + "/" +
                      Traits<TOffset>::kName +
                      (width == IndexWidth::k32 ? ", 32 bits" : ", 64 bits") +
                      (chunk.images == g.batch ? ", whole" : ", part");
            function(problem, layout, &tensors, ChunkLaunch{g, chunk, width, TestStream()});
          }
        }
      });
    });
  }
}

// Where an element of the columns lies, as kernels.h says.
int64_t PlaceInColumns(const Geometry& g, const Chunk& chunk, Layout layout, int n, int oy, int ox,
                       int tap, int c) {
  const int64_t pixel =
      ((n - chunk.first_image) * chunk.rows + oy - chunk.first_row) * g.out_width + ox;
  const int64_t group = c / g.group_in_channels, channel = c % g.group_in_channels;
  if (layout == Layout::kChannelsLast) {
    return ((pixel * g.groups + group) * g.taps + tap) * g.group_in_channels + channel;
  }
  return ((group * g.taps + tap) * g.group_in_channels + channel) * chunk.pixels(g) + pixel;
}

bool Inside(const Chunk& chunk, int n, int oy) {
  return n >= chunk.first_image && n < chunk.first_image + chunk.images && oy >= chunk.first_row &&
         oy < chunk.first_row + chunk.rows;
}

// A random gradient of the columns, 0 outside the chunk, in the oracle's order and in memory's.
template <typename T>
oracle::Columns MakeColumnGradient(const Problem& problem, const ChunkLaunch& launch, Layout layout,
                                   Array<T>* array) {
  const oracle::Sizes& s = problem.sizes;
  oracle::Columns gradient(s.images, s.taps() * s.in_channels, s.out_height(), s.out_width());
  std::mt19937 random(99);
  ForEachElement(gradient, [&](int n, int c, int oy, int ox) {
    if (!Inside(launch.chunk, n, oy)) return;
    const double value = static_cast<double>(static_cast<int>(random() % 65) - 32) / 16;
    gradient(n, c, oy, ox).Add(value, std::fabs(value));
    (*array)[PlaceInColumns(launch.geometry, launch.chunk, layout, n, oy, ox, c / s.in_channels,
                            c % s.in_channels)] = Encode<T>(value);
  });
  return gradient;
}

// ---- Kernels, one by one ------------------------------------------------------------------------

void TestSample() {
  const auto test = [](const Problem& problem, Layout layout, auto* tensors,
                       const ChunkLaunch& launch) {
    using T = std::decay_t<decltype(tensors->input[0])>;
    const Geometry& g = launch.geometry;
    Array<T> columns(launch.chunk.pixels(g) * g.taps * g.in_channels);
    ExpectOk(mdcn::cuda::Sample(launch, tensors->input.data(), tensors->sampling, columns.data()));
    const oracle::Columns expected = oracle::SampleColumns(problem);
    const Tolerance<T> tolerance{1};
    Comparison comparison("columns");
    ForEachElement(expected, [&](int n, int c, int oy, int ox) {
      if (!Inside(launch.chunk, n, oy)) return;
      const Number& number = expected(n, c, oy, ox);
      const int64_t at =
          PlaceInColumns(g, launch.chunk, layout, n, oy, ox, c / problem.sizes.in_channels,
                         c % problem.sizes.in_channels);
      comparison.Check(Decode(columns[at]), number, tolerance(number),
                       "[image %d, tap and channel %d, y %d, x %d]", n, c, oy, ox);
    });
  };
  ForEachKernelCase(test);
}

void TestSamplingGradient() {
  ForEachKernelCase(
      [](const Problem& problem, Layout layout, auto* tensors, const ChunkLaunch& launch) {
        using T = std::decay_t<decltype(tensors->input[0])>;
        using TOffset = std::decay_t<decltype(tensors->offset[0])>;
        const Geometry& g = launch.geometry;
        Array<T> columns(launch.chunk.pixels(g) * g.taps * g.in_channels);
        const oracle::Columns gradient = MakeColumnGradient(problem, launch, layout, &columns);
        Array<TOffset> offset_gradient(g.offset_size()), mask_gradient(g.mask_size());
        // The rest of an image is another chunk's, and stays.
        std::fill_n(offset_gradient.data(), g.offset_size(), Encode<TOffset>(7));
        std::fill_n(mask_gradient.data(), g.mask_size(), Encode<TOffset>(7));
        ExpectOk(mdcn::cuda::SamplingGradient(launch, tensors->input.data(), tensors->sampling,
                                              columns.data(), offset_gradient.data(),
                                              problem.has_mask ? mask_gradient.data() : nullptr));
        oracle::SamplingGradients expected = oracle::BackpropagateColumns(problem, gradient);
        const auto untouched = [&](Tensor<Number>* tensor, bool all) {
          ForEachElement(*tensor, [&](int n, int c, int oy, int ox) {
            if (all || !Inside(launch.chunk, n, oy)) (*tensor)(n, c, oy, ox) = {7, 7, 0};
          });
        };
        untouched(&expected.offset, false);
        untouched(&expected.mask, !problem.has_mask);
        Compare("offset gradient", &offset_gradient, layout, expected.offset, Tolerance<T>{1});
        Compare("mask gradient", &mask_gradient, layout, expected.mask, Tolerance<T>{1});
      });
}

template <typename Function>
void TestInputGradientKernel(const Function& add) {
  ForEachKernelCase(
      [&](const Problem& problem, Layout layout, auto* tensors, const ChunkLaunch& launch) {
        using T = std::decay_t<decltype(tensors->input[0])>;
        using Real = ComputeType<T>;
        const Geometry& g = launch.geometry;
        const Chunk& chunk = launch.chunk;
        Array<T> columns(chunk.pixels(g) * g.taps * g.in_channels);
        const oracle::Columns gradient = MakeColumnGradient(problem, launch, layout, &columns);
        Array<Real> image_gradient(chunk.images * g.in_pixels * g.in_channels);
        std::fill_n(image_gradient.data(), image_gradient.count(), Real(0.5));  // it is added to
        add(tensors, launch, columns.data(), image_gradient.data());
        const Tensor<Number> all = oracle::BackpropagateColumns(problem, gradient).input;
        Tensor<Number> expected(static_cast<int>(chunk.images), all.c, all.h, all.w);
        ForEachElement(expected, [&](int n, int c, int y, int x) {
          Number& number = expected(n, c, y, x);
          number = all(static_cast<int>(chunk.first_image) + n, c, y, x);
          number.Add(0.5, 0.5);
        });
        Compare("input gradient", &image_gradient, layout, expected, Tolerance<Real>{1});
      });
}

void TestScatter() {
  const auto add = [](auto* tensors, const ChunkLaunch& launch, const auto* columns,
                      auto* image_gradient) {
    ExpectOk(mdcn::cuda::ScatterInputGradient(launch, tensors->sampling, columns, image_gradient));
  };
  TestInputGradientKernel(add);
}

void TestGather() {
  TestInputGradientKernel(
      [](auto* tensors, const ChunkLaunch& launch, const auto* columns, auto* image_gradient) {
        Array<char> scratch(
            mdcn::cuda::SortScratchBytes(launch.chunk.sites(launch.geometry), launch.index_width));
        ExpectOk(mdcn::cuda::GatherInputGradient(launch, tensors->sampling, columns, image_gradient,
                                                 scratch.data()));
      });
}

template <typename Index>
void TestSortOf(int64_t count, int key_bits, int64_t high_bits) {
  context = std::to_string(count) + " pairs, " + std::to_string(key_bits) + " bits";
  std::mt19937_64 random(count + key_bits);
  std::vector<std::pair<Index, Index>> pairs(count);
  Array<Index> keys0(count), keys1(count), values0(count), values1(count);
  Array<Index> counts(mdcn::cuda::SortCountsSize(count));
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t mask = (uint64_t{1} << key_bits) - 1;
    // Few different keys, so that the order of equal ones matters.
    pairs[i] = {static_cast<Index>((random() % 50 * 0x9e3779b97f4a7c15u & mask) | high_bits),
                static_cast<Index>(i)};
    keys0[i] = pairs[i].first;
    values0[i] = pairs[i].second;
  }
  const mdcn::cuda::SortBuffers<Index> buffers = {
      {keys0.data(), keys1.data()}, {values0.data(), values1.data()}, counts.data()};
  ExpectOk(mdcn::cuda::SortPairs(buffers, count, key_bits, TestStream()));
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  for (int64_t i = 0; i < count; ++i) {
    if (keys0[i] == pairs[i].first && values0[i] == pairs[i].second) continue;
    Fail("pair " + std::to_string(i) + " is (" + std::to_string(keys0[i]) + ", " +
         std::to_string(values0[i]) + "), not (" + std::to_string(pairs[i].first) + ", " +
         std::to_string(pairs[i].second) + ")");
    return;
  }
}

void TestSort() {
  for (unsigned schedule : {0u, 1u}) {
    cuda_emulation::SetSchedule(schedule);
    cuda_emulation::SetDevice({1, 3});
    for (int64_t count : {0, 1, 255, 2048, 2049, 7 * 2048 + 300}) {
      TestSortOf<int32_t>(count, 6, 0);
      TestSortOf<int32_t>(count, 17, 0);
      TestSortOf<int64_t>(count, 9, 0);
    }
    TestSortOf<int64_t>(3000, 40, 0);
    // Enough tiles for the prefix sum to take several rounds.
    TestSortOf<int32_t>(40 * 2048 + 5, 4, 0);
  }
}

void TestElementwise() {
  cuda_emulation::SetDevice({1, 3});
  ForEachLayout([](Layout layout) {
    ForEachTypePair([&](auto pair) {
      using T = typename decltype(pair)::T;
      context = std::string("bias, ") + Traits<T>::kName;
      const Problem problem = MakeProblem(Cases()[0].sizes, true, Offsets::kFinite, true);
      DeviceTensors<T, typename decltype(pair)::TOffset> tensors(problem, layout, 0);
      Array<T> output(tensors.geometry.output_size());
      ExpectOk(mdcn::cuda::BroadcastBias(tensors.geometry, tensors.bias.data(), output.data(),
                                         TestStream()));
      Tensor<Number> expected(problem.output_gradient.n, problem.output_gradient.c,
                              problem.output_gradient.h, problem.output_gradient.w);
      ForEachElement(expected, [&](int n, int c, int y, int x) {
        expected(n, c, y, x) = {problem.bias[c], 0, 0};
      });
      Compare("bias", &output, layout, expected, Tolerance<T>{0});
      if constexpr (!std::is_same_v<T, ComputeType<T>>) {
        context = std::string("sums in float, ") + Traits<T>::kName;
        constexpr int kCount = 5000;
        Array<T> terms(kCount), values(kCount);
        Array<float> sum(kCount);
        std::mt19937 random(3);
        for (int i = 0; i < kCount; ++i) {
          terms[i] = Encode<T>(i % 7 == 0 ? 1.5 : std::ldexp(random() % 4096, -4));
          sum[i] = i % 11 == 0 ? static_cast<float>(kInfinity)
                               : std::ldexp(static_cast<float>(random() % 65536), -22);
        }
        sum[5] = static_cast<float>(kNan);
        sum[6] = -70000;
        std::vector<float> expected_sum(kCount);
        for (int i = 0; i < kCount; ++i) {
          expected_sum[i] = sum[i] + static_cast<float>(Decode(terms[i]));
        }
        ExpectOk(mdcn::cuda::AddTo(terms.data(), kCount, sum.data(), TestStream()));
        ExpectOk(mdcn::cuda::Convert(sum.data(), kCount, values.data(), TestStream()));
        for (int i = 0; i < kCount; ++i) {
          const double encoded = Decode(Encode<T>(expected_sum[i])), value = Decode(values[i]);
          const bool both_nan = std::isnan(encoded) && std::isnan(value);
          if (both_nan || (sum[i] == expected_sum[i] && encoded == value)) continue;
          Fail("element " + std::to_string(i) + ": expected " + std::to_string(encoded) +
               ", received " + std::to_string(value));
          break;
        }
      }
    });
  });
}

// More pixels than slices, so that slices have several.
void TestBiasGradient() {
  cuda_emulation::SetDevice({1, 3});
  const oracle::Sizes sizes = {3, 20, 30, 1, 1, 1, 5, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1};
  const Problem problem = MakeProblem(sizes, true, Offsets::kFinite, true);
  const oracle::All expected = oracle::Convolve(problem);
  ForEachLayout([&](Layout layout) {
    ForEachTypePair([&](auto pair) {
      using T = typename decltype(pair)::T;
      context = Traits<T>::kName;
      DeviceTensors<T, typename decltype(pair)::TOffset> tensors(problem, layout, 0);
      const Geometry& g = tensors.geometry;
      Array<ComputeType<T>> scratch(mdcn::cuda::BiasGradientScratchSize(g));
      Array<T> bias(g.out_channels);
      ExpectOk(mdcn::cuda::BiasGradient(g, tensors.output_gradient.data(), scratch.data(),
                                        bias.data(), TestStream()));
      Compare("bias gradient", &bias, Layout::kChannelsLast, expected.bias_gradient,
              Tolerance<T>{1});
    });
  });
}

// ---- The driver ---------------------------------------------------------------------------------

// Column-major BLAS by its definition, with what it asks of its arguments, as the OpKernels call
// it.
template <typename T>
class PlainProduct : public mdcn::cuda::MatrixProduct<T> {
 public:
  Status Multiply(const mdcn::cuda::MatrixProductCall<T>& call) override {
    ++calls;
    Expect(!call.result.transposed, "a transposed result");
    if (fail_after-- == 0) return Status::Internal("the product failed");
    const auto gemm = mdcn::cuda::ToColumnMajor(call);
    Expect(gemm.m > 0 && gemm.n > 0 && gemm.k > 0 && gemm.batch > 0, "a product without elements");
    Expect(gemm.lda >= (gemm.transpose_a ? gemm.k : gemm.m), "lda is too small");
    Expect(gemm.ldb >= (gemm.transpose_b ? gemm.n : gemm.k), "ldb is too small");
    Expect(gemm.ldc >= gemm.m, "ldc is too small");
    using Real = ComputeType<T>;
    const auto real = [](T value) { return static_cast<Real>(Decode(value)); };
    for (int64_t item = 0; item < gemm.batch; ++item) {
      const T* const a = gemm.a + item * gemm.stride_a;
      const T* const b = gemm.b + item * gemm.stride_b;
      T* const c = gemm.c + item * gemm.stride_c;
      for (int64_t j = 0; j < gemm.n; ++j) {
        for (int64_t i = 0; i < gemm.m; ++i) {
          T& result = c[i + j * gemm.ldc];
          Real sum = 0;
          for (int64_t p = 0; p < gemm.k; ++p) {
            sum += real(gemm.transpose_a ? a[p + i * gemm.lda] : a[i + p * gemm.lda]) *
                   real(gemm.transpose_b ? b[j + p * gemm.ldb] : b[p + j * gemm.ldb]);
          }
          result = Encode<T>(gemm.accumulate ? real(result) + sum : sum);
        }
      }
    }
    return Status();
  }

  int calls = 0;
  int fail_after = -1;
};

// A workspace of exactly the planned size, and what runs in it.
template <typename T>
struct Runner {
  explicit Runner(int64_t workspace_bytes)
      : workspace(workspace_bytes),
        execution{TestStream(), &product, workspace.data(), workspace_bytes} {}

  PlainProduct<T> product;
  Array<char> workspace;
  mdcn::cuda::Execution<T> execution;
};

// One row at a time, some rows, some images, all.
std::vector<int64_t> ChunkBytes(const Geometry& g, int64_t element_bytes) {
  const int64_t row = g.out_width * g.taps * g.in_channels * element_bytes;
  return {1, 3 * row, 2 * g.out_height * row, mdcn::cuda::kDefaultChunkBytes};
}

// Calls function(problem, layout, tensors) for every case, type pair and layout.
template <typename Function>
void ForEachDriverCase(Offsets offsets, const Function& function) {
  int turn = 0;
  for (const Case& test_case : Cases()) {
    if (!test_case.for_driver) continue;
    ForEachLayout([&](Layout layout) {
      const Problem problem = MakeProblem(test_case.sizes, test_case.has_mask, offsets,
                                          /*has_bias=*/++turn % 4 < 2);
      const oracle::All expected = oracle::Convolve(problem);
      ForEachTypePair([&](auto pair) {
        using T = typename decltype(pair)::T;
        using TOffset = typename decltype(pair)::TOffset;
        cuda_emulation::SetDevice({1, 3});
        context =
            Describe(test_case, layout) + ", " + Traits<T>::kName + "/" + Traits<TOffset>::kName;
        DeviceTensors<T, TOffset> tensors(problem, layout, test_case.misalignment);
        function(problem, expected, layout, &tensors);
      });
    });
  }
}

void TestForward() {
  const auto test = [](const Problem& problem, const oracle::All& expected, Layout layout,
                       auto* tensors) {
    using T = std::decay_t<decltype(tensors->input[0])>;
    using TOffset = std::decay_t<decltype(tensors->offset[0])>;
    const Geometry& g = tensors->geometry;
    Array<T> first(g.output_size());
    const std::vector<int64_t> sizes = ChunkBytes(g, sizeof(T));
    for (size_t i = 0; i < sizes.size(); ++i) {
      const mdcn::cuda::Options options = {sizes[i], false};
      Runner<T> runner(mdcn::cuda::ForwardWorkspaceBytes<T>(g, options));
      Array<T> output(g.output_size());
      ExpectOk(mdcn::cuda::Forward<T, TOffset>(
          g,
          {tensors->input.data(), tensors->filters.data(), tensors->sampling,
           problem.bias.empty() ? nullptr : tensors->bias.data(), output.data()},
          options, runner.execution));
      Compare("output", &output, layout, expected.output, Tolerance<T>{2});
      if (i == 0) std::copy_n(output.data(), output.count(), first.data());
      Expect(output.SameBits(first), "the output depends on the chunk size");
      if (i + 1 == sizes.size() && g.batch > 0) {
        Expect(runner.product.calls <= std::min(g.batch, g.groups), "too many products in a chunk");
      }
    }
  };
  ForEachDriverCase(Offsets::kAny, test);
}

void TestInputGradient() {
  const auto test = [](const Problem& problem, const oracle::All& expected, Layout layout,
                       auto* tensors) {
    using T = std::decay_t<decltype(tensors->input[0])>;
    using TOffset = std::decay_t<decltype(tensors->offset[0])>;
    const Geometry& g = tensors->geometry;
    Array<TOffset> first_offset(g.offset_size()), first_mask(g.mask_size());
    const std::vector<int64_t> sizes = ChunkBytes(g, sizeof(T));
    const Tolerance<T> tolerance{2, 16 + static_cast<int>(g.group_out_channels)};
    for (size_t i = 0; i < sizes.size(); ++i) {
      for (bool deterministic : {false, true}) {
        if (deterministic && i != 1) continue;  // the sort is slow here, and tested by itself
        const mdcn::cuda::Options options = {sizes[i], deterministic};
        Array<T> first_input(g.input_size());
        // Twice, on different devices in a different order of threads, where it must not matter.
        for (int run = 0; run < (deterministic ? 2 : 1); ++run) {
          cuda_emulation::SetDevice({1, run == 0 ? 3 : 1});
          cuda_emulation::SetSchedule(run == 0 ? 0 : 5);
          Runner<T> runner(mdcn::cuda::InputGradientWorkspaceBytes<T>(g, options));
          Array<T> input(g.input_size());
          Array<TOffset> offset(g.offset_size()), mask(g.mask_size());
          ExpectOk(mdcn::cuda::InputGradient<T, TOffset>(
              g,
              {tensors->input.data(), tensors->filters.data(), tensors->sampling,
               tensors->output_gradient.data(), input.data(), offset.data(),
               problem.has_mask ? mask.data() : nullptr},
              options, runner.execution));
          Compare("input gradient", &input, layout, expected.gradients.input, tolerance);
          Compare("offset gradient", &offset, layout, expected.gradients.offset, tolerance);
          if (problem.has_mask) {
            Compare("mask gradient", &mask, layout, expected.gradients.mask, tolerance);
          }
          if (i == 0 && !deterministic) {
            std::copy_n(offset.data(), offset.count(), first_offset.data());
            std::copy_n(mask.data(), mask.count(), first_mask.data());
          }
          Expect(offset.SameBits(first_offset), "the offset gradient depends on the chunk size");
          Expect(mask.SameBits(first_mask), "the mask gradient depends on the chunk size");
          if (run == 0) std::copy_n(input.data(), input.count(), first_input.data());
          Expect(input.SameBits(first_input), "the deterministic input gradient varies");
        }
      }
    }
  };
  ForEachDriverCase(Offsets::kAny, test);
}

void TestFilterGradient() {
  const auto test = [](const Problem& problem, const oracle::All& expected, Layout, auto* tensors) {
    using T = std::decay_t<decltype(tensors->input[0])>;
    using TOffset = std::decay_t<decltype(tensors->offset[0])>;
    const Geometry& g = tensors->geometry;
    for (int64_t bytes : ChunkBytes(g, sizeof(T))) {
      const mdcn::cuda::Options options = {bytes, false};
      Runner<T> runner(mdcn::cuda::FilterGradientWorkspaceBytes<T>(g, options));
      Array<T> filters(g.filters_size()), bias(g.out_channels);
      const bool has_bias = !problem.bias.empty();
      ExpectOk(mdcn::cuda::FilterGradient<T, TOffset>(
          g,
          {tensors->input.data(), tensors->sampling, tensors->output_gradient.data(),
           filters.data(), has_bias ? bias.data() : nullptr},
          options, runner.execution));
      Compare("filter gradient", &filters, Layout::kChannelsFirst, expected.filter_gradient,
              Tolerance<T>{3});
      if (!has_bias) continue;
      Compare("bias gradient", &bias, Layout::kChannelsLast, expected.bias_gradient,
              Tolerance<T>{1});
    }
  };
  ForEachDriverCase(Offsets::kFinite, test);
}

// Every launch and every product that fails is reported, whichever it is, and nothing follows it.
void TestErrors() {
  const Problem problem = MakeProblem(Cases()[0].sizes, true, Offsets::kFinite, true);
  DeviceTensors<Half, float> tensors(problem, Layout::kChannelsLast, 0);
  const Geometry& g = tensors.geometry;
  const mdcn::cuda::Options options = {1, true};
  Array<Half> output(g.output_size()), input(g.input_size()), filters(g.filters_size());
  Array<Half> bias(g.out_channels);
  Array<float> offset(g.offset_size()), mask(g.mask_size());
  const std::vector<std::pair<const char*, std::function<Status(mdcn::cuda::Execution<Half>)>>>
      functions = {
          {"forward",
           [&](const mdcn::cuda::Execution<Half>& execution) {
             return mdcn::cuda::Forward<Half, float>(
                 g,
                 {tensors.input.data(), tensors.filters.data(), tensors.sampling,
                  tensors.bias.data(), output.data()},
                 options, execution);
           }},
          {"input gradient",
           [&](const mdcn::cuda::Execution<Half>& execution) {
             return mdcn::cuda::InputGradient<Half, float>(
                 g,
                 {tensors.input.data(), tensors.filters.data(), tensors.sampling,
                  tensors.output_gradient.data(), input.data(), offset.data(), mask.data()},
                 options, execution);
           }},
          {"filter gradient",
           [&](const mdcn::cuda::Execution<Half>& execution) {
             return mdcn::cuda::FilterGradient<Half, float>(
                 g,
                 {tensors.input.data(), tensors.sampling, tensors.output_gradient.data(),
                  filters.data(), bias.data()},
                 options, execution);
           }},
  };
  const int64_t enough = mdcn::cuda::InputGradientWorkspaceBytes<Half>(g, options) +
                         mdcn::cuda::FilterGradientWorkspaceBytes<Half>(g, options);
  const auto mentions = [](const Status& status, const char* text) {
    return !status.ok() && status.message().find(text) != std::string::npos;
  };
  for (const auto& [name, function] : functions) {
    context = name;
    Runner<Half> runner(enough);
    const int64_t before = cuda_emulation::LaunchCount();
    ExpectOk(function(runner.execution));
    const int launches = static_cast<int>(cuda_emulation::LaunchCount() - before);
    const int calls = runner.product.calls;
    for (int i = 0; i < launches; i += 1 + i / 4) {
      cuda_emulation::FailAfter(i);
      const int64_t start = cuda_emulation::LaunchCount();
      Expect(mentions(function(runner.execution), "failed: invalid argument"),
             "the failure of launch " + std::to_string(i) + " is lost");
      Expect(cuda_emulation::LaunchCount() == start + i, "a launch follows one that failed");
    }
    for (const auto& [error, remedy] :
         {std::pair(cudaErrorNoKernelImageForDevice,
                    ". Build tf_mdcn with this GPU's architecture"),
          std::pair(cudaErrorInsufficientDriver, "runtime version. Update the driver, or build")}) {
      cuda_emulation::FailAfter(0, error);
      Expect(mentions(function(runner.execution), remedy), std::string("no remedy") + remedy);
    }
    cuda_emulation::FailAfter(-1);
    for (int i = 0; i < calls; ++i) {
      runner.product.fail_after = i;
      Expect(mentions(function(runner.execution), "the product failed"),
             "the failure of product " + std::to_string(i) + " is lost");
    }
    runner.product.fail_after = -1;
    mdcn::cuda::Execution<Half> other_stream = runner.execution;
    other_stream.stream = nullptr;
    Expect(mentions(function(other_stream), "invalid resource handle"), "another stream");
    mdcn::cuda::Execution<Half> too_small = runner.execution;
    too_small.workspace_bytes = 255;
    Expect(mentions(function(too_small), "the workspace must have"), "too small a workspace");
  }
}

// More elements than 32 bits count, in memory of which only the touched pages exist: one channel,
// 1 x 1 taps, a stride that visits 36 pixels. The index width is the driver's choice.
void TestLarge() {
  context = "50000 x 50000";
  const oracle::Sizes sizes = {1, 50000, 50000, 1, 1, 1, 1, 9999, 9999, 1, 1, 0, 0, 0, 0, 1, 1};
  ForEachLayout([&](Layout layout) {
    const Geometry g = MakeGeometryOf(sizes, layout);
    const auto map = [](int64_t bytes) {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) std::abort();
      return memory;
    };
    const int64_t input_bytes = g.input_size() * sizeof(Half);
    const int64_t gradient_bytes = g.input_size() * sizeof(float);
    Half* const input = static_cast<Half*>(map(input_bytes));
    float* const gradient = static_cast<float*>(map(gradient_bytes));
    Array<float> offset(g.offset_size());
    std::fill_n(offset.data(), offset.count(), 0.f);
    Array<Half> columns(g.out_pixels);
    const auto pixel = [&](int64_t i) {
      return i / g.out_width * 9999 * 50000 + i % g.out_width * 9999;
    };
    for (int64_t i = 0; i < g.out_pixels; ++i) input[pixel(i)] = Encode<Half>(i + 1);
    const IndexWidth width = mdcn::cuda::ChooseIndexWidth(g, 1, g.out_height);
    Expect(width == IndexWidth::k64, "64 bits are needed");
    const ChunkLaunch launch = {g, {0, 1, 0, g.out_height}, width, TestStream()};
    const Sampling<float> sampling = {offset.data(), nullptr};
    ExpectOk(mdcn::cuda::Sample(launch, input, sampling, columns.data()));
    ExpectOk(mdcn::cuda::ScatterInputGradient(launch, sampling, columns.data(), gradient));
    for (int64_t i = 0; i < g.out_pixels; ++i) {
      Expect(Decode(columns[i]) == i + 1, "sample " + std::to_string(i));
      Expect(gradient[pixel(i)] == i + 1, "gradient " + std::to_string(i));
    }
    munmap(input, input_bytes);
    munmap(gradient, gradient_bytes);
  });
}

void TestTuning() {
  namespace cuda = mdcn::cuda;
  context = "tuning";
  Expect(cuda::LaneBits(1, 1, 4) == 0, "one channel, one lane");
  Expect(cuda::LaneBits(5, 1, 4) == 3, "five channels, eight lanes");
  Expect(cuda::LaneBits(1000, 1, 2) == 5, "at most a warp");
  Expect(cuda::LaneBits(1000, 4, 4) == 3, "one cache line");
  Expect(cuda::GridBlocks(7, 1, 3) == 3 && cuda::GridBlocks(2, 10, 8) == 2, "at most a wave");
  Geometry g = MakeGeometryOf({33, 100, 10, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1},
                              Layout::kChannelsLast);
  for (int64_t row_bytes : {1, 7, 1000, 1 << 20}) {
    for (int64_t bytes : {0, 1, 999, 70000, 10 << 20}) {
      const cuda::ChunkSize size = cuda::ChooseChunkSize(g, row_bytes, bytes);
      const int64_t rows = size.images * size.rows;
      Expect(rows == 1 || rows * row_bytes <= bytes, "a chunk must fit");
      Expect(size.images >= 1 && size.rows >= 1, "a chunk must not be empty");
      Expect(size.rows == g.out_height || size.images == 1, "several images come whole");
    }
  }
  const cuda::ChunkSize half = cuda::ChooseChunkSize(g, 1, 99);
  Expect(half.images == 1 && half.rows == 50, "100 rows of which 99 fit are cut in halves");
  // How an image is cut does not depend on the batch.
  g.batch = 1;
  Expect(cuda::ChooseChunkSize(g, 1, 99).rows == half.rows, "rows depend on the batch");
  Expect(cuda::ChooseIndexWidth(g, 1, 100) == IndexWidth::k32, "32 bits suffice");
  g.pad_top = int64_t{1} << 30;
  Expect(cuda::ChooseIndexWidth(g, 1, 100) == IndexWidth::k64, "positions need 64 bits");
}

const std::vector<std::pair<std::string, void (*)()>>& Tests() {
  static const std::vector<std::pair<std::string, void (*)()>> tests = {
      {"sample", TestSample},
      {"sampling_gradient", TestSamplingGradient},
      {"scatter", TestScatter},
      {"gather", TestGather},
      {"sort", TestSort},
      {"elementwise", TestElementwise},
      {"bias_gradient", TestBiasGradient},
      {"forward", TestForward},
      {"input_gradient", TestInputGradient},
      {"filter_gradient", TestFilterGradient},
      {"errors", TestErrors},
      {"large", TestLarge},
      {"tuning", TestTuning},
  };
  return tests;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--list") {
    for (const auto& test : Tests()) std::printf("%s\n", test.first.c_str());
    return 0;
  }
  cuda_emulation::SetStream(TestStream());
  for (int i = 1; i < argc; ++i) {
    const auto test = std::find_if(Tests().begin(), Tests().end(),
                                   [&](const auto& t) { return t.first == argv[i]; });
    if (test == Tests().end()) {
      std::printf("no test is called %s\n", argv[i]);
      return 2;
    }
    const int before = failures;
    test->second();
    std::printf("%s: %s\n", argv[i], failures == before ? "passed" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}
