#include "tile.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <utility>

namespace ha::cpu {

TileWorker::TileWorker(const HaParams& params)
    : p_(params), g_(params), kernels_(kernels()), buffer_(new LaneRow[g_.head_dim + kTileKeys + g_.head_dim_v + 2]) {
  const double scale = g_.a.scale > 0 ? double(g_.a.scale) : 1.0 / std::sqrt(double(g_.head_dim));
  LaneRow* next = buffer_.get();
  const auto take = [&](int64_t rows) { return std::exchange(next, next + rows)->values; };
  tile_ = {0, int(g_.head_dim), int(g_.head_dim_v), float(scale * M_LOG2E), take(g_.head_dim), take(kTileKeys),
           take(g_.head_dim_v), take(1), take(1)};
}

void TileWorker::begin(int64_t b, int64_t head_kv) {
  tile_.rows = 0;
  std::fill_n(tile_.queries, g_.head_dim * kRows, 0.0f);
  std::fill_n(tile_.sums, g_.head_dim_v * kRows, 0.0f);
  std::fill_n(tile_.reference, kRows, -FLT_MAX);
  std::fill_n(tile_.totals, kRows, 0.0f);
  std::fill_n(last_visible_, kRows, INT32_MIN);
  const int64_t head = b * g_.heads_kv + head_kv;
  waiting_ = {static_cast<const float*>(p_.k) + head * g_.seq_k * g_.head_dim,
              static_cast<const float*>(p_.v) + head * g_.seq_k * g_.head_dim_v, index_, 0, nullptr, nullptr};
}

void TileWorker::add_row(int64_t line, int64_t last_visible) {
  const int r = tile_.rows++;
  lines_[r] = line;
  last_visible_[r] = int32_t(last_visible);
  const float* q = static_cast<const float*>(p_.q) + line * g_.head_dim;
  for (int64_t d = 0; d < g_.head_dim; ++d) tile_.queries[d * kRows + r] = q[d];
}

void TileWorker::resume(const float* references, const float* totals) {
  for (int r = 0; r < tile_.rows; ++r) {
    const int64_t line = lines_[r];
    if (totals[line] == 0.0f) continue;  // met nothing; its output is not written yet
    tile_.reference[r] = references[line];
    tile_.totals[r] = totals[line];
    const float* sums = static_cast<const float*>(p_.out) + line * g_.head_dim_v;
    for (int64_t d = 0; d < g_.head_dim_v; ++d) tile_.sums[d * kRows + r] = sums[d];
  }
}

void TileWorker::suspend(float* references, float* totals) {
  flush();
  for (int r = 0; r < tile_.rows; ++r) {
    const int64_t line = lines_[r];
    references[line] = tile_.reference[r];
    totals[line] = tile_.totals[r];
    float* sums = static_cast<float*>(p_.out) + line * g_.head_dim_v;
    for (int64_t d = 0; d < g_.head_dim_v; ++d) sums[d] = tile_.sums[d * kRows + r];
  }
}

void TileWorker::finish() {
  flush();
  for (int r = 0; r < tile_.rows; ++r) {
    const int64_t line = lines_[r];
    const float total = tile_.totals[r];
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    float* row = static_cast<float*>(p_.out) + line * g_.head_dim_v;
    for (int64_t d = 0; d < g_.head_dim_v; ++d) row[d] = tile_.sums[d * kRows + r] * inverse;
    if (p_.lse) p_.lse[line] = total == 0.0f ? -INFINITY : float(double(tile_.reference[r]) * M_LN2 + std::log(double(total)));
  }
}

}  // namespace ha::cpu
