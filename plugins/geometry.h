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

struct Node;

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

  HA_INLINE bool sorts() const { return a.selector == HA_SORTLSH; }

  // Position tiles of `size` that hold a query row.
  HA_INLINE Range tiles(int64_t size) const {
    if (seq_q == 0) return {0, 0};
    return {floor_div(first(), size), floor_div(first() + seq_q - 1, size) + 1};
  }
  HA_INLINE Range query_blocks() const { return tiles(a.block_size); }
  HA_INLINE Range local_blocks() const { return a.causal ? tiles(a.local_size) : Range{0, 1}; }
  // Query pools of `rows` positions, counted from position 0. Strict: the one before the first query block is row 0 alone (rule 22).
  HA_INLINE Range query_pools(int64_t rows) const {
    if (!a.strict_causal || seq_q == 0) return tiles(rows);
    return {floor_div(query_blocks().start * a.block_size, rows) - 1, tiles(rows).stop};
  }
  // The first of the query pools that score a query block, counted likewise (rules 20 and 22).
  HA_INLINE int64_t scoring_pools(int64_t block, int64_t rows) const { return (block - a.strict_causal) * (a.block_size / rows); }
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

  // --- selector `sortlsh`: the dyadic tree of local blocks (rules 24 and 25) ---

  // Levels of the tree; its root joins all local blocks. Non-causal: one, whose only node meets everything.
  HA_INLINE int levels() const {
    if (!a.causal) return 1;
    int levels = 0;
    for (int64_t last = seq_k > 0 ? (seq_k - 1) / a.local_size : 0; last; last >>= 1) ++levels;
    return levels;
  }
  // Nodes of a level that hold a query row: node m has its rows in segment 2m + 1 of 2^level local blocks, its keys in 2m.
  HA_INLINE Range nodes_of_level(int level) const {
    if (seq_q == 0) return {0, 0};
    if (!a.causal) return {0, 1};
    if (level == 0 && a.local_overlap) return {0, 0};  // its keys are the rows' local part
    const int64_t size = segment(level), first_position = max64(first(), 0), last_position = first() + seq_q - 1;
    if (last_position < 0) return {0, 0};
    return {(first_position / size) / 2, (last_position / size + 1) / 2};
  }
  HA_INLINE int64_t node_count() const {
    int64_t count = 0;
    for (int level = 0; level < levels(); ++level) count += nodes_of_level(level).size();
    return count;
  }
  // Positions of one segment of a level.
  HA_INLINE int64_t segment(int level) const { return int64_t{a.local_size} << level; }
  // Node m of a level under `length` valid keys.
  HA_INLINE Node node(int level, int64_t m, int64_t length) const;
  // Levels, as bits, at which the row at `position` belongs to a node that has keys.
  HA_INLINE uint64_t levels_of(int64_t position, int64_t length) const {
    const int64_t from = min64(a.sinks, length);
    if (!a.causal) return length > from;
    uint64_t found = 0;
    const int64_t c = position < 0 ? 0 : position / a.local_size;
    for (int level = a.local_overlap; c >> level; ++level)
      if (c >> level & 1) {
        const int64_t stop = (c >> level) * segment(level);
        found |= uint64_t{min64(stop, length) > max64(stop - segment(level), from)} << level;
      }
    return found;
  }

  // --- plan and draws of either selector ---

  // int32 elements of the plan.
  HA_INLINE int64_t plan_size() const {
    if (exact()) return 0;
    return batch * (sorts() ? levels() * (heads_q * seq_q + heads_kv * seq_k) : heads_q * query_blocks().size() * a.num_blocks);
  }
  // Draws of samples a head.
  HA_INLINE int64_t draws() const { return sorts() ? node_count() : local_blocks().size(); }
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

// Sample s of `sample_size` for one head and draw, as an index into its `total` candidates (rules 14 and 15).
HA_INLINE Sample draw_index(const HaAttributes& a, int64_t total, int64_t s, int64_t head, int64_t start) {
  if (total <= 0) return {-1, 0.0f};
  const uint64_t u = philox(uint32_t(s), uint32_t(head), uint32_t(start), 0, uint32_t(a.seed));
  if (!a.stratified) return {int64_t((u * uint64_t(total)) >> 32), float(total) / float(a.sample_size)};
  const int64_t m = min64(a.sample_size, total);
  if (s >= m) return {-1, 0.0f};
  // floor(s total / m) without a 64-bit division: total = whole m + rest, and s rest stays below 2^24.
  const int32_t whole = int32_t(total) / int32_t(m), rest = int32_t(total) % int32_t(m);
  const int32_t part = int32_t(s) * rest / int32_t(m), more = int32_t(s) * rest - part * int32_t(m) + rest >= int32_t(m);
  const int32_t size = whole + more;  // of the stratum: the next one's start less this one's
  return {s * whole + part + int64_t((u * uint64_t(size)) >> 32), float(size)};
}

// The same as a key, where the candidates are the keys behind the sinks in position order (selector `blocks`).
HA_INLINE Sample draw_sample(const HaAttributes& a, int64_t total, int64_t s, int64_t head, int64_t start) {
  Sample sample = draw_index(a, total, s, head, start);
  if (sample.key >= 0) sample.key += a.sinks;
  return sample;
}

// --- selector `sortlsh` ---------------------------------------------------------------------------------------------

struct Node {
  Range rows, keys;  // query row indices (live and dead), keys behind the sinks and inside the length
  int64_t start;     // of its draws' counter: the first position of its rows' segment (rule 11)
  int64_t live;      // rows that are not dead (rule 3): its first ones
  HA_INLINE bool empty() const { return rows.size() == 0 || keys.size() == 0; }
};

HA_INLINE Node Geometry::node(int level, int64_t m, int64_t length) const {
  const int64_t from = min64(a.sinks, length);
  if (!a.causal) return {{0, seq_q}, {from, length}, 0, live_rows(length)};
  const int64_t size = segment(level), middle = (2 * m + 1) * size;
  const int64_t low = max64(max64(middle, first()) - first(), 0), high = min64(middle + size - first(), seq_q);
  const int64_t live = max64(0, min64(live_rows(length), high) - low);
  return {{low, max64(high, low)}, {max64(middle - size, from), min64(middle, length)}, middle, live};
}

// Key blocks, in the node's sorted order, that query block `block` meets; `live` = live rows of the node (rule 28).
HA_INLINE Range taken_blocks(const HaAttributes& a, int64_t block, int64_t live, int64_t keys) {
  const int64_t nq = max64(1, ceil_div(live, a.block_size)), nk = ceil_div(keys, a.block_size), t = min64(a.num_blocks, nk);
  const int64_t centre = min64((2 * block + 1) * nk / (2 * nq), nk - 1);
  const int64_t start = max64(0, min64(centre - t / 2, nk - t));
  return {start, start + t};
}

// With hash_centre the mean of up to 4,096 tokens, these apart, is subtracted from what is hashed. They are added up in parts (rule 26).
constexpr int kCentreParts = 32;
constexpr int kCentrePart = 128;
constexpr int kCentreTokens = kCentreParts * kCentrePart;

// The tokens of one batch row and head whose mean it is.
HA_INLINE Range centred_tokens(const Geometry& g, bool queries, int64_t length) {
  return queries ? Range{0, g.live_rows(length)} : Range{min64(g.a.sinks, length), length};
}

// Signs of all projections for one coordinate: bit t is set where the entry is -1 (rule 26).
HA_INLINE uint32_t sign_word(int64_t coordinate, int32_t seed) { return philox(uint32_t(coordinate), 0, 0, 1, uint32_t(seed)); }

// Rank of a code: the inverse Gray code, so that neighbouring ranks differ in one bit (rule 27).
HA_INLINE uint32_t gray_rank(uint32_t code) {
  for (int shift = 1; shift <= 8; shift *= 2) code ^= code >> shift;
  return code;
}

}  // namespace ha
