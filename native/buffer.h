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
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_), std::swap(size_, o.size_);
    return *this;
  }

  // At least n elements; what was there is lost and zeroed when it has to grow.
  T* reserve(size_t n) {
    if (n > size_) {
      std::free(std::exchange(data_, nullptr));
      size_ = 0;
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
  void allocate(size_t n) {
    const size_t bytes = std::max<size_t>(64, (n * sizeof(T) + 63) / 64 * 64);
    void* p = nullptr;
    if (posix_memalign(&p, bytes >= kHuge ? kHuge : 64, bytes)) throw std::bad_alloc();
    data_ = static_cast<T*>(p);
#if defined(__linux__)
    if (bytes >= kHuge) madvise(p, bytes / kHuge * kHuge, MADV_HUGEPAGE);  // fewer page walks; where it is refused, nothing is lost
#endif
    std::memset(static_cast<void*>(data_), 0, bytes);
    size_ = n;
  }
  static constexpr size_t kHuge = 2 << 20;  // bytes of a huge page
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitnet
