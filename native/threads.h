// One pool of threads. Work is handed out item by item; workers spin for a moment after a job, then sleep.
#pragma once
#include <atomic>
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
  void run(int n_items, const std::function<void(int, int)>& work);

 private:
  void take_items(int thread);
  void worker_loop(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int, int)>* work_ = nullptr;
  int n_items_ = 0;
  std::atomic<int> next_item_{0};
  std::atomic<int> busy_{0};       // workers that have not finished the current job
  std::atomic<uint32_t> job_{0};   // counts jobs; workers wait for it to change
  std::atomic<bool> stop_{false};
};

}  // namespace bitnet
