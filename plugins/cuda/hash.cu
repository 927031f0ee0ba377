// The ranks of `sortlsh` (rules 26 and 27): every row of Q or K is hashed once. A thread sums all projections of four rows; their
// elements pass through the warp's own buffers, so that memory is read in whole segments and signs are fetched once for four rows.
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace ha {
namespace {

constexpr int kWarps = kHashThreads / 32;
constexpr int kPieces = kHashPieces;
constexpr int kRowBytes = (kPieces + 1) * 16;  // an odd number of pieces: eight rows lie in all banks
constexpr int kThreadRows = kHashWarpRows / 32;
static_assert(kWarps * kHashBuffers * kHashWarpRows * kRowBytes == kHashBufferBytes);

// Signs of kProjections projections for each coordinate: bfloat16 +1 or -1, [head_dim, kProjections].
template <int kProjections>
HA_DEVICE void write_signs(const Geometry& g, uint32_t* signs) {
  for (int d = thread_index(); d < g.head_dim; d += kHashThreads) {
    const uint32_t word = sign_word(d, g.a.seed);
#pragma unroll
    for (int t = 0; t < kProjections; t += 2)
      signs[d * (kProjections / 2) + t / 2] = 0x3F803F80u | (word >> t & 1u) << 15 | (word >> (t + 1) & 1u) << 31;
  }
}

template <class T, int kProjections>
HA_KERNEL(kHashThreads, 4) hash_kernel(const HA_CONSTANT HashArgs args) {
  const Geometry g(args.p);
  const bool queries = args.side == HA_QUERIES;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  unsigned char* const signs = shared_memory() + kHashBufferBytes;
  write_signs<kProjections>(g, reinterpret_cast<uint32_t*>(signs));
  sync_block();

  const int64_t rows = g.batch * (queries ? g.heads_q * g.seq_q : g.heads_kv * g.seq_k);
  const int64_t first = (block_index() * kWarps + warp) * kHashWarpRows;
  if (first >= rows) return;
  const int pieces = int(g.head_dim) / kPieceElements<T>, groups = (pieces + kPieces - 1) / kPieces;
  const char* const source = static_cast<const char*>(queries ? args.p.q : args.p.k);
  constexpr int kBuffer = kHashWarpRows * kRowBytes;
  unsigned char* const buffers = shared_memory() + warp * kHashBuffers * kBuffer;

  const auto load = [&](int group) {
    const int row0 = lane / kPieces, piece = group * kPieces + lane % kPieces, left = int(min64(rows - first, kHashWarpRows));
    if (piece < pieces) {
      const uint32_t target = shared_address(buffers) + group % kHashBuffers * kBuffer + lane % kPieces * 16;
      const char* const from = source + (first * pieces + piece) * 16;
#pragma unroll 4
      for (int row = row0; row < kHashWarpRows; row += 32 / kPieces)
        copy_async(target + row * kRowBytes, from + (row < left ? row : 0) * pieces * 16, row < left);
    }
    copy_commit();
  };

  float sum[kThreadRows][kProjections] = {};
  load(0);
  for (int group = 0; group < groups; ++group) {
    if (group + 1 < groups) load(group + 1);
    else copy_commit();
    copy_wait<1>();
    sync_warp();
    const unsigned char* const buffer = buffers + group % kHashBuffers * kBuffer + lane * kRowBytes;
    const int stop = min(kPieces, pieces - group * kPieces);
    for (int piece = 0; piece < stop; ++piece) {
      float x[kThreadRows][kPieceElements<T>];
#pragma unroll
      for (int row = 0; row < kThreadRows; ++row)
        unpack<T>(*reinterpret_cast<const Words4*>(buffer + row * 32 * kRowBytes + piece * 16), x[row]);
      const Words4* sign_words = reinterpret_cast<const Words4*>(signs) + (group * kPieces + piece) * kPieceElements<T> * (kProjections / 8);
#pragma unroll
      for (int i = 0; i < kPieceElements<T>; ++i) {
        float sign[kProjections];
#pragma unroll
        for (int t = 0; t < kProjections; t += 8) unpack<Bfloat16>(sign_words[(i * kProjections + t) / 8], sign + t);
        // A product with +1 or -1 is exact, so a fused multiply-add rounds like the plain addition of the rule.
#pragma unroll
        for (int row = 0; row < kThreadRows; ++row)
#pragma unroll
          for (int t = 0; t < kProjections; ++t) sum[row][t] += x[row][i] * sign[t];
      }
    }
    sync_warp();  // before the next load overwrites this buffer
  }
#pragma unroll
  for (int row = 0; row < kThreadRows; ++row) {
    uint32_t code = 0;
#pragma unroll
    for (int t = 0; t < kProjections; ++t) code |= uint32_t(sum[row][t] > 0.0f) << t;
    const int64_t at = first + row * 32 + lane;
    if (at < rows) args.ranks[at] = uint16_t(gray_rank(code & ((1u << g.a.num_projections) - 1)));
  }
}

template <class T>
void launch_type(const HashArgs& args) {
  const Geometry g(args.p);
  const int64_t rows = g.batch * (args.side == HA_QUERIES ? g.heads_q * g.seq_q : g.heads_kv * g.seq_k);
  const int64_t blocks = ceil_div(rows, kWarps * kHashWarpRows);
  const int projections = g.a.num_projections <= 8 ? 8 : 16;
  const size_t shared = kHashBufferBytes + size_t(g.head_dim) * projections * 2;
  if (projections == 8) launch<hash_kernel<T, 8>>(blocks, kHashThreads, shared, args.p.stream, args);
  else launch<hash_kernel<T, 16>>(blocks, kHashThreads, shared, args.p.stream, args);
}

}  // namespace

void launch_hash(const HashArgs& args) {
  with_elements(args.p.dtype, [&](auto element) { launch_type<decltype(element)>(args); });
}

}  // namespace ha
