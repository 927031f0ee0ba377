// Shapes before the run: what ONNX Runtime's graph gets to know of the outputs.
#pragma once
#include "ort_common.h"

namespace ha::ort {

// O [batch, heads_q, rows, head_dim_v] and LSE [batch, heads_q, rows] from the shapes of Q and V, symbolic names kept.
void infer_shapes(OrtShapeInferContext* context);

}  // namespace ha::ort
