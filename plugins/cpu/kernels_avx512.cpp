// The inner loops for processors with AVX-512 and its integer dot products (VNNI).
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"

// GCC before 13 warns of its own header: _mm512_undefined_ps() is uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define HA_ISA avx512
#define HA_VECTOR_BYTES 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#include "simd.h"

#include "kernels.inl"
