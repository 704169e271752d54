// The one definition of bilinear sampling and its derivatives, for host and device: where a
// position falls on an axis, which corners exist, and what each corner weighs. No memory is read
// here, so the CPU, the CUDA kernels and their emulation all share it.
//
// Contract (DESIGN.md): a corner outside the image counts as 0; the derivative at a whole-number
// coordinate is the right-hand one, slope between floor(y) and floor(y) + 1; positions that are
// infinite or far away are outside; a NaN position makes every weight NaN.
#ifndef MDCN_CORE_SAMPLING_H_
#define MDCN_CORE_SAMPLING_H_

#include <cstdint>

// Internal linkage matters: the same functions are compiled for several instruction sets, and a
// linker must never merge them.
#if defined(__CUDACC__)
#define MDCN_SAMPLING_INLINE static __host__ __device__ __forceinline__
#else
#define MDCN_SAMPLING_INLINE static inline __attribute__((always_inline))
#endif

namespace mdcn {

// A position on one axis: the whole number at or below it and the distance from there, in [0, 1).
// A position with no corner inside the image is given low = -2.
template <typename Real>
struct AxisSample {
  int32_t low;
  Real fraction;
};

template <typename Real>
MDCN_SAMPLING_INLINE AxisSample<Real> SampleAxis(Real position, int32_t size) {
  const bool touches = position >= Real(-1) && position < Real(size);
  const Real located = touches ? position : Real(-2);  // safe to convert to an integer
  const int32_t truncated = static_cast<int32_t>(located);
  const int32_t low = truncated - (located < Real(truncated) ? 1 : 0);
  const Real fraction = position == position ? located - Real(low) : position;
  return {low, fraction};
}

// Whether the corner at `index` on an axis of `size` lies inside the image.
MDCN_SAMPLING_INLINE bool CornerExists(int32_t index, int32_t size) {
  return static_cast<uint32_t>(index) < static_cast<uint32_t>(size);
}

// One number for each of the four corners: weights, values, or dot products with values. low_high
// is the corner at (low y, high x).
template <typename Real>
struct Corners {
  Real low_low, low_high, high_low, high_high;
};

// A corner that does not exist keeps its weight; its value is what counts as 0.
template <typename Real>
MDCN_SAMPLING_INLINE Corners<Real> BilinearWeights(Real fraction_y, Real fraction_x) {
  const Real rest_y = Real(1) - fraction_y, rest_x = Real(1) - fraction_x;
  return {rest_y * rest_x, rest_y * fraction_x, fraction_y * rest_x, fraction_y * fraction_x};
}

// d(sample)/dy for the four corner values (or for four dot products with them).
template <typename Real>
MDCN_SAMPLING_INLINE Real DerivativeY(const Corners<Real>& corners, Real fraction_x) {
  return (Real(1) - fraction_x) * (corners.high_low - corners.low_low) +
         fraction_x * (corners.high_high - corners.low_high);
}

// d(sample)/dx, likewise.
template <typename Real>
MDCN_SAMPLING_INLINE Real DerivativeX(const Corners<Real>& corners, Real fraction_y) {
  return (Real(1) - fraction_y) * (corners.low_high - corners.low_low) +
         fraction_y * (corners.high_high - corners.high_low);
}

}  // namespace mdcn

#endif  // MDCN_CORE_SAMPLING_H_
