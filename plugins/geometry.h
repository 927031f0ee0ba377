// Where tiles lie, which keys a row meets and which samples are drawn: the rules of docs/operator.md as small inline
// functions, shared by the processor's and the GPU's kernels. hyperattention/selection.py says the same in Python.
#pragma once
#include "attention.h"

#ifdef __CUDACC__
#define HA_INLINE __host__ __device__ __forceinline__
#else
#define HA_INLINE inline
#endif

namespace ha {

constexpr int kDecodeRows = 64;   // rule 5
constexpr int kSuperblock = 256;  // rule 23
constexpr int kCoarsePool = 16;
constexpr int kKeptMin = 32;
constexpr int kKeptShare = 8;

HA_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
HA_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
HA_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
HA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return floor_div(a + b - 1, b); }

struct Range {
  int64_t start, stop;
  HA_INLINE int64_t size() const { return stop > start ? stop - start : 0; }
};

// One problem without its tensors. Positions: causal is aligned bottom-right (rule 1).
struct Geometry {
  HaAttributes a;
  int64_t batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v;

  HA_INLINE explicit Geometry(const HaParams& p)
      : a(p.attributes), batch(p.batch), heads_q(p.heads_q), heads_kv(p.heads_kv), seq_q(p.seq_q), seq_k(p.seq_k),
        head_dim(p.head_dim), head_dim_v(p.head_dim_v) {}

  HA_INLINE int64_t group() const { return heads_q / heads_kv; }
  HA_INLINE bool exact() const { return seq_k <= a.exact_below || seq_q <= kDecodeRows; }  // rule 5
  HA_INLINE int64_t first() const { return a.causal ? seq_k - seq_q : 0; }                  // position of row 0

  // Position tiles of `size` that hold a query row.
  HA_INLINE Range tiles(int64_t size) const {
    if (seq_q == 0) return {0, 0};
    return {floor_div(first(), size), floor_div(first() + seq_q - 1, size) + 1};
  }
  HA_INLINE Range query_blocks() const { return tiles(a.block_size); }
  HA_INLINE Range local_blocks() const { return a.causal ? tiles(a.local_size) : Range{0, 1}; }
  HA_INLINE int64_t query_pools(int64_t rows) const { return tiles(rows).size(); }
  HA_INLINE int64_t key_pools(int64_t rows) const { return ceil_div(seq_k, rows); }

  HA_INLINE int64_t length(const int32_t* lengths, int64_t b) const {  // rule 2
    return lengths ? max64(0, min64(lengths[b], seq_k)) : seq_k;
  }
  HA_INLINE int64_t live_rows(int64_t length) const {  // rule 3
    return a.causal || seq_q == seq_k ? max64(0, min64(length - first(), seq_q)) : seq_q;
  }
  HA_INLINE int64_t local_block(int64_t position) const { return a.causal ? floor_div(position, a.local_size) : 0; }
  HA_INLINE int64_t far(int64_t position, int64_t length) const {  // rule 9, first key that is not local
    if (!a.causal) return length;
    return max64(0, floor_div(position, a.local_size) - a.local_overlap) * a.local_size;
  }
  // Candidate key blocks of the query block that starts at `position` (rule 19).
  HA_INLINE Range candidates(int64_t position, int64_t length) const {
    return {a.sinks / a.block_size, ceil_div(min64(far(position, length), length), a.block_size)};
  }
  // Superblocks that hold these candidates (rule 23).
  HA_INLINE Range superblocks(Range candidates) const {
    const int64_t per = kSuperblock / a.block_size;
    return {candidates.start / per, ceil_div(candidates.stop, per)};
  }
  HA_INLINE bool may_use_superblocks() const { return kSuperblock % a.block_size == 0 && a.block_size % kCoarsePool == 0; }
  HA_INLINE bool uses_superblocks(Range candidates) const {
    return may_use_superblocks() && superblocks(candidates).size() > kKeptMin;
  }
  HA_INLINE static int64_t kept_superblocks(int64_t count) { return max64(kKeptMin, ceil_div(count, kKeptShare)); }
  // First position of a local block and the number of residual candidates of its rows (rules 11 and 13).
  HA_INLINE int64_t draw_start(int64_t local_block) const { return a.causal ? local_block * a.local_size : 0; }
  HA_INLINE int64_t residual_candidates(int64_t local_block, int64_t length) const {
    return max64(0, min64(far(draw_start(local_block), length), length) - a.sinks);
  }
};

// Output word 0 of Philox4x32-10 with key (key, 0) (rule 10).
HA_INLINE uint32_t philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key) {
  uint32_t k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

struct Sample {
  int64_t key;   // -1: there is no such sample
  float weight;  // its log is added to the logit
};

// Sample s of `sample_size` for one head and local block, drawn from `total` candidates behind the sinks (rules 14, 15).
HA_INLINE Sample draw_sample(const HaAttributes& a, int64_t total, int64_t s, int64_t head, int64_t start) {
  if (total <= 0) return {-1, 0.0f};
  const uint64_t u = philox(uint32_t(s), uint32_t(head), uint32_t(start), 0, uint32_t(a.seed));
  if (!a.stratified) return {a.sinks + int64_t((u * uint64_t(total)) >> 32), float(total) / float(a.sample_size)};
  const int64_t m = min64(a.sample_size, total);
  if (s >= m) return {-1, 0.0f};
  // floor(s total / m) without a 64-bit division: total = whole m + rest, and s rest stays below 2^24.
  const int32_t whole = int32_t(total) / int32_t(m), rest = int32_t(total) % int32_t(m);
  const int64_t low = s * whole + int32_t(s) * rest / int32_t(m), size = (s + 1) * whole + int32_t(s + 1) * rest / int32_t(m) - low;
  return {a.sinks + low + int64_t((u * uint64_t(size)) >> 32), float(size)};
}

}  // namespace ha
