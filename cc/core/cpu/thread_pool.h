// Plain threads, started anew for every run: for programs that bring no thread pool of their own.
#ifndef MDCN_CORE_CPU_THREAD_POOL_H_
#define MDCN_CORE_CPU_THREAD_POOL_H_

#include <functional>
#include <thread>
#include <vector>

#include "core/cpu/worker_pool.h"

namespace mdcn::cpu {

class ThreadPool : public WorkerPool {
 public:
  explicit ThreadPool(int workers) : workers_(workers) {}
  int workers() const override { return workers_; }
  void Run(int count, const std::function<void(int)>& body) override {
    std::vector<std::thread> threads;
    for (int worker = 1; worker < count; ++worker) threads.emplace_back(body, worker);
    if (count > 0) body(0);
    for (std::thread& thread : threads) thread.join();
  }

 private:
  const int workers_;
};

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_THREAD_POOL_H_
