// Stands in for CUDA's header of the same name in the emulation: half precision by its bits.
#ifndef MDCN_TESTS_CUDA_EMULATION_CUDA_FP16_H_
#define MDCN_TESTS_CUDA_EMULATION_CUDA_FP16_H_

#include <cmath>
#include <limits>

struct __half_raw {
  unsigned short x;
};

class __half {
 public:
  explicit __half(__half_raw raw) : raw_(raw) {}
  operator __half_raw() const { return raw_; }

 private:
  __half_raw raw_;
};

inline float __half2float(__half half) {
  const unsigned bits = static_cast<__half_raw>(half).x;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float value) {
  unsigned bits;
  if (std::isnan(value)) {
    bits = 0x7fff;
  } else {
    const float magnitude = std::fabs(value);
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
    // nearbyint rounds ties to even; a carry moves into the exponent by itself.
    if (magnitude >= 65520) {
      bits = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
      bits = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 24)));
    } else {
      bits = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 11 - exponent))) - 1024 +
             static_cast<unsigned>((exponent + 14) << 10);
    }
    if (std::signbit(value)) bits |= 0x8000;
  }
  return __half(__half_raw{static_cast<unsigned short>(bits)});
}

#endif  // MDCN_TESTS_CUDA_EMULATION_CUDA_FP16_H_
