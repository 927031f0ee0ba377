// The inner loops. Included by one file per instruction set, after `#pragma GCC target`; no standard header comes after
// that pragma, or an inline function of it could be compiled for a processor that is not there.
//
// Query rows lie along the lanes, keys and values are read as scalars and broadcast: nothing is packed or transposed but
// the queries, a key set may be any list of rows, and the softmax needs no sum across lanes.
namespace ha::cpu::HA_ISA {
namespace {

constexpr int kPart = 64;

// --- attention -------------------------------------------------------------------------------------------------------

// Dot products of kKeys keys with kVectors vectors of rows; keeps each row's largest.
template <int kVectors, int kKeys, bool kMasked>
void logits_of(const Tile& tile, const KeySet& keys, int row, int first, Floats* largest) {
  const int dim = tile.head_dim;
  const float* key[kKeys];
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j) key[j] = keys.k + int64_t{keys.index[first + j]} * dim;
  const float* query = tile.queries + row;
  float* out = tile.logits + first * kRows + row;
  Floats sum[kKeys][kVectors] = {};
  // Long heads are summed in parts, which keeps the rounding error of a head of 256 at that of one of 64.
  for (int start = 0, stop;; start = stop) {
    stop = dim - start < kPart ? dim : start + kPart;
    for (int d = start; d < stop; ++d, query += kRows) {
      Floats x[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) x[v] = load(query + v * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) {
        const Floats y = all(key[j][d]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[j][v] = fma(y, x[v], sum[j][v]);
      }
    }
    if (start > 0)
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[j][v] += load(out + j * kRows + v * kLanes);
    if (stop == dim) break;
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(out + j * kRows + v * kLanes, sum[j][v]);
        sum[j][v] = Floats{};
      }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (kMasked) {
        const Ints last = *reinterpret_cast<const Ints*>(keys.last_visible + row + v * kLanes);
        sum[j][v] = all(keys.index[first + j]) > last ? all(-__builtin_inff()) : sum[j][v];
      }
      largest[v] = larger(sum[j][v], largest[v]);
      store(out + j * kRows + v * kLanes, sum[j][v]);
    }
  }
}

// kColumns columns of the values, weighted by the probabilities that now stand in tile.logits. The keys of a set are summed
// apart from the older ones: the rounding error then grows with the square root of a set, not of the whole sequence.
template <int kVectors, int kColumns>
void sums_of(const Tile& tile, const KeySet& keys, int row, int column, const Floats* decay) {
  Floats sum[kColumns][kVectors] = {};
  float* out = tile.sums + column * kRows + row;
  const float* probability = tile.logits + row;
  const float* values = keys.v + column;
  for (int j = 0; j < keys.count; ++j, probability += kRows) {
    const float* value = values + int64_t{keys.index[j]} * tile.head_dim_v;
    Floats x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load(probability + v * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Floats y = all(value[c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[c][v] = fma(y, x[v], sum[c][v]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      store(out + c * kRows + v * kLanes, fma(load(out + c * kRows + v * kLanes), decay[v], sum[c][v]));
}

// What is left when the register block no longer fits: 1 to kBlock - 1 keys or columns.
template <int kVectors, bool kMasked, int kKeys = kBlock - 1>
void last_logits(const Tile& tile, const KeySet& keys, int row, int first, Floats* largest) {
  if (keys.count - first == kKeys) return logits_of<kVectors, kKeys, kMasked>(tile, keys, row, first, largest);
  if constexpr (kKeys > 1) last_logits<kVectors, kMasked, kKeys - 1>(tile, keys, row, first, largest);
}

template <int kVectors, int kColumns = kBlock - 1>
void last_sums(const Tile& tile, const KeySet& keys, int row, int column, const Floats* decay) {
  if (tile.head_dim_v - column == kColumns) return sums_of<kVectors, kColumns>(tile, keys, row, column, decay);
  if constexpr (kColumns > 1) last_sums<kVectors, kColumns - 1>(tile, keys, row, column, decay);
}

// Turns the logits of one vector of rows into probabilities; gives the factor that older sums shrink by.
Floats probabilities(const Tile& tile, const KeySet& keys, int row, Floats largest) {
  const Floats scale = all(tile.exponent), before = load(tile.reference + row);
  const Floats reference = larger(largest * scale, before);
  const Floats decay = power_of_two(before - reference);
  Floats total{};
  float* logits = tile.logits + row;
  for (int j = 0; j < keys.count; ++j, logits += kRows) {
    Floats p = power_of_two(fma(load(logits), scale, -reference));
    if (keys.weights) p = p * all(keys.weights[j]);
    store(logits, p);
    total += p;
  }
  store(tile.reference + row, reference);
  store(tile.totals + row, fma(load(tile.totals + row), decay, total));
  return decay;
}

template <int kVectors, bool kMasked>
void absorb_rows(const Tile& tile, const KeySet& keys, int row) {
  Floats largest[kVectors], decay[kVectors];
  for (auto& x : largest) x = all(-__builtin_inff());
  int j = 0;
  for (; j + kBlock <= keys.count; j += kBlock) logits_of<kVectors, kBlock, kMasked>(tile, keys, row, j, largest);
  last_logits<kVectors, kMasked>(tile, keys, row, j, largest);
  for (int v = 0; v < kVectors; ++v) decay[v] = probabilities(tile, keys, row + v * kLanes, largest[v]);
  int c = 0;
  for (; c + kBlock <= tile.head_dim_v; c += kBlock) sums_of<kVectors, kBlock>(tile, keys, row, c, decay);
  last_sums<kVectors>(tile, keys, row, c, decay);
}

template <int kVectors>
void absorb_group(const Tile& tile, const KeySet& keys, int row, int vectors) {
  if (vectors >= kVectors) {
    return keys.last_visible ? absorb_rows<kVectors, true>(tile, keys, row) : absorb_rows<kVectors, false>(tile, keys, row);
  }
  if constexpr (kVectors > 1) absorb_group<kVectors - 1>(tile, keys, row, vectors);
}

void absorb(const Tile& tile, const KeySet& keys) {
  for (int row = 0; row < tile.rows; row += kGroup * kLanes)
    absorb_group<kGroup>(tile, keys, row, (tile.rows - row + kLanes - 1) / kLanes);
}

// --- selection -------------------------------------------------------------------------------------------------------

// Rule 20's maximum over kQueries query pools for the key pools of one group.
template <int kQueries>
void score_queries(const int32_t* queries, const float* factors, int count, const int8_t* packed, int pairs, Floats* best) {
  constexpr int kVectors = kPoolGroup / kLanes;
  Ints dot[kQueries][kVectors] = {};
  for (int pair = 0; pair < pairs; ++pair, queries += count, packed += kPoolGroup * 2) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Ints key = widen(packed + v * kLanes * 2);
#pragma GCC unroll 16
      for (int i = 0; i < kQueries; ++i) dot[i][v] = add_pairs(dot[i][v], all(queries[i]), key);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      best[v] = larger(__builtin_convertvector(dot[i][v], Floats) * all(factors[i]), best[v]);
}

void score(const int32_t* queries, const float* factors, int count, const PackedPools& keys, int64_t first, int64_t last,
           float* scores) {
  constexpr int kVectors = kPoolGroup / kLanes, kWide = 16 / kVectors;
  for (int64_t group = first; group < last; ++group) {
    const int8_t* packed = keys.values + group * keys.pairs * kPoolGroup * 2;
    Floats best[kVectors];
    for (auto& x : best) x = all(-__builtin_inff());
    int q = 0;
    for (; q + kWide <= count; q += kWide) score_queries<kWide>(queries + q, factors + q, count, packed, keys.pairs, best);
    for (; q < count; q += kScoreQueries)
      score_queries<kScoreQueries>(queries + q, factors + q, count, packed, keys.pairs, best);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = group * kPoolGroup + v * kLanes;
      const Floats x = best[v] * load(keys.factors + at);
      store(scores + at, x == x ? x : all(-__builtin_inff()));
    }
  }
}

float pool(const float* x, int64_t rows, int dim, int8_t* values) {
  float mean[kMaxHeadDim];
  for (int d = 0; d < dim; ++d) mean[d] = 0.0f;
  for (int64_t r = 0; r < rows; ++r, x += dim)
    for (int d = 0; d < dim; ++d) mean[d] += x[d];
  int32_t largest_bits = 0;  // the bits of |x| order like |x|, and above all of them stand infinity and NaN
  for (int d = 0; d < dim; ++d) {
    mean[d] /= float(rows);
    int32_t bits;
    __builtin_memcpy(&bits, &mean[d], 4);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  if (largest_bits >= 0x7f800000) {
    __builtin_memset(values, 0, size_t(dim));
    return __builtin_nanf("");
  }
  float a;
  __builtin_memcpy(&a, &largest_bits, 4);
  a /= 127.0f;
  if (a == 0.0f) a = 1.0f;
  for (int d = 0; d < dim; ++d) {
    const float scaled = mean[d] / a;
    const float rounded = (scaled + 12582912.0f) - 12582912.0f;  // half to even
    values[d] = int8_t(rounded > 127.0f ? 127.0f : rounded < -127.0f ? -127.0f : rounded);
  }
  return a;
}

// Projections lie along the lanes, and kTokens tokens are summed side by side.
template <int kVectors, int kTokens = 8 / kVectors>
void hash_tokens(const float* x, int64_t tokens, int dim, const uint32_t* signs, const float* least, uint32_t used, uint16_t* codes) {
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const float* token[kTokens];
    Floats sum[kTokens][kVectors] = {};
    for (int i = 0; i < kTokens; ++i) token[i] = x + (first + i < tokens ? first + i : tokens - 1) * dim;
    for (int d = 0; d < dim; ++d) {
      Bits sign[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sign[v] = load(signs + d * kMaxProjections + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += (Floats)((Bits)all(token[i][d]) ^ sign[v]);
    }
    for (int i = 0; i < kTokens && first + i < tokens; ++i) {
      uint32_t code = 0;
      for (int v = 0; v < kVectors; ++v) code |= positive_lanes(sum[i][v] - load(least + v * kLanes)) << v * kLanes;
      codes[first + i] = uint16_t(code & used);
    }
  }
}

template <int kVectors = kMaxProjections / kLanes>
void hash_vectors(const float* x, int64_t tokens, int dim, const uint32_t* signs, const float* least, int projections, uint16_t* codes) {
  if constexpr (kVectors > 1)
    if (projections <= (kVectors - 1) * kLanes) return hash_vectors<kVectors - 1>(x, tokens, dim, signs, least, projections, codes);
  hash_tokens<kVectors>(x, tokens, dim, signs, least, (1u << projections) - 1, codes);
}

void hash(const float* x, int64_t tokens, int dim, const uint32_t* signs, const float* least, int projections, uint16_t* codes) {
  hash_vectors(x, tokens, dim, signs, least, projections, codes);
}

}  // namespace

#define HA_STRING_(x) #x
#define HA_STRING(x) HA_STRING_(x)
extern const Kernels kTable;
const Kernels kTable = {HA_STRING(HA_ISA), absorb, score, pool, hash};

}  // namespace ha::cpu::HA_ISA
