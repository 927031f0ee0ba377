// Vectors of floats in the instruction set that the including file has chosen with `#pragma GCC target`. That file also
// defines HA_VECTOR_BYTES, and HA_ISA: a namespace per instruction set, so that no inline function of one leaks into another.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define HA_FORCE static inline __attribute__((always_inline))

namespace ha::cpu::HA_ISA {

constexpr int kLanes = HA_VECTOR_BYTES / 4;
// Vectors of query rows in one register block: kGroup x 6 accumulators fill the register file.
constexpr int kGroup = HA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kBlock = 6;

typedef float Floats __attribute__((vector_size(HA_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(HA_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(HA_VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(HA_VECTOR_BYTES), aligned(4)));
typedef uint32_t LooseBits __attribute__((vector_size(HA_VECTOR_BYTES), aligned(4)));

HA_FORCE Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
HA_FORCE Bits load(const uint32_t* from) { return *reinterpret_cast<const LooseBits*>(from); }
HA_FORCE void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
HA_FORCE Floats all(float x) { return x - Floats{}; }
HA_FORCE Ints all(int32_t x) { return x - Ints{}; }

#if HA_VECTOR_BYTES == 64
HA_FORCE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
HA_FORCE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
HA_FORCE Floats nearest(Floats a) { return (Floats)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT); }
HA_FORCE Floats times_power(Floats a, Floats n) { return (Floats)_mm512_scalef_ps((__m512)a, (__m512)n); }
HA_FORCE Ints add_pairs(Ints sum, Ints a, Ints b) { return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
HA_FORCE uint32_t positive_lanes(Floats a) { return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_GT_OQ); }
HA_FORCE Ints widen(const int8_t* from) {
  return (Ints)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif HA_VECTOR_BYTES == 32
HA_FORCE Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
HA_FORCE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
HA_FORCE Floats nearest(Floats a) {
  return (Floats)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HA_FORCE Ints add_pairs(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
HA_FORCE uint32_t positive_lanes(Floats a) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
HA_FORCE Ints widen(const int8_t* from) {
  return (Ints)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
HA_FORCE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
HA_FORCE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
HA_FORCE Floats nearest(Floats a) {  // adding 1.5 * 2^23 rounds to an integer, half to even, for |a| < 2^22
  return (a + 12582912.0f) - 12582912.0f;
}
HA_FORCE Ints add_pairs(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
HA_FORCE uint32_t positive_lanes(Floats a) { return uint32_t(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, _mm_setzero_ps()))); }
HA_FORCE Ints widen(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (Ints)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
#endif
#if HA_VECTOR_BYTES != 64
// For n of at least -127; a smaller one counts as that, and NaN stays NaN.
HA_FORCE Floats times_power(Floats a, Floats n) {
  return (Floats)((Bits)a + ((Bits)__builtin_convertvector(larger(all(-127.0f), n), Ints) << 23));
}
#endif

// 2^t within 2 ulp for t <= 1; exactly 0 below 2^-126 and at -inf, NaN at NaN.
HA_FORCE Floats power_of_two(Floats t) {
  const Floats n = nearest(t), f = t - n;
  // Least relative error on [-0.5, 0.5] among polynomials of degree 6 that are 1 at 0.
  Floats p = all(1.535336196e-4f);
  p = fma(p, f, all(1.339887502e-3f));
  p = fma(p, f, all(9.618436918e-3f));
  p = fma(p, f, all(5.550332367e-2f));
  p = fma(p, f, all(2.402264774e-1f));
  p = fma(p, f, all(6.931471825e-1f));
  p = fma(p, f, all(1.0f));
  return t < -126.0f ? Floats{} : times_power(p, n);
}

}  // namespace ha::cpu::HA_ISA
