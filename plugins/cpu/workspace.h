// Hands out aligned pieces of the caller's scratch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ha::cpu {

// Built from a null pointer it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 256;
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace ha::cpu
