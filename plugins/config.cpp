#include "config.h"

#include "geometry.h"

#ifndef HA_VERSION
#define HA_VERSION "0.0.0"
#endif
#ifndef HA_BUILD_ID
#define HA_BUILD_ID "unknown"
#endif
#ifndef HA_BACKENDS
#define HA_BACKENDS "[]"
#endif
#ifndef HA_ARCHITECTURES
#define HA_ARCHITECTURES "[]"
#endif
#define HA_TEXT_(x) #x
#define HA_TEXT(x) HA_TEXT_(x)  // of what the macro x stands for

namespace ha {
namespace {
thread_local std::string last_error;

void require(bool ok, const std::string& message) {
  if (!ok) throw Error(HA_INVALID, message);
}
}  // namespace

const IntegerField kFields[kIntegerFields] = {
    {"causal", &HaAttributes::causal, 0, 1, 1},
    {"block_size", &HaAttributes::block_size, 16, 256, 64},
    {"num_blocks", &HaAttributes::num_blocks, 0, 64, 8},
    {"pool_size", &HaAttributes::pool_size, 1, 256, 4},
    {"sample_size", &HaAttributes::sample_size, 0, 4096, 256},
    {"stratified", &HaAttributes::stratified, 0, 1, 1},
    {"local_size", &HaAttributes::local_size, 16, 65536, 1024},
    {"local_overlap", &HaAttributes::local_overlap, 0, 1, 1},
    {"sinks", &HaAttributes::sinks, 0, 4096, 64},
    {"exact_below", &HaAttributes::exact_below, 0, INT32_MAX, 4096},
    {"num_projections", &HaAttributes::num_projections, 1, 16, 7},
    {"seed", &HaAttributes::seed, 0, INT32_MAX, 0},
    {"strict_causal", &HaAttributes::strict_causal, 0, 1, 0},
    {"hash_centre", &HaAttributes::hash_centre, 0, 1, 0},
};

HaAttributes default_attributes() {
  HaAttributes attributes{};
  for (const auto& field : kFields) attributes.*field.member = field.fallback;
  attributes.selector = HA_BLOCKS;
  return attributes;
}

int32_t parse_selector(const std::string& name) {
  if (name == "blocks") return HA_BLOCKS;
  if (name == "sortlsh") return HA_SORTLSH;
  throw Error(HA_INVALID, "selector is '" + name + "'; it takes one of blocks, sortlsh");
}

const char* selector_name(int32_t selector) { return selector == HA_SORTLSH ? "sortlsh" : "blocks"; }

int64_t in_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    throw Error(HA_INVALID, std::string(name) + " is " + std::to_string(value) + "; it takes an integer from " + std::to_string(low) +
                                " to " + std::to_string(high));
  return value;
}

void check_attributes(const HaAttributes& a) {
  for (const auto& field : kFields) in_range(field.name, a.*field.member, field.low, field.high);
  require(a.scale == 0 || (a.scale >= 1e-20f && a.scale <= 1e20f),
          "scale is " + std::to_string(a.scale) + "; it takes 0 for 1/sqrt(head size), or a number from 1e-20 to 1e+20");
  require(a.selector == HA_BLOCKS || a.selector == HA_SORTLSH,
          "selector is " + std::to_string(a.selector) + "; it takes one of blocks (0), sortlsh (1)");
  require(!a.strict_causal || a.selector == HA_BLOCKS,
          "strict_causal is 1 with selector sortlsh, which looks ahead by whole nodes; take selector blocks, or strict_causal 0");
  require(!a.strict_causal || a.causal,
          "strict_causal is 1 with causal 0, where every row sees all keys; take causal 1, or strict_causal 0");
  if (a.selector == HA_SORTLSH) return;
  require(a.block_size % a.pool_size == 0, "block_size " + std::to_string(a.block_size) + " is not a multiple of pool_size " +
                                               std::to_string(a.pool_size) + "; choose a pool_size that divides it");
  require(!a.causal || a.local_size % a.block_size == 0,
          "local_size " + std::to_string(a.local_size) + " is not a multiple of block_size " + std::to_string(a.block_size) +
              "; the causal selector 'blocks' needs one");
}

void check(const HaParams& p) {
  require(p.struct_size == sizeof(HaParams), "HaParams has " + std::to_string(p.struct_size) + " bytes, this library's has " +
                                                 std::to_string(sizeof(HaParams)) + "; caller and library are of different builds");
  check_attributes(p.attributes);
  require(p.dtype == HA_FLOAT32 || p.dtype == HA_FLOAT16 || p.dtype == HA_BFLOAT16,
          "dtype is " + std::to_string(p.dtype) + "; it takes 0 (float32), 1 (float16) or 2 (bfloat16)");
  in_range("batch", p.batch, 0, INT32_MAX);
  in_range("heads_q", p.heads_q, 1, INT32_MAX);
  in_range("heads_kv", p.heads_kv, 1, INT32_MAX);
  in_range("seq_q", p.seq_q, 0, INT32_MAX);
  in_range("seq_k", p.seq_k, 0, INT32_MAX);
  in_range("head_dim", p.head_dim, 1, 256);
  in_range("head_dim_v", p.head_dim_v, 1, 256);
  require(p.heads_q % p.heads_kv == 0, std::to_string(p.heads_q) + " query heads over " + std::to_string(p.heads_kv) +
                                           " key heads; the first must be a multiple of the second");
}

void set_last_error(const std::string& message) noexcept {
  try {
    last_error = message;
  } catch (...) {  // out of memory: an empty text is better than ending the process
    last_error.clear();
  }
}

}  // namespace ha

extern "C" const char* ha_last_error(void) { return ha::last_error.c_str(); }

extern "C" const char* ha_build_info(void) {
  return "{\"version\": \"" HA_VERSION "\", \"abi\": " HA_TEXT(HA_ABI_VERSION) ", \"build_id\": \"" HA_BUILD_ID
         "\", \"backends\": " HA_BACKENDS ", \"architectures\": " HA_ARCHITECTURES ", \"compiler\": \"" __VERSION__ "\"}";
}

extern "C" int ha_check(const HaParams* params) {
  return ha::guarded([&] { ha::check(*params); });
}

extern "C" int ha_plan_dims(const HaParams* params, int64_t dims[3]) {
  return ha::guarded([&] {
    ha::check(*params);
    const ha::Geometry g(*params);
    dims[0] = g.plan_size();
    dims[1] = g.exact() ? 0 : g.sorts() ? g.levels() : g.query_blocks().size();
    dims[2] = g.exact() ? 0 : g.draws();
  });
}
