#include "core/cpu/plan.h"

#include <algorithm>
#include <map>

namespace mdcn::cpu {
namespace {

// A run before its position has been numbered.
struct ChannelRun {
  int64_t mask_channel, channel, count, column;
};

// The runs that fill columns [begin, end), in order of columns; absolute columns.
std::vector<ChannelRun> RunsOfColumns(const Geometry& geometry, int64_t begin, int64_t end) {
  std::vector<ChannelRun> runs;
  for (int64_t column = begin; column < end;) {
    const int64_t row = column / geometry.group_in_channels;  // group * K + tap
    const int64_t group = row / geometry.taps, tap = row % geometry.taps;
    const int64_t channel =
        group * geometry.group_in_channels + column % geometry.group_in_channels;
    const int64_t deformable_group = channel / geometry.deformable_group_channels;
    const int64_t count = std::min(
        {(row + 1) * geometry.group_in_channels - column,
         (deformable_group + 1) * geometry.deformable_group_channels - channel, end - column});
    runs.push_back({deformable_group * geometry.taps + tap, channel, count, column});
    column += count;
  }
  return runs;
}

// Numbers the positions in order of mask channels, so that their offsets are read in long spans.
SamplingPlan MakePlan(const Geometry& geometry, const std::vector<ChannelRun>& runs,
                      int64_t first_column) {
  std::map<int64_t, int32_t> positions;  // by mask channel
  for (const ChannelRun& run : runs) positions[run.mask_channel] = 0;
  SamplingPlan plan;
  for (auto& [mask_channel, position] : positions) {
    position = plan.positions++;
    const int64_t tap = mask_channel % geometry.taps;
    plan.tap_y.push_back(
        static_cast<int32_t>(tap / geometry.kernel_width * geometry.dilation_height));
    plan.tap_x.push_back(
        static_cast<int32_t>(tap % geometry.kernel_width * geometry.dilation_width));
    if (!plan.spans.empty() &&
        plan.spans.back().mask_channel + plan.spans.back().count == mask_channel) {
      ++plan.spans.back().count;
    } else {
      plan.spans.push_back({mask_channel, 1});
    }
  }
  for (const ChannelRun& run : runs) {
    plan.runs.push_back(
        {positions[run.mask_channel], run.channel, run.count, run.column - first_column});
    plan.columns += run.count;
  }
  // Where all that a kernel reads is contiguous, whole vectors go over the ends of pixels.
  if (geometry.data_format == DataFormat::kChannelsLast &&
      plan.positions == geometry.deformable_groups * geometry.taps) {
    plan.batch_pixels = static_cast<int>(
        std::clamp<int64_t>(kBatchPositions / plan.positions, 1, geometry.out_width));
  }
  for (int i = plan.positions; i < plan.batch_pixels * plan.positions; ++i) {
    plan.tap_y.push_back(plan.tap_y[i - plan.positions]);
    plan.tap_x.push_back(plan.tap_x[i - plan.positions] +
                         static_cast<int32_t>(geometry.stride_width));
  }
  plan.tap_y.resize(kMaxPositions);
  plan.tap_x.resize(kMaxPositions);
  std::stable_sort(plan.runs.begin(), plan.runs.end(),
                   [](const Run& a, const Run& b) { return a.position < b.position; });
  return plan;
}

}  // namespace

std::vector<SamplingPlan> PlanColumns(const Geometry& geometry, int64_t begin, int64_t end,
                                      int64_t max_columns) {
  std::vector<SamplingPlan> plans;
  const int64_t group_columns = geometry.taps * geometry.group_in_channels;
  for (int64_t first = begin; first < end;) {
    std::vector<ChannelRun> runs =
        RunsOfColumns(geometry, first, std::min(end, first + max_columns));
    std::map<int64_t, bool> seen;
    size_t kept = 0;
    for (; kept < runs.size(); ++kept) {
      seen[runs[kept].mask_channel] = true;
      if (seen.size() > kMaxPositions) break;
    }
    runs.resize(kept);
    SamplingPlan plan = MakePlan(geometry, runs, first);
    for (int64_t column = first; column < first + plan.columns;) {
      const int64_t group = column / group_columns;
      const int64_t piece_end = std::min((group + 1) * group_columns, first + plan.columns);
      plan.pieces.push_back(
          {group, column - first, column - group * group_columns, piece_end - column});
      column = piece_end;
    }
    first += plan.columns;
    plans.push_back(std::move(plan));
  }
  return plans;
}

std::vector<SamplingPlan> PlanPositions(const Geometry& geometry, int64_t channel_begin,
                                        int64_t channel_end) {
  std::map<int64_t, std::vector<ChannelRun>> by_position;
  for (const ChannelRun& run : RunsOfColumns(geometry, 0, ColumnCount(geometry))) {
    const int64_t begin = std::max(run.channel, channel_begin);
    const int64_t end = std::min(run.channel + run.count, channel_end);
    if (begin >= end) continue;
    by_position[run.mask_channel].push_back(
        {run.mask_channel, begin, end - begin, run.column + begin - run.channel});
  }
  std::vector<SamplingPlan> plans;
  std::vector<ChannelRun> runs;
  int positions = 0;
  for (const auto& [mask_channel, position_runs] : by_position) {
    runs.insert(runs.end(), position_runs.begin(), position_runs.end());
    if (++positions == kMaxPositions) {
      plans.push_back(MakePlan(geometry, runs, 0));
      runs.clear();
      positions = 0;
    }
  }
  if (positions > 0) plans.push_back(MakePlan(geometry, runs, 0));
  return plans;
}

}  // namespace mdcn::cpu
