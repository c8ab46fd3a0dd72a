// Memory for weights and activations: aligned to a cache line, zeroed, owned or of an arena, movable; in huge pages where it is large.
#pragma once
#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "arena.h"

namespace bitnet {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  // arena: whose memory it is, which outlives it; null for its own.
  explicit Buffer(size_t n, Arena* arena = nullptr) { allocate(n, arena); }
  ~Buffer() { release(); }
  Buffer(Buffer&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)), owned_(o.owned_) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_), std::swap(size_, o.size_), std::swap(owned_, o.owned_);
    return *this;
  }

  // At least n elements; what was there is lost and zeroed when it has to grow.
  T* reserve(size_t n) {
    if (n > size_) {
      release();
      allocate(n, nullptr);
    }
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  static size_t bytes_of(size_t n) { return std::max<size_t>(64, (n * sizeof(T) + 63) / 64 * 64); }
  // Large memory comes from the system, which zeroes each page as it is first touched: no second pass, and threads share the work.
  static bool mapped(size_t bytes) { return kMapsMemory && bytes >= kMapped; }
  static constexpr size_t kMapped = 256 << 10;
  static constexpr std::align_val_t kLine{64};

  void allocate(size_t n, Arena* arena) {
    const size_t bytes = bytes_of(n);
    void* p = arena ? arena->take(bytes) : nullptr;
    owned_ = !p;
    if (p) {
    } else if (mapped(bytes)) {
      p = map_memory(bytes);
    } else {
      p = ::operator new(bytes, kLine);
      std::memset(p, 0, bytes);
    }
    data_ = static_cast<T*>(p);
    size_ = n;
  }
  void release() {
    if (owned_) {
      if (data_ && mapped(bytes_of(size_))) unmap_memory(data_, bytes_of(size_));
      else ::operator delete(data_, kLine);
    }
    data_ = nullptr;
    size_ = 0;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
  bool owned_ = true;
};

}  // namespace bitnet
