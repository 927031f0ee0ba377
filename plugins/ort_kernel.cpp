#include "ort_kernel.h"

#include <array>

#include "ort_attributes.h"

namespace ha::ort {
namespace {

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string out;
  for (const int64_t size : shape) out += (out.empty() ? "" : ", ") + std::to_string(size);
  return "(" + out + ")";
}

Shape shape_of(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

void set_shapes(HaParams& params, const Shape& q, const Shape& k, const Shape& v) {
  const auto shapes = "Q, K, V have shapes " + text(q) + ", " + text(k) + ", " + text(v);
  if (q.size() != 4 || k.size() != 4 || v.size() != 4) {
    throw Error(HA_INVALID, shapes + "; each takes 4 dimensions: batch, heads, sequence, head size");
  }
  if (q[0] != k[0] || k[0] != v[0] || k[1] != v[1] || k[2] != v[2] || q[3] != k[3]) {
    throw Error(HA_INVALID, shapes + "; they must agree in batch, K and V in heads and sequence, Q and K in head size");
  }
  params.batch = q[0], params.heads_q = q[1], params.heads_kv = k[1];
  params.seq_q = q[2], params.seq_k = k[2], params.head_dim = q[3], params.head_dim_v = v[3];
}

// Null for an optional output that the node leaves out.
void* output(OrtKernelContext* context, size_t index, const Shape& shape) {
  OrtValue* value = nullptr;
  ok(Ort::GetApi().KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  if (value) ok(Ort::GetApi().GetTensorMutableData(value, &data));
  return data;
}

}  // namespace

Kernel::Kernel(const OrtKernelInfo* info, HaDtype dtype) : attributes_(read_attributes(info)), dtype_(dtype) {
  ok(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
}

Kernel::~Kernel() { Ort::GetApi().ReleaseAllocator(allocator_); }

OrtStatus* Kernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(context); });
}

void Kernel::compute(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  const std::array<Ort::ConstValue, 3> input{context.GetInput(0), context.GetInput(1), context.GetInput(2)};
  HaParams params{};
  params.struct_size = sizeof(HaParams);
  params.dtype = dtype_;
  params.attributes = attributes_;
  set_shapes(params, shape_of(input[0]), shape_of(input[1]), shape_of(input[2]));
  params.q = input[0].GetTensorRawData();
  params.k = input[1].GetTensorRawData();
  params.v = input[2].GetTensorRawData();
  if (context.GetInputCount() > 3) {
    if (const Ort::ConstValue lengths = context.GetInput(3)) {
      const Shape shape = shape_of(lengths);
      if (shape != Shape{params.batch}) {
        throw Error(HA_INVALID, "lengths has shape " + text(shape) + "; it takes one length a batch row: " + text({params.batch}));
      }
      params.lengths = lengths.GetTensorData<int32_t>();
    }
  }
  check(params);
  params.out = output(raw, 0, {params.batch, params.heads_q, params.seq_q, params.head_dim_v});
  if (context.GetOutputCount() > 1) params.lse = static_cast<float*>(output(raw, 1, {params.batch, params.heads_q, params.seq_q}));
  forward(params, raw);
}

}  // namespace ha::ort
