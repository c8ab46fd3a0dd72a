// One pool of threads. Work is handed out item by item; workers spin for a moment after a job, then sleep.
//
// The caller waits for items, not for workers: a worker that the system has not yet woken holds up nobody, which matters
// wherever other programs use the cores too.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace bitnet {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);  // the caller is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  // Calls work(item, thread) once for every item in [0, n_items), thread in [0, size()), and returns when all are done.
  // What is not worth sharing runs on the caller alone: waking others costs some microseconds.
  void run(int n_items, const std::function<void(int, int)>& work, bool worth_sharing = true);

 private:
  void take_items(int thread);
  void worker_loop(int thread);

  std::vector<std::thread> workers_;
  // Of the current job. A worker reads them only after it has claimed an item, and the job cannot end before that item does.
  const std::function<void(int, int)>* work_ = nullptr;
  int n_items_ = 0;
  std::atomic<uint64_t> state_{0};     // number of the job << 32 | items not yet claimed
  std::atomic<int> unfinished_{0};     // items of the current job
  std::atomic<uint32_t> job_{0};       // what idle workers wait on to change
  std::atomic<bool> stop_{false};
};

}  // namespace bitnet
