// Launching a kernel over a grid-stride loop: the grid's size, and every CUDA error as a Status.
// Separate from the kernels so that no launch goes unchecked, and free of the <<<>>> syntax so that
// a plain C++ compiler reads the kernels too (tests/cc/cuda_emulation).
#ifndef MDCN_CORE_CUDA_LAUNCH_H_
#define MDCN_CORE_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/cuda/tuning.h"
#include "core/status.h"

namespace mdcn::cuda {

// What a user can do about an error that comes from how the library was built, or nothing.
inline const char* RemedyFor(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return ". Build tf_mdcn with this GPU's architecture in TF_MDCN_CUDA_ARCHS";
    case cudaErrorInsufficientDriver:
      return ". Update the driver, or build tf_mdcn with an older nvcc";
    default:
      return "";
  }
}

inline Status CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status();
  return Status::Internal(std::string("ModulatedDeformConv2D: ") + what +
                          " failed: " + cudaGetErrorString(error) + RemedyFor(error));
}

// Launches at most `blocks` blocks of kThreadsPerBlock threads; no blocks, no launch.
template <typename... Parameters, typename... Arguments>
Status LaunchBlocks(const char* name, void (*kernel)(Parameters...), int64_t blocks,
                    cudaStream_t stream, Arguments&&... arguments) {
  if (blocks == 0) return Status();
  int device = 0, multiprocessors = 0, resident_blocks = 0;
  MDCN_RETURN_IF_ERROR(CheckCuda(cudaGetDevice(&device), "cudaGetDevice"));
  MDCN_RETURN_IF_ERROR(CheckCuda(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name));
  MDCN_RETURN_IF_ERROR(CheckCuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident_blocks, kernel, kThreadsPerBlock, 0),
      name));
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(GridBlocks(blocks, multiprocessors, resident_blocks)));
  config.blockDim = dim3(kThreadsPerBlock);
  config.stream = stream;
  return CheckCuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
                   name);
}

// Launches a kernel that loops over `threads` items with GridThread and GridThreads.
template <typename... Parameters, typename... Arguments>
Status LaunchThreads(const char* name, void (*kernel)(Parameters...), int64_t threads,
                     cudaStream_t stream, Arguments&&... arguments) {
  return LaunchBlocks(name, kernel, CeilDivide(threads, kThreadsPerBlock), stream,
                      std::forward<Arguments>(arguments)...);
}

// The first item of this thread, and the step to its next ones.
template <typename Index>
__device__ __forceinline__ Index GridThread() {
  return static_cast<Index>(blockIdx.x) * static_cast<Index>(blockDim.x) +
         static_cast<Index>(threadIdx.x);
}

template <typename Index>
__device__ __forceinline__ Index GridThreads() {
  return static_cast<Index>(gridDim.x) * static_cast<Index>(blockDim.x);
}

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_LAUNCH_H_
