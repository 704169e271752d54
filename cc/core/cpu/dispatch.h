// The one place that chooses the instruction set, once, and can say what it chose.
#ifndef MDCN_CORE_CPU_DISPATCH_H_
#define MDCN_CORE_CPU_DISPATCH_H_

#include <string>
#include <vector>

#include "core/cpu/kernel_table.h"
#include "core/status.h"

namespace mdcn::cpu {

struct InstructionSet {
  const char* name;  // "baseline", "avx2", "avx512", "avx512bf16"
  const KernelSet* kernels;
};

// Compiled in and run by this machine, best first. "baseline" is always the last.
const std::vector<InstructionSet>& AvailableInstructionSets();

// The best available one, or the one that the environment variable TF_MDCN_CPU_ISA names. Chosen at
// the first call; an unavailable name is an error at every call, never replaced by another set.
Status ChooseInstructionSet(InstructionSet* chosen);

// The available set of that name.
Status FindInstructionSet(const std::string& name, InstructionSet* found);

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_DISPATCH_H_
