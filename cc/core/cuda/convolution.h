// The whole convolution and its gradients on the GPU: cuts the output into chunks of rows and
// strings kernels and matrix products together. Host code without CUDA or TensorFlow headers; the
// caller brings device memory, a stream and a matrix product.
#ifndef MDCN_CORE_CUDA_CONVOLUTION_H_
#define MDCN_CORE_CUDA_CONVOLUTION_H_

#include <cstdint>

#include "core/cuda/kernels.h"
#include "core/cuda/matrix_product.h"
#include "core/cuda/tuning.h"
#include "core/geometry.h"
#include "core/status.h"
#include "core/types.h"

namespace mdcn::cuda {

// How to run. Options change speed and memory, and results by rounding at most.
struct Options {
  // Bounds the scratch of a chunk, down to one output row of one image.
  int64_t chunk_bytes = kDefaultChunkBytes;
  // The input gradient bit for bit the same in every run, at some cost in time.
  bool deterministic = false;
};

template <typename T>
struct Execution {
  Stream stream;
  MatrixProduct<T>* product;
  void* workspace;  // device memory, aligned to kWorkspaceAlignment
  int64_t workspace_bytes;
};
constexpr int64_t kWorkspaceAlignment = 256;

// All pointers are device pointers in the layouts of geometry.h. `mask` and `bias` may be nullptr,
// and so are then their gradients.
template <typename T, typename TOffset>
struct ForwardTensors {
  const T* input;
  const T* filters;
  Sampling<TOffset> sampling;
  const T* bias;
  T* output;
};

template <typename T, typename TOffset>
struct InputGradientTensors {
  const T* input;
  const T* filters;
  Sampling<TOffset> sampling;
  const T* output_gradient;
  T* input_gradient;
  TOffset* offset_gradient;
  TOffset* mask_gradient;
};

template <typename T, typename TOffset>
struct FilterGradientTensors {
  const T* input;
  Sampling<TOffset> sampling;
  const T* output_gradient;
  T* filter_gradient;
  T* bias_gradient;
};

// The workspace that the function of the same name needs with these options: at most chunk_bytes
// (unless one row needs more) and, for 16-bit types, a float32 copy of the gradient of a chunk's
// images or of the filters, and some partial sums of the bias gradient.
template <typename T>
int64_t ForwardWorkspaceBytes(const Geometry& geometry, const Options& options);
template <typename T>
int64_t InputGradientWorkspaceBytes(const Geometry& geometry, const Options& options);
template <typename T>
int64_t FilterGradientWorkspaceBytes(const Geometry& geometry, const Options& options);

template <typename T, typename TOffset>
Status Forward(const Geometry& geometry, const ForwardTensors<T, TOffset>& tensors,
               const Options& options, const Execution<T>& execution);

// The gradients of input, offset and mask.
template <typename T, typename TOffset>
Status InputGradient(const Geometry& geometry, const InputGradientTensors<T, TOffset>& tensors,
                     const Options& options, const Execution<T>& execution);

// The gradients of filters and bias.
template <typename T, typename TOffset>
Status FilterGradient(const Geometry& geometry, const FilterGradientTensors<T, TOffset>& tensors,
                      const Options& options, const Execution<T>& execution);

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_CONVOLUTION_H_
