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

// What fetch_row will read of a row is brought into L2 meanwhile.
HA_DEVICE void prefetch_row(const HopperArgs& args, int64_t slice, const Row& row) {
  constexpr int kLine = 128;
  if (!row.stored) return;
  const int v_row = int(args.p.head_dim_v) * 2;
  const int64_t at = slice * args.p.seq_q + row.index;
  for (int byte = 0; byte < v_row; byte += kLine) prefetch(static_cast<const char*>(args.p.out) + at * v_row + byte);
  prefetch(args.lse + at);
}

// Divides by the sums and writes O and LSE of a thread's two rows. kStored: they may have met keys in earlier launches; then the stored
// output counts as the value of one more key, and `row` are SeenRows: fetched before other rows are written, which the compiler cannot tell
// from these. The steps of both rows stand side by side, so that one's wait is the other's work.
template <class T, int P, bool kStored, class Rows, class AnyRow>
HA_DEVICE void store_rows(const HopperArgs& args, const Rows& rows, int thread, int64_t slice, const AnyRow (&row)[2]) {
  const int v_row = int(args.p.head_dim_v) * 2, t = thread % 4;
  float total[2] = {rows.sum[0], rows.sum[1]}, top[2], scale[2], weight[2];
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] += shuffle_xor(total[half], mask);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = rows.largest[half];
    scale[half] = 1.0f;
    if constexpr (kStored) {
      const float seen = row[half].lse * kLog2E, higher = fmaxf(top[half], seen), base = higher == -INFINITY ? 0.0f : higher;
      scale[half] = exp2_fast(top[half] - base);
      weight[half] = exp2_fast(seen - base);
      total[half] = fmaf(total[half], scale[half], weight[half]);
      top[half] = higher;
    }
    const float inverse = total[half] == 0.0f ? 0.0f : reciprocal_fast(total[half]);
    scale[half] *= inverse;
    if constexpr (kStored) weight[half] *= inverse;
  }
  const int64_t start = slice * args.p.seq_q;
  if (args.lse) {  // two of the four threads that share rows write one each
    const int index = t == 0 ? row[0].index : row[1].index;
    const float sum = t == 0 ? total[0] : total[1], lse = ((t == 0 ? top[0] : top[1]) + log2_fast(sum)) * kLn2;
    if (t < 2 && index >= 0) args.lse[start + index] = sum == 0.0f ? -INFINITY : lse;
  }
  char* out[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) out[half] = static_cast<char*>(args.p.out) + (start + row[half].index) * v_row + t * 16;
  // Pieces of 16 bytes, four at a time: of both rows, or of one above 64 columns.
  constexpr int kTogether = 4, kPieces = P / 32;
#pragma unroll
  for (int first = 0; first < 2 * kPieces; first += kTogether) {
    Words4 seen[kTogether], pieces[kTogether];
    if constexpr (kStored) {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) seen[n] = row[(first + n) / kPieces].words[(first + n) % kPieces];
      transpose_quads(seen, thread);
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int half = (first + n) / kPieces, m = (first + n) % kPieces;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = rows.o[(4 * m + i) * 4 + 2 * half] * scale[half], y = rows.o[(4 * m + i) * 4 + 2 * half + 1] * scale[half];
        if constexpr (kStored) {
          x = fmaf(to_float(T{uint16_t(seen[n].w[i])}), weight[half], x);
          y = fmaf(to_float(T{uint16_t(seen[n].w[i] >> 16)}), weight[half], y);
        }
        pieces[n].w[i] = pack<T>(x, y);
      }
    }
    transpose_quads(pieces, thread);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int half = (first + n) / kPieces, m = (first + n) % kPieces;
      if (row[half].index >= 0 && (4 * m + t) * 16 < v_row) *reinterpret_cast<Words4*>(out[half] + m * 64) = pieces[n];
    }
  }
}

}  // namespace ha
