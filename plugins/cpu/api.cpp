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

bool has_plan(const Geometry& g) { return !g.exact() && g.a.num_blocks > 0 && g.batch * g.seq_q > 0; }

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
  if (!params.plan) check_workspace(params, Geometry(params));
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
    const bool some = g.batch * (side == HA_QUERIES ? g.query_pools(rows) : g.key_pools(rows)) > 0;
    ha::cpu::need(values, "values", some);
    ha::cpu::need(scales, "scales", some);
    OwnThreads threads(params->threads);
    ha::cpu::pool(*params, HaSide(side), rows, values, scales, threads);
  });
}

extern "C" int ha_cpu_select(const HaParams* params, int32_t* blocks) {
  return guarded([&] {
    const Geometry g(*params);
    ha::cpu::check_queries_and_keys(*params);
    ha::cpu::need(blocks, "blocks", ha::cpu::has_plan(g));
    ha::cpu::check_workspace(*params, g);
    OwnThreads threads(params->threads);
    ha::cpu::select(*params, blocks, threads);
  });
}

extern "C" int ha_cpu_samples(const HaParams* params, int32_t* index, float* weight) {
  return guarded([&] {
    ha::cpu::check_problem(*params);
    const Geometry g(*params);
    if (g.exact()) return;
    ha::cpu::need(index, "index", g.a.sample_size > 0 && g.batch > 0);
    ha::cpu::need(weight, "weight", g.a.sample_size > 0 && g.batch > 0);
    const ha::Range tiles = g.local_blocks();
    for (int64_t line = 0; line < g.batch * g.heads_q * tiles.size(); ++line) {
      const int64_t tile = tiles.start + line % tiles.size(), head = line / tiles.size();
      const int64_t total = g.residual_candidates(tile, g.length(params->lengths, head / g.heads_q));
      for (int64_t s = 0; s < g.a.sample_size; ++s) {
        const ha::Sample sample = ha::draw_sample(g.a, total, s, head % g.heads_q, g.draw_start(tile));
        *index++ = int32_t(sample.key);
        *weight++ = sample.weight;
      }
    }
  });
}

extern "C" int ha_cpu_attend(const HaParams* params) {
  return guarded([&] {
    ha::cpu::check_attention(*params);
    ha::cpu::need(params->plan, "plan", ha::cpu::has_plan(Geometry(*params)));
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
