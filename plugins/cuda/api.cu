// The exported ha_cuda_* functions: checks, scratch, and the order of the stages on the caller's stream.
#include "config.h"
#include "launch.cuh"
#include "sm90_kernels.h"

namespace ha {

#define HA_DECLARE(T, DTYPE, P) extern template void launch_attend<T, P>(const AttendArgs&);
HA_ATTEND_INSTANCES(HA_DECLARE)
#undef HA_DECLARE
#define HA_DECLARE(T, DTYPE, P) extern template void launch_hopper<T, P>(const AttendArgs&);
HA_HOPPER_INSTANCES(HA_DECLARE)
#undef HA_DECLARE

namespace {

void require(bool ok, HaStatus status, const std::string& message) {
  if (!ok) throw Error(status, message);
}

void check_supported(const HaParams& p) {
  check(p);
  const auto size = [](const char* name, int64_t value) {
    require(value >= kHeadStep && value <= kHeadMost && value % kHeadStep == 0, HA_UNSUPPORTED,
            std::string(name) + " is " + std::to_string(value) + "; the CUDA kernels take multiples of " + std::to_string(kHeadStep) +
                " up to " + std::to_string(kHeadMost) + ": pad the tensors with zeros and set scale, or use the CPU kernels");
  };
  size("head_dim", p.head_dim);
  size("head_dim_v", p.head_dim_v);
  require(max64(p.seq_q, p.seq_k) <= kMostRows, HA_UNSUPPORTED,
          "the sequence has " + std::to_string(max64(p.seq_q, p.seq_k)) + " rows; the CUDA kernels take up to " +
              std::to_string(kMostRows) + ": split it");
  require(padded_head(p.head_dim, p.head_dim_v), HA_UNSUPPORTED,
          "head sizes are " + std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v) + "; this build has CUDA kernels up to " +
              std::to_string(largest_head()) + ": build with more HYPERATTENTION_HEAD_SIZES");
}

void require_pointer(const void* pointer, int64_t elements, const char* name) {
  require(pointer || elements == 0, HA_INVALID, std::string(name) + " is a null pointer; it takes device memory");
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, HA_INVALID,
          std::string(name) + " is not aligned to 16 bytes; the CUDA kernels need it");
}

void check_selectable(const Geometry& g) {
  if (g.exact() || g.sorts() || g.a.num_blocks == 0) return;
  const SelectConfig config = select_config(g);
  require(config.fits(), HA_UNSUPPORTED,
          "selection over " + std::to_string(g.seq_k) + " keys with block_size " + std::to_string(g.a.block_size) + " needs " +
              std::to_string(config.bytes) + " bytes of shared memory, the CUDA kernel takes " + std::to_string(kSelectMostShared) +
              ": raise block_size (64, 128 and 256 go furthest), or split the sequence");
}

unsigned char* scratch(const HaParams& p, size_t bytes) {
  if (bytes == 0) return nullptr;
  require(p.workspace && p.workspace_size >= bytes, HA_INVALID,
          "workspace has " + std::to_string(p.workspace ? p.workspace_size : 0) + " bytes; ha_cuda_workspace_size asks for " +
              std::to_string(bytes));
  require(reinterpret_cast<uintptr_t>(p.workspace) % 256 == 0, HA_INVALID, "workspace is not aligned to 256 bytes");
  return static_cast<unsigned char*>(p.workspace);
}

// The tensor that a selector reads.
void require_side(const HaParams& p, int32_t side) {
  if (side == HA_QUERIES) require_pointer(p.q, p.seq_q, "q");
  else require_pointer(p.k, p.seq_k, "k");
}

void select_blocks(const HaParams& p, unsigned char* base, const Workspace& w, int32_t* plan) {
  const Geometry g(p);
  check_selectable(g);
  const auto pools = [&](size_t values, size_t scales, int32_t rows, int64_t count) {
    return Pools{reinterpret_cast<int8_t*>(base + values), reinterpret_cast<float*>(base + scales), rows, count, pool_stride(g.head_dim)};
  };
  SelectArgs args{p, select_config(g, shared_limit()), {}, {}, {}, {}, plan};
  args.q_fine = pools(w.q_fine, w.q_fine_scale, g.a.pool_size, g.query_pools(g.a.pool_size).size());
  args.k_fine = pools(w.k_fine, w.k_fine_scale, g.a.pool_size, g.key_pools(g.a.pool_size));
  if (args.config.supers) {
    args.q_coarse = pools(w.q_coarse, w.q_coarse_scale, kCoarsePool, g.query_pools(kCoarsePool).size());
    args.k_coarse = pools(w.k_coarse, w.k_coarse_scale, kCoarsePool, g.key_pools(kCoarsePool));
  }
  launch_pools({p, HA_QUERIES, args.q_fine, args.q_coarse});
  launch_pools({p, HA_KEYS, args.k_fine, args.k_coarse});
  launch_select(args);
}

void select_sorted(const HaParams& p, unsigned char* base, const Workspace& w, int32_t* plan) {
  const Geometry g(p);
  uint16_t* const ranks_q = reinterpret_cast<uint16_t*>(base + w.q_ranks);
  uint16_t* const ranks_k = reinterpret_cast<uint16_t*>(base + w.k_ranks);
  int32_t* const order = g.a.num_projections > kSortDigitBits ? reinterpret_cast<int32_t*>(base + w.order) : nullptr;
  uint32_t* const counts = sorts_chunks(g) ? reinterpret_cast<uint32_t*>(base + w.counts) : nullptr;
  const HashArgs hash{p, ranks_q, ranks_k, counts, g.a.hash_centre ? reinterpret_cast<float*>(base + w.least) : nullptr};
  if (hash.least) launch_centre(hash);
  launch_hash(hash);
  const SortArgs sort{p, ranks_q, ranks_k, plan, order, counts};
  launch_sort_chunks(sort);
  launch_sort_nodes(sort);
}

void select(const HaParams& p, int32_t* plan) {
  const Geometry g(p);
  if (g.plan_size() == 0) return;
  require(plan, HA_INVALID, "plan is a null pointer; it takes device memory");
  require_side(p, HA_QUERIES);
  require_side(p, HA_KEYS);
  const Workspace w = workspace(g);
  unsigned char* const base = scratch(p, w.bytes);
  if (g.sorts()) select_sorted(p, base, w, plan);
  else select_blocks(p, base, w, plan);
}

// Whether attention follows a plan.
bool needs_plan(const Geometry& g) { return g.sorts() ? has_nodes(g) : !g.exact() && g.a.num_blocks; }

void attend(const HaParams& p) {
  const Geometry g(p);
  if (g.batch == 0 || g.seq_q == 0) return;
  require_pointer(p.q, g.seq_q, "q");
  require_pointer(p.k, g.seq_k, "k");
  require_pointer(p.v, g.seq_k, "v");
  require_pointer(p.out, g.seq_q, "out");
  require(p.plan || !needs_plan(g), HA_INVALID,
          "plan is a null pointer; ha_cuda_attend takes a plan, ha_cuda_forward makes one");
#if HA_HOPPER
  const bool hopper = uses_hopper(g, p.dtype, compute_capability());
#else
  const bool hopper = false;
#endif
  AttendArgs args{p, p.lse};
  if (!p.lse && !g.exact() && (g.sorts() || (hopper && splits_blocks(g)))) {
    const Workspace w = workspace(g);
    args.lse = reinterpret_cast<float*>(scratch(p, w.bytes) + w.lse);
  }
#if HA_HOPPER
  if (hopper) {
    const int padded = hopper_head(max64(g.head_dim, g.head_dim_v));
#define HA_CASE(T, DTYPE, P)                                               \
  if constexpr (has_padded_head(P)) {                                      \
    if (p.dtype == DTYPE && padded == P) return launch_hopper<T, P>(args); \
  }
    HA_HOPPER_INSTANCES(HA_CASE)
#undef HA_CASE
  }
#endif
  const int padded = padded_head(g.head_dim, g.head_dim_v);
#define HA_CASE(T, DTYPE, P)                                               \
  if constexpr (has_padded_head(P)) {                                      \
    if (p.dtype == DTYPE && padded == P) return launch_attend<T, P>(args); \
  }
  HA_ATTEND_INSTANCES(HA_CASE)
#undef HA_CASE
}

void forward(HaParams p) {
  const Geometry g(p);
  if (!p.plan && needs_plan(g) && g.batch) {
    const Workspace w = workspace(g);
    int32_t* const plan = reinterpret_cast<int32_t*>(scratch(p, w.bytes) + w.plan);
    select(p, plan);
    p.plan = plan;
  }
  attend(p);
}

}  // namespace
}  // namespace ha

extern "C" int ha_cuda_workspace_size(const HaParams* params, size_t* bytes) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    const ha::Geometry g(*params);
    ha::check_selectable(g);
    *bytes = ha::workspace(g).bytes;
  });
}

extern "C" int ha_cuda_pool(const HaParams* params, int32_t side, int32_t rows, int8_t* values, float* scales) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    ha::require(side == HA_QUERIES || side == HA_KEYS, HA_INVALID,
                "side is " + std::to_string(side) + "; it takes 0 (queries) or 1 (keys)");
    ha::require(rows >= 1 && rows <= 256, HA_INVALID, "rows is " + std::to_string(rows) + "; it takes an integer from 1 to 256");
    const ha::Geometry g(*params);
    const int64_t count = side == HA_QUERIES ? g.query_pools(rows).size() : g.key_pools(rows);
    ha::require((values && scales) || count == 0, HA_INVALID, "values or scales is a null pointer; they take device memory");
    ha::require_side(*params, side);
    ha::launch_pools({*params, side, {values, scales, rows, count, g.head_dim}, {}});
  });
}

extern "C" int ha_cuda_select(const HaParams* params, int32_t* plan) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    ha::select(*params, plan);
  });
}

extern "C" int ha_cuda_samples(const HaParams* params, int32_t* index, float* weight) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    const ha::Geometry g(*params);
    if (g.exact() || g.a.sample_size == 0 || g.batch == 0) return;
    ha::require(index && weight, HA_INVALID, "index or weight is a null pointer; they take device memory");
    ha::launch_samples({*params, index, weight});
  });
}

extern "C" int ha_cuda_attend(const HaParams* params) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    ha::attend(*params);
  });
}

extern "C" int ha_cuda_forward(const HaParams* params) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    ha::forward(*params);
  });
}
