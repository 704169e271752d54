// The matrix product: packed panels and a register-blocked micro-kernel. It knows nothing of
// sampling. Included by kernels.cc only.
#ifndef MDCN_CORE_CPU_PRODUCT_INL_H_
#define MDCN_CORE_CPU_PRODUCT_INL_H_

#include <type_traits>

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

// Elements of depth, side by side in the columns; the odd halves of pairs are `odd` further on.
template <int kCount, typename Element, typename T>
MDCN_INLINE Vector<ComputeType<T>, kCount> LoadElements(const T* from, int64_t odd) {
  if constexpr (std::is_same_v<Element, BFloat16Pair>) {
    const auto even_bits = LoadBits<kCount>(from), odd_bits = LoadBits<kCount>(from + odd);
    return BitCast<Vector<float, kCount>>(even_bits | odd_bits << 16);
  } else {
    return Load<kCount>(from);
  }
}

template <typename T, typename Element>
void Pack(const MatrixView<T>& matrix, int64_t depth, int64_t columns, int64_t panel_depth,
          ComputeType<T>* panels) {
  using Real = ComputeType<T>;
  constexpr int kColumns = kPanelColumns<Real>;
  const int64_t panel_stride = panel_depth * kColumns;
  const int64_t odd = matrix.depth_stride / 2;
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
        Store<kCount>(LoadElements<kCount, Element>(from + v * kCount, odd), to + v * kCount);
      }
    }
  }
  for (int64_t first = along_rows; first < columns; first += kColumns) {
    const int64_t count = columns - first < kColumns ? columns - first : kColumns;
    const T* from = matrix.data + first * matrix.column_stride;
    Real* to = panels + first / kColumns * panel_stride;
    for (int64_t d = 0; d < depth; ++d, from += matrix.depth_stride, to += kColumns) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = LoadElements<1, Element>(from + i * matrix.column_stride, odd);
      }
      for (int64_t i = count; i < kColumns; ++i) to[i] = 0;
    }
  }
}

enum class Result { kStore, kContinue, kAdd };  // what becomes of c: = sum, sum from c on, += sum

// *sums += element * row. Of pairs the odd depth first: the order of the instruction, which also
// takes subnormal numbers as zeros.
template <int kCount, typename Element>
MDCN_INLINE void AddProduct(Element element, const Vector<Element, kCount>& row,
                            Vector<ComputeType<Element>, kCount>* sums) {
  if constexpr (std::is_same_v<Element, BFloat16Pair>) {
#if defined(__AVX512BF16__)
    *sums = _mm512_dpbf16_ps(*sums, BitCast<__m512bh>(_mm512_set1_epi32(element)),
                             BitCast<__m512bh>(row));
#else
    using Reals = Vector<float, kCount>;
    *sums += BitCast<float>(element & 0xffff0000u) * BitCast<Reals>(row & 0xffff0000u);
    *sums += BitCast<float>(element << 16) * BitCast<Reals>(row << 16);
#endif
  } else {
    *sums += element * row;
  }
}

template <typename Element, int kRows, int kVectors, bool kTransposed, Result kResult>
MDCN_INLINE void MultiplyBlock(const Element* a, int64_t a_stride, const Element* b, int64_t depth,
                               ComputeType<Element>* c, int64_t c_stride) {
  using Real = ComputeType<Element>;
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
    Vector<Element, kCount> b_row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b_row[v] = LoadRaw<kCount>(b + v * kCount);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Element element = LoadRaw<1>(a + (kTransposed ? d * a_stride + r : r * a_stride + d));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) AddProduct<kCount>(element, b_row[v], &sums[r][v]);
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
template <typename Element, int kRows, int kVectors, bool kTransposed, Result kResult>
MDCN_INLINE void MultiplyRows(const Element* a, int64_t a_stride, int64_t rows, const Element* b,
                              int64_t depth, ComputeType<Element>* c, int64_t c_stride) {
  const int64_t row_step = kTransposed ? 1 : a_stride;
  for (; rows >= kRows; rows -= kRows, a += kRows * row_step, c += kRows * c_stride) {
    MultiplyBlock<Element, kRows, kVectors, kTransposed, kResult>(a, a_stride, b, depth, c,
                                                                  c_stride);
  }
  if constexpr (kRows > 1) {
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows > 2 ? 2 : 1;
    if (rows > 0) {
      MultiplyRows<Element, kNext, kVectors, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                                   c_stride);
    }
  }
}

template <typename Element, bool kTransposed, Result kResult>
__attribute__((noinline)) void MultiplyPanel(const Element* a, int64_t a_stride, int64_t rows,
                                             const Element* b, int64_t depth, int64_t columns,
                                             ComputeType<Element>* c, int64_t c_stride) {
  if (columns > kLanes<ComputeType<Element>>) {
    MultiplyRows<Element, kRowBlock, 2, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                              c_stride);
  } else {
    MultiplyRows<Element, kRowBlock, 1, kTransposed, kResult>(a, a_stride, rows, b, depth, c,
                                                              c_stride);
  }
}

// a and b hold Elements.
template <typename Element, typename Real = ComputeType<Element>>
void Multiply(const Real* a, int64_t a_stride, int64_t rows, const Real* b, int64_t panel_depth,
              int64_t depth, int64_t columns, Real* c, int64_t c_stride, bool accumulate) {
  constexpr int kColumns = kPanelColumns<Real>;
  // As many passes as bring them nearest to that depth, all alike.
  const int64_t passes = (depth + kDepthBlock<Real> / 2) / kDepthBlock<Real>;
  const int64_t pass_depth = passes > 1 ? (depth + passes - 1) / passes : depth;
  for (int64_t begin = 0; begin < depth; begin += pass_depth) {
    const int64_t count = depth - begin < pass_depth ? depth - begin : pass_depth;
    for (int64_t column = 0; column < columns; column += kColumns) {
      const auto* from = reinterpret_cast<const Element*>(a + begin);
      const auto* panel =
          reinterpret_cast<const Element*>(b + column * panel_depth + begin * kColumns);
      if (accumulate || begin > 0) {
        MultiplyPanel<Element, false, Result::kContinue>(from, a_stride, rows, panel, count,
                                                         columns - column, c + column, c_stride);
      } else {
        MultiplyPanel<Element, false, Result::kStore>(from, a_stride, rows, panel, count,
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
