// The exported ha_cuda_* functions: checks, scratch, and the order of the stages on the caller's stream.
#include "config.h"
#include "kernels.h"

namespace ha {

#define HA_DECLARE(T, DTYPE, D) extern template void launch_attend<T, D>(const AttendArgs&);
HA_ATTEND_INSTANCES(HA_DECLARE)
#undef HA_DECLARE

namespace {

void require(bool ok, HaStatus status, const std::string& message) {
  if (!ok) throw Error(status, message);
}

void check_supported(const HaParams& p) {
  check(p);
  require(p.dtype != HA_FLOAT32, HA_UNSUPPORTED,
          "dtype is float32; the CUDA kernels take float16 (1) and bfloat16 (2): convert the tensors, or use the CPU kernels");
  require(p.head_dim == 64 || p.head_dim == 128, HA_UNSUPPORTED,
          "head_dim is " + std::to_string(p.head_dim) + "; the CUDA kernels take 64 and 128");
  require(p.head_dim_v == p.head_dim, HA_UNSUPPORTED,
          "head_dim_v is " + std::to_string(p.head_dim_v) + " and head_dim " + std::to_string(p.head_dim) +
              "; the CUDA kernels take equal ones");
}

void require_pointer(const void* pointer, int64_t elements, const char* name) {
  require(pointer || elements == 0, HA_INVALID, std::string(name) + " is a null pointer; it takes device memory");
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, HA_INVALID, std::string(name) + " is not aligned to 16 bytes; the CUDA kernels need it");
}

void check_selectable(const Geometry& g) {
  if (g.exact() || g.a.num_blocks == 0) return;
  const SelectConfig config = select_config(g);
  require(config.fits(), HA_UNSUPPORTED,
          "selection over " + std::to_string(g.seq_k) + " keys with block_size " + std::to_string(g.a.block_size) + " needs " +
              std::to_string(config.bytes) + " bytes of shared memory, the CUDA kernel takes " + std::to_string(kSelectSharedLimit) +
              ": raise block_size (64, 128 and 256 go furthest), or split the sequence");
}

unsigned char* scratch(const HaParams& p, size_t bytes) {
  if (bytes == 0) return nullptr;
  require(p.workspace && p.workspace_size >= bytes, HA_INVALID,
          "workspace has " + std::to_string(p.workspace ? p.workspace_size : 0) + " bytes; ha_cuda_workspace_size asks for " + std::to_string(bytes));
  require(reinterpret_cast<uintptr_t>(p.workspace) % 256 == 0, HA_INVALID, "workspace is not aligned to 256 bytes");
  return static_cast<unsigned char*>(p.workspace);
}

void pool(const HaParams& p, int32_t side, Pools fine, Pools coarse) {
  const Geometry g(p);
  require_pointer(side == HA_QUERIES ? p.q : p.k, side == HA_QUERIES ? g.seq_q : g.seq_k, side == HA_QUERIES ? "q" : "k");
  launch_pools({p, side, fine, coarse});
}

void select(const HaParams& p, int32_t* blocks) {
  const Geometry g(p);
  if (g.exact() || g.a.num_blocks == 0 || g.batch == 0) return;
  check_selectable(g);
  require(blocks, HA_INVALID, "blocks is a null pointer; it takes device memory for the plan");
  const Workspace w = workspace(g);
  unsigned char* const base = scratch(p, w.bytes);
  SelectArgs args{p, select_config(g), {}, {}, {}, {}, blocks};
  const auto pools = [base](size_t values, size_t scales, int32_t rows, int64_t count) {
    return Pools{reinterpret_cast<int8_t*>(base + values), reinterpret_cast<float*>(base + scales), rows, count};
  };
  args.q_fine = pools(w.q_fine, w.q_fine_scale, g.a.pool_size, g.query_pools(g.a.pool_size));
  args.k_fine = pools(w.k_fine, w.k_fine_scale, g.a.pool_size, g.key_pools(g.a.pool_size));
  if (args.config.supers) {
    args.q_coarse = pools(w.q_coarse, w.q_coarse_scale, kCoarsePool, g.query_pools(kCoarsePool));
    args.k_coarse = pools(w.k_coarse, w.k_coarse_scale, kCoarsePool, g.key_pools(kCoarsePool));
  }
  pool(p, HA_QUERIES, args.q_fine, args.q_coarse);
  pool(p, HA_KEYS, args.k_fine, args.k_coarse);
  launch_select(args);
}

void attend(const HaParams& p) {
  const Geometry g(p);
  if (g.batch == 0 || g.seq_q == 0) return;
  require_pointer(p.q, g.seq_q, "q");
  require_pointer(p.k, g.seq_k, "k");
  require_pointer(p.v, g.seq_k, "v");
  require_pointer(p.out, g.seq_q, "out");
  require(p.plan || g.exact() || g.a.num_blocks == 0, HA_INVALID,
          "plan is a null pointer; ha_cuda_attend takes a plan, ha_cuda_forward makes one");
  const AttendArgs args{p, attend_config(g)};
#define HA_CASE(T, DTYPE, D) \
  if (p.dtype == DTYPE && p.head_dim == D) return launch_attend<T, D>(args);
  HA_ATTEND_INSTANCES(HA_CASE)
#undef HA_CASE
}

void forward(HaParams p) {
  const Geometry g(p);
  if (!p.plan && !g.exact() && g.a.num_blocks && g.batch) {
    const Workspace w = workspace(g);
    int32_t* const blocks = reinterpret_cast<int32_t*>(scratch(p, w.bytes) + w.blocks);
    select(p, blocks);
    p.plan = blocks;
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
    ha::require(side == HA_QUERIES || side == HA_KEYS, HA_INVALID, "side is " + std::to_string(side) + "; it takes 0 (queries) or 1 (keys)");
    ha::require(rows >= 1 && rows <= 256, HA_INVALID, "rows is " + std::to_string(rows) + "; it takes an integer from 1 to 256");
    const ha::Geometry g(*params);
    const int64_t count = side == HA_QUERIES ? g.query_pools(rows) : g.key_pools(rows);
    ha::require((values && scales) || count == 0, HA_INVALID, "values or scales is a null pointer; they take device memory");
    ha::pool(*params, side, {values, scales, rows, count}, {});
  });
}

extern "C" int ha_cuda_select(const HaParams* params, int32_t* blocks) {
  return ha::guarded([&] {
    ha::check_supported(*params);
    ha::select(*params, blocks);
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
