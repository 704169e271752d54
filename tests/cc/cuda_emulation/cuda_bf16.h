// Stands in for CUDA's header of the same name in the emulation: bfloat16 by its bits.
#ifndef MDCN_TESTS_CUDA_EMULATION_CUDA_BF16_H_
#define MDCN_TESTS_CUDA_EMULATION_CUDA_BF16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16_raw {
  unsigned short x;
};

class __nv_bfloat16 {
 public:
  explicit __nv_bfloat16(__nv_bfloat16_raw raw) : raw_(raw) {}
  operator __nv_bfloat16_raw() const { return raw_; }

 private:
  __nv_bfloat16_raw raw_;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<__nv_bfloat16_raw>(value).x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __nv_bfloat16(__nv_bfloat16_raw{static_cast<unsigned short>(bits)});
}

#endif  // MDCN_TESTS_CUDA_EMULATION_CUDA_BF16_H_
