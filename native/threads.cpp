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

ThreadPool::ThreadPool(int n_threads) : shares_(n_threads) {
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

bool ThreadPool::take_piece(Share& share, int piece, bool from_front, int* first, int* end) {
  uint64_t range = share.range.load(std::memory_order_relaxed);
  for (;;) {
    const int b = int(range >> 32), e = int(uint32_t(range));
    if (b >= e) return false;
    const int n = std::min(piece, e - b);
    *first = from_front ? b : e - n, *end = from_front ? b + n : e;
    const uint64_t left = from_front ? uint64_t(b + n) << 32 | uint32_t(e) : uint64_t(b) << 32 | uint32_t(e - n);
    if (share.range.compare_exchange_weak(range, left, std::memory_order_relaxed)) return true;
  }
}

void ThreadPool::run_ranges(int n, int piece, const std::function<void(int, int, int)>& work, bool worth_sharing) {
  if (workers_.empty() || n <= piece || !worth_sharing) return work(0, n, 0);
  for (int t = 0; t < size(); t++)
    shares_[t].range.store(uint64_t(share_begin(n, piece, t)) << 32 | uint32_t(share_begin(n, piece, t + 1)), std::memory_order_relaxed);
  run(size(), [&](int, int thread) {
    int first, end;
    for (int i = 0; i < size(); i++)
      while (take_piece(shares_[(thread + i) % size()], piece, i == 0, &first, &end)) work(first, end, thread);
  });
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
