// How the columns of a convolution are cut into pieces for the kernels. "Columns" is the matrix
// that the filters multiply: one row for each output pixel, with the masked samples of all taps and
// channels, ordered [group][tap][channel of the group] (the order of the filters' rows). It never
// exists as a whole; the kernels fill pieces of it, and these plans say which.
#ifndef MDCN_CORE_CPU_PLAN_H_
#define MDCN_CORE_CPU_PLAN_H_

#include <cstdint>
#include <vector>

#include "core/geometry.h"

namespace mdcn::cpu {

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDivide(a, multiple) * multiple; }

// Positions that a kernel computes at a time: what it has room for, and how many it shares between
// pixels side by side. Twice as many made narrow layers 3 to 6% slower.
constexpr int kMaxPositions = 256;
constexpr int kBatchPositions = 128;

// Positions whose mask channels (deformable_group * K + tap) are contiguous.
struct PositionSpan {
  int64_t mask_channel;
  int32_t count;
};

// Contiguous channels that one position samples, and the columns where they go.
struct Run {
  int32_t position;  // index in the plan's positions
  int64_t channel;   // of the input
  int64_t count;
  int64_t column;  // relative to the first column of the plan
};

// A part of the columns that belongs to one group: a depth range of its matrix product.
struct GroupPiece {
  int64_t group;
  int64_t column;  // relative to the first column of the plan
  int64_t depth_begin, depth;
};

// What to sample for each pixel to fill some of its columns.
struct SamplingPlan {
  std::vector<PositionSpan> spans;
  int positions = 0;     // of a pixel
  int batch_pixels = 1;  // side by side, whose positions are computed at a time
  // Of each position of a batch, in input pixels from the corner of the first pixel's kernel; with
  // room for whole vectors.
  std::vector<int32_t> tap_y, tap_x;
  std::vector<Run> runs;  // in order of positions
  std::vector<GroupPiece> pieces;
  int64_t columns = 0;
};

// All columns of a pixel.
inline int64_t ColumnCount(const Geometry& geometry) {
  return geometry.taps * geometry.in_channels;
}

// Cuts columns [begin, end) into plans of at most `max_columns` columns and kMaxPositions
// positions.
std::vector<SamplingPlan> PlanColumns(const Geometry& geometry, int64_t begin, int64_t end,
                                      int64_t max_columns);

// Cuts all positions into plans of at most kMaxPositions, each with all the runs of its positions
// that lie in input channels [channel_begin, channel_end). Columns are relative to the whole row.
std::vector<SamplingPlan> PlanPositions(const Geometry& geometry, int64_t channel_begin,
                                        int64_t channel_end);

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_PLAN_H_
