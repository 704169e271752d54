// What the drivers ask of a thread pool: TensorFlow's intra-op threads, XLA's, or plain
// std::threads.
#ifndef MDCN_CORE_CPU_WORKER_POOL_H_
#define MDCN_CORE_CPU_WORKER_POOL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace mdcn::cpu {

class WorkerPool {
 public:
  virtual ~WorkerPool() = default;

  // How many workers may run at a time, the calling thread included.
  virtual int workers() const = 0;

  // Runs body(worker) for every worker in [0, count), and returns when all are done. They may run
  // one after the other.
  virtual void Run(int count, const std::function<void(int worker)>& body) = 0;

  // Runs body(job, worker) for every job in [0, jobs); a worker takes the next job when it is done
  // with one. No two jobs run on the same worker at a time.
  void RunJobs(int64_t jobs, const std::function<void(int64_t job, int worker)>& body) {
    std::atomic<int64_t> next{0};
    const int count = static_cast<int>(std::min<int64_t>(jobs, workers()));
    Run(count, [&](int worker) {
      for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
        body(job, worker);
      }
    });
  }
};

}  // namespace mdcn::cpu

#endif  // MDCN_CORE_CPU_WORKER_POOL_H_
