// ONNX Runtime's custom op HyperAttention: its kernels by provider and element type, and the library's entry point.
#include <mutex>

#include "ort_kernel.h"
#include "ort_shapes.h"

namespace ha::ort {
namespace {

// Release 1.18 brought KernelInfoGetAllocator and KernelContext_GetScratchBuffer.
constexpr uint32_t kOldestApi = 18;
uint32_t api_version = 0;

// One kernel of the op. ONNX Runtime merges kernels of one name into one schema: Q, K, V and O take any of their element types,
// and O's type is that of the kernel whose input types match.
struct Op : Ort::CustomOpBase<Op, Kernel, true> {
  using Make = std::unique_ptr<Kernel> (*)(const OrtKernelInfo*, HaDtype);

  Op(const char* provider, ONNXTensorElementDataType type, HaDtype dtype, Make make)
      : provider_(provider), type_(type), dtype_(dtype), make_(make) {
    version = api_version;  // the host refuses a newer one than its own
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

// The newest interface that both this library's headers and the host know; null when the host's is too old.
const OrtApi* negotiate(const OrtApiBase* base) {
  for (api_version = ORT_API_VERSION; api_version >= kOldestApi; --api_version)
    if (const OrtApi* api = base->GetApi(api_version)) return api;
  return nullptr;
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
