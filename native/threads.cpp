#include "threads.h"

#include <exception>

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

// Takes up to `piece` items from one end of a share.
bool take(std::atomic<uint64_t>& share, int piece, bool from_front, int* first, int* end) {
  uint64_t range = share.load(std::memory_order_acquire);
  for (;;) {
    const int b = int(range >> 32), e = int(uint32_t(range));
    if (b >= e) return false;
    const int n = std::min(piece, e - b);
    *first = from_front ? b : e - n, *end = *first + n;
    const uint64_t left = from_front ? uint64_t(b + n) << 32 | uint32_t(e) : uint64_t(b) << 32 | uint32_t(e - n);
    if (share.compare_exchange_weak(range, left, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  }
}
}  // namespace

ThreadPool::ThreadPool(int n_threads) : shares_(n_threads) {
  workers_.reserve(n_threads - 1);
  try {
    for (int t = 1; t < n_threads; t++) workers_.emplace_back([this, t] { worker_loop(t); });
  } catch (const std::exception&) {  // the system gives no more, or no memory for one: those that are here do the work
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_release);
  job_number_.fetch_add(1, std::memory_order_release);
  job_number_.notify_all();
  for (std::thread& w : workers_) w.join();
}

int ThreadPool::work_through(int thread, int piece) {
  int done = 0, first, end;
  for (int i = 0; i < size(); i++)
    while (take(shares_[(thread + i) % size()].range, piece, i == 0, &first, &end)) {
      job_.call(job_.work, first, end, thread);
      done += end - first;
    }
  return done;
}

void ThreadPool::share_out(Job job, int n, int piece) {
  job_ = job;
  piece_.store(piece, std::memory_order_relaxed);
  unfinished_.store(n, std::memory_order_relaxed);
  const int64_t pieces = (n + piece - 1) / piece;
  auto begin = [&](int t) { return uint64_t(std::min<int64_t>(n, pieces * t / size() * piece)); };
  for (int t = 0; t < size(); t++) shares_[t].range.store(begin(t) << 32 | begin(t + 1), std::memory_order_release);
  job_number_.fetch_add(1, std::memory_order_release);
  job_number_.notify_all();
  const int mine = work_through(0, piece);
  int left = unfinished_.fetch_sub(mine, std::memory_order_acq_rel) - mine;
  for (; left != 0; left = unfinished_.load(std::memory_order_acquire)) wait_while_equal(unfinished_, left);
}

void ThreadPool::worker_loop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_while_equal(job_number_, seen);
    seen = job_number_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    const int done = work_through(thread, piece_.load(std::memory_order_relaxed));
    if (done && unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done) unfinished_.notify_one();
  }
}

}  // namespace bitnet
