// Memory for weights and activations: aligned to a cache line, zeroed, owned, movable.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

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
  void reserve(size_t n) {
    if (n > size_) {
      std::free(std::exchange(data_, nullptr));
      size_ = 0;
      allocate(n);
    }
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  void allocate(size_t n) {
    size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
    size_ = n;
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bitnet
