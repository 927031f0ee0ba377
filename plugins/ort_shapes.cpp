#include "ort_shapes.h"

namespace ha::ort {
namespace {

// A tensor as inference sees it: sizes, -1 where unknown, and names for symbolic dimensions.
struct SymbolicTensor {
  ONNXTensorElementDataType type;
  std::vector<int64_t> sizes;
  std::vector<const char*> names;

  SymbolicTensor(const OrtShapeInferContext* context, size_t input) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
    ok(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
    ok(api.GetTensorElementType(info, &type));
    size_t rank = 0;
    ok(api.GetDimensionsCount(info, &rank));
    sizes.resize(rank);
    names.resize(rank, "");
    ok(api.GetDimensions(info, sizes.data(), rank));
    ok(api.GetSymbolicDimensions(info, names.data(), rank));
  }
};

void set_output(OrtShapeInferContext* context, size_t output, const SymbolicTensor& tensor) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  ok(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info{raw};
  std::vector<const char*> names = tensor.names;
  ok(api.SetTensorElementType(raw, tensor.type));
  ok(api.SetDimensions(raw, tensor.sizes.data(), tensor.sizes.size()));
  ok(api.SetSymbolicDimensions(raw, names.data(), names.size()));
  ok(api.ShapeInferContext_SetOutputTypeShape(context, output, raw));
}

}  // namespace

void infer_shapes(OrtShapeInferContext* context) {
  SymbolicTensor o(context, 0);
  const SymbolicTensor v(context, 2);
  if (o.sizes.size() != 4 || v.sizes.size() != 4) return;  // of unknown rank; a wrong one is refused when the node runs
  o.sizes[3] = v.sizes[3];
  o.names[3] = v.names[3];
  set_output(context, 0, o);
}

}  // namespace ha::ort
