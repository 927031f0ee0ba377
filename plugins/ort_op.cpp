// ONNX Runtime's custom op HyperAttention: its kernels by provider and element type, and the library's entry point.
#include <algorithm>
#include <cstdio>
#include <mutex>

#include "ort_kernel.h"
#include "ort_shapes.h"

namespace ha::ort {
namespace {

// Release 1.18 brought KernelInfoGetAllocator and KernelContext_GetScratchBuffer.
constexpr uint32_t kOldestApi = 18;
// Before release 1.24 ONNX Runtime ends the process when it readies shape inference of a custom op for a node whose optional
// input has an empty name; there the op goes without, and shapes are those that the file declares.
constexpr unsigned kSafeInference = 24;

struct Host {
  uint32_t api_version = 0;
  bool infers_shapes = false;
};
Host host;  // set once, before the first op is made

// One kernel of the op. ONNX Runtime merges kernels of one name into one schema: Q, K, V and O take any of their element types,
// and O's type is that of the kernel whose input types match.
struct Op : Ort::CustomOpBase<Op, Kernel, true> {
  using Make = std::unique_ptr<Kernel> (*)(const OrtKernelInfo*, HaDtype);

  Op(const char* provider, ONNXTensorElementDataType type, HaDtype dtype, Make make)
      : provider_(provider), type_(type), dtype_(dtype), make_(make) {
    version = host.api_version;  // ONNX Runtime refuses a newer one than its own
    if (!host.infers_shapes) return;
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatus* {
      return guarded([&] { infer_shapes(context); });
    };
  }
  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return guarded([&] { *kernel = make_(info, dtype_).release(); });
  }
  const char* GetName() const { return "HyperAttention"; }
  const char* GetExecutionProviderType() const { return provider_; }
  size_t GetInputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetInputType(size_t index) const { return index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : type_; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type_; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index == 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

 private:
  const char* provider_;
  ONNXTensorElementDataType type_;
  HaDtype dtype_;
  Make make_;
};

// Sessions keep pointers to the domain and its ops, and may end after this library's own destructors: they are never freed.
OrtCustomOpDomain* make_domain() {
  OrtCustomOpDomain* domain = nullptr;
  ok(Ort::GetApi().CreateCustomOpDomain("hyperattention", &domain));
  const auto add = [&](const char* provider, ONNXTensorElementDataType type, HaDtype dtype, Op::Make make) {
    ok(Ort::GetApi().CustomOpDomain_Add(domain, new Op(provider, type, dtype, make)));
  };
  add("CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, HA_FLOAT32, make_cpu_kernel);
#ifdef HA_WITH_CUDA
  add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, HA_FLOAT32, make_cuda_kernel);
  add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, HA_FLOAT16, make_cuda_kernel);
  add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, HA_BFLOAT16, make_cuda_kernel);
#endif
  return domain;
}

// The newest interface that both this library's headers and the host know; null when the host's is too old. Release 1.x has
// interface x; asking for a newer one would print a complaint.
const OrtApi* negotiate(const OrtApiBase* base) {
  unsigned major = 0, minor = 0;
  std::sscanf(base->GetVersionString(), "%u.%u", &major, &minor);
  host.infers_shapes = major > 1 || minor >= kSafeInference;
  host.api_version = major > 1 ? ORT_API_VERSION : std::min<uint32_t>(ORT_API_VERSION, minor);
  return host.api_version < kOldestApi ? nullptr : base->GetApi(host.api_version);
}

OrtStatus* refuse(const OrtApiBase* base) {
  const std::string text = std::string("HyperAttention: this is ONNX Runtime ") + base->GetVersionString() + "; the op takes 1." +
                           std::to_string(kOldestApi) + " or newer";
  return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
}

}  // namespace
}  // namespace ha::ort

extern "C" HA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace ha::ort;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!Ort::Global<void>::api_) {
    const OrtApi* api = negotiate(base);
    if (!api) return refuse(base);
    Ort::InitApi(api);
  }
  return guarded([&] {
    static OrtCustomOpDomain* const domain = make_domain();
    ok(Ort::GetApi().AddCustomOpDomain(options, domain));
  });
}
