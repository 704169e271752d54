// What the CUDA kernels are checked against: modulated deformable convolution and its gradients in
// plain loops and double precision, from the definition in DESIGN.md. Shares no code with the
// library. Tensors are four-dimensional arrays in one fixed order, channels first; with every
// number comes the sum of the magnitudes that were added to make it and their count, from which
// tolerances are derived.
#ifndef MDCN_TESTS_CC_CUDA_ORACLE_H_
#define MDCN_TESTS_CC_CUDA_ORACLE_H_

#include <cmath>
#include <limits>
#include <vector>

namespace oracle {

struct Number {
  double value = 0, magnitude = 0;
  int terms = 0;

  void Add(double term, double term_magnitude) {
    value += term;
    magnitude += term_magnitude;
    ++terms;
  }
};

// [n][c][y][x] of any element type.
template <typename Element>
struct Tensor {
  Tensor() = default;
  Tensor(int images, int channels, int height, int width)
      : n(images), c(channels), h(height), w(width), elements(size_t(n) * c * h * w) {}
  Element& operator()(int image, int channel, int y, int x) {
    return elements[((size_t(image) * c + channel) * h + y) * w + x];
  }
  const Element& operator()(int image, int channel, int y, int x) const {
    return elements[((size_t(image) * c + channel) * h + y) * w + x];
  }

  int n = 0, c = 0, h = 0, w = 0;
  std::vector<Element> elements;
};

struct Sizes {
  int images, in_height, in_width, in_channels;
  int kernel_height, kernel_width, out_channels;
  int stride_height, stride_width, dilation_height, dilation_width;
  int top, bottom, left, right;
  int groups, deformable_groups;

  int taps() const { return kernel_height * kernel_width; }
  int out_height() const {
    return (in_height + top + bottom - (kernel_height - 1) * dilation_height - 1) / stride_height +
           1;
  }
  int out_width() const {
    return (in_width + left + right - (kernel_width - 1) * dilation_width - 1) / stride_width + 1;
  }
};

// One sample of one channel: its value and derivatives are sums of corner * weight.
struct SampleWeights {
  struct Corner {
    int y, x;
    double value, dy, dx;
  };
  std::vector<Corner> corners;  // inside the image
  // 0, or NaN where the position makes it so.
  double value = 0, dy = 0, dx = 0;
};

inline SampleWeights WeighSample(double y, double x, int height, int width) {
  SampleWeights sample;
  if (std::isnan(y) || std::isnan(x)) {
    // A NaN coordinate spoils what depends on it: the value, and the slope along the other axis.
    sample.value = std::numeric_limits<double>::quiet_NaN();
    if (std::isnan(x)) sample.dy = sample.value;
    if (std::isnan(y)) sample.dx = sample.value;
    return sample;
  }
  if (!(std::fabs(y) < 1e9 && std::fabs(x) < 1e9)) return sample;
  const double y0 = std::floor(y), x0 = std::floor(x);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const double cy = y0 + i, cx = x0 + j;
      if (cy < 0 || cy >= height || cx < 0 || cx >= width) continue;
      const double wy = i == 0 ? 1 - (y - y0) : y - y0, wx = j == 0 ? 1 - (x - x0) : x - x0;
      sample.corners.push_back(
          {int(cy), int(cx), wy * wx, (i == 0 ? -1 : 1) * wx, (j == 0 ? -1 : 1) * wy});
    }
  }
  return sample;
}

struct Problem {
  Sizes sizes;
  Tensor<double> input;    // [n][c][y][x]
  Tensor<double> filters;  // [kernel y][kernel x][c / groups][f]
  Tensor<double> offset;   // [n][(g * taps + tap) * 2 + axis][y][x]
  Tensor<double> mask;     // [n][g * taps + tap][y][x]
  bool has_mask;
  std::vector<double> bias;        // empty: none
  Tensor<double> output_gradient;  // [n][f][y][x]
};

// Calls function(n, oy, ox, tap, c, position in the mask, weights, modulation) for every sample.
template <typename Function>
void ForEachSample(const Problem& problem, const Function& function) {
  const Sizes& s = problem.sizes;
  for (int n = 0; n < s.images; ++n) {
    for (int oy = 0; oy < s.out_height(); ++oy) {
      for (int ox = 0; ox < s.out_width(); ++ox) {
        for (int g = 0; g < s.deformable_groups; ++g) {
          for (int tap = 0; tap < s.taps(); ++tap) {
            const int position = g * s.taps() + tap;
            const double y = oy * s.stride_height - s.top +
                             tap / s.kernel_width * s.dilation_height +
                             problem.offset(n, 2 * position, oy, ox);
            const double x = ox * s.stride_width - s.left +
                             tap % s.kernel_width * s.dilation_width +
                             problem.offset(n, 2 * position + 1, oy, ox);
            const SampleWeights weights = WeighSample(y, x, s.in_height, s.in_width);
            const double modulation = problem.has_mask ? problem.mask(n, position, oy, ox) : 1;
            const int channels = s.in_channels / s.deformable_groups;
            for (int c = g * channels; c < (g + 1) * channels; ++c) {
              function(n, oy, ox, tap, c, position, weights, modulation);
            }
          }
        }
      }
    }
  }
}

// [n][tap * C + c][oy][ox], for the columns and their gradient.
using Columns = Tensor<Number>;

inline Columns SampleColumns(const Problem& problem) {
  const Sizes& s = problem.sizes;
  Columns columns(s.images, s.taps() * s.in_channels, s.out_height(), s.out_width());
  ForEachSample(problem, [&](int n, int oy, int ox, int tap, int c, int, const SampleWeights& w,
                             double modulation) {
    Number& sample = columns(n, tap * s.in_channels + c, oy, ox);
    sample.value = modulation * w.value;
    for (const auto& corner : w.corners) {
      const double term = modulation * corner.value * problem.input(n, c, corner.y, corner.x);
      sample.Add(term, std::fabs(term));
    }
  });
  return columns;
}

struct SamplingGradients {
  Tensor<Number> input, offset, mask;
};

inline SamplingGradients BackpropagateColumns(const Problem& problem, const Columns& gradient) {
  const Sizes& s = problem.sizes;
  SamplingGradients result;
  const int positions = s.deformable_groups * s.taps();
  result.input = Tensor<Number>(s.images, s.in_channels, s.in_height, s.in_width);
  result.offset = Tensor<Number>(s.images, 2 * positions, s.out_height(), s.out_width());
  result.mask = Tensor<Number>(s.images, positions, s.out_height(), s.out_width());
  ForEachSample(problem, [&](int n, int oy, int ox, int tap, int c, int position,
                             const SampleWeights& w, double modulation) {
    const Number& g = gradient(n, tap * s.in_channels + c, oy, ox);
    Number& dy = result.offset(n, 2 * position, oy, ox);
    Number& dx = result.offset(n, 2 * position + 1, oy, ox);
    Number& mask = result.mask(n, position, oy, ox);
    dy.value += modulation * w.dy;
    dx.value += modulation * w.dx;
    mask.value += w.value;
    for (const auto& corner : w.corners) {
      const double x = problem.input(n, c, corner.y, corner.x);
      dy.Add(modulation * corner.dy * x * g.value,
             std::fabs(modulation * corner.dy * x) * g.magnitude);
      dx.Add(modulation * corner.dx * x * g.value,
             std::fabs(modulation * corner.dx * x) * g.magnitude);
      mask.Add(corner.value * x * g.value, std::fabs(corner.value * x) * g.magnitude);
      result.input(n, c, corner.y, corner.x)
          .Add(modulation * corner.value * g.value,
               std::fabs(modulation * corner.value) * g.magnitude);
    }
  });
  return result;
}

// Calls function(n, oy, ox, tap, c, f) for every product of a sample and a filter element.
template <typename Function>
void ForEachProduct(const Sizes& s, const Function& function) {
  const int group_in = s.in_channels / s.groups, group_out = s.out_channels / s.groups;
  for (int n = 0; n < s.images; ++n)
    for (int oy = 0; oy < s.out_height(); ++oy)
      for (int ox = 0; ox < s.out_width(); ++ox)
        for (int tap = 0; tap < s.taps(); ++tap)
          for (int c = 0; c < s.in_channels; ++c)
            for (int f = c / group_in * group_out; f < (c / group_in + 1) * group_out; ++f)
              function(n, oy, ox, tap, c, f);
}

struct All {
  Tensor<Number> output, filter_gradient;
  Tensor<Number> bias_gradient;  // [1][f][1][1]
  SamplingGradients gradients;
};

inline All Convolve(const Problem& problem) {
  const Sizes& s = problem.sizes;
  const int group_in = s.in_channels / s.groups;
  const Columns columns = SampleColumns(problem);
  Columns column_gradient(columns.n, columns.c, columns.h, columns.w);
  All all;
  all.output = Tensor<Number>(s.images, s.out_channels, s.out_height(), s.out_width());
  all.filter_gradient = Tensor<Number>(s.kernel_height, s.kernel_width, group_in, s.out_channels);
  all.bias_gradient = Tensor<Number>(1, s.out_channels, 1, 1);
  for (int n = 0; n < s.images; ++n)
    for (int f = 0; f < s.out_channels; ++f)
      for (int oy = 0; oy < s.out_height(); ++oy)
        for (int ox = 0; ox < s.out_width(); ++ox) {
          const double gradient = problem.output_gradient(n, f, oy, ox);
          all.bias_gradient(0, f, 0, 0).Add(gradient, std::fabs(gradient));
        }
  if (!problem.bias.empty()) {
    for (int n = 0; n < s.images; ++n)
      for (int f = 0; f < s.out_channels; ++f)
        for (int oy = 0; oy < s.out_height(); ++oy)
          for (int ox = 0; ox < s.out_width(); ++ox)
            all.output(n, f, oy, ox).Add(problem.bias[f], std::fabs(problem.bias[f]));
  }
  ForEachProduct(s, [&](int n, int oy, int ox, int tap, int c, int f) {
    const int ky = tap / s.kernel_width, kx = tap % s.kernel_width;
    const Number& sample = columns(n, tap * s.in_channels + c, oy, ox);
    const double filter = problem.filters(ky, kx, c % group_in, f);
    const double gradient = problem.output_gradient(n, f, oy, ox);
    all.output(n, f, oy, ox).Add(sample.value * filter, sample.magnitude * std::fabs(filter));
    column_gradient(n, tap * s.in_channels + c, oy, ox)
        .Add(gradient * filter, std::fabs(gradient * filter));
    all.filter_gradient(ky, kx, c % group_in, f)
        .Add(sample.value * gradient, sample.magnitude * std::fabs(gradient));
  });
  all.gradients = BackpropagateColumns(problem, column_gradient);
  return all;
}

}  // namespace oracle

#endif  // MDCN_TESTS_CC_CUDA_ORACLE_H_
