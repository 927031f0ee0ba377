// The few instructions the kernels are made of, under one name each: tensor cores (mma.sync), ldmatrix, cp.async and warp
// reductions of sm_80 and later. With HA_EMULATE the same names come from tests/emulation/emulator.h, which runs every
// thread of a block on the processor, so that the kernels' logic is tested where there is no GPU.
#pragma once
#include <cmath>
#include <cstdint>

#include "geometry.h"

namespace ha {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

}  // namespace ha

#ifdef HA_EMULATE
#include "emulator.h"
#else

#define HA_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define HA_DEVICE __device__ __forceinline__
#define HA_CONSTANT __grid_constant__

namespace ha {

HA_DEVICE int thread_index() { return int(threadIdx.x); }
HA_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
HA_DEVICE int64_t grid_size() { return int64_t(gridDim.x); }
HA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char ha_shared_memory[];
  return ha_shared_memory;
}
HA_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }
HA_DEVICE void sync_block() { __syncthreads(); }
HA_DEVICE void sync_warp() { __syncwarp(); }

// 16 bytes from global to shared memory, or zeros. The source is not read when `valid` is false.
HA_DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
HA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
HA_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
HA_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
HA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

HA_DEVICE uint32_t load_word(uint32_t address) {
  uint32_t y;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(y) : "r"(address) : "memory");
  return y;
}

// c[16 x 8] += a[16 x 16] b[16 x 8] in fp32.
template <class T>
HA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
HA_DEVICE void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HA_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c[16 x 8] += a[16 x 8] b[8 x 8] of fp32 words, of which the product sees 10 bits of mantissa.
HA_DEVICE void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// x rounded to what multiply_add_tf32 sees of it.
HA_DEVICE uint32_t round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// c[16 x 8] += a[16 x 32] b[32 x 8] of int8 in int32.
HA_DEVICE void multiply_add_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a b + c of the same shapes: accumulators that start from a constant need no copies of it.
HA_DEVICE void multiply_add_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

HA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
HA_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
HA_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
HA_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
// Lanes whose x has `bit` if this lane's has it, and lacks it if not.
HA_DEVICE uint32_t lanes_alike(uint32_t x, uint32_t bit) {
  uint32_t y;
  asm volatile(
      "{.reg .pred p; .reg .b32 t; and.b32 t, %1, %2; setp.ne.u32 p, t, 0; vote.sync.ballot.b32 t, p, 0xffffffff; @!p not.b32 t, t; "
      "mov.b32 %0, t;}"
      : "=r"(y)
      : "r"(x), "r"(bit));
  return y;
}
HA_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
HA_DEVICE int warp_sum(int x) { return __reduce_add_sync(0xffffffffu, x); }
// c + the sum of the four products of int8.
HA_DEVICE int dot4(uint32_t a, uint32_t b, int c) { return __dp4a(int(a), int(b), c); }
// Byte i of the result is byte selector >> 4 i of b:a.
HA_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
HA_DEVICE void add_atomic(uint32_t* target, uint32_t x) { atomicAdd(target, x); }
HA_DEVICE int fetch_add_atomic(int* target, int x) { return atomicAdd(target, x); }
HA_DEVICE void max_atomic(uint32_t* target, uint32_t x) { atomicMax(target, x); }
HA_DEVICE int count_bits(uint32_t x) { return __popc(x); }

// IEEE operations that the compiler never fuses: the plan must not depend on its choices.
HA_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
HA_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
HA_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
HA_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
HA_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }

HA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x within 2^-22 of it, relatively, for normal x and 1 / x.
HA_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HA_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
HA_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

template <class T>
HA_DEVICE uint32_t pack(float low, float high);
template <>
HA_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
HA_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
HA_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
HA_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
HA_DEVICE float to_float(float x) { return x; }
template <class T>
HA_DEVICE T load_once(const T* source) {
  return __ldg(source);
}
HA_DEVICE Words4 load16(const void* source) {
  const uint4 x = __ldg(static_cast<const uint4*>(source));
  return {{x.x, x.y, x.z, x.w}};
}

}  // namespace ha
#endif
