// Stage 2 with the selector `sortlsh` (rules 24 to 27): every token is hashed once, every node sorted by rank.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "selectors.h"
#include "workspace.h"

namespace ha::cpu {
namespace {

constexpr int64_t kTokensAUnit = 512;
constexpr int kDigit = 256;  // ranks are sorted by 8 bits at a time

// Rule 26's matrix as sign bits, [head_dim][kMaxProjections].
std::vector<uint32_t> sign_bits(const Geometry& g) {
  std::vector<uint32_t> bits;
  for (int64_t d = 0; d < g.head_dim; ++d) {
    const uint32_t word = sign_word(d, g.a.seed);
    for (int t = 0; t < kMaxProjections; ++t) bits.push_back(word >> t << 31);
  }
  return bits;
}

// One side of a call: its tokens [batch, heads, rows, head_dim] and their ranks [batch, heads, rows].
struct Side {
  bool queries;
  const float* tokens;
  int64_t heads, rows;
  uint16_t* ranks;
};

// What each sum has to be above for its bit: nothing, or with hash_centre the sum of the mean of `count` tokens.
void least_sums(const Geometry& g, const float* tokens, int64_t count, const std::vector<uint32_t>& signs, float* least) {
  std::fill_n(least, kMaxProjections, 0.0f);
  if (!g.a.hash_centre || count == 0) return;
  const int64_t taken = min64(count, kCentreTokens);
  std::vector<float> total(size_t(g.head_dim)), part(size_t(g.head_dim));
  for (int64_t first = 0; first < taken; first += kCentrePart) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t s = first; s < min64(first + kCentrePart, taken); ++s)
      for (int64_t d = 0; d < g.head_dim; ++d) part[size_t(d)] += tokens[s * count / taken * g.head_dim + d];
    for (int64_t d = 0; d < g.head_dim; ++d) total[size_t(d)] += part[size_t(d)];
  }
  for (int64_t d = 0; d < g.head_dim; ++d) {
    const float mean = total[size_t(d)] / float(taken);
    for (int t = 0; t < g.a.num_projections; ++t) least[t] += signs[size_t(d * kMaxProjections + t)] ? -mean : mean;
  }
}

void rank_tokens(const Geometry& g, const Side& side, const int32_t* lengths, Workers& workers) {
  const std::vector<uint32_t> signs = sign_bits(g);
  const int64_t slices = g.batch * side.heads, units = ceil_div(side.rows, kTokensAUnit);
  std::vector<float> least(size_t(slices * kMaxProjections));
  for_each_unit(workers, slices, [&] {
    return [&](int64_t slice) {
      const Range centred = centred_tokens(g, side.queries, g.length(lengths, slice / side.heads));
      const float* const from = side.tokens + (slice * side.rows + centred.start) * g.head_dim;
      least_sums(g, from, centred.size(), signs, &least[size_t(slice * kMaxProjections)]);
    };
  });
  for_each_unit(workers, slices * units, [&] {
    return [&](int64_t unit) {
      const int64_t slice = unit / units, start = unit % units * kTokensAUnit, first = slice * side.rows + start;
      const int64_t count = min64(kTokensAUnit, side.rows - start);
      const float* const from = side.tokens + first * g.head_dim;
      const float* const above = &least[size_t(slice * kMaxProjections)];
      kernels().hash(from, count, int(g.head_dim), signs.data(), above, g.a.num_projections, side.ranks + first);
      for (int64_t i = first; i < first + count; ++i) side.ranks[i] = uint16_t(gray_rank(side.ranks[i]));
    };
  });
}

// Sorts `from[0..count)` into `to` by one digit of their ranks, equal ones in the order that they came in. `from` is null for
// the numbers first, first + 1, ...
void sort_digit(const uint16_t* ranks, int shift, const int32_t* from, int32_t first, int64_t count, int32_t* to) {
  int32_t ends[kDigit + 1] = {};
  const auto at = [&](int64_t i) { return from ? from[i] : first + int32_t(i); };
  const auto digit = [&](int32_t token) { return (ranks[token] >> shift) % kDigit; };
  for (int64_t i = 0; i < count; ++i) ++ends[digit(at(i)) + 1];
  for (int d = 0; d < kDigit; ++d) ends[d + 1] += ends[d];
  for (int64_t i = 0; i < count; ++i) to[ends[digit(at(i))]++] = at(i);
}

// Writes `members` by (rank, position) to their own slots.
void sort_members(const uint16_t* ranks, Range members, int bits, int32_t* slots, std::vector<int32_t>& scratch) {
  const int64_t count = members.size();
  int32_t* out = slots + members.start;
  if (bits <= 8) return sort_digit(ranks, 0, nullptr, int32_t(members.start), count, out);
  scratch.resize(size_t(count));
  sort_digit(ranks, 0, nullptr, int32_t(members.start), count, scratch.data());
  sort_digit(ranks, 8, scratch.data(), 0, count, out);
}

struct NodeName {
  int level;
  int64_t m;
};

std::vector<NodeName> largest_first(const Geometry& g) {
  std::vector<NodeName> names;
  for (int level = g.levels() - 1; level >= 0; --level) {
    const Range nodes = g.nodes_of_level(level);
    for (int64_t m = nodes.start; m < nodes.stop; ++m) names.push_back({level, m});
  }
  return names;
}

}  // namespace

SortMemory::SortMemory(const Geometry& g, void* workspace) {
  if (g.exact()) return;
  Carver carver(workspace);
  const int64_t rows = g.batch * g.heads_q * g.seq_q;
  query_ranks = carver.take<uint16_t>(rows);
  key_ranks = carver.take<uint16_t>(g.batch * g.heads_kv * g.seq_k);
  references = carver.take<float>(rows);
  totals = carver.take<float>(rows);
  plan = carver.take<int32_t>(g.plan_size());
  bytes = carver.bytes();
}

void select_sortlsh(const HaParams& params, int32_t* plan, Workers& workers) {
  const Geometry g(params);
  const SortMemory memory(g, params.workspace);
  std::fill_n(plan, g.plan_size(), -1);
  const std::vector<NodeName> names = largest_first(g);
  if (names.empty()) return;
  rank_tokens(g, {true, static_cast<const float*>(params.q), g.heads_q, g.seq_q, memory.query_ranks}, params.lengths, workers);
  rank_tokens(g, {false, static_cast<const float*>(params.k), g.heads_kv, g.seq_k, memory.key_ranks}, params.lengths, workers);
  const int64_t levels = g.levels(), lines = g.batch * g.heads_q;
  int32_t* const key_plan = plan + lines * levels * g.seq_q;
  for_each_unit(workers, (lines + g.batch * g.heads_kv) * int64_t(names.size()), [&] {
    return [&, scratch = std::vector<int32_t>()](int64_t unit) mutable {
      const int64_t all = lines + g.batch * g.heads_kv;
      const NodeName name = names[size_t(unit / all)];
      const bool queries = unit % all < lines;
      const int64_t line = queries ? unit % all : unit % all - lines;
      const int64_t length = g.length(params.lengths, line / (queries ? g.heads_q : g.heads_kv));
      const Node node = g.node(name.level, name.m, length);
      if (node.empty()) return;
      if (!queries) {
        int32_t* slots = key_plan + (line * levels + name.level) * g.seq_k;
        return sort_members(memory.key_ranks + line * g.seq_k, node.keys, g.a.num_projections, slots, scratch);
      }
      int32_t* slots = plan + (line * levels + name.level) * g.seq_q;
      const int64_t dead = node.rows.start + node.live;
      sort_members(memory.query_ranks + line * g.seq_q, {node.rows.start, dead}, g.a.num_projections, slots, scratch);
      for (int64_t row = dead; row < node.rows.stop; ++row) slots[row] = int32_t(row);
    };
  });
}

}  // namespace ha::cpu
