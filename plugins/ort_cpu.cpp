// The node on the processor: kernels of plugins/cpu on the session's own threads.
#include <thread>

#include "cpu/cpu.h"
#include "ort_kernel.h"

namespace ha::ort {
namespace {

// The session's intra-op threads.
class SessionThreads : public cpu::Workers {
 public:
  explicit SessionThreads(OrtKernelContext* context) : context_(context) {}

  void run(const std::function<void()>& worker) override {
    struct Task {
      const std::function<void()>& worker;
      cpu::FirstFailure failure;
    } task{worker, {}};
    const auto call = [](void* data, size_t) {
      auto& each = *static_cast<Task*>(data);
      each.failure.guard(each.worker);
    };
    // The pool may have fewer threads than that: a worker that comes late finds no unit left.
    const size_t most = std::max(1u, std::thread::hardware_concurrency());
    ok(Ort::GetApi().KernelContext_ParallelFor(context_, call, most, 0, &task));
    task.failure.rethrow();
  }

 private:
  OrtKernelContext* context_;
};

class CpuKernel : public Kernel {
 public:
  using Kernel::Kernel;

 private:
  void forward(HaParams& params, OrtKernelContext* context) const override {
    const size_t bytes = cpu::workspace_size(Geometry(params));
    void* const memory = bytes ? allocator()->Alloc(allocator(), Scratch::padded(bytes)) : nullptr;
    if (bytes && !memory) throw Error(HA_FAILED, "no memory for a workspace of " + std::to_string(bytes) + " bytes");
    const Scratch scratch(allocator(), memory);
    scratch.set(params, bytes);
    cpu::check_forward(params);
    SessionThreads threads(context);
    cpu::forward(params, threads);
  }
};

}  // namespace

std::unique_ptr<Kernel> make_cpu_kernel(const OrtKernelInfo* info, HaDtype dtype) { return std::make_unique<CpuKernel>(info, dtype); }

}  // namespace ha::ort
