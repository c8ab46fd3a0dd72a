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
  uint64_t state = state_.load(std::memory_order_acquire);
  while (uint32_t(state) != 0) {
    if (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    (*work_)(n_items_ - int(uint32_t(state)), thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    state = state_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run(int n_items, const std::function<void(int, int)>& work, bool worth_sharing) {
  if (workers_.empty() || n_items <= 1 || !worth_sharing) {
    for (int i = 0; i < n_items; i++) work(i, 0);
    return;
  }
  work_ = &work;
  n_items_ = n_items;
  unfinished_.store(n_items, std::memory_order_relaxed);
  // The number of the job keeps a compare-exchange that began in an earlier job from succeeding in this one.
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  state_.store(uint64_t{job} << 32 | uint32_t(n_items), std::memory_order_release);
  job_.store(job, std::memory_order_release);
  job_.notify_all();
  take_items(0);
  for (int left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) wait_while_equal(unfinished_, left);
}

void ThreadPool::worker_loop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_while_equal(job_, seen);
    seen = job_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    take_items(thread);
  }
}

}  // namespace bitnet
