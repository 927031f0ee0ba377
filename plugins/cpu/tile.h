// A tile of query rows and the keys that wait to be absorbed: what every way of attending is built from.
#pragma once
#include <memory>

#include "cpu.h"
#include "kernels.h"

namespace ha::cpu {

struct alignas(64) LaneRow {
  float values[kRows];
};

// One thread's tile. Calls: begin, add_row for each row, any number of add_*, then finish.
class TileWorker {
 protected:
  explicit TileWorker(const HaParams& params);

  // An empty tile over one key head.
  void begin(int64_t b, int64_t head_kv);
  // `line`: number of the row in [batch * heads_q * seq_q]. add_masked hides keys past `last_visible` from it.
  void add_row(int64_t line, int64_t last_visible);

  // The rows go on from what they met before, and leave it again (the sums go to the output).
  void resume(const float* references, const float* totals);
  void suspend(float* references, float* totals);
  // Writes the rows' output and the logarithm of their sums.
  void finish();

  void push(int64_t key) {
    index_[waiting_.count++] = int32_t(key);
    if (waiting_.count == kTileKeys) flush();
  }
  void push(int64_t key, float weight) {
    weights_[waiting_.count] = weight;
    push(key);
  }
  void flush() {
    if (waiting_.count > 0) kernels_.absorb(tile_, waiting_);
    waiting_.count = 0;
  }
  // Adds what `body` pushes, hidden from the rows that it lies past, or with weights.
  template <class F>
  void masked(F&& body) {
    flush();
    waiting_.last_visible = last_visible_;
    body();
    flush();
    waiting_.last_visible = nullptr;
  }
  template <class F>
  void weighted(F&& body) {
    flush();
    waiting_.weights = weights_;
    body();
    flush();
    waiting_.weights = nullptr;
  }

  void add_range(int64_t start, int64_t stop) {
    for (int64_t key = start; key < stop; ++key) push(key);
  }
  // Keys from `start` up to each row's own position; `first` and `last` are the least and the largest position.
  void add_causal(int64_t start, int64_t first, int64_t last, int64_t length) {
    add_range(start, min64(first + 1, length));
    masked([&] { add_range(max64(first + 1, start), min64(last + 1, length)); });
  }

  const HaParams& p_;
  const Geometry g_;
  Tile tile_{};

 private:
  const Kernels& kernels_;
  std::unique_ptr<LaneRow[]> buffer_;
  KeySet waiting_{};
  int64_t lines_[kRows];
  alignas(64) int32_t index_[kTileKeys];
  alignas(64) float weights_[kTileKeys];

 protected:
  alignas(64) int32_t last_visible_[kRows];
};

}  // namespace ha::cpu
