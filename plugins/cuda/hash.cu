// The ranks of `sortlsh` (rules 26 and 27) and, for the sort by chunks, how many members of each rank there are: every row of Q and K is
// read once. A block of threads takes a quarter of a chunk; each warp has a ring in shared memory that its tiles of rows pass through.
#include "hash_tile.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "sort.cuh"

namespace ha {
namespace {

constexpr int kWarps = kHashThreads / 32;

struct HashLaunch {
  HashArgs hash;
  SortChunks q, k;
};

// What a warp loads at once: some pieces of each row of a tile.
struct Cursor {
  int row, part;  // the tile's first row, of the block's

  HA_DEVICE void advance(int parts) {
    if (++part < parts) return;
    part = 0;
    row += kWarps * kHashTileRows;
  }
};

template <class T, int kProjections, int kPieces>
HA_KERNEL(kHashThreads, hash_blocks_per_processor(kPieces)) hash_kernel(const HA_CONSTANT HashLaunch args) {
  constexpr int kTiles = kProjections / 8, kStageRowBytes = kPieces * 16, kStageBytes = kHashTileRows * kStageRowBytes;
  const HaParams& p = args.hash.p;
  const Geometry g(p);
  const int pieces = int(g.head_dim) / kPieceElements<T>, row_bytes = pieces * 16, parts = (pieces + kPieces - 1) / kPieces;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  unsigned char* const ring = shared_memory() + warp * kHashStages * kStageBytes;
  Words4* const signs = reinterpret_cast<Words4*>(shared_memory() + kWarps * kHashStages * kStageBytes);
  uint32_t* const words = reinterpret_cast<uint32_t*>(signs + parts * kPieces * kProjections);
  uint32_t* const counts = words + g.head_dim;
  float* const least = reinterpret_cast<float*>(counts + kSortBins);

  const Chunk chunk = find_chunk(p, g, args.q, args.k, block_index() / kChunkQuarters);
  const int quarter = int(block_index() % kChunkQuarters);
  const int64_t start = chunk.slots.start + quarter * kQuarterRows, first = chunk.slice * chunk.rows + start;
  const int rows = int(min64(chunk.slots.stop - start, kQuarterRows));
  const int member_start = int(chunk.members.start - start), member_stop = int(chunk.members.stop - start);
  const char* const source = static_cast<const char*>(chunk.queries ? p.q : p.k) + first * row_bytes;
  uint16_t* const ranks = (chunk.queries ? args.hash.ranks_q : args.hash.ranks_k) + first;

  // Odd rows of a stage have the halves of 128 bytes exchanged, so that eight lanes' pieces of two rows lie in all banks.
  Cursor loading{warp * kHashTileRows, 0};
  const auto load = [&](int stage) {
    if (loading.row < rows) {
      const int row = lane / kPieces, piece = lane % kPieces, from = loading.part * kPieces + piece;
      const uint32_t target = shared_address(ring) + stage * kStageBytes + row * kStageRowBytes + (piece ^ row % 2 * 4) * 16;
      const char* const tile = source + (loading.row + row) * row_bytes + from * 16;
#pragma unroll
      for (int i = 0; i < kHashTileRows; i += 32 / kPieces)
        copy_async(target + i * kStageRowBytes, tile + i * row_bytes, from < pieces && loading.row + row + i < rows);
      loading.advance(parts);
    }
    copy_commit();
  };

  for (int stage = 0; stage < kHashStages - 1; ++stage) load(stage);
  for (int bin = thread_index(); bin < kSortBins; bin += kHashThreads) counts[bin] = 0;
  if (thread_index() < kMaxProjections) {
    const int64_t slice = chunk.slice + (chunk.queries ? 0 : g.batch * g.heads_q);
    least[thread_index()] = args.hash.least ? args.hash.least[slice * kMaxProjections + thread_index()] : 0.0f;
  }
  write_signs<T, kProjections>(g, words, signs, parts * kPieces);

  const int group_row = lane / 4, lane_piece = lane % 4, own_row = group_row + 8 * lane_piece;
  // Lanes whose own row lies before this one's.
  const uint32_t before_lanes = 0x11111111u * ((1u << lane_piece) - 1) | (0x11111111u << lane_piece & ((1u << lane) - 1));
  HashSums<T, kTiles> sums;
  int stage = 0;
  for (Cursor at{warp * kHashTileRows, 0}; at.row < rows; at.advance(parts)) {
    copy_wait<kHashStages - 2>();
    sync_warp();
    load(stage ? stage - 1 : kHashStages - 1);
    const unsigned char* const staged = ring + stage * kStageBytes + group_row * kStageRowBytes + lane_piece * 16;
    stage = stage + 1 < kHashStages ? stage + 1 : 0;
#pragma unroll
    for (int four = 0; four < kPieces / 4; ++four) {
      Words4 mine[kTiles], x[2 * kHashGroups];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) mine[t] = signs[(at.part * kPieces + four * 4 + lane_piece) * kProjections + t * 8 + group_row];
#pragma unroll
      for (int h = 0; h < 2 * kHashGroups; ++h)
        x[h] = *reinterpret_cast<const Words4*>(staged + 8 * h * kStageRowBytes + (four ^ group_row % 2) * 64);
#pragma unroll
      for (int group = 0; group < kHashGroups; ++group) sums.add(group, x[2 * group], x[2 * group + 1], mine);
    }
    if (at.part + 1 < parts) continue;

    uint32_t doubtful;
    uint32_t code = sums.code(lane, int(g.head_dim), g.a.num_projections, least, &doubtful);
    sums = HashSums<T, kTiles>();
    const int row = at.row + own_row;
    if (ballot(doubtful != 0)) {
      for (int mask = 1; mask < 4; mask *= 2) doubtful |= uint32_t(shuffle_xor(int(doubtful), mask));
      for (uint32_t open = ballot((doubtful >> lane_piece & 1u) && row < rows); open; open &= open - 1) {
        const int owner = count_bits((open & (0u - open)) - 1);
        const char* const from = source + (at.row + owner / 4 + owner % 4 * 8) * row_bytes;
        const uint32_t exact = exact_code<T>(from, pieces, words, least[lane % kMaxProjections], lane);
        if (lane == owner) code = exact;
      }
    }
    uint32_t word = gray_rank(code & ((1u << g.a.num_projections) - 1));
    if constexpr (kProjections <= kSortDigitBits) {
      const bool member = row >= member_start && row < member_stop;
      const uint32_t peers = same_digit<kSortBins>(word, member), before = count_bits(peers & before_lanes);
      const bool last = member && !(peers & ~(before_lanes | 1u << lane));
      if (last) add_atomic(counts + word, before + 1);
      word = rank_word(word, before, last);
    }
    if (row < rows) ranks[row] = uint16_t(word);
  }
  sync_block();
  if (!args.hash.counts) return;
  const int bins = chunk_bins(g.a);
  uint32_t* const slice = slice_counts(args.hash.counts, g, args.q, args.k, chunk.queries, chunk.slice, bins);
  uint32_t* const out = slice + (chunk.number * kChunkQuarters + quarter) * bins;
  for (int bin = thread_index(); bin < bins; bin += kHashThreads) out[bin] = counts[bin];
}

template <class T, int kProjections>
void launch_instance(const HashArgs& hash) {
  const Geometry g(hash.p);
  const HashLaunch args{hash, sort_chunks(g, HA_QUERIES), sort_chunks(g, HA_KEYS)};
  const int64_t blocks = g.batch * (g.heads_q * args.q.count + g.heads_kv * args.k.count) * kChunkQuarters;
  const int64_t pieces = g.head_dim / kPieceElements<T>;
  const size_t shared = hash_shared(g.head_dim, pieces, kProjections);
  if (hash_stage_pieces(pieces) == 8) launch<hash_kernel<T, kProjections, 8>>(blocks, kHashThreads, shared, hash.p.stream, args);
  else launch<hash_kernel<T, kProjections, 16>>(blocks, kHashThreads, shared, hash.p.stream, args);
}

}  // namespace

void launch_hash(const HashArgs& args) {
  with_elements(args.p.dtype, [&](auto element) {
    using T = decltype(element);
    args.p.attributes.num_projections <= 8 ? launch_instance<T, 8>(args) : launch_instance<T, 16>(args);
  });
}

}  // namespace ha
