// Runs emulated CUDA kernels: each block on a host thread, each thread of a block as a fiber of
// that host thread, switched only where the kernel synchronises. ThreadSanitizer is told that every
// fiber is a thread of its own and that only synchronisation orders them, so it sees every race
// that the schedule of the moment hides. This file itself must be compiled without
// -fsanitize=thread (define CUDA_EMULATION_TSAN instead), or its bookkeeping would be taken for the
// kernels'.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

#ifdef CUDA_EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {
namespace {

// The sanitizers' interfaces, or nothing.
#ifdef CUDA_EMULATION_TSAN
void* NewTsanFiber() { return __tsan_create_fiber(0); }
void* CurrentTsanFiber() { return __tsan_get_current_fiber(); }
void SwitchTsanFiber(void* fiber) { __tsan_switch_to_fiber(fiber, /*no sync*/ 1); }
void Acquire(void* what) { __tsan_acquire(what); }
void Release(void* what) { __tsan_release(what); }
#else
void* NewTsanFiber() { return nullptr; }
void* CurrentTsanFiber() { return nullptr; }
void SwitchTsanFiber(void*) {}
void Acquire(void*) {}
void Release(void*) {}
#endif
#ifdef __SANITIZE_ADDRESS__
void StartSwitch(void** save, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(save, stack, bytes);
}
void FinishSwitch(void* saved, const void** stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
}
#else
void StartSwitch(void**, const void*, size_t) {}
void FinishSwitch(void*, const void**, size_t*) {}
#endif

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;  // address space; only what is touched is memory

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "CUDA emulation: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

enum class State { kReady, kAtBarrier, kInExchange, kDone };

// Fibers live as long as the program and run launch after launch, so that their stacks keep one
// place in memory and cost is low.
struct Fiber {
  void* stack = nullptr;
  jmp_buf jump;  // where it is, once it has been left
  bool started = false;
  void* tsan = nullptr;
  void* asan = nullptr;
  State state = State::kReady;
  // An exchange that this lane takes part in.
  unsigned members = 0;
  uint64_t value = 0, received = 0;
  int source_lane = 0;
};

Device device;
unsigned schedule = 0;
cudaStream_t expected_stream = nullptr;
int fail_after = -1;
cudaError_t failure = cudaSuccess;
int64_t launches = 0;
int done_tag;  // what every thread of a launch releases at its end

// One block of a launch.
class Block {
 public:
  explicit Block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_[i]->tsan = NewTsanFiber();
      fibers_[i]->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fibers_[i]->stack == MAP_FAILED) Die("no memory for a stack");
    }
  }

  void Run(const cudaLaunchConfig_t& config, unsigned index, const std::function<void()>& thread) {
    current_block_ = this;
    thread_ = &thread;
    gridDim = {config.gridDim.x, 1, 1};
    blockDim = {config.blockDim.x, 1, 1};
    blockIdx = {index, 0, 0};
    host_tsan_ = CurrentTsanFiber();
    std::vector<unsigned> order(config.blockDim.x);
    std::iota(order.begin(), order.end(), 0u);
    if (schedule != 0) std::shuffle(order.begin(), order.end(), std::mt19937(schedule + index));
    for (unsigned i : order) fibers_[i]->state = State::kReady;
    Release(&start_tag_);
    unsigned done = 0;
    while (done < order.size()) {
      bool progress = false;
      for (unsigned i : order) {
        if (fibers_[i]->state != State::kReady) continue;
        Resume(i);
        progress = true;
        if (fibers_[i]->state == State::kDone) ++done;
      }
      if (!progress) Die("deadlock: some threads wait for others that do not come");
    }
  }

  void SynchronizeBlock() {
    void* const tag = &barrier_tags_[barrier_count_ % 2];
    Release(tag);
    current_->state = State::kAtBarrier;
    const bool last = std::all_of(fibers_.begin(), fibers_.begin() + blockDim.x,
                                  [](const auto& f) { return f->state == State::kAtBarrier; });
    if (last) {
      for (unsigned i = 0; i < blockDim.x; ++i) fibers_[i]->state = State::kReady;
      ++barrier_count_;
    } else {
      Yield();
    }
    Acquire(tag);
  }

  // No memory is ordered by this, as none is by __shfl_sync.
  uint64_t ExchangeLanes(unsigned members, uint64_t value, int source_lane) {
    const unsigned warp = threadIdx.x / kWarpSize * kWarpSize;
    Fiber* const own = current_;
    if (!(members >> OwnLane() & 1)) Die("a shuffle does not name the lane that calls it");
    if (!(members >> source_lane & 1)) Die("a shuffle reads from a lane that it does not name");
    own->state = State::kInExchange;
    own->members = members;
    own->value = value;
    own->source_lane = source_lane;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(members >> lane & 1)) continue;
      const Fiber& other = *fibers_[warp + lane];
      if (other.state != State::kInExchange || other.members != members) {
        Yield();
        return own->received;
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(members >> lane & 1)) continue;
      Fiber* const fiber = fibers_[warp + lane].get();
      fiber->received = fibers_[warp + fiber->source_lane]->value;
      fiber->state = State::kReady;
    }
    return own->received;
  }

  __attribute__((noinline)) static Block* Current() { return current_block_; }

 private:
  // The life of a fiber: one thread of this block in every launch. It may wake on another host
  // thread each time, so it keeps to its own variables and asks for nothing thread_local.
  static void Enter() {
    Block* const block = Current();
    FinishSwitch(nullptr, &block->host_stack_, &block->host_stack_bytes_);
    for (;;) {
      Acquire(&block->start_tag_);
      (*block->thread_)();
      Release(&done_tag);
      block->current_->state = State::kDone;
      block->Yield();
    }
  }

  void Resume(unsigned index) {
    current_ = fibers_[index].get();
    threadIdx = {index, 0, 0};
    StartSwitch(&host_asan_, current_->stack, kStackBytes);
    if (_setjmp(host_jump_) == 0) {
      SwitchTsanFiber(current_->tsan);
      if (current_->started) _longjmp(current_->jump, 1);
      current_->started = true;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = current_->stack;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, &Block::Enter, 0);
      setcontext(&context);
    }
    FinishSwitch(host_asan_, nullptr, nullptr);
  }

  void Yield() {
    Fiber* const own = current_;
    StartSwitch(&own->asan, host_stack_, host_stack_bytes_);
    if (_setjmp(own->jump) == 0) {
      SwitchTsanFiber(host_tsan_);
      _longjmp(host_jump_, 1);
    }
    FinishSwitch(own->asan, &host_stack_, &host_stack_bytes_);
  }

  static thread_local Block* current_block_;

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* thread_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf host_jump_;
  void* host_tsan_ = nullptr;
  void* host_asan_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
  int start_tag_, barrier_tags_[2];  // known to ThreadSanitizer by their addresses
  unsigned barrier_count_ = 0;
};

thread_local Block* Block::current_block_ = nullptr;

}  // namespace

void SetDevice(const Device& new_device) { device = new_device; }
int ResidentBlocks() { return device.resident_blocks; }
void SetSchedule(unsigned seed) { schedule = seed; }
void SetStream(cudaStream_t stream) { expected_stream = stream; }
void FailAfter(int after_launches, cudaError_t error) {
  fail_after = after_launches;
  failure = error;
}
int64_t LaunchCount() { return launches; }

cudaError_t Launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::vector<std::unique_ptr<Block>> blocks;
  if (config.stream != expected_stream) return cudaErrorInvalidResourceHandle;
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024) {
    return cudaErrorInvalidValue;
  }
  if (fail_after-- == 0) return failure;
  ++launches;
  while (blocks.size() < config.gridDim.x) {
    blocks.push_back(std::make_unique<Block>(config.blockDim.x));
  }
  // All are started before any is joined, so that no block comes after another.
  std::vector<std::thread> hosts;
  for (unsigned i = 0; i < config.gridDim.x; ++i) {
    hosts.emplace_back([&, i] { blocks[i]->Run(config, i, thread); });
  }
  for (std::thread& host : hosts) host.join();
  Acquire(&done_tag);
  return cudaSuccess;
}

void SynchronizeBlock() { Block::Current()->SynchronizeBlock(); }
uint64_t ExchangeLanes(unsigned members, uint64_t value, int source_lane) {
  return Block::Current()->ExchangeLanes(members, value, source_lane);
}
int OwnLane() { return static_cast<int>(threadIdx.x % kWarpSize); }

}  // namespace cuda_emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* current) {
  *current = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::device.multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t stream) {
  if (stream != cuda_emulation::expected_stream) return cudaErrorInvalidResourceHandle;
  std::memset(data, byte, bytes);
  return cudaSuccess;
}
