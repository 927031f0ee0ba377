// The C interface of the processor's kernels.
#include <string>

#include "config.h"
#include "cpu.h"

namespace ha::cpu {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw Error(HA_INVALID, message);
}

void need(const void* pointer, const char* name, bool wanted) {
  require(pointer || !wanted, std::string(name) + " is a null pointer; this problem reads or writes it");
}

void check_workspace(const HaParams& params, const Geometry& g) {
  const size_t bytes = workspace_size(g);
  if (bytes == 0) return;
  need(params.workspace, "workspace", true);
  require(params.workspace_size >= bytes, "workspace has " + std::to_string(params.workspace_size) + " bytes; this problem takes " +
                                              std::to_string(bytes) + " (ha_cpu_workspace_size)");
  require(reinterpret_cast<uintptr_t>(params.workspace) % 256 == 0, "workspace is not aligned to 256 bytes");
}

void check_queries_and_keys(const HaParams& params) {
  check_problem(params);
  need(params.q, "q", params.batch * params.seq_q > 0);
  need(params.k, "k", params.batch * params.seq_k > 0);
}

void check_attention(const HaParams& params) {
  check_queries_and_keys(params);
  need(params.v, "v", params.batch * params.seq_k > 0);
  need(params.out, "out", params.batch * params.seq_q > 0);
}

}  // namespace

void check_problem(const HaParams& params) {
  check(params);
  if (params.dtype != HA_FLOAT32) {
    throw Error(HA_UNSUPPORTED, std::string("dtype is ") + (params.dtype == HA_FLOAT16 ? "float16" : "bfloat16") +
                                    "; the processor's kernels take float32 (cast the tensors)");
  }
}

void check_forward(const HaParams& params) {
  check_attention(params);
  const Geometry g(params);
  if (!params.plan || g.sorts()) check_workspace(params, g);
}

}  // namespace ha::cpu

using ha::Geometry;
using ha::guarded;
using ha::cpu::OwnThreads;

extern "C" int ha_cpu_workspace_size(const HaParams* params, size_t* bytes) {
  return guarded([&] {
    ha::cpu::check_problem(*params);
    *bytes = ha::cpu::workspace_size(Geometry(*params));
  });
}

extern "C" int ha_cpu_pool(const HaParams* params, int32_t side, int32_t rows, int8_t* values, float* scales) {
  return guarded([&] {
    ha::cpu::check_queries_and_keys(*params);
    ha::cpu::require(side == HA_QUERIES || side == HA_KEYS, "side is " + std::to_string(side) + "; it takes 0 (queries) or 1 (keys)");
    ha::cpu::require(rows >= 1, "rows is " + std::to_string(rows) + "; it takes an integer of at least 1");
    const Geometry g(*params);
    const bool some = g.batch * (side == HA_QUERIES ? g.query_pools(rows).size() : g.key_pools(rows)) > 0;
    ha::cpu::need(values, "values", some);
    ha::cpu::need(scales, "scales", some);
    OwnThreads threads(params->threads);
    ha::cpu::pool(*params, HaSide(side), rows, values, scales, threads);
  });
}

extern "C" int ha_cpu_select(const HaParams* params, int32_t* plan) {
  return guarded([&] {
    ha::cpu::check_queries_and_keys(*params);
    const Geometry g(*params);
    ha::cpu::need(plan, "plan", g.plan_size() > 0);
    ha::cpu::check_workspace(*params, g);
    OwnThreads threads(params->threads);
    ha::cpu::select(*params, plan, threads);
  });
}

extern "C" int ha_cpu_samples(const HaParams* params, int32_t* index, float* weight) {
  return guarded([&] {
    ha::cpu::check_problem(*params);
    const Geometry g(*params);
    if (g.exact()) return;
    const bool some = g.a.sample_size > 0 && g.batch * g.draws() > 0;
    ha::cpu::need(index, "index", some);
    ha::cpu::need(weight, "weight", some);
    ha::cpu::samples(*params, index, weight);
  });
}

extern "C" int ha_cpu_attend(const HaParams* params) {
  return guarded([&] {
    ha::cpu::check_attention(*params);
    const Geometry g(*params);
    ha::cpu::need(params->plan, "plan", g.plan_size() > 0);
    if (g.sorts()) ha::cpu::check_workspace(*params, g);
    OwnThreads threads(params->threads);
    ha::cpu::attend(*params, params->plan, threads);
  });
}

extern "C" int ha_cpu_forward(const HaParams* params) {
  return guarded([&] {
    ha::cpu::check_forward(*params);
    OwnThreads threads(params->threads);
    ha::cpu::forward(*params, threads);
  });
}
