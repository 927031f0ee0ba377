// The node on a GPU: kernels of plugins/cuda on the run's own stream, with scratch from the provider's arena. Built only where
// there is a CUDA compiler; nothing here calls CUDA before a node runs, so the library registers without a driver too.
#include "ort_kernel.h"

namespace ha::ort {
namespace {

void call(int status) {
  if (status != HA_OK) throw Error(HaStatus(status), ha_last_error());
}

class CudaKernel : public Kernel {
 public:
  using Kernel::Kernel;

 private:
  void forward(HaParams& params, OrtKernelContext* context) const override {
    const OrtApi& api = Ort::GetApi();
    size_t bytes = 0;
    call(ha_cuda_workspace_size(&params, &bytes));
    ok(api.KernelContext_GetGPUComputeStream(context, &params.stream));
    // Another stream than the provider's would read Q before it is there.
    if (!params.stream) throw Error(HA_FAILED, "ONNX Runtime gave the node no CUDA stream; use its CUDAExecutionProvider");
    const Scratch scratch(allocator(), bytes ? device_memory(context, Scratch::padded(bytes)) : nullptr);
    scratch.set(params, bytes);
    call(ha_cuda_forward(&params));
  }

  // The launches that use the memory are still queued when it goes back to the arena. That is safe for memory that was
  // allocated on the run's stream: the arena keeps it for that stream until the run has been waited for. Memory from
  // OrtAllocator::Alloc belongs to no stream; a run of this session in another thread, on a stream of its own, could get it
  // while our kernels write it.
  void* device_memory(OrtKernelContext* context, size_t bytes) const {
    const OrtApi& api = Ort::GetApi();
    // The call below is noexcept and ends the process where the arena is full; Alloc throws, and what it frees is found again.
    allocator()->Free(allocator(), allocator()->Alloc(allocator(), bytes));
    void* memory = nullptr;
    ok(api.KernelContext_GetScratchBuffer(context, allocator()->Info(allocator()), bytes, &memory));
    if (!memory) throw Error(HA_FAILED, "no device memory for a workspace of " + std::to_string(bytes) + " bytes");
    return memory;
  }
};

}  // namespace

std::unique_ptr<Kernel> make_cuda_kernel(const OrtKernelInfo* info, HaDtype dtype) { return std::make_unique<CudaKernel>(info, dtype); }

}  // namespace ha::ort
