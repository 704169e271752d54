// The tensor types as the core sees them, without TensorFlow: 16-bit floats as their bits, and the
// type in which each tensor type is computed.
#ifndef MDCN_CORE_TYPES_H_
#define MDCN_CORE_TYPES_H_

#include <cstdint>

namespace mdcn {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Positions, interpolation and sums are in this type.
template <typename T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <typename T>
using ComputeType = typename ComputeTypeOf<T>::type;

// Calls MACRO(T, TOffset) for every supported pair of data type and offset (and mask) type.
#define MDCN_FOR_EACH_TYPE_PAIR(MACRO)      \
  MACRO(float, float)                       \
  MACRO(double, double)                     \
  MACRO(::mdcn::Half, ::mdcn::Half)         \
  MACRO(::mdcn::Half, float)                \
  MACRO(::mdcn::BFloat16, ::mdcn::BFloat16) \
  MACRO(::mdcn::BFloat16, float)

}  // namespace mdcn

#endif  // MDCN_CORE_TYPES_H_
