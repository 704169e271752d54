#include "core/cpu/dispatch.h"

#include <cstdlib>

namespace mdcn::cpu {

namespace baseline {
extern const KernelSet kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelSet kKernels;
}
namespace avx512 {
extern const KernelSet kKernels;
}
namespace avx512bf16 {
extern const KernelSet kKernels;
}
#endif

const std::vector<InstructionSet>& AvailableInstructionSets() {
  static const auto* const sets = [] {
    auto* available = new std::vector<InstructionSet>;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512) available->push_back({"avx512", &avx512::kKernels});
#if defined(MDCN_AVX512BF16)  // compiled in
    // Not the best on Intel's: vdpbf16ps takes four times as long as a multiply-add from Sapphire
    // Rapids on (4 micro-operations; libxsmm/tpp-mlir's pull request 1025 found products in
    // bfloat16 to take twice as long as in float32). On AMD's it takes as long as one.
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
      available->insert(__builtin_cpu_is("intel") ? available->end() : available->begin(),
                        {"avx512bf16", &avx512bf16::kKernels});
    }
#endif
    if (has_avx2) available->push_back({"avx2", &avx2::kKernels});
#endif
    available->push_back({"baseline", &baseline::kKernels});
    return available;
  }();
  return *sets;
}

Status FindInstructionSet(const std::string& name, InstructionSet* found) {
  std::string available;
  for (const InstructionSet& set : AvailableInstructionSets()) {
    if (name == set.name) {
      *found = set;
      return Status();
    }
    available += (available.empty() ? "" : ", ") + std::string(set.name);
  }
  return Status::InvalidArgument("tf_mdcn: the instruction set (TF_MDCN_CPU_ISA) must be one of [" +
                                 available + "] on this machine; received " + name);
}

Status ChooseInstructionSet(InstructionSet* chosen) {
  static const auto* const forced = [] {
    const char* name = std::getenv("TF_MDCN_CPU_ISA");
    return new std::string(name == nullptr ? "" : name);
  }();
  if (!forced->empty()) return FindInstructionSet(*forced, chosen);
  *chosen = AvailableInstructionSets().front();
  return Status();
}

}  // namespace mdcn::cpu
