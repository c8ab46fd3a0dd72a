#include "threads.h"

namespace bitnet {
namespace {
constexpr int kSpins = 4000;  // some tens of microseconds: longer than the gap between two layers' jobs, shorter than a user notices

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename T>
void wait_while_equal(std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause_cpu();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}
}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (int t = 1; t < n_threads; t++) workers_.emplace_back([this, t] { worker_loop(t); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_release);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& w : workers_) w.join();
}

void ThreadPool::take_items(int thread) {
  for (int i; (i = next_item_.fetch_add(1, std::memory_order_relaxed)) < n_items_;) (*work_)(i, thread);
}

void ThreadPool::run(int n_items, const std::function<void(int, int)>& work) {
  if (workers_.empty() || n_items <= 1) {
    for (int i = 0; i < n_items; i++) work(i, 0);
    return;
  }
  work_ = &work;
  n_items_ = n_items;
  next_item_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  take_items(0);
  for (int left; (left = busy_.load(std::memory_order_acquire)) != 0;) wait_while_equal(busy_, left);
}

void ThreadPool::worker_loop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_while_equal(job_, seen);
    seen++;  // the caller waits for every worker, so no job is missed
    if (stop_.load(std::memory_order_acquire)) return;
    take_items(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace bitnet
