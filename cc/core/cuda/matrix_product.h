// The matrix product that the convolution needs and does not contain: TensorFlow's BLAS in
// cc/tf/kernels_gpu.cc, a plain loop in the emulated tests.
#ifndef MDCN_CORE_CUDA_MATRIX_PRODUCT_H_
#define MDCN_CORE_CUDA_MATRIX_PRODUCT_H_

#include <cstdint>

#include "core/status.h"

namespace mdcn::cuda {

// A batch of row-major matrices in device memory. Element (i, j) of matrix b is
// data[b * batch_step + i * row_step + j], after which `transposed` swaps rows and columns.
template <typename T>
struct MatrixBatch {
  T* data;
  int64_t row_step;
  int64_t batch_step;  // may be 0 in a factor: the same matrix for all
  bool transposed = false;
};

// result[b] = left[b] * right[b], or result[b] += left[b] * right[b] if `accumulate`, for b in
// [0, batch), where result[b] is rows x columns, left[b] rows x depth and right[b] depth x columns
// (after transposition). The result is never transposed, its matrices never overlap, and no size is
// 0. Elements are summed in ComputeType<T> at least.
template <typename T>
struct MatrixProductCall {
  int64_t batch;
  int64_t rows, columns, depth;
  MatrixBatch<const T> left, right;
  MatrixBatch<T> result;
  bool accumulate;
};

// The arguments of BLAS's gemm_strided_batched: c = a * b, or c += a * b, in column-major order.
template <typename T>
struct GemmArguments {
  bool transpose_a, transpose_b;
  int64_t m, n, k;
  const T* a;
  int64_t lda, stride_a;
  const T* b;
  int64_t ldb, stride_b;
  bool accumulate;  // beta
  T* c;
  int64_t ldc, stride_c;
  int64_t batch;
};

// Column-major BLAS sees every matrix transposed: it is asked for result^T = right^T * left^T.
template <typename T>
GemmArguments<T> ToColumnMajor(const MatrixProductCall<T>& call) {
  return {call.right.transposed,
          call.left.transposed,
          call.columns,
          call.rows,
          call.depth,
          call.right.data,
          call.right.row_step,
          call.right.batch_step,
          call.left.data,
          call.left.row_step,
          call.left.batch_step,
          call.accumulate,
          call.result.data,
          call.result.row_step,
          call.result.batch_step,
          call.batch};
}

// Enqueues products on the stream that the kernels run on.
template <typename T>
class MatrixProduct {
 public:
  virtual ~MatrixProduct() = default;
  virtual Status Multiply(const MatrixProductCall<T>& call) = 0;
};

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_MATRIX_PRODUCT_H_
