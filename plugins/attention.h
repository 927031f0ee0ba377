// The C interface of the kernels: one POD in, one status out. No torch, TensorRT or ONNX Runtime here.
//
// The same functions exist for the processor (`ha_cpu_*`, host pointers, in libhyperattention_ort.so) and for CUDA
// (`ha_cuda_*`, device pointers, in both libraries where CUDA is built). docs/operator.md fixes what they compute;
// hyperattention/reference.py is the ground truth. hyperattention/library.py mirrors the structs for ctypes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#error "Linux only"
#endif
#define HA_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define HA_ABI_VERSION 4

enum HaStatus {
  HA_OK = 0,
  HA_INVALID = 1,      // a value out of range or a null pointer: the caller's mistake
  HA_UNSUPPORTED = 2,  // a legal problem this backend has no kernel for
  HA_FAILED = 3        // the runtime (CUDA, memory) refused
};
enum HaDtype { HA_FLOAT32 = 0, HA_FLOAT16 = 1, HA_BFLOAT16 = 2 };
enum HaSelector { HA_BLOCKS = 0, HA_SORTLSH = 1 };
enum HaSide { HA_QUERIES = 0, HA_KEYS = 1 };

// Attributes of the operator, in the order of hyperattention/config.py.
typedef struct HaAttributes {
  int32_t causal;
  float scale;  // 0 means 1/sqrt(head_dim)
  int32_t selector;
  int32_t block_size;
  int32_t num_blocks;
  int32_t pool_size;
  int32_t sample_size;
  int32_t stratified;
  int32_t local_size;
  int32_t local_overlap;
  int32_t sinks;
  int32_t exact_below;
  int32_t num_projections;
  int32_t seed;
  int32_t strict_causal;
  int32_t hash_centre;
} HaAttributes;

// One problem. Tensors are dense, row-major: q [batch, heads_q, seq_q, head_dim], k [batch, heads_kv, seq_k, head_dim],
// v [batch, heads_kv, seq_k, head_dim_v], out [batch, heads_q, seq_q, head_dim_v], all of `dtype`.
typedef struct HaParams {
  uint32_t struct_size;  // sizeof(HaParams), checked
  int32_t dtype;
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v;
  HaAttributes attributes;
  const void* q;
  const void* k;
  const void* v;
  const int32_t* lengths;      // [batch] valid keys of each row, clamped to 0..seq_k; null = all
  void* out;
  float* lse;                  // [batch, heads_q, seq_q], natural log; null = not wanted
  const int32_t* plan;         // a plan to follow, as ha_*_select writes it for this problem (any other leads to undefined
                               // output, which differs between kernels, never outside the tensors); null = select
  void* workspace;             // ha_*_workspace_size bytes, 256-byte aligned
  size_t workspace_size;
  void* stream;                // cudaStream_t (CUDA)
  int32_t threads;             // CPU: threads to use, 0 = all
  int32_t reserved;
} HaParams;

// Text of the calling thread's last failure: what was found and what is allowed. Never null.
HA_EXPORT const char* ha_last_error(void);
// One JSON object: version, abi, build id (hash of the sources), backends, architectures, compilers.
HA_EXPORT const char* ha_build_info(void);

// Checks attributes, shapes and dtype; touches no tensor.
HA_EXPORT int ha_check(const HaParams* params);
// Size of the plan: dims = {int32 elements, query blocks (`blocks`) or levels (`sortlsh`), draws a head}, all 0 on the exact
// path. The plan of `blocks` is int32 [batch, heads_q, query_blocks, num_blocks]: chosen key blocks, ascending, -1 behind
// the last. That of `sortlsh` is rows [batch, heads_q, levels, seq_q] and behind them keys [batch, heads_kv, levels, seq_k]:
// each node's sorted rows (keys) in the slots of its own rows (keys), -1 in the others. Samples: [batch, heads_q, draws, sample_size].
HA_EXPORT int ha_plan_dims(const HaParams* params, int64_t dims[3]);

// Bytes of scratch that ha_*_select, ha_*_attend and ha_*_forward need: a pure function of shape, dtype and attributes.
HA_EXPORT int ha_cpu_workspace_size(const HaParams* params, size_t* bytes);
HA_EXPORT int ha_cuda_workspace_size(const HaParams* params, size_t* bytes);

// Stage 1, the selector's quantised pools (operator rules 18 and 20), for tests: `rows` consecutive positions a pool,
// values int8 [batch, heads, pools, head_dim], scales float [batch, heads, pools]: the query's 1/sqrt(max(1, q8.q8)), the
// key's max|x|/127; NaN for a pool that is skipped (its values are 0). Pools of queries start at floor(p0 / rows); with
// strict_causal at floor(b floor(p0 / b) / rows) - 1, b = block_size, and the first one is row 0 alone (rule 22).
HA_EXPORT int ha_cpu_pool(const HaParams* params, int32_t side, int32_t rows, int8_t* values, float* scales);
HA_EXPORT int ha_cuda_pool(const HaParams* params, int32_t side, int32_t rows, int8_t* values, float* scales);
// Stage 2, the selector: writes the plan.
HA_EXPORT int ha_cpu_select(const HaParams* params, int32_t* plan);
HA_EXPORT int ha_cuda_select(const HaParams* params, int32_t* plan);
// Stage 3, the residual's draw, for tests: key index (`sortlsh`: index into the node's sorted keys; -1 = no sample) and the
// weight whose log is added.
HA_EXPORT int ha_cpu_samples(const HaParams* params, int32_t* index, float* weight);
HA_EXPORT int ha_cuda_samples(const HaParams* params, int32_t* index, float* weight);
// Stage 4, attention under params->plan (required unless the exact path is taken).
HA_EXPORT int ha_cpu_attend(const HaParams* params);
HA_EXPORT int ha_cuda_attend(const HaParams* params);
// All of it: selects when params->plan is null, then attends. CUDA: asynchronous on params->stream, allocates
// nothing, never synchronises, may be captured into a CUDA graph.
HA_EXPORT int ha_cpu_forward(const HaParams* params);
HA_EXPORT int ha_cuda_forward(const HaParams* params);

#ifdef __cplusplus
}
#endif
