// The layout of one block of scratch memory: planned first, allocated by the caller, then
// addressed.
#ifndef MDCN_CORE_CPU_WORKSPACE_H_
#define MDCN_CORE_CPU_WORKSPACE_H_

#include <cstdint>

namespace mdcn::cpu {

constexpr int64_t kWorkspaceAlignmentBytes = 64;

// `copies` arrays of `count` elements, each aligned to a cache line.
template <typename Element>
struct Region {
  int64_t begin_bytes = 0, stride_bytes = 0;

  Element* In(char* workspace, int copy = 0) const {
    return reinterpret_cast<Element*>(workspace + begin_bytes + copy * stride_bytes);
  }
};

class WorkspaceLayout {
 public:
  template <typename Element>
  Region<Element> Add(int64_t count, int copies = 1) {
    const int64_t size_bytes = count * static_cast<int64_t>(sizeof(Element));
    const int64_t stride_bytes = (size_bytes + kWorkspaceAlignmentBytes - 1) /
                                 kWorkspaceAlignmentBytes * kWorkspaceAlignmentBytes;
    const Region<Element> region{bytes_, stride_bytes};
    bytes_ += stride_bytes * copies;
    return region;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_WORKSPACE_H_
