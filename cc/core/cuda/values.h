// Tensor elements on the device: conversion to and from the type they are computed in, and accesses
// of several elements at once. The only file that knows CUDA's 16-bit types.
#ifndef MDCN_CORE_CUDA_VALUES_H_
#define MDCN_CORE_CUDA_VALUES_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/cuda/tuning.h"
#include "core/geometry.h"
#include "core/types.h"

namespace mdcn::cuda {

__device__ __forceinline__ float ToReal(float value) { return value; }
__device__ __forceinline__ double ToReal(double value) { return value; }
__device__ __forceinline__ float ToReal(Half value) {
  __half_raw raw;
  raw.x = value.bits;
  return __half2float(__half(raw));
}
__device__ __forceinline__ float ToReal(BFloat16 value) {
  __nv_bfloat16_raw raw;
  raw.x = value.bits;
  return __bfloat162float(__nv_bfloat16(raw));
}

__device__ __forceinline__ void FromReal(float real, float* value) { *value = real; }
__device__ __forceinline__ void FromReal(double real, double* value) { *value = real; }
__device__ __forceinline__ void FromReal(float real, Half* value) {
  value->bits = static_cast<__half_raw>(__float2half_rn(real)).x;
}
__device__ __forceinline__ void FromReal(float real, BFloat16* value) {
  value->bits = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(real)).x;
}

// kWidth elements that are read and written in one access; they must lie at a multiple of its size.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T elements[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ void Load(const T* __restrict__ from, ComputeType<T> (&reals)[kWidth]) {
  const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(from);
  for (int i = 0; i < kWidth; ++i) reals[i] = ToReal(pack.elements[i]);
}

template <int kWidth, typename T>
__device__ __forceinline__ void Store(const ComputeType<T> (&reals)[kWidth], T* __restrict__ to) {
  Pack<T, kWidth> pack;
  for (int i = 0; i < kWidth; ++i) FromReal(reals[i], &pack.elements[i]);
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// Whether kernels may access `width` neighbouring channels at once: they are neighbours, no access
// crosses into another weight group or deformable group, and every one is aligned.
inline bool PacksFit(const Geometry& geometry, int width, const void* input, const void* columns) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  };
  return geometry.data_format == DataFormat::kChannelsLast && aligned(input) && aligned(columns) &&
         geometry.group_in_channels % width == 0 && geometry.deformable_group_channels % width == 0;
}

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_VALUES_H_
