// Stage 4: every tile of query rows gathers the keys it meets (rules 6 to 19) and absorbs them.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <utility>

#include "cpu.h"
#include "kernels.h"

namespace ha::cpu {
namespace {

const float* floats(const void* pointer) { return static_cast<const float*>(pointer); }

struct alignas(64) Row {
  float values[kRows];
};

// One thread's tile and the list of keys that wait to be absorbed.
class TileWorker {
 public:
  TileWorker(const HaParams& params, const int32_t* plan)
      : p_(params), g_(params), plan_(plan), kernels_(kernels()), buffer_(new Row[g_.head_dim + kTileKeys + g_.head_dim_v + 2]) {
    const double scale = g_.a.scale > 0 ? double(g_.a.scale) : 1.0 / std::sqrt(double(g_.head_dim));
    Row* next = buffer_.get();
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows)->values; };
    tile_ = {0, int(g_.head_dim), int(g_.head_dim_v), float(scale * M_LOG2E), take(g_.head_dim), take(kTileKeys),
             take(g_.head_dim_v), take(1), take(1)};
  }

  // Rows [first, last) of the list "head of the group, then query row" against all the keys they see.
  void exact(int64_t b, int64_t head_kv, int64_t first, int64_t last) {
    begin(b, head_kv, first, last);
    const int64_t length = g_.length(p_.lengths, b);
    if (!g_.a.causal) {
      add_range(0, length);
    } else {
      const auto [low, high] = std::minmax_element(position_, position_ + tile_.rows);
      add_range(0, min64(int64_t{*low} + 1, length));
      add_masked(max64(int64_t{*low} + 1, 0), min64(int64_t{*high} + 1, length));
    }
    finish();
  }

  // Rows of one head and one query block.
  void approximate(int64_t b, int64_t head, int64_t first, int64_t last) {
    const int64_t head_kv = head / g_.group(), line = head % g_.group() * g_.seq_q;
    begin(b, head_kv, line + first, line + last);
    const HaAttributes& a = g_.a;
    const int64_t length = g_.length(p_.lengths, b), position = g_.first() + first;
    const int64_t block = floor_div(position, a.block_size);
    const int64_t far = min64(g_.far(position, length), length);
    const int32_t* chosen = plan_ + ((b * g_.heads_q + head) * g_.query_blocks().size() + block - g_.query_blocks().start) * a.num_blocks;
    add_range(0, min64(a.sinks, far));
    for (int i = 0; i < a.num_blocks; ++i) {
      if (chosen[i] < 0) continue;
      const int64_t start = int64_t{chosen[i]} * a.block_size;
      add_range(max64(start, a.sinks), min64(start + a.block_size, far));
    }
    if (a.causal) {
      const int64_t last_position = g_.first() + last - 1;
      add_range(far, min64(position + 1, length));
      add_masked(max64(position + 1, 0), min64(last_position + 1, length));
    }
    add_samples(head, position, length, chosen);
    finish();
  }

 private:
  void begin(int64_t b, int64_t head_kv, int64_t first, int64_t last) {
    tile_.rows = int(last - first);
    const int64_t base = (b * g_.heads_kv + head_kv) * g_.group() * g_.seq_q + first;
    out_ = static_cast<float*>(p_.out) + base * g_.head_dim_v;
    lse_ = p_.lse ? p_.lse + base : nullptr;
    const float* q = floats(p_.q) + base * g_.head_dim;
    std::fill_n(tile_.queries, g_.head_dim * kRows, 0.0f);
    for (int r = 0; r < tile_.rows; ++r, q += g_.head_dim)
      for (int64_t d = 0; d < g_.head_dim; ++d) tile_.queries[d * kRows + r] = q[d];
    for (int r = 0; r < kRows; ++r) position_[r] = r < tile_.rows ? int32_t(g_.first() + (first + r) % g_.seq_q) : INT32_MIN;
    std::fill_n(tile_.sums, g_.head_dim_v * kRows, 0.0f);
    std::fill_n(tile_.reference, kRows, -FLT_MAX);
    std::fill_n(tile_.totals, kRows, 0.0f);
    const int64_t head = b * g_.heads_kv + head_kv;
    waiting_ = {floats(p_.k) + head * g_.seq_k * g_.head_dim, floats(p_.v) + head * g_.seq_k * g_.head_dim_v, index_, 0, nullptr, nullptr};
  }

  void flush() {
    if (waiting_.count > 0) kernels_.absorb(tile_, waiting_);
    waiting_.count = 0;
  }

  void push(int64_t key) {
    index_[waiting_.count++] = int32_t(key);
    if (waiting_.count == kTileKeys) flush();
  }

  void add_range(int64_t start, int64_t stop) {
    for (int64_t key = start; key < stop; ++key) push(key);
  }

  // Keys that some rows do not see because they come later.
  void add_masked(int64_t start, int64_t stop) {
    if (start >= stop) return;
    flush();
    waiting_.last_visible = position_;
    add_range(start, stop);
    flush();
    waiting_.last_visible = nullptr;
  }

  void add_samples(int64_t head, int64_t position, int64_t length, const int32_t* chosen) {
    const HaAttributes& a = g_.a;
    const int64_t tile = g_.local_block(position), total = g_.residual_candidates(tile, length);
    if (total == 0 || a.sample_size == 0) return;
    flush();
    waiting_.weights = weights_;
    for (int64_t s = 0; s < a.sample_size; ++s) {
      const Sample sample = draw_sample(a, total, s, head, g_.draw_start(tile));
      if (sample.key < 0) break;
      const int32_t block = int32_t(sample.key / a.block_size);
      if (std::find(chosen, chosen + a.num_blocks, block) != chosen + a.num_blocks) continue;
      weights_[waiting_.count] = sample.weight;
      push(sample.key);
    }
    flush();
    waiting_.weights = nullptr;
  }

  void finish() {
    flush();
    for (int r = 0; r < tile_.rows; ++r) {
      const float total = tile_.totals[r];
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      float* row = out_ + r * g_.head_dim_v;
      for (int64_t d = 0; d < g_.head_dim_v; ++d) row[d] = tile_.sums[d * kRows + r] * inverse;
      if (lse_) lse_[r] = total == 0.0f ? -INFINITY : float(double(tile_.reference[r]) * M_LN2 + std::log(double(total)));
    }
  }

  const HaParams& p_;
  const Geometry g_;
  const int32_t* plan_;
  const Kernels& kernels_;
  std::unique_ptr<Row[]> buffer_;
  Tile tile_{};
  KeySet waiting_{};
  alignas(64) int32_t index_[kTileKeys];
  alignas(64) float weights_[kTileKeys];
  alignas(64) int32_t position_[kRows];
  float* out_ = nullptr;
  float* lse_ = nullptr;
};

void attend_exact(const HaParams& params, const Geometry& g, Workers& workers) {
  // Few rows: a tile holds those of several heads of the group, which meet the same keys.
  const bool together = g.seq_q <= kRows;
  const int64_t line = together ? g.group() * g.seq_q : g.seq_q, lines = together ? 1 : g.group();
  const int64_t tiles = ceil_div(line, kRows), heads = g.batch * g.heads_kv * lines;
  for_each_unit(workers, heads * tiles, [&] {
    return [&, worker = std::make_unique<TileWorker>(params, nullptr)](int64_t unit) {
      const int64_t tile = tiles - 1 - unit / heads, head = unit % heads;  // the longest first
      const int64_t start = head % lines * line + tile * kRows;
      const int64_t stop = min64(start + kRows, (head % lines + 1) * line);
      worker->exact(head / lines / g.heads_kv, head / lines % g.heads_kv, start, stop);
    };
  });
}

void attend_approximate(const HaParams& params, const Geometry& g, const int32_t* blocks, Workers& workers) {
  const Range span = g.query_blocks();
  const int64_t heads = g.batch * g.heads_q;
  for_each_unit(workers, heads * span.size(), [&] {
    return [&, worker = std::make_unique<TileWorker>(params, blocks)](int64_t unit) {
      const int64_t head = unit / span.size(), block = span.start + unit % span.size();
      const int64_t start = max64(block * g.a.block_size - g.first(), 0);
      const int64_t stop = min64((block + 1) * g.a.block_size - g.first(), g.seq_q);
      for (int64_t row = start; row < stop; row += kRows)
        worker->approximate(head / g.heads_q, head % g.heads_q, row, min64(row + kRows, stop));
    };
  });
}

}  // namespace

void attend(const HaParams& params, const int32_t* blocks, Workers& workers) {
  const Geometry g(params);
  if (g.batch == 0 || g.seq_q == 0) return;
  g.exact() ? attend_exact(params, g, workers) : attend_approximate(params, g, blocks, workers);
}

}  // namespace ha::cpu
