// TensorRT's view of the operator: IPluginV3 "HyperAttention", version "1", namespace "hyperattention".
//
// Inputs Q, K, V (float16, bfloat16 or float32, linear) and optionally lengths (int32 [batch]); outputs O and, with the field
// with_lse, LSE (float32). Every method that TensorRT calls is a noexcept shell that logs the reason and returns an error status.
#include "trt_plugin.h"

#include <algorithm>

#include "geometry.h"
#include "trt_fields.h"
#include "trt_log.h"

namespace ha::trt {
namespace {
using namespace nvinfer1;

constexpr char kName[] = "HyperAttention";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "hyperattention";
constexpr int32_t kLengths = 3;  // index of the optional input

[[noreturn]] void fail(const std::string& message) { throw Error(HA_INVALID, message); }

std::string shape_text(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

void check_counts(const Fields& fields, int32_t inputs, int32_t outputs) {
  if (inputs != kLengths && inputs != kLengths + 1)
    fail("it has " + std::to_string(inputs) + " inputs; it takes Q, K, V and optionally lengths");
  if (outputs != 1 + fields.with_lse)
    fail("it has " + std::to_string(outputs) + " outputs; with_lse = " + std::to_string(fields.with_lse) + " gives " +
         std::to_string(1 + fields.with_lse));
}

int32_t dtype_of(DataType type) {
  if (type == DataType::kFLOAT) return HA_FLOAT32;
  if (type == DataType::kHALF) return HA_FLOAT16;
  if (type == DataType::kBF16) return HA_BFLOAT16;
  throw Error(HA_UNSUPPORTED, "Q, K, V have TensorRT data type " + std::to_string(static_cast<int32_t>(type)) +
                                  "; the kernels take float32 (0), float16 (1) or bfloat16 (7): export with --dtype fp32, fp16 or bf16");
}

// The problem that the shapes pose, checked; without tensors. `lengths` is null where the node has none.
HaParams problem(const Fields& fields, DataType type, const Dims& q, const Dims& k, const Dims& v, const Dims* lengths) {
  const std::string shapes = "Q " + shape_text(q) + ", K " + shape_text(k) + ", V " + shape_text(v);
  if (q.nbDims != 4 || k.nbDims != 4 || v.nbDims != 4) fail(shapes + ": each takes 4 dimensions: batch, heads, sequence, head size");
  if (k.d[0] != q.d[0] || v.d[0] != q.d[0]) fail(shapes + ": the batch sizes must be equal");
  if (k.d[3] != q.d[3]) fail(shapes + ": Q and K must have one head size");
  if (v.d[1] != k.d[1] || v.d[2] != k.d[2]) fail(shapes + ": K and V must have the same heads and the same keys");
  if (lengths && (lengths->nbDims != 1 || lengths->d[0] != q.d[0]))
    fail("lengths " + shape_text(*lengths) + " beside " + shapes + ": it takes one length a batch row, [" + std::to_string(q.d[0]) + "]");
  HaParams params{};
  params.struct_size = sizeof(HaParams);
  params.dtype = dtype_of(type);
  params.batch = q.d[0], params.heads_q = q.d[1], params.seq_q = q.d[2], params.head_dim = q.d[3];
  params.heads_kv = k.d[1], params.seq_k = k.d[2], params.head_dim_v = v.d[3];
  params.attributes = fields.attributes;
  check(params);
  return params;
}

// The hash of the sources, out of ha_build_info.
std::string build_id() {
  constexpr char key[] = "\"build_id\": \"";
  const std::string info = ha_build_info();
  const size_t at = info.find(key) + sizeof(key) - 1;
  return info.substr(at, info.find('"', at) - at);
}

size_t workspace_of(const HaParams& params) {
  size_t bytes = 0;
  if (const int status = ha_cuda_workspace_size(&params, &bytes)) throw Error(static_cast<HaStatus>(status), ha_last_error());
  return bytes;
}

// Scratch for every problem up to `largest`. The kernels' need grows with the shape along each path, so beside the largest
// shape count: the largest with few queries and with few keys, which take the exact path (rule 5); and one tile more of
// each, because tiles are cut in position (rule 1) and fewer rows can touch one tile more when they begin inside one.
size_t workspace_up_to(const HaParams& largest) {
  size_t bytes = workspace_of(largest);
  const auto also = [&](int64_t seq_q, int64_t seq_k) {
    HaParams params = largest;
    params.seq_q = seq_q, params.seq_k = seq_k;
    bytes = std::max(bytes, workspace_of(params));
  };
  also(std::min<int64_t>(largest.seq_q, kDecodeRows), largest.seq_k);
  also(largest.seq_q, std::min<int64_t>(largest.seq_k, largest.attributes.exact_below));
  also(largest.seq_q + kSuperblock, largest.seq_k + kSuperblock);
  return bytes;
}

// At network creation TensorRT may ask before a profile is set; its bounds are then negative.
bool bounded(const DynamicPluginTensorDesc* in, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    for (int32_t d = 0; d < in[i].max.nbDims; ++d)
      if (in[i].max.d[d] < 0) return false;
  return true;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  Plugin(const Fields& fields, std::string layer)
      : fields_(fields), layer_(std::move(layer)), selector_(selector_name(fields.attributes.selector)), description_(describe(fields)),
        metadata_(std::string(kName) + " build=" + build_id() + " " + description_) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
    return nullptr;
  }
  IPluginV3* clone() noexcept override {
    IPluginV3* copy = nullptr;
    guarded(layer(), [&] { copy = new Plugin(fields_, layer_); });
    return copy;
  }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1 + fields_.with_lse; }
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  // Shown by the engine inspector, where the name tells our layers from others; the build tells which library is registered.
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in, int32_t inputs) const noexcept override {
    return guarded(layer(), [&] {
      check_counts(fields_, inputs, outputs);
      out[0] = in[0];
      if (fields_.with_lse) out[1] = DataType::kFLOAT;
    });
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out, int32_t outputs,
                          IExprBuilder&) noexcept override {
    return guarded(layer(), [&] {
      check_counts(fields_, inputs, outputs);
      for (int32_t i = 0; i < kLengths; ++i)
        if (in[i].nbDims != 4)
          fail(std::string(1, "QKV"[i]) + " has " + std::to_string(in[i].nbDims) +
               " dimensions; it takes 4: batch, heads, sequence, head size");
      out[0] = in[0];
      out[0].d[3] = in[2].d[3];
      if (fields_.with_lse) {
        out[1] = in[0];
        out[1].nbDims = 3;
      }
    });
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    const int32_t status = guarded(layer(), [&] { check_counts(fields_, inputs, outputs); });
    if (status != HA_OK || position < 0 || position >= inputs + outputs) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == 0)
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    if (position == kLengths && inputs > kLengths) return tensor.type == DataType::kINT32;
    if (position == inputs + 1) return tensor.type == DataType::kFLOAT;
    return tensor.type == tensors[0].desc.type;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    return guarded(layer(), [&] {
      check_counts(fields_, inputs, outputs);
      if (bounded(in, inputs)) workspace_up_to(largest(in, inputs));
    });
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    size_t bytes = 0;
    guarded(layer(), [&] { bytes = workspace_up_to(largest(in, inputs)); });
    return bytes;
  }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*, int32_t outputs) noexcept override {
    return guarded(layer(), [&] {
      check_counts(fields_, inputs, outputs);
      inputs_ = inputs;
      workspace_of(actual(in));
    });
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(layer(), [&] {
      if (inputs_ == 0) fail("enqueue was called before onShapeChange, so it is not known whether there are lengths");
      HaParams params = actual(in);
      params.q = inputs[0], params.k = inputs[1], params.v = inputs[2];
      params.lengths = inputs_ > kLengths ? static_cast<const int32_t*>(inputs[kLengths]) : nullptr;
      params.out = outputs[0];
      params.lse = fields_.with_lse ? static_cast<float*>(outputs[1]) : nullptr;
      params.workspace = workspace, params.workspace_size = workspace_of(params);
      params.stream = stream;
      if (const int status = ha_cuda_forward(&params)) throw Error(static_cast<HaStatus>(status), ha_last_error());
    });
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    auto* copy = static_cast<Plugin*>(clone());
    if (copy) copy->inputs_ = inputs_;
    return copy;
  }

  // Rebuilt on every call, so that a clone never points at its parent's members.
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    const int32_t status = guarded(layer(), [&] {
      list_ = list_fields(fields_, selector_.c_str());
      collection_ = {static_cast<int32_t>(list_.size()), list_.data()};
    });
    return status == HA_OK ? &collection_ : nullptr;
  }

 private:
  const char* layer() const noexcept { return layer_.c_str(); }
  HaParams largest(const DynamicPluginTensorDesc* in, int32_t inputs) const {
    return problem(fields_, in[0].desc.type, in[0].max, in[1].max, in[2].max, inputs > kLengths ? &in[kLengths].max : nullptr);
  }
  HaParams actual(const PluginTensorDesc* in) const {
    return problem(fields_, in[0].type, in[0].dims, in[1].dims, in[2].dims, inputs_ > kLengths ? &in[kLengths].dims : nullptr);
  }

  const Fields fields_;
  const std::string layer_, selector_, description_, metadata_;
  int32_t inputs_ = 0;  // how many there are: onShapeChange is told, enqueue is not
  std::vector<PluginField> list_;
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(const char* name, const PluginFieldCollection* collection, TensorRTPhase) noexcept override {
    const char* layer = name ? name : "";
    IPluginV3* plugin = nullptr;
    guarded(layer, [&] { plugin = new Plugin(parse_fields(collection), layer); });
    return plugin;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const std::vector<PluginField> list_ = declare_fields();
  const PluginFieldCollection collection_{static_cast<int32_t>(list_.size()), list_.data()};
};

}  // namespace

IPluginCreatorInterface& creator() {
  static Creator instance;
  return instance;
}

}  // namespace ha::trt
