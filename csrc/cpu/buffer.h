#pragma once
// Scratch memory of a kernel: aligned for the widest vectors, not initialised unless asked.

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace qk::cpu {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Rounded up to whole cache lines and one more, so that a full vector may be read at the last element.
  explicit Buffer(int64_t count) : bytes_((count * sizeof(T) + 63) / 64 * 64 + 64), data_(allocate(bytes_)) {}

  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  void clear() { std::memset(static_cast<void*>(data_.get()), 0, bytes_); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  static T* allocate(size_t bytes) { return static_cast<T*>(::operator new(bytes, std::align_val_t(64))); }

  size_t bytes_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace qk::cpu
