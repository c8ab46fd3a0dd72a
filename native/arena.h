// Memory for the weights of one model: taken piece after piece from large regions in huge pages, given back all at once.
//
// Matrices of a few hundred KB would each lie in small pages, whose translations cost a third of the speed at which they are read.
#pragma once
#include <algorithm>
#include <cstddef>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitnet {

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // the sanitizer watches what malloc gave
constexpr bool kMapsMemory = true;
constexpr size_t kHugePage = 2 << 20;   // bytes
constexpr size_t kMapUnit = 64 << 10;   // a multiple of the system's pages, whatever they are

inline size_t whole_pages(size_t bytes) { return (bytes + kMapUnit - 1) / kMapUnit * kMapUnit; }
// Zeroed by the system as it is first touched; from kHugePage on in huge pages, where the system lets them be.
inline void* map_memory(size_t bytes) {
  const size_t length = whole_pages(bytes), spare = bytes >= kHugePage ? kHugePage : 0;
  char* p = static_cast<char*>(mmap(nullptr, length + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (!spare) return p;
  const size_t before = (kHugePage - reinterpret_cast<size_t>(p) % kHugePage) % kHugePage;  // what lies before and after the aligned part goes back
  if (before) munmap(p, before);
  if (before < kHugePage) munmap(p + before + length, kHugePage - before);
  madvise(p + before, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // fewer page walks; where it is refused, nothing is lost
  return p + before;
}
inline void unmap_memory(void* p, size_t bytes) { munmap(p, whole_pages(bytes)); }
#else
constexpr bool kMapsMemory = false;
constexpr size_t kHugePage = 2 << 20;
inline void* map_memory(size_t) { throw std::bad_alloc(); }
inline void unmap_memory(void*, size_t) {}
#endif

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    for (const Region& r : regions_) unmap_memory(r.begin, r.bytes);
  }
  // Zeroed, aligned to a cache line, until the arena goes; null where memory is not mapped.
  void* take(size_t bytes) {
    if (!kMapsMemory) return nullptr;
    const std::lock_guard<std::mutex> alone(mutex_);
    bytes = (bytes + 63) / 64 * 64;
    if (regions_.empty() || regions_.back().bytes - regions_.back().used < bytes) {
      const size_t region = std::max(kRegion, (bytes + kHugePage - 1) / kHugePage * kHugePage);
      regions_.push_back({static_cast<char*>(map_memory(region)), region, 0});
    }
    Region& r = regions_.back();
    return r.begin + (r.used += bytes) - bytes;
  }

 private:
  struct Region {
    char* begin;
    size_t bytes, used;
  };
  static constexpr size_t kRegion = 64 << 20;  // only what is touched counts
  std::mutex mutex_;
  std::vector<Region> regions_;
};

}  // namespace bitnet
