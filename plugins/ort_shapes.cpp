#include "ort_shapes.h"

namespace ha::ort {
namespace {

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

// The element type stays out: ONNX Runtime takes it from the kernel whose input types match.
void set_output_shape(OrtShapeInferContext* context, size_t output, const SymbolicShape& shape) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  ok(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info{raw};
  std::vector<const char*> names = shape.names;
  ok(api.SetDimensions(raw, shape.sizes.data(), shape.sizes.size()));
  ok(api.SetSymbolicDimensions(raw, names.data(), names.size()));
  ok(api.ShapeInferContext_SetOutputTypeShape(context, output, raw));
}

}  // namespace

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

}  // namespace ha::ort
