// Memory for weights and activations: aligned to a cache line, zeroed, owned, movable; in huge pages where it is large.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitnet {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n) { allocate(n); }
  ~Buffer() { release(); }
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_), std::swap(size_, o.size_);
    return *this;
  }

  // At least n elements; what was there is lost and zeroed when it has to grow.
  T* reserve(size_t n) {
    if (n > size_) {
      release();
      allocate(n);
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHuge = 2 << 20;  // bytes of a huge page
  static size_t bytes_of(size_t n) { return std::max<size_t>(64, (n * sizeof(T) + 63) / 64 * 64); }

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // the sanitizer watches what malloc gave
  // Large memory comes from the system, which zeroes each page as it is first touched: no second pass, and threads share the work.
  static bool mapped(size_t bytes) { return bytes >= kMapped; }
  static void* map(size_t bytes) {
    const size_t length = whole_pages(bytes), spare = bytes >= kHuge ? kHuge : 0;
    char* p = static_cast<char*>(mmap(nullptr, length + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED) throw std::bad_alloc();
    if (!spare) return p;
    const size_t before = (kHuge - reinterpret_cast<size_t>(p) % kHuge) % kHuge;  // what lies before and after the aligned part goes back
    if (before) munmap(p, before);
    if (before < kHuge) munmap(p + before + length, kHuge - before);
    madvise(p + before, bytes / kHuge * kHuge, MADV_HUGEPAGE);  // fewer page walks; where it is refused, nothing is lost
    return p + before;
  }
  static void unmap(void* p, size_t bytes) { munmap(p, whole_pages(bytes)); }
  static size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
  static constexpr size_t kMapped = 256 << 10;
  static constexpr size_t kPage = 64 << 10;  // a multiple of the system's pages, whatever they are
#else
  static bool mapped(size_t) { return false; }
  static void* map(size_t) { return nullptr; }
  static void unmap(void*, size_t) {}
#endif

  void allocate(size_t n) {
    const size_t bytes = bytes_of(n);
    void* p = nullptr;
    if (mapped(bytes)) {
      p = map(bytes);
    } else {
      if (posix_memalign(&p, 64, bytes)) throw std::bad_alloc();
      std::memset(p, 0, bytes);
    }
    data_ = static_cast<T*>(p);
    size_ = n;
  }
  void release() {
    if (data_ && mapped(bytes_of(size_))) unmap(data_, bytes_of(size_));
    else std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitnet
