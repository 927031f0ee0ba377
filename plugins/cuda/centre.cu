// The sums of the mean tokens for hash_centre (rule 26): a block of threads a batch row and head of Q or K. Each warp adds up one part of
// its tokens, each thread then one element of the parts, and at last a thread for each projection the signed elements of the mean.
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "sort_config.h"

namespace ha {
namespace {

constexpr int kCentreThreads = 32 * kCentreParts;

template <class T>
HA_DEVICE float element(const T* from) {
  if constexpr (sizeof(T) == 4) return *from;
  else return to_float(*from);
}

template <class T>
HA_KERNEL(kCentreThreads, 1) centre_kernel(const HA_CONSTANT HashArgs args) {
  const HaParams& p = args.p;
  const Geometry g(p);
  const int D = int(g.head_dim), warp = thread_index() / 32, lane = thread_index() % 32;
  float* const parts = reinterpret_cast<float*>(shared_memory());  // [kCentreParts][D]; the first becomes the mean,
  uint32_t* const words = reinterpret_cast<uint32_t*>(parts + D);  // and the second the words of rule 26
  const int64_t of_queries = g.batch * g.heads_q, block = block_index();
  const bool queries = block < of_queries;
  const int64_t slice = queries ? block : block - of_queries;
  const Range tokens = centred_tokens(g, queries, g.length(p.lengths, slice / (queries ? g.heads_q : g.heads_kv)));
  const int64_t count = tokens.size(), taken = min64(count, kCentreTokens);
  const T* const from = static_cast<const T*>(queries ? p.q : p.k) + (slice * (queries ? g.seq_q : g.seq_k) + tokens.start) * D;

  const int mine = int(max64(0, min64(taken - warp * kCentrePart, kCentrePart)));
  for (int base = 0; base < D; base += 32) {
    const int d = base + lane;
    float part = 0.0f;
    for (int first = 0; first < mine; first += 32) {
      // Lane s knows token s of the next 32.
      const int own = int(min64(warp * kCentrePart + first + lane, taken - 1) * count / taken);
#pragma unroll 8
      for (int s = 0; s < min(32, mine - first); ++s) {
        const T* const token = from + int64_t{shuffle(own, s)} * D;
        part = add_rn(part, d < D ? element(token + d) : 0.0f);
      }
    }
    if (d < D) parts[warp * D + d] = part;
  }
  sync_block();
  for (int d = thread_index(); d < D; d += kCentreThreads) {
    float total = 0.0f;
    for (int part = 0; part < kCentreParts; ++part) total = add_rn(total, parts[part * D + d]);
    // Into its own column, which no other thread has read.
    parts[d] = taken ? div_rn(total, float(taken)) : 0.0f;
    words[d] = sign_word(d, g.a.seed);
  }
  sync_block();
  if (thread_index() >= kMaxProjections) return;
  float sum = 0.0f;
  for (int d = 0; d < D; ++d) sum = add_rn(sum, bits_float(float_bits(parts[d]) ^ words[d] >> thread_index() << 31));
  args.least[block * kMaxProjections + thread_index()] = sum;
}

}  // namespace

void launch_centre(const HashArgs& args) {
  const Geometry g(args.p);
  with_elements(args.p.dtype, [&](auto element) {
    const size_t shared = size_t(kCentreParts * g.head_dim) * sizeof(float);
    launch<centre_kernel<decltype(element)>>(g.batch * (g.heads_q + g.heads_kv), kCentreThreads, shared, args.p.stream, args);
  });
}

}  // namespace ha
