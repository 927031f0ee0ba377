// ONNX Runtime's custom op HyperAttention on the CPU: attributes to HaAttributes, shapes checked, kernels of plugins/cpu on
// the session's own threads. Not linked with libonnxruntime: everything goes through the OrtApi that the host hands in.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <array>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#include "config.h"
#include "cpu/cpu.h"

namespace {

using ha::Error;

// Release 1.17 brought InferOutputShapeFn and KernelContext_ParallelFor.
constexpr uint32_t kOldestApi = 17;
uint32_t api_version = 0;

void ok(OrtStatus* status) { Ort::ThrowOnError(status); }

// Runs a function that throws; nothing may pass through ONNX Runtime's C interface.
template <class F>
OrtStatus* guarded(F&& body) noexcept {
  const auto failed = [](OrtErrorCode code, const std::string& text) {
    return Ort::GetApi().CreateStatus(code, ("HyperAttention: " + text).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return failed(error.status == HA_FAILED ? ORT_FAIL : ORT_INVALID_ARGUMENT, error.message);
  } catch (const Ort::Exception& error) {
    return failed(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return failed(ORT_FAIL, error.what());
  }
}

// --- attributes ------------------------------------------------------------------------------------------------------

class NodeAttributes {
 public:
  explicit NodeAttributes(const OrtKernelInfo* info) : info_(info) {}

  HaAttributes parse() const {
    HaAttributes attributes = ha::default_attributes();
    for (const auto& field : ha::kFields) {
      int64_t value = field.fallback;
      if (!read(api_.KernelInfoGetAttribute_int64, field.name, value)) refuse_other_type(field.name, "an integer");
      if (value < field.low || value > field.high) {
        throw Error(HA_INVALID, std::string(field.name) + " is " + std::to_string(value) + "; it takes an integer from " +
                                    std::to_string(field.low) + " to " + std::to_string(field.high));
      }
      attributes.*field.member = int32_t(value);
    }
    if (!read(api_.KernelInfoGetAttribute_float, "scale", attributes.scale)) refuse_other_type("scale", "a float");
    std::string selector;
    if (read_text("selector", selector)) {
      attributes.selector = ha::parse_selector(selector);
    } else {
      refuse_other_type("selector", "a string");
    }
    ha::check_attributes(attributes);
    return attributes;
  }

 private:
  template <class T>
  bool read(OrtStatus*(ORT_API_CALL* get)(const OrtKernelInfo*, const char*, T*) noexcept, const char* name, T& value) const {
    T found;
    const Ort::Status status{get(info_, name, &found)};
    if (status.IsOK()) value = found;
    return status.IsOK();
  }

  bool read_text(const char* name, std::string& value) const {
    size_t size = 0;
    if (!Ort::Status{api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)}.IsOK()) return false;
    value.resize(size);
    ok(api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);  // without the final zero
    return true;
  }

  // ONNX Runtime answers alike for an attribute that is missing and for one of another type: only the first is fine.
  void refuse_other_type(const char* name, const char* wanted) const {
    int64_t integer;
    float number;
    std::string text;
    size_t size = 0;
    const char* found = nullptr;
    // The list query answers for an attribute of any type, so it comes first.
    if (Ort::Status{api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size)}.IsOK()) found = "of another type";
    if (read(api_.KernelInfoGetAttribute_int64, name, integer)) found = "an integer";
    if (read(api_.KernelInfoGetAttribute_float, name, number)) found = "a float";
    if (read_text(name, text)) found = "a string";
    if (found) throw Error(HA_INVALID, std::string(name) + " is " + found + "; it takes " + wanted);
  }

  const OrtApi& api_ = Ort::GetApi();
  const OrtKernelInfo* info_;
};

// --- the kernel ------------------------------------------------------------------------------------------------------

// The session's intra-op threads.
class SessionThreads : public ha::cpu::Workers {
 public:
  explicit SessionThreads(OrtKernelContext* context) : context_(context) {}

  void run(const std::function<void()>& worker) override {
    struct Task {
      const std::function<void()>& worker;
      ha::cpu::FirstFailure failure;
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

std::string text(const std::vector<int64_t>& shape) {
  std::string out;
  for (const int64_t size : shape) out += (out.empty() ? "" : ", ") + std::to_string(size);
  return "(" + out + ")";
}

// Scratch from the session's arena.
class Workspace {
 public:
  Workspace(OrtKernelContext* context, size_t bytes) : allocator_(get_allocator(context)) {
    if (bytes == 0) return;
    memory_ = allocator_->Alloc(allocator_, bytes + kAlignment);
    if (!memory_) throw Error(HA_FAILED, "no memory for a workspace of " + std::to_string(bytes) + " bytes");
  }
  ~Workspace() {
    if (memory_) allocator_->Free(allocator_, memory_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* aligned() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_) + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 256;

  static OrtAllocator* get_allocator(OrtKernelContext* context) {
    const Ort::MemoryInfo cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    OrtAllocator* allocator = nullptr;
    ok(Ort::GetApi().KernelContext_GetAllocator(context, cpu, &allocator));
    return allocator;
  }

  OrtAllocator* allocator_;
  void* memory_ = nullptr;
};

class Kernel {
 public:
  explicit Kernel(const OrtKernelInfo* info) : attributes_(NodeAttributes(info).parse()) {}

  OrtStatus* ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(context); });
  }

 private:
  void compute(OrtKernelContext* raw) const {
    const Ort::KernelContext context(raw);
    const std::array<Ort::ConstValue, 3> input{context.GetInput(0), context.GetInput(1), context.GetInput(2)};
    HaParams params = problem(shape_of(input[0]), shape_of(input[1]), shape_of(input[2]));
    params.q = input[0].GetTensorRawData();
    params.k = input[1].GetTensorRawData();
    params.v = input[2].GetTensorRawData();
    if (context.GetInputCount() > 3) {
      if (const Ort::ConstValue lengths = context.GetInput(3)) {
        const std::vector<int64_t> shape = shape_of(lengths);
        if (shape != std::vector<int64_t>{params.batch}) {
          throw Error(HA_INVALID, "lengths has shape " + text(shape) + "; it takes one length a batch row: " + text({params.batch}));
        }
        params.lengths = lengths.GetTensorData<int32_t>();
      }
    }
    ha::check(params);
    params.out = output(raw, 0, {params.batch, params.heads_q, params.seq_q, params.head_dim_v});
    if (context.GetOutputCount() > 1) {
      params.lse = static_cast<float*>(output(raw, 1, {params.batch, params.heads_q, params.seq_q}));
    }
    params.workspace_size = ha::cpu::workspace_size(ha::Geometry(params));
    const Workspace workspace(raw, params.workspace_size);
    params.workspace = workspace.aligned();
    ha::cpu::check_forward(params);
    SessionThreads threads(raw);
    ha::cpu::forward(params, threads);
  }

  static std::vector<int64_t> shape_of(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

  HaParams problem(const std::vector<int64_t>& q, const std::vector<int64_t>& k, const std::vector<int64_t>& v) const {
    const auto shapes = "Q, K, V have shapes " + text(q) + ", " + text(k) + ", " + text(v);
    if (q.size() != 4 || k.size() != 4 || v.size() != 4) {
      throw Error(HA_INVALID, shapes + "; each takes 4 dimensions: batch, heads, sequence, head size");
    }
    if (q[0] != k[0] || k[0] != v[0] || k[1] != v[1] || k[2] != v[2] || q[3] != k[3]) {
      throw Error(HA_INVALID, shapes + "; they must agree in batch, K and V in heads and sequence, Q and K in head size");
    }
    HaParams params{};
    params.struct_size = sizeof(HaParams);
    params.dtype = HA_FLOAT32;
    params.batch = q[0], params.heads_q = q[1], params.heads_kv = k[1];
    params.seq_q = q[2], params.seq_k = k[2], params.head_dim = q[3], params.head_dim_v = v[3];
    params.attributes = attributes_;
    return params;
  }

  // Null for an optional output that the node leaves out.
  static void* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape) {
    OrtValue* value = nullptr;
    ok(Ort::GetApi().KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    if (value) ok(Ort::GetApi().GetTensorMutableData(value, &data));
    return data;
  }

  HaAttributes attributes_;
};

// --- the op ----------------------------------------------------------------------------------------------------------

// A shape as inference sees it: sizes, -1 where unknown, and names for symbolic dimensions.
struct SymbolicShape {
  std::vector<int64_t> sizes;
  std::vector<const char*> names;

  SymbolicShape(const OrtShapeInferContext* context, size_t input) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    ok(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
    size_t rank = 0;
    ok(api.GetDimensionsCount(info, &rank));
    sizes.resize(rank);
    names.resize(rank, "");
    ok(api.GetDimensions(info, sizes.data(), rank));
    ok(api.GetSymbolicDimensions(info, names.data(), rank));
  }
};

void set_output_shape(OrtShapeInferContext* context, size_t output, const SymbolicShape& shape) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  ok(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info{raw};
  std::vector<const char*> names = shape.names;
  ok(api.SetTensorElementType(raw, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
  ok(api.SetDimensions(raw, shape.sizes.data(), shape.sizes.size()));
  ok(api.SetSymbolicDimensions(raw, names.data(), names.size()));
  ok(api.ShapeInferContext_SetOutputTypeShape(context, output, raw));
}

void infer_shapes(OrtShapeInferContext* context) {
  SymbolicShape shape(context, 0);
  const SymbolicShape v(context, 2);
  if (shape.sizes.size() != 4 || v.sizes.size() != 4) return;  // of unknown rank; a wrong one is refused when the node runs
  shape.sizes[3] = v.sizes[3];
  shape.names[3] = v.names[3];
  set_output_shape(context, 0, shape);
  shape.sizes.pop_back();
  shape.names.pop_back();
  set_output_shape(context, 1, shape);
}

struct Op : Ort::CustomOpBase<Op, Kernel, true> {
  Op() {
    version = api_version;  // the host refuses a newer one than its own
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatus* {
      return guarded([&] { infer_shapes(context); });
    };
  }
  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return guarded([&] { *kernel = new Kernel(info); });
  }
  const char* GetName() const { return "HyperAttention"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index == 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
};

// The newest interface that both this library's headers and the host know; null when the host's is too old.
const OrtApi* negotiate(const OrtApiBase* base) {
  for (api_version = ORT_API_VERSION; api_version >= kOldestApi; --api_version)
    if (const OrtApi* api = base->GetApi(api_version)) return api;
  return nullptr;
}

}  // namespace

extern "C" HA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!Ort::Global<void>::api_) {
    const OrtApi* api = negotiate(base);
    if (!api) {
      const OrtApi* oldest = base->GetApi(1);
      return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, (std::string("HyperAttention: this is ONNX Runtime ") + base->GetVersionString() +
                                                        "; the op takes 1." + std::to_string(kOldestApi) + " or newer")
                                                           .c_str());
    }
    Ort::InitApi(api);
  }
  return guarded([&] {
    // Sessions keep pointers to both, and may end after this library's own destructors: they are never freed.
    static const Op* op = new Op;
    static OrtCustomOpDomain* domain = [] {
      OrtCustomOpDomain* made = nullptr;
      ok(Ort::GetApi().CreateCustomOpDomain("hyperattention", &made));
      ok(Ort::GetApi().CustomOpDomain_Add(made, op));
      return made;
    }();
    ok(Ort::GetApi().AddCustomOpDomain(options, domain));
  });
}
