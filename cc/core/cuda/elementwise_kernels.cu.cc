// The small kernels for sums over several chunks: zeroing, adding 16-bit products to a sum in
// float, and converting it back.
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/tuning.h"
#include "core/cuda/values.h"

namespace mdcn::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    AddToKernel(const T* __restrict__ terms, int64_t count, ComputeType<T>* __restrict__ sum) {
  for (int64_t i = GridThread<int64_t>(); i < count; i += GridThreads<int64_t>()) {
    sum[i] += ToReal(terms[i]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    ConvertKernel(const ComputeType<T>* __restrict__ sum, int64_t count, T* __restrict__ values) {
  for (int64_t i = GridThread<int64_t>(); i < count; i += GridThreads<int64_t>()) {
    FromReal(sum[i], &values[i]);
  }
}

}  // namespace

template <typename T>
Status AddTo(const T* terms, int64_t count, ComputeType<T>* sum, Stream stream) {
  return LaunchThreads("AddToKernel", AddToKernel<T>, count, stream, terms, count, sum);
}

template <typename T>
Status Convert(const ComputeType<T>* sum, int64_t count, T* values, Stream stream) {
  return LaunchThreads("ConvertKernel", ConvertKernel<T>, count, stream, sum, count, values);
}

Status SetZero(void* data, int64_t bytes, Stream stream) {
  if (bytes == 0) return Status();
  return CheckCuda(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

template Status AddTo(const Half*, int64_t, float*, Stream);
template Status AddTo(const BFloat16*, int64_t, float*, Stream);
template Status Convert(const float*, int64_t, Half*, Stream);
template Status Convert(const float*, int64_t, BFloat16*, Stream);

}  // namespace mdcn::cuda
