// One pool of threads. Work is handed out item by item; workers spin for a moment after a job, then sleep.
//
// The caller waits for items, not for workers: a worker that the system has not yet woken holds up nobody, which matters
// wherever other programs use the cores too.
#pragma once
#include <algorithm>
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
  // Calls work(first, end, thread) until [0, n) is done, in pieces of up to `piece`. Every thread has a share that it works through from
  // its beginning, as one stream of memory; who is done takes pieces from the end of another's.
  void run_ranges(int n, int piece, const std::function<void(int, int, int)>& work, bool worth_sharing = true);
  // Where in [0, n) a thread's share of run_ranges begins; shares are multiples of `piece` but for the last.
  int share_begin(int n, int piece, int thread) const {
    const int64_t pieces = (n + piece - 1) / piece;
    return int(std::min<int64_t>(n, pieces * thread / size() * piece));
  }

 private:
  void take_items(int thread);
  void worker_loop(int thread);

  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};  // begin << 32 | end of what nobody has taken yet
  };
  bool take_piece(Share& share, int piece, bool from_front, int* first, int* end);

  std::vector<Share> shares_;  // one per thread
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
