// Stands in for CUDA's header of the same name when the kernels in cc/core/cuda are compiled by a
// plain C++ compiler for tests: the built-in variables, qualifiers and functions that they use, run
// by fibers on host threads (emulation.cc). Nothing else of CUDA is here.
#ifndef MDCN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_
#define MDCN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Each block runs on a host thread of its own.
#define __shared__ static thread_local

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidResourceHandle,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct dim3 {
  dim3(unsigned x_size = 1) : x(x_size) {}
  unsigned x, y = 1, z = 1;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t stream);

namespace cuda_emulation {

// The device that launchers see; together they bound the grid.
struct Device {
  int multiprocessors = 1;
  int resident_blocks = 3;
};
void SetDevice(const Device& device);
int ResidentBlocks();

// The order in which the threads of a block run between two synchronisations.
void SetSchedule(unsigned seed);
// Work on any other stream fails, as does the launch after `launches` more if that is not negative.
void SetStream(cudaStream_t stream);
void FailAfter(int launches, cudaError_t error = cudaErrorInvalidValue);
int64_t LaunchCount();

cudaError_t Launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Waits for all threads of the block, or for the lanes in `members`, whose values it exchanges.
void SynchronizeBlock();
uint64_t ExchangeLanes(unsigned members, uint64_t value, int source_lane);
int OwnLane();

template <typename T>
T Shuffle(unsigned members, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ExchangeLanes(members, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return cuda_emulation::Launch(*config, [&] { std::apply(kernel, values); });
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = cuda_emulation::ResidentBlocks();
  return cudaSuccess;
}

struct uint3 {
  unsigned x, y, z;
};
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_emulation::SynchronizeBlock(); }

template <typename T>
T __shfl_down_sync(unsigned members, T value, int distance, int width) {
  const int lane = cuda_emulation::OwnLane();
  const bool inside = lane % width + distance < width;
  return cuda_emulation::Shuffle(members, value, inside ? lane + distance : lane);
}

template <typename T>
T __shfl_up_sync(unsigned members, T value, int distance, int width) {
  const int lane = cuda_emulation::OwnLane();
  const bool inside = lane % width >= distance;
  return cuda_emulation::Shuffle(members, value, inside ? lane - distance : lane);
}

// Atomic and unordered, as on the device.
template <typename T>
T atomicAdd(T* address, T value) {
  T before;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  T after;
  do {
    after = before + value;
  } while (!__atomic_compare_exchange(address, &before, &after, /*weak=*/true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

#endif  // MDCN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_
