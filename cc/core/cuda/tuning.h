// Every number that was chosen for speed on the GPU rather than for correctness: block and grid
// sizes, lanes, chunk sizes. Pure functions of sizes, so that tests can ask them without a GPU.
#ifndef MDCN_CORE_CUDA_TUNING_H_
#define MDCN_CORE_CUDA_TUNING_H_

#include <algorithm>
#include <cstdint>

#include "core/geometry.h"

namespace mdcn::cuda {

// 256 threads divide every multiprocessor's thread limit (1024, 1536, 2048). Launch bounds of 4
// blocks let the compiler use 64 registers and keep at least half of the threads resident on all
// architectures.
constexpr int kThreadsPerBlock = 256;
constexpr int kMinBlocksPerMultiprocessor = 4;
constexpr int kWarpSize = 32;

// One vector access of a thread; also the alignment that it needs.
constexpr int kVectorBytes = 16;

// The columns of a chunk are written by one kernel and read by the next, so they should stay in L2:
// 40 MB on an A100, 50 on an H100, 72 on an RTX 4090. Smaller caches (6 MB on a V100) gain nothing
// from smaller chunks that the matrix product does not lose to fewer rows: 32 MiB are 3640 pixels
// of 3x3 taps and 256 float32 channels, about one wave of 128 x 128 tiles for 256 outputs.
constexpr int64_t kDefaultChunkBytes = int64_t{32} << 20;

// The radix sort of the deterministic path: items that a block ranks at a time, and its digit. Four
// bits are the most for which a counter per digit and thread fits (8 KiB) without costing
// occupancy.
constexpr int kSortItemsPerThread = 8;
constexpr int kSortTileItems = kThreadsPerBlock * kSortItemsPerThread;
constexpr int kSortDigitBits = 4;
constexpr int kSortDigits = 1 << kSortDigitBits;

// Partial sums of the bias gradient for each channel: with a hundred channels they fill a GPU.
constexpr int64_t kBiasSlices = 512;

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks as are resident at once; grid-stride loops do the rest. More would only be queued.
inline int64_t GridBlocks(int64_t wanted_blocks, int multiprocessors, int resident_blocks) {
  const int64_t wave = static_cast<int64_t>(multiprocessors) * std::max(resident_blocks, 1);
  return std::min(wanted_blocks, wave);
}

// The power of two of lanes (log2) that share one site's channels when each access covers `width`
// elements: enough for one 128-byte line, the unit of coalescing, not more than the channels need.
// Fewer lanes mean that each computes the position, some hundred instructions, for more channels.
inline int LaneBits(int64_t channels, int width, int element_bytes) {
  int bits = 0;
  const auto lanes = [&] { return int64_t{1} << bits; };
  while (lanes() < kWarpSize && lanes() * width < channels && lanes() * width * element_bytes < 128)
    ++bits;
  return bits;
}

// How output rows are cut: `images` whole images at a time, or, where one image does not fit, some
// `rows` of one. How one image is cut does not depend on the batch it is in.
struct ChunkSize {
  int64_t images, rows;
};

// The most rows whose scratch (`row_bytes` each) fits `chunk_bytes`, one at the least; evened out,
// so that the last chunk is not a sliver.
inline ChunkSize ChooseChunkSize(const Geometry& geometry, int64_t row_bytes, int64_t chunk_bytes) {
  const int64_t fitting = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, row_bytes));
  const auto even = [](int64_t total, int64_t most) {
    return total <= most ? total : CeilDivide(total, CeilDivide(total, most));
  };
  if (fitting < geometry.out_height) return {1, even(geometry.out_height, fitting)};
  return {even(geometry.batch, fitting / geometry.out_height), geometry.out_height};
}

}  // namespace mdcn::cuda

#endif  // MDCN_CORE_CUDA_TUNING_H_
