// The matrix product: packed panels and a register-blocked micro-kernel. It knows nothing of
// sampling. Included by kernels.cc only.
#ifndef MDCN_CORE_CPU_PRODUCT_INL_H_
#define MDCN_CORE_CPU_PRODUCT_INL_H_

#include "core/cpu/kernel_table.h"
#include "core/cpu/vector-inl.h"

namespace mdcn::cpu::MDCN_ISA {
namespace {

// A block of kRowBlock x 2 vectors of sums stays in registers: 12 of 16, or 24 of 32.
constexpr int kPanelVectors = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowBlock = 12;
#else
constexpr int kRowBlock = 6;
#endif
template <typename Real>
constexpr int kPanelColumns = kPanelVectors * kLanes<Real>;

// Depth of one pass: 16 KiB of a panel stay in the L1 cache while the rows go by.
template <typename Real>
constexpr int64_t kDepthBlock = 16 * 1024 / (kPanelColumns<Real> * sizeof(Real));

template <typename T>
void Pack(const MatrixView<T>& matrix, int64_t depth, int64_t columns, int64_t panel_depth,
          ComputeType<T>* panels) {
  using Real = ComputeType<T>;
  constexpr int kColumns = kPanelColumns<Real>;
  const int64_t panel_stride = panel_depth * kColumns;
  const int64_t whole = columns / kColumns * kColumns;
  // Along the rows where they are contiguous: panel by panel, large filters took a page of the
  // memory for every other row, and half as long again.
  const int64_t along_rows = matrix.column_stride == 1 ? whole : 0;
  for (int64_t d = 0; d < depth; ++d) {
    const T* from = matrix.data + d * matrix.depth_stride;
    Real* to = panels + d * kColumns;
    for (int64_t i = 0; i < along_rows; i += kColumns, from += kColumns, to += panel_stride) {
      for (int v = 0; v < kPanelVectors; ++v) {
        constexpr int kCount = kLanes<Real>;
        Store<kCount>(Load<kCount>(from + v * kCount), to + v * kCount);
      }
    }
  }
  for (int64_t first = along_rows; first < columns; first += kColumns) {
    const int64_t count = columns - first < kColumns ? columns - first : kColumns;
    const T* from = matrix.data + first * matrix.column_stride;
    Real* to = panels + first / kColumns * panel_stride;
    for (int64_t d = 0; d < depth; ++d, from += matrix.depth_stride, to += kColumns) {
      for (int64_t i = 0; i < count; ++i) to[i] = Load<1>(from + i * matrix.column_stride);
      for (int64_t i = count; i < kColumns; ++i) to[i] = 0;
    }
  }
}

enum class Result { kStore, kContinue, kAdd };  // what becomes of c: = sum, sum from c on, += sum

template <typename Real, int kRows, int kVectors, bool kTransposed, Result kResult>
MDCN_INLINE void MultiplyBlock(const Real* a, int64_t a_stride, const Real* b, int64_t depth,
                               Real* c, int64_t c_stride) {
  constexpr int kCount = kLanes<Real>;
  using V = Vector<Real, kCount>;
  V sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kResult == Result::kContinue ? Load<kCount>(c + r * c_stride + v * kCount) : V{};
    }
  }
  for (int64_t d = 0; d < depth; ++d, b += kPanelColumns<Real>) {
    V b_row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b_row[v] = Load<kCount>(b + v * kCount);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Real element = kTransposed ? a[d * a_stride + r] : a[r * a_stride + d];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += element * b_row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Real* to = c + r * c_stride + v * kCount;
      Store<kCount>(kResult == Result::kAdd ? Load<kCount>(to) + sums[r][v] : sums[r][v], to);
    }
  }
}

// All rows of one panel, in blocks of kRows, the rest in smaller ones. How rows fall into blocks
// does not change their sums.
template <typename Real, int kRows, int kVectors, bool kTransposed, Result kResult>
MDCN_INLINE void MultiplyRows(const Real* a, int64_t a_stride, int64_t rows, const Real* b,
                              int64_t depth, Real* c, int64_t c_stride) {
  const int64_t row_step = kTransposed ? 1 : a_stride;
  for (; rows >= kRows; rows -= kRows, a += kRows * row_step, c += kRows * c_stride) {
    MultiplyBlock<Real, kRows, kVectors, kTransposed, kResult>(a, a_stride, b, depth, c, c_stride);
  }
  if constexpr (kRows > 1) {
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows > 2 ? 2 : 1;
    if (rows > 0) {
      MultiplyRows<Real, kNext, kVectors, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                                c_stride);
    }
  }
}

template <typename Real, bool kTransposed, Result kResult>
__attribute__((noinline)) void MultiplyPanel(const Real* a, int64_t a_stride, int64_t rows,
                                             const Real* b, int64_t depth, int64_t columns, Real* c,
                                             int64_t c_stride) {
  if (columns > kLanes<Real>) {
    MultiplyRows<Real, kRowBlock, 2, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                           c_stride);
  } else {
    MultiplyRows<Real, kRowBlock, 1, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                           c_stride);
  }
}

template <typename Real>
void Multiply(const Real* a, int64_t a_stride, int64_t rows, const Real* b, int64_t panel_depth,
              int64_t depth, int64_t columns, Real* c, int64_t c_stride, bool accumulate) {
  constexpr int kColumns = kPanelColumns<Real>;
  // As many passes as bring them nearest to that depth, all alike.
  const int64_t passes = (depth + kDepthBlock<Real> / 2) / kDepthBlock<Real>;
  const int64_t pass_depth = passes > 1 ? (depth + passes - 1) / passes : depth;
  for (int64_t begin = 0; begin < depth; begin += pass_depth) {
    const int64_t count = depth - begin < pass_depth ? depth - begin : pass_depth;
    for (int64_t column = 0; column < columns; column += kColumns) {
      const Real* panel = b + column * panel_depth + begin * kColumns;
      if (accumulate || begin > 0) {
        MultiplyPanel<Real, false, Result::kContinue>(a + begin, a_stride, rows, panel, count,
                                                      columns - column, c + column, c_stride);
      } else {
        MultiplyPanel<Real, false, Result::kStore>(a + begin, a_stride, rows, panel, count,
                                                   columns - column, c + column, c_stride);
      }
    }
  }
}

template <typename Real>
void AddTransposedProduct(const Real* a, int64_t a_stride, int64_t rows, const Real* b,
                          int64_t depth, int64_t columns, Real* c, int64_t c_stride) {
  constexpr int kColumns = kPanelColumns<Real>;
  for (int64_t column = 0; column < columns; column += kColumns, b += depth * kColumns) {
    const int64_t count = columns - column < kColumns ? columns - column : kColumns;
    if (count % kLanes<Real> == 0) {
      MultiplyPanel<Real, true, Result::kAdd>(a, a_stride, rows, b, depth, count, c + column,
                                              c_stride);
      continue;
    }
    // c has no room for whole vectors here: through a block that has.
    Real block[kRowBlock * kColumns];
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t block_rows = rows - row < kRowBlock ? rows - row : kRowBlock;
      MultiplyPanel<Real, true, Result::kStore>(a + row, a_stride, block_rows, b, depth, count,
                                                block, kColumns);
      for (int64_t r = 0; r < block_rows; ++r) {
        for (int64_t i = 0; i < count; ++i) {
          c[(row + r) * c_stride + column + i] += block[r * kColumns + i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace mdcn::cpu::MDCN_ISA

#endif  // MDCN_CORE_CPU_PRODUCT_INL_H_
