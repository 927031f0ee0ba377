// How a warp group writes its rows of O and LSE.
#pragma once
#include "sm90_state.cuh"

namespace ha {

// A row, and a thread's part of what earlier launches have stored of it, as it lies in memory.
template <int P>
struct SeenRow {
  int index;
  float lse;
  Words4 words[P / 32];
};

template <int P>
HA_DEVICE SeenRow<P> fetch_row(const HopperArgs& args, int thread, int64_t slice, const Row& row) {
  const int v_row = int(args.p.head_dim_v) * 2;
  const int64_t at = slice * args.p.seq_q + max(row.index, 0);
  const char* const out = static_cast<const char*>(args.p.out) + at * v_row;
  SeenRow<P> seen;
  seen.index = row.index;
  seen.lse = row.stored ? args.lse[at] : -INFINITY;
#pragma unroll
  for (int m = 0; m < P / 32; ++m) {
    const int byte = (4 * m + thread % 4) * 16;
    seen.words[m] = row.stored && byte < v_row ? *reinterpret_cast<const Words4*>(out + byte) : Words4{};
  }
  return seen;
}

// Divides by the sums and writes O and LSE. kStored: rows may have met keys in earlier launches; then the stored output counts as the
// value of one more key. `row_of(half)` gives the thread's row of either half, then a SeenRow: fetched before other rows are written, which
// the compiler cannot tell from these.
template <class T, int P, bool kStored, class State, class RowOf>
HA_DEVICE void store_rows(const HopperArgs& args, State& state, int thread, int64_t slice, RowOf&& row_of) {
  const int v_row = int(args.p.head_dim_v) * 2, t = thread % 4;
  const auto byte_of = [t](int m) { return (4 * m + t) * 16; };  // of a row, where the thread's piece m lies
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto row = row_of(half);
    const int64_t at = slice * args.p.seq_q + max(row.index, 0);
    char* const out = static_cast<char*>(args.p.out) + at * v_row;
    Words4 seen[P / 32];
    float seen_lse = -INFINITY;
    if constexpr (kStored) {
      seen_lse = row.lse;
#pragma unroll
      for (int m = 0; m < P / 32; ++m) seen[m] = row.words[m];
    }
    float total = state.sum[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    float top = state.largest[half], scale = 1.0f, weight = 0.0f;
    if (kStored && seen_lse != -INFINITY) {
      top = fmaxf(top, seen_lse * kLog2E);
      scale = exp2_fast(state.largest[half] - top);
      weight = exp2_fast(seen_lse * kLog2E - top);
      total = total * scale + weight;
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    scale *= inverse;
    weight *= inverse;
    if (args.lse && t == 0 && row.index >= 0) args.lse[at] = total == 0.0f ? -INFINITY : (top + log2f(total)) * kLn2;
#pragma unroll
    for (int m = 0; m < P / 32; ++m) {
      if constexpr (kStored) transpose_quad(seen[m].w, thread);
      Words4 piece;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = state.o[(4 * m + i) * 4 + 2 * half] * scale, y = state.o[(4 * m + i) * 4 + 2 * half + 1] * scale;
        if constexpr (kStored) {
          x = fmaf(to_float(T{uint16_t(seen[m].w[i])}), weight, x);
          y = fmaf(to_float(T{uint16_t(seen[m].w[i] >> 16)}), weight, y);
        }
        piece.w[i] = pack<T>(x, y);
      }
      transpose_quad(piece.w, thread);
      if (row.index >= 0 && byte_of(m) < v_row) *reinterpret_cast<Words4*>(out + byte_of(m)) = piece;
    }
  }
}

}  // namespace ha
