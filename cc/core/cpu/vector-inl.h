// Vectors of the instruction set that this translation unit is compiled for, on the compiler's own
// vector types, and the loads and stores that convert 16-bit floats. Included by kernels.cc only;
// everything is local to that unit, because the linker must not merge code of two instruction sets.
#ifndef MDCN_CORE_CPU_VECTOR_INL_H_
#define MDCN_CORE_CPU_VECTOR_INL_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/types.h"

#if defined(__AVX512F__)
#define MDCN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MDCN_VECTOR_BYTES 32
#else
#define MDCN_VECTOR_BYTES 16
#endif

// Bfloat16 can also be multiplied in pairs (product-inl.h): where there is an instruction for it,
// and where a test asks for it, to have that way compiled for machines that lack the instruction.
#if defined(__AVX512BF16__)
#define MDCN_BFLOAT16_PAIRS
#endif

#define MDCN_INLINE inline __attribute__((always_inline))

namespace mdcn::cpu::MDCN_ISA {
namespace {

// Two consecutive depths, the even one in the low half.
using BFloat16Pair = uint32_t;

template <typename Real>
constexpr int kLanes = MDCN_VECTOR_BYTES / sizeof(Real);

// A vector of 1 is a scalar, so that one template serves the tail of a loop.
template <typename Element, int kCount>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kCount * sizeof(Element))));
};
template <typename Element>
struct VectorOf<Element, 1> {
  using type = Element;
};
template <typename Element, int kCount>
using Vector = typename VectorOf<Element, kCount>::type;

template <typename To, typename From>
MDCN_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int kCount, typename Element>
MDCN_INLINE Vector<Element, kCount> LoadRaw(const Element* from) {
  Vector<Element, kCount> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// GCC 12 widens the two halves of a vector one by one and joins them: one instruction where there
// is one.
template <int kCount>
MDCN_INLINE Vector<uint32_t, kCount> LoadBits(const void* from) {
  const auto bits = LoadRaw<kCount>(static_cast<const uint16_t*>(from));
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    return BitCast<Vector<uint32_t, 16>>(
        _mm512_maskz_cvtepu16_epi32(0xffff, BitCast<__m256i>(bits)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kCount == 8) {
    return BitCast<Vector<uint32_t, 8>>(_mm256_cvtepu16_epi32(BitCast<__m128i>(bits)));
  }
  if constexpr (kCount == 4) {
    return BitCast<Vector<uint32_t, 4>>(
        _mm_cvtepu16_epi32(_mm_cvtsi64_si128(BitCast<int64_t>(bits))));
  }
#endif
  if constexpr (kCount == 1) {
    return bits;
  } else {
    return __builtin_convertvector(bits, Vector<uint32_t, kCount>);
  }
}

template <int kCount>
MDCN_INLINE Vector<float, kCount> Load(const float* from) {
  return LoadRaw<kCount>(from);
}

template <int kCount>
MDCN_INLINE Vector<double, kCount> Load(const double* from) {
  return LoadRaw<kCount>(from);
}

template <int kCount>
MDCN_INLINE Vector<float, kCount> Load(const BFloat16* from) {
  return BitCast<Vector<float, kCount>>(LoadBits<kCount>(from) << 16);
}

// Without F16C: rebias the exponent; the two ends of its range, infinity or NaN and zero or
// subnormal, need a correction each. A subnormal is the difference of two normal numbers, so that
// the result does not depend on whether the thread flushes subnormals.
template <int kCount>
MDCN_INLINE Vector<float, kCount> Load(const Half* from) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    return _mm512_maskz_cvtph_ps(0xffff, BitCast<__m256i>(LoadRaw<16>(&from->bits)));
  }
#endif
#if defined(__F16C__)
  if constexpr (kCount == 8) {
    return _mm256_cvtph_ps(BitCast<__m128i>(LoadRaw<8>(&from->bits)));
  }
  if constexpr (kCount == 4) {
    return _mm_cvtph_ps(_mm_cvtsi64_si128(BitCast<int64_t>(LoadRaw<4>(&from->bits))));
  }
  if constexpr (kCount == 1) return _cvtsh_ss(from->bits);
#endif
  using Bits = Vector<uint32_t, kCount>;
  using Reals = Vector<float, kCount>;
  const Bits half = LoadBits<kCount>(from);
  const Bits shifted = (half & 0x7fffu) << 13;
  const Bits exponent = shifted & (0x7c00u << 13);
  const Bits normal = shifted + (112u << 23);
  const Bits special = normal + (112u << 23);
  const Bits one_up = normal + (1u << 23);
  const Bits subnormal = BitCast<Bits>(BitCast<Reals>(one_up) - BitCast<float>(113u << 23));
  const Bits magnitude =
      exponent == (0x7c00u << 13) ? special : (exponent == 0u ? subnormal : normal);
  return BitCast<Reals>(magnitude | ((half & 0x8000u) << 16));
}

// The bits of bfloat16s, rounded to nearest even; a NaN stays one.
template <int kCount>
MDCN_INLINE Vector<uint32_t, kCount> NarrowBits(const Vector<float, kCount>& values) {
  const auto bits = BitCast<Vector<uint32_t, kCount>>(values);
  return values != values ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

MDCN_INLINE BFloat16 NarrowOne(float value, BFloat16) {
  return {static_cast<uint16_t>(NarrowBits<1>(value))};
}

// In vectors of two or more. The instructions take subnormal numbers as zeros, as the product does.
template <int kCount>
MDCN_INLINE void StoreNarrow(const Vector<float, kCount>& vector, BFloat16* to) {
#if defined(__AVX512BF16__)
  if constexpr (kCount == 16) {
    const __m256bh narrow = _mm512_cvtneps_pbh(vector);
    return void(std::memcpy(to, &narrow, sizeof(narrow)));
  }
  if constexpr (kCount == 8) {
    const __m128bh narrow = _mm256_cvtneps_pbh(vector);
    return void(std::memcpy(to, &narrow, sizeof(narrow)));
  }
#endif
  const auto narrow = __builtin_convertvector(NarrowBits<kCount>(vector), Vector<uint16_t, kCount>);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// Likewise, an element of each in turn.
template <int kCount>
MDCN_INLINE void StorePairs(const Vector<float, kCount>& even, const Vector<float, kCount>& odd,
                            BFloat16* to) {
#if defined(__AVX512BF16__)
  Vector<uint16_t, 2 * kCount> order;
  for (int i = 0; i < 2 * kCount; ++i) order[i] = i / 2 + i % 2 * kCount;
  const auto both = BitCast<Vector<uint16_t, 2 * kCount>>(_mm512_cvtne2ps_pbh(odd, even));
  const auto narrow = __builtin_shuffle(both, order);
#else
  const auto narrow = NarrowBits<kCount>(even) | NarrowBits<kCount>(odd) << 16;
#endif
  std::memcpy(to, &narrow, sizeof(narrow));
}

template <int kCount, typename T>
MDCN_INLINE void Store(const Vector<ComputeType<T>, kCount>& vector, T* to) {
  if constexpr (std::is_same_v<T, ComputeType<T>>) {
    std::memcpy(to, &vector, sizeof(vector));
  } else if constexpr (kCount == 1) {
    *to = NarrowOne(vector, T{});
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    StoreNarrow<kCount>(vector, to);
  }
}

MDCN_INLINE Half NarrowOne(float value, Half) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {  // subnormal in half: units of 2^-24, rounded by adding 0.5
    const float rounded = BitCast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (BitCast<uint32_t>(rounded) - BitCast<uint32_t>(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
#endif
}

MDCN_INLINE float NarrowOne(float value, float) { return value; }
MDCN_INLINE double NarrowOne(double value, double) { return value; }

template <typename T>
void Widen(const T* from, int64_t count, ComputeType<T>* to) {
  constexpr int kCount = kLanes<ComputeType<T>>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) Store<kCount>(Load<kCount>(from + i), to + i);
  for (; i < count; ++i) to[i] = Load<1>(from + i);
}

template <typename T>
MDCN_INLINE bool IsFinite(const T* from, int64_t count) {
  constexpr int kCount = kLanes<ComputeType<T>>;
  Vector<ComputeType<T>, kCount> zeros{};  // or NaN
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) zeros += Load<kCount>(from + i) * 0;
  ComputeType<T> zero = 0;
  for (; i < count; ++i) zero += Load<1>(from + i) * 0;
  for (int lane = 0; lane < kCount; ++lane) zero += zeros[lane];
  return zero == 0;
}

template <typename T>
void AddRows(const T* from, int64_t rows, int64_t columns, ComputeType<T>* sums) {
  constexpr int kCount = kLanes<ComputeType<T>>;
  for (int64_t row = 0; row < rows; ++row, from += columns) {
    int64_t i = 0;
    for (; i + kCount <= columns; i += kCount) {
      Store<kCount>(Load<kCount>(sums + i) + Load<kCount>(from + i), sums + i);
    }
    for (; i < columns; ++i) sums[i] += Load<1>(from + i);
  }
}

template <typename T>
void Narrow(const ComputeType<T>* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = NarrowOne(from[i], T{});
}

}  // namespace
}  // namespace mdcn::cpu::MDCN_ISA

#endif  // MDCN_CORE_CPU_VECTOR_INL_H_
