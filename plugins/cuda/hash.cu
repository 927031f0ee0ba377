// The ranks of `sortlsh` (rules 26 and 27): every row of Q and K is hashed once. Tensor cores add up the signed elements of a warp's
// 32 rows and, beside them, the elements' sizes, which bound how far such a sum can be from the rule's. A row with a sum whose sign is
// in doubt is added up again in the rule's order.
#include <type_traits>

#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kWarps = kHashThreads / 32;
constexpr int kGroups = kHashTileRows / 16;  // of rows: one operand each, of which lane l has rows l / 4 and l / 4 + 8
constexpr int kBatch = 2;                    // chunks of kHashLanePieces pieces whose loads are in flight at once
constexpr uint32_t kSizes = 0x7FFF7FFFu;     // a pair of 16-bit floats without their signs

// fp32 becomes three bfloat16 that add up to it, each of which goes through the tensor cores.
template <class T>
using Operand = std::conditional_t<sizeof(T) == 4, Bfloat16, T>;
template <class T>
constexpr int kTerms = sizeof(T) == 4 ? 3 : 1;
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, Half> ? 0x3C003C00u : 0x3F803F80u;

// Adds one piece of each of a lane's two rows: to `sum` under the signs of each 8 projections, to `size` as absolute values. Where an
// element stands in the operand does not matter as long as its signs stand there too.
template <class T, int kTiles>
HA_DEVICE void add_pieces(const Words4& low, const Words4& high, const Words4 (&signs)[kTiles], float (&sum)[kTiles][4], float (&size)[4]) {
  const auto add = [&](const uint32_t(&a)[4], int step, bool sized) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) multiply_add<Operand<T>>(sum[tile], a, signs[tile].w[2 * step], signs[tile].w[2 * step + 1]);
    const uint32_t b[4] = {a[0] & kSizes, a[1] & kSizes, a[2] & kSizes, a[3] & kSizes};
    if (sized) multiply_add<Operand<T>>(size, b, kOnes<T>, kOnes<T>);
  };
  if constexpr (sizeof(T) == 4) {
    float x[2][4];
    unpack<T>(low, x[0]);
    unpack<T>(high, x[1]);
#pragma unroll
    for (int term = 0; term < kTerms<T>; ++term) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* const pair = x[i % 2] + i / 2 * 2;
        const uint32_t first = float_bits(pair[0]) & 0xFFFF0000u, second = float_bits(pair[1]) & 0xFFFF0000u;
        a[i] = first >> 16 | second;
        pair[0] -= bits_float(first);  // exact, as are the terms: 8 of 24 bits each
        pair[1] -= bits_float(second);
      }
      add(a, 0, term == 0);
    }
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) add({low.w[2 * step], high.w[2 * step], low.w[2 * step + 1], high.w[2 * step + 1]}, step, true);
  }
}

// The code of one row as rule 26 adds it up; lane t has projection t.
template <class T>
HA_DEVICE uint32_t exact_code(const char* row, int pieces, const uint32_t* words, int lane) {
  float sum = 0.0f;
  for (int piece = 0; piece < pieces; ++piece) {
    float x[kPieceElements<T>];
    unpack<T>(load16(row + piece * 16), x);
#pragma unroll
    for (int i = 0; i < kPieceElements<T>; ++i)
      sum = add_rn(sum, bits_float(float_bits(x[i]) ^ words[piece * kPieceElements<T> + i] >> lane << 31));
  }
  return ballot(sum > 0.0f);
}

// In shared memory: the words of rule 26, and of each piece and projection the signs in a piece's layout.
template <class T, int kProjections>
HA_DEVICE void write_signs(const Geometry& g, uint32_t* words, Words4* signs, int pieces) {
  constexpr int kPairs = kPieceElements<T> / 2;
  for (int d = thread_index(); d < g.head_dim; d += kHashThreads) words[d] = sign_word(d, g.a.seed);
  sync_block();
  for (int at = thread_index(); at < pieces * kProjections; at += kHashThreads) {
    const int t = at % kProjections, d = at / kProjections * kPieceElements<T>;
    Words4 piece{};
    for (int pair = 0; pair < kPairs && d + 2 * pair < g.head_dim; ++pair)
      piece.w[pair] = kOnes<T> | (words[d + 2 * pair] >> t & 1u) << 15 | (words[d + 2 * pair + 1] >> t & 1u) << 31;
    signs[at] = piece;
  }
  sync_block();
}

template <class T, int kProjections>
HA_KERNEL(kHashThreads, 3) hash_kernel(const HA_CONSTANT HashArgs args) {
  constexpr int kTiles = kProjections / 8;
  const Geometry g(args.p);
  const int pieces = int(g.head_dim) / kPieceElements<T>, chunks = (pieces + kHashLanePieces - 1) / kHashLanePieces;
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared_memory());
  Words4* const signs = reinterpret_cast<Words4*>(words + g.head_dim);
  write_signs<T, kProjections>(g, words, signs, chunks * kHashLanePieces);

  const int64_t rows_q = g.batch * g.heads_q * g.seq_q, blocks_q = ceil_div(rows_q, kHashBlockRows);
  const bool queries = block_index() < blocks_q;
  const int64_t rows = queries ? rows_q : g.batch * g.heads_kv * g.seq_k;
  const int64_t block_row = (queries ? block_index() : block_index() - blocks_q) * kHashBlockRows;
  const char* const source = static_cast<const char*>(queries ? args.p.q : args.p.k);
  uint16_t* const ranks = queries ? args.ranks_q : args.ranks_k;
  const int warp = thread_index() / 32, lane = thread_index() % 32, group_row = lane / 4, lane_piece = lane % 4;
  const int row_bytes = pieces * 16, projections = g.a.num_projections;
  // How far a sum and the rule's may be apart, in units of the sum of sizes: tensor cores add "with at least single precision", hence
  // at most 2^-23 an addition, of 17 for 16 elements, and the rule's own 2^-24. That holds between the ends of fp32's range only.
  const float doubt = float(int(g.head_dim) * (kTerms<T> + 1)) * 0x1p-22f, least = 1e-30f, most = 1e37f;

  for (int tile_row = warp * kHashTileRows; tile_row < kHashBlockRows; tile_row += kWarps * kHashTileRows) {
    const int64_t first = block_row + tile_row;
    if (first >= rows) break;
    const int left = int(min64(rows - first, kHashTileRows));
    const char* const tile = source + first * row_bytes;
    float sum[kGroups][kTiles][4] = {}, size[kGroups][4] = {};
    for (int chunk0 = 0; chunk0 < chunks; chunk0 += kBatch) {
      Words4 raw[kBatch][2 * kGroups];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = (chunk0 + i) * kHashLanePieces + lane_piece;
#pragma unroll
        for (int h = 0; h < 2 * kGroups; ++h) {
          const int row = group_row + 8 * h;
          raw[i][h] = piece < pieces && row < left ? load16(tile + row * row_bytes + piece * 16) : Words4{};
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (chunk0 + i >= chunks) break;
        Words4 mine[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          mine[t] = signs[((chunk0 + i) * kHashLanePieces + lane_piece) * kProjections + t * 8 + group_row];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) add_pieces<T, kTiles>(raw[i][2 * group], raw[i][2 * group + 1], mine, sum[group], size[group]);
      }
    }

    // A lane has projections 2 (lane % 4) and the next of rows lane / 4 + 8 h; byte h of `bits` collects row h's.
    uint32_t bits[kTiles] = {}, doubtful = 0;
#pragma unroll
    for (int h = 0; h < 2 * kGroups; ++h) {
      const float sizes = size[h / 2][h % 2 * 2], bound = sizes < most ? sizes * doubt + least : INFINITY;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = sum[h / 2][t][h % 2 * 2 + e];
          const int projection = lane_piece * 2 + e;
          bits[t] |= uint32_t(x > 0.0f) << (8 * h + projection);
          doubtful |= uint32_t(t * 8 + projection < projections && !(fabsf(x) > bound)) << h;
        }
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
      for (int t = 0; t < kTiles; ++t) bits[t] |= uint32_t(shuffle_xor(int(bits[t]), mask));
    const int row = group_row + 8 * lane_piece;  // this lane's from here on
    uint32_t code = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) code |= (bits[t] >> (8 * lane_piece) & 0xFFu) << (8 * t);
    if (ballot(doubtful != 0)) {
      for (int mask = 1; mask < 4; mask *= 2) doubtful |= uint32_t(shuffle_xor(int(doubtful), mask));
      for (uint32_t open = ballot((doubtful >> lane_piece & 1u) && row < left); open; open &= open - 1) {
        const int owner = count_bits((open & (0u - open)) - 1);
        const uint32_t exact = exact_code<T>(tile + (owner / 4 + owner % 4 * 8) * row_bytes, pieces, words, lane);
        if (lane == owner) code = exact;
      }
    }
    if (row < left) ranks[first + row] = uint16_t(gray_rank(code & ((1u << projections) - 1)));
  }
}

template <class T>
void launch_type(const HashArgs& args) {
  const Geometry g(args.p);
  const int64_t blocks =
      ceil_div(g.batch * g.heads_q * g.seq_q, kHashBlockRows) + ceil_div(g.batch * g.heads_kv * g.seq_k, kHashBlockRows);
  const int projections = g.a.num_projections <= 8 ? 8 : 16;
  const size_t shared = hash_shared(g.head_dim, g.head_dim / kPieceElements<T>, projections);
  if (projections == 8) launch<hash_kernel<T, 8>>(blocks, kHashThreads, shared, args.p.stream, args);
  else launch<hash_kernel<T, 16>>(blocks, kHashThreads, shared, args.p.stream, args);
}

}  // namespace

void launch_hash(const HashArgs& args) {
  with_elements(args.p.dtype, [&](auto element) { launch_type<decltype(element)>(args); });
}

}  // namespace ha
