// A stable radix sort of (key, value) pairs, least significant digit first, for the deterministic
// input gradient: three launches for each four bits, and the same result in every run. CUB's sort
// was not used because it could be neither run by the emulation (tests/cc/cuda_emulation) nor held
// to the limits that the static resource report checks.
#include "core/cuda/kernels.h"
#include "core/cuda/launch.h"
#include "core/cuda/tuning.h"

namespace mdcn::cuda {
namespace {

constexpr int kWarps = kThreadsPerBlock / kWarpSize;

template <typename Index>
__device__ __forceinline__ int DigitOf(Index key, int shift) {
  return static_cast<int>(key >> shift) & (kSortDigits - 1);
}

// The sum of `value` over the threads before this one; `total` is the sum over the block. Every
// thread must call it, with the same `warp_sums` in shared memory.
template <typename Index>
__device__ __forceinline__ Index SumBefore(Index value, Index (&warp_sums)[kWarps], Index* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Index sum = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Index before = __shfl_up_sync(0xffffffffu, sum, distance, kWarpSize);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  Index warps_before = 0, all_warps = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) warps_before += warp_sums[i];
    all_warps += warp_sums[i];
  }
  __syncthreads();  // the caller may use warp_sums again
  *total = all_warps;
  return warps_before + sum - value;
}

// counts[digit][tile] = how many keys of the tile have the digit.
template <typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    CountDigitsKernel(const Index* __restrict__ keys, Index count, int shift, Index tiles,
                      Index* __restrict__ counts) {
  __shared__ int digit_counts[kSortDigits];
  for (Index tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x < kSortDigits) digit_counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = 0; i < kSortItemsPerThread; ++i) {
      const Index item = tile * kSortTileItems + i * kThreadsPerBlock + Index(threadIdx.x);
      if (item < count) atomicAdd(&digit_counts[DigitOf(keys[item], shift)], 1);
    }
    __syncthreads();
    if (threadIdx.x < kSortDigits) {
      // The same thread clears it for the next tile, after which all wait.
      counts[Index(threadIdx.x) * tiles + tile] = digit_counts[threadIdx.x];
    }
  }
}

// values[i] = values[0] + ... + values[i - 1], by one block.
template <typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    PrefixSumKernel(Index* __restrict__ values, Index count) {
  __shared__ Index warp_sums[kWarps];
  Index before_block = 0;
  for (Index start = 0; start < count; start += kThreadsPerBlock) {
    const Index i = start + Index(threadIdx.x);
    const Index value = i < count ? values[i] : 0;
    Index total;
    const Index sum = before_block + SumBefore(value, warp_sums, &total);
    if (i < count) values[i] = sum;
    before_block += total;
  }
}

// Moves each pair to its place: after all pairs with a smaller digit, and after those with the same
// digit that came before it. starts[digit][tile] is where the tile's first such pair goes.
template <typename Index>
__global__ void __launch_bounds__(kThreadsPerBlock, kMinBlocksPerMultiprocessor)
    MoveByDigitKernel(const Index* __restrict__ keys, const Index* __restrict__ values, Index count,
                      int shift, Index tiles, const Index* __restrict__ starts,
                      Index* __restrict__ sorted_keys, Index* __restrict__ sorted_values) {
  // Each thread ranks a run of neighbouring items, so that order by thread is order by item.
  __shared__ uint16_t ranks[kSortDigits * kThreadsPerBlock];  // [digit][thread]
  __shared__ int digit_starts[kSortDigits];
  __shared__ int warp_sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  for (Index tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Index first = tile * kSortTileItems + thread * kSortItemsPerThread;
    for (int digit = 0; digit < kSortDigits; ++digit) ranks[digit * kThreadsPerBlock + thread] = 0;
    for (int i = 0; i < kSortItemsPerThread && first + i < count; ++i) {
      ++ranks[DigitOf(keys[first + i], shift) * kThreadsPerBlock + thread];
    }
    __syncthreads();
    // The prefix sums over [digit][thread], of which each thread takes kSortDigits in a row.
    uint16_t* const own = &ranks[thread * kSortDigits];
    int own_sum = 0;
    for (int i = 0; i < kSortDigits; ++i) own_sum += own[i];
    int total;
    int sum = SumBefore(own_sum, warp_sums, &total);
    for (int i = 0; i < kSortDigits; ++i) {
      const int value = own[i];
      own[i] = static_cast<uint16_t>(sum);
      sum += value;
    }
    __syncthreads();
    if (thread < kSortDigits) digit_starts[thread] = ranks[thread * kThreadsPerBlock];
    __syncthreads();
    for (int i = 0; i < kSortItemsPerThread && first + i < count; ++i) {
      const Index key = keys[first + i];
      const int digit = DigitOf(key, shift);
      const int rank = ranks[digit * kThreadsPerBlock + thread]++;
      const Index to = starts[digit * tiles + tile] + (rank - digit_starts[digit]);
      sorted_keys[to] = key;
      sorted_values[to] = values[first + i];
    }
    // The next tile begins with this thread's own ranks, and waits before it touches others'.
  }
}

}  // namespace

int64_t SortCountsSize(int64_t count) { return kSortDigits * CeilDivide(count, kSortTileItems); }

template <typename Index>
Status SortPairs(const SortBuffers<Index>& buffers, int64_t count, int key_bits, Stream stream) {
  const Index tiles = static_cast<Index>(CeilDivide(count, kSortTileItems));
  const Index items = static_cast<Index>(count);
  // Two passes at a time, so that the result is where the input was; a digit too many is 0.
  for (int shift = 0; shift < key_bits; shift += 2 * kSortDigitBits) {
    for (int pass = 0; pass < 2; ++pass) {
      const int digit_shift = shift + pass * kSortDigitBits;
      const int from = pass, to = 1 - pass;
      MDCN_RETURN_IF_ERROR(LaunchBlocks("CountDigitsKernel", CountDigitsKernel<Index>, tiles,
                                        stream, buffers.keys[from], items, digit_shift, tiles,
                                        buffers.counts));
      MDCN_RETURN_IF_ERROR(LaunchBlocks("PrefixSumKernel", PrefixSumKernel<Index>, tiles > 0,
                                        stream, buffers.counts, kSortDigits * tiles));
      MDCN_RETURN_IF_ERROR(LaunchBlocks("MoveByDigitKernel", MoveByDigitKernel<Index>, tiles,
                                        stream, buffers.keys[from], buffers.values[from], items,
                                        digit_shift, tiles, buffers.counts, buffers.keys[to],
                                        buffers.values[to]));
    }
  }
  return Status();
}

template Status SortPairs(const SortBuffers<int32_t>&, int64_t, int, Stream);
template Status SortPairs(const SortBuffers<int64_t>&, int64_t, int, Stream);

}  // namespace mdcn::cuda
