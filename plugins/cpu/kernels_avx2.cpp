// The inner loops for processors with AVX2 and FMA.
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"

#define HA_ISA avx2
#define HA_VECTOR_BYTES 32
#pragma GCC target("avx2,fma")
#include "simd.h"

#include "kernels.inl"
