// Stage 2: the selector `blocks` (rules 17 to 23). Every number in it is an exact integer or one IEEE operation.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "pools.h"
#include "selectors.h"
#include "workspace.h"

namespace ha::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Whether some query block of this shape is scored on two levels.
bool needs_coarse_pools(const Geometry& g) {
  if (!g.may_use_superblocks() || g.seq_q == 0) return false;
  return g.uses_superblocks(g.candidates(g.first() + g.seq_q - 1, g.seq_k));
}

struct SelectorMemory {
  QueryPools fine_q{}, coarse_q{};
  KeyPools fine_k{}, coarse_k{};
  int32_t* blocks = nullptr;
  size_t bytes = 0;

  SelectorMemory(const Geometry& g, void* workspace) {
    if (g.plan_size() == 0) return;
    Carver carver(workspace);
    place(g, g.a.pool_size, fine_q, fine_k, carver);
    if (needs_coarse_pools(g)) place(g, kCoarsePool, coarse_q, coarse_k, carver);
    blocks = carver.take<int32_t>(g.plan_size());
    bytes = carver.bytes();
  }

 private:
  static void place(const Geometry& g, int64_t rows, QueryPools& q, KeyPools& k, Carver& carver) {
    q.rows = k.rows = rows;
    q.pools = g.query_pools(rows).size();
    q.values = carver.take<int8_t>(g.batch * g.heads_q * q.pools * g.head_dim);
    q.factors = carver.take<float>(g.batch * g.heads_q * q.pools);
    k.groups = ceil_div(g.key_pools(rows), kPoolGroup);
    k.values = carver.take<int8_t>(g.batch * g.heads_kv * k.groups * packed_pairs(g) * kPoolGroup * 2);
    k.factors = carver.take<float>(g.batch * g.heads_kv * k.groups * kPoolGroup);
  }
};

struct Item {
  float score;
  int64_t index;
};

// Keeps the best `count` by score, ties to the smaller index, in ascending order (rule 21).
void keep_best(std::vector<Item>& items, int64_t count) {
  const auto end = items.begin() + min64(count, int64_t(items.size()));
  std::partial_sort(items.begin(), end, items.end(), [](const Item& x, const Item& y) {
    return x.score != y.score ? x.score > y.score : x.index < y.index;
  });
  items.erase(end, items.end());
  std::sort(items.begin(), items.end(), [](const Item& x, const Item& y) { return x.index < y.index; });
}

// One thread's selector.
class SelectWorker {
 public:
  SelectWorker(const HaParams& params, const SelectorMemory& memory)
      : p_(params), g_(params), m_(memory), kernels_(kernels()),
        scores_(size_t(g_.seq_k + 2 * kSuperblock + kPoolGroup), kNever) {}

  // The chosen key blocks of one query block: num_blocks numbers.
  void operator()(int64_t b, int64_t head, int64_t block, int32_t* out) {
    const HaAttributes& a = g_.a;
    const Range candidates = g_.candidates(block * a.block_size, g_.length(p_.lengths, b));
    const int64_t per_block = a.block_size / a.pool_size;
    std::vector<Range> parts{candidates};
    if (g_.uses_superblocks(candidates)) parts = keep_superblocks(b, head, block, candidates);
    load_queries(m_.fine_q, b, head, block);
    items_.clear();
    for (const Range part : parts) {
      score(m_.fine_k, b, head, part.start * per_block, part.stop * per_block);
      add_items(part, per_block, part.stop * per_block);
    }
    keep_best(items_, a.num_blocks);
    for (int i = 0; i < a.num_blocks; ++i) out[i] = i < int(items_.size()) ? int32_t(items_[i].index) : -1;
  }

 private:
  // Rule 23: the candidates inside the superblocks that score best with coarse pools.
  std::vector<Range> keep_superblocks(int64_t b, int64_t head, int64_t block, Range candidates) {
    const Range supers = g_.superblocks(candidates);
    const int64_t end = candidates.stop * g_.a.block_size / kCoarsePool, per_super = kSuperblock / g_.a.block_size;
    load_queries(m_.coarse_q, b, head, block);
    score(m_.coarse_k, b, head, supers.start * (kSuperblock / kCoarsePool), end);
    items_.clear();
    add_items(supers, kSuperblock / kCoarsePool, end);
    keep_best(items_, Geometry::kept_superblocks(supers.size()));
    std::vector<Range> parts;
    for (const Item& item : items_) {
      const int64_t first = item.index * per_super;
      parts.push_back({max64(first, candidates.start), min64(first + per_super, candidates.stop)});
    }
    return parts;
  }

  // The live query pools that score a block as int16 pairs, repeated up to a multiple of kScoreQueries (a maximum does not mind).
  void load_queries(const QueryPools& pools, int64_t b, int64_t head, int64_t block) {
    const int64_t start = g_.scoring_pools(block, pools.rows) - g_.query_pools(pools.rows).start;
    const int64_t first = max64(start, 0), last = min64(start + g_.a.block_size / pools.rows, pools.pools);
    const int64_t line = (b * g_.heads_q + head) * pools.pools;
    live_.clear();
    for (int64_t i = line + first; i < line + last; ++i)
      if (!std::isnan(pools.factors[i])) live_.push_back(i);
    while (!live_.empty() && live_.size() % kScoreQueries) live_.push_back(live_.back());
    const size_t count = live_.size();
    const int pairs = packed_pairs(g_);
    queries_.assign(count * pairs, 0);
    factors_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const int8_t* values = pools.values + live_[i] * g_.head_dim;
      factors_[i] = pools.factors[live_[i]];
      for (int64_t d = 0; d < g_.head_dim; ++d) {
        const uint32_t half = uint16_t(int16_t{values[d]});
        queries_[size_t(d / 2) * count + i] |= int32_t(d % 2 ? half << 16 : half);
      }
    }
  }

  // Writes scores_ of the key pools [first, last), and of others in the same groups.
  void score(const KeyPools& pools, int64_t b, int64_t head, int64_t first, int64_t last) {
    const int pairs = packed_pairs(g_);
    const int64_t line = (b * g_.heads_kv + head / g_.group()) * pools.groups;
    const PackedPools packed{pools.values + line * pairs * kPoolGroup * 2, pools.factors + line * kPoolGroup, pairs};
    const int64_t written = pools.groups * kPoolGroup;
    kernels_.score(queries_.data(), factors_.data(), int(factors_.size()), packed, first / kPoolGroup,
                   min64(ceil_div(last, kPoolGroup), pools.groups), scores_.data());
    if (last > written) std::fill(scores_.begin() + written, scores_.begin() + last, kNever);
  }

  // Items of `per` pools each, pools at or past `end` left out.
  void add_items(Range range, int64_t per, int64_t end) {
    for (int64_t item = range.start; item < range.stop; ++item)
      items_.push_back({*std::max_element(&scores_[item * per], &scores_[min64((item + 1) * per, end)]), item});
  }

  const HaParams& p_;
  const Geometry g_;
  const SelectorMemory& m_;
  const Kernels& kernels_;
  std::vector<float> scores_;  // by pool
  std::vector<Item> items_;
  std::vector<int64_t> live_;
  std::vector<int32_t> queries_;
  std::vector<float> factors_;
};

}  // namespace

size_t blocks_workspace_size(const Geometry& g) { return SelectorMemory(g, nullptr).bytes; }

int32_t* blocks_plan(const Geometry& g, void* workspace) { return SelectorMemory(g, workspace).blocks; }

void select_blocks(const HaParams& params, int32_t* blocks, Workers& workers) {
  const Geometry g(params);
  const SelectorMemory memory(g, params.workspace);
  fill(params, memory.fine_q, workers);
  fill(params, memory.fine_k, workers);
  if (memory.coarse_q.rows) {
    fill(params, memory.coarse_q, workers);
    fill(params, memory.coarse_k, workers);
  }
  const Range span = g.query_blocks();
  for_each_unit(workers, g.batch * g.heads_q * span.size(), [&] {
    return [&, worker = SelectWorker(params, memory)](int64_t unit) mutable {
      // The last blocks meet the most candidates: they go first.
      const int64_t heads = g.batch * g.heads_q, head = unit % heads, block = span.size() - 1 - unit / heads;
      worker(head / g.heads_q, head % g.heads_q, span.start + block, blocks + (head * span.size() + block) * g.a.num_blocks);
    };
  });
}

}  // namespace ha::cpu
