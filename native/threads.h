// One pool of threads. Work is a range of items: every thread has a share that it works through from its beginning, in pieces, as one
// stream of memory; who is done takes pieces from the end of another's. Workers spin for a moment after a job, then sleep.
//
// The caller waits for items, not for workers: a worker that the system has not yet woken holds up nobody, which matters
// wherever other programs use the cores too.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace bitnet {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);  // the caller is one of them; fewer where the system gives no more
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(first, end, thread) on pieces of up to `piece` items until [0, n) is done; thread in [0, size()).
  // What is not worth sharing runs on the caller alone, as one piece: waking others costs about a microsecond.
  template <typename Work>
  void run_ranges(int n, int piece, Work&& work, bool worth_sharing = true) {
    if (n <= 0) return;
    if (workers_.empty() || n <= piece || !worth_sharing) return work(0, n, 0);
    share_out({[](void* w, int first, int end, int thread) { (*static_cast<std::remove_reference_t<Work>*>(w))(first, end, thread); },
               const_cast<void*>(static_cast<const void*>(&work))}, n, piece);
  }
  // Calls work(item, thread) once for every item in [0, n).
  template <typename Work>
  void run(int n, Work&& work, bool worth_sharing = true) {
    run_ranges(n, 1, [&](int first, int end, int thread) {
      for (int i = first; i < end; i++) work(i, thread);
    }, worth_sharing);
  }

 private:
  struct Job {
    void (*call)(void* work, int first, int end, int thread);
    void* work;
  };
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};  // begin << 32 | end of what nobody has taken yet
  };
  void share_out(Job job, int n, int piece);
  int work_through(int thread, int piece);  // returns how many items it did
  void worker_loop(int thread);

  std::vector<Share> shares_;  // one per thread
  std::vector<std::thread> workers_;
  // job_ and piece_ are read only after a piece of the job was taken, which keeps the job from ending before that piece does. Whoever
  // takes a piece by an old view of the shares has taken one of the present job all the same.
  alignas(64) Job job_{};
  std::atomic<int> piece_{1};
  std::atomic<uint32_t> job_number_{0};       // what idle workers wait on to change
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int> unfinished_{0};  // items of the present job
};

}  // namespace bitnet
