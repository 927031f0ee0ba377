// Shapes before the run: what ONNX Runtime's graph gets to know of the outputs.
#pragma once
#include "ort_common.h"

namespace ha::ort {

// O [batch, heads_q, rows, head_dim_v] of Q's type from the shapes of Q and V, symbolic names kept. LSE's shape stays what the file says:
// ONNX Runtime does not tell whether the node has that output, and setting the shape of one that is not there writes out of
// bounds (1.20 and 1.24 end the process).
void infer_shapes(OrtShapeInferContext* context);

}  // namespace ha::ort
