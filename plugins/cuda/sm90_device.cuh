// What the Hopper kernels add to device.cuh: tile loads by the copy engine (TMA), barriers in shared memory that count bytes, products of
// whole warp groups (WGMMA) and registers handed from one warp group to another. CUTLASS's headers hold the instructions.
#pragma once
#include "device.cuh"

namespace ha {

// A matrix in shared memory of 128-byte rows, swizzled: its start, the bytes between its columns of 64 elements (where rows run along the
// outer index), the bytes between groups of eight rows.
struct Matrix {
  uint32_t low, high;
  HA_DEVICE Matrix(uint32_t address, int leading, int stride)
      : low(uint32_t(leading >> 4) << 16 | address >> 4), high(1u << 30 | uint32_t(stride >> 4)) {}
  // The descriptor of what lies so many bytes further.
  HA_DEVICE uint64_t at(int bytes) const { return uint64_t{high} << 32 | (low + uint32_t(bytes >> 4)); }
};

}  // namespace ha

#ifdef HA_EMULATE
#include "sm90_emulator.h"
#else
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>

namespace ha {

// --- barriers in shared memory, by address; waiting ends when the phase of this parity is complete ------------------

HA_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initialisation, before the block's first barrier.
HA_DEVICE void barrier_publish() { cutlass::arch::fence_barrier_init(); }
HA_DEVICE void barrier_arrive(uint32_t barrier, int count = 1) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0], %1;}" ::"r"(barrier), "r"(count) : "memory");
}
// `bytes` more have to land before the phase is complete.
HA_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// This thread arrives when all its copy_async so far have landed.
HA_DEVICE void barrier_arrive_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
HA_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether it is complete now.
HA_DEVICE bool barrier_test(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}

// The address as it stands: what it was computed from is not computed again at each use.
HA_DEVICE const char* settled(const char* address) {
  asm volatile("" : "+l"(address));
  return address;
}
HA_DEVICE uint32_t settled(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// Threads of some warps only; ids 1 to 15.
HA_DEVICE void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
HA_DEVICE void arrive_named(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Writes to shared memory by threads, seen by this one, come before its later products.
HA_DEVICE void fence_products() { cutlass::arch::fence_view_async_shared(); }

// --- tile loads -----------------------------------------------------------------------------------------------------

struct alignas(64) TileMap {
  uint64_t words[16];  // the driver's CUtensorMap
};

// Of the line of global memory there, into L2.
HA_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
HA_DEVICE void prefetch_map(const TileMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Box of kTileColumns columns and kTileKeys rows from (column, row) of matrix `slice`; what lies outside is zero.
HA_DEVICE void load_tile(const TileMap& map, uint32_t target, uint32_t barrier, int column, int row, int slice) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(slice)
      : "memory");
}

// --- registers ------------------------------------------------------------------------------------------------------

template <int kCount>
HA_DEVICE void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kCount>();
}
template <int kCount>
HA_DEVICE void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kCount>();
}

// --- products of a warp group ---------------------------------------------------------------------------------------

template <class T, int kColumns>
struct Product;
#define HA_PRODUCT(T, TYPE, COLUMNS)                                                                                         \
  template <>                                                                                                                \
  struct Product<T, COLUMNS> {                                                                                               \
    using Shared = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32##TYPE##TYPE##_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    using Registers =                                                                                                        \
        cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32##TYPE##TYPE##_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>; \
  };
HA_PRODUCT(Half, F16, 64)
HA_PRODUCT(Half, F16, 128)
HA_PRODUCT(Bfloat16, BF16, 64)
HA_PRODUCT(Bfloat16, BF16, 128)
#undef HA_PRODUCT

HA_DEVICE cute::SM90::GMMA::ScaleOut scale_out(bool add) {
  return add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
}
template <class Op, int kCount, size_t... I>
HA_DEVICE void run_product(float (&c)[kCount], uint64_t a, uint64_t b, bool add, std::index_sequence<I...>) {
  Op::fma(a, b, c[I]..., scale_out(add));
}
template <class Op, int kCount, size_t... I>
HA_DEVICE void run_product(float (&c)[kCount], const uint32_t* a, uint64_t b, std::index_sequence<I...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, c[I]..., cute::SM90::GMMA::ScaleOut::One);
}

// c[64 x 2 kCount] = a b^T (+ c), both of 16 columns in shared memory. Nothing may touch c until product_wait.
template <class T, int kCount>
HA_DEVICE void multiply_shared(float (&c)[kCount], uint64_t a, uint64_t b, bool add) {
  run_product<typename Product<T, 2 * kCount>::Shared>(c, a, b, add, std::make_index_sequence<kCount>());
}
// c[64 x 2 kCount] += a b, where a lies in registers and b has 16 rows in shared memory.
template <class T, int kCount>
HA_DEVICE void multiply_registers(float (&c)[kCount], const uint32_t* a, uint64_t b) {
  run_product<typename Product<T, 2 * kCount>::Registers>(c, a, b, std::make_index_sequence<kCount>());
}
// Registers written so far are seen by the products that follow.
HA_DEVICE void product_begin() { cute::warpgroup_arrive(); }
HA_DEVICE void product_commit() { cute::warpgroup_commit_batch(); }
// At most kPending committed groups still run.
template <int kPending>
HA_DEVICE void product_wait() {
  cute::warpgroup_wait<kPending>();
}
// Keeps the compiler from moving accesses of c over this point.
template <class X, int kCount>
HA_DEVICE void fence_registers(X (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(c[i]);
}

}  // namespace ha
#endif
