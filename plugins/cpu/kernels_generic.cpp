// The inner loops for every x86-64 processor.
#include <immintrin.h>

#include <cstddef>

#include "kernels.h"

#define HA_ISA generic
#define HA_VECTOR_BYTES 16
#include "simd.h"

#include "kernels.inl"
