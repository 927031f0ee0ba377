// The stages on the processor, behind the C interface and the ONNX Runtime op. They take checked parameters.
#pragma once
#include "geometry.h"
#include "parallel.h"

namespace ha::cpu {

// Throws Error for what the processor's kernels do not take.
void check_problem(const HaParams& params);
// The same, and for null pointers and a workspace too small for `forward`.
void check_forward(const HaParams& params);

size_t workspace_size(const Geometry& g);
// Stage 1, in the layout of ha_cpu_pool.
void pool(const HaParams& params, HaSide side, int64_t rows, int8_t* values, float* factors, Workers& workers);
// Stage 2; uses the workspace.
void select(const HaParams& params, int32_t* plan, Workers& workers);
// Stage 3, in the layout of ha_cpu_samples.
void samples(const HaParams& params, int32_t* index, float* weight);
// Stage 4; `plan` is not read where it is empty. `sortlsh` uses the workspace.
void attend(const HaParams& params, const int32_t* plan, Workers& workers);
// Stages 2 and 4, or stage 4 alone when params.plan is set.
void forward(const HaParams& params, Workers& workers);

}  // namespace ha::cpu
