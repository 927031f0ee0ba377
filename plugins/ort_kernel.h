// One HyperAttention node of a session, whatever device it runs on.
#pragma once
#include <memory>

#include "ort_common.h"

namespace ha::ort {

// Holds nothing that changes after construction: a session's runs may overlap, and so may sessions.
class Kernel {
 public:
  Kernel(const OrtKernelInfo* info, HaDtype dtype);
  virtual ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  OrtStatus* ComputeV2(OrtKernelContext* context) noexcept;

 protected:
  OrtAllocator* allocator() const { return allocator_; }

 private:
  // The problem is checked and its tensors are set; scratch, stream and threads are the device's own.
  virtual void forward(HaParams& params, OrtKernelContext* context) const = 0;
  void compute(OrtKernelContext* context) const;

  HaAttributes attributes_;
  HaDtype dtype_;
  OrtAllocator* allocator_ = nullptr;  // of the memory that the node's provider computes in
};

// Scratch of one run, back to the session's allocator at its end.
class Scratch {
 public:
  // Bytes to ask the allocator for so that `set` has `bytes` after aligning.
  static size_t padded(size_t bytes) { return bytes + kAlignment; }

  Scratch(OrtAllocator* allocator, void* memory) : allocator_(allocator), memory_(memory) {}
  ~Scratch() {
    if (memory_) allocator_->Free(allocator_, memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void set(HaParams& params, size_t bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    params.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    params.workspace_size = bytes;
  }

 private:
  static constexpr size_t kAlignment = 256;

  OrtAllocator* allocator_;
  void* memory_;
};

std::unique_ptr<Kernel> make_cpu_kernel(const OrtKernelInfo* info, HaDtype dtype);
std::unique_ptr<Kernel> make_cuda_kernel(const OrtKernelInfo* info, HaDtype dtype);

}  // namespace ha::ort
