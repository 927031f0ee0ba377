// Runs the CUDA kernels' source on the processor, one fiber a thread, for tests where there is no GPU. It gives the names
// of plugins/cuda/device.cuh with the same meaning: the lane layouts of mma.sync and ldmatrix are written out from the PTX
// manual, a cp.async lands only when its group is waited for, shared memory starts as NaN, threads run in changing order.
// HA_EMULATE is the device's compute capability: 80, or 90 for the Hopper kernels (sm90_emulator.h).
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#define HA_KERNEL(threads, blocks_per_sm) void
#define HA_DEVICE inline
#define HA_CONSTANT

namespace ha {

using std::max;
using std::min;

// The device that the kernels are launched on. Few processors, so that a block of threads has several tiles to work on.
int compute_capability();
inline int64_t processor_count() { return 3; }

// Runs `body` for every thread of every block. Aborts with a message when the threads of a block cannot all finish.
void emulate(int64_t blocks, int threads, size_t shared, const std::function<void()>& body);

// Bytes of shared memory that the emulated GPU grants a block: HA_EMULATED_SHARED in the environment, or what every GPU grants.
int64_t shared_limit();

int thread_index();
int64_t block_index();
int64_t grid_size();
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);
void sync_block();
void sync_warp();

void copy_async(uint32_t target, const void* source, bool valid);
void copy_commit();
void copy_wait(int pending);
template <int kPending>
void copy_wait() {
  copy_wait(kPending);
}

void load_matrices(uint32_t (&r)[4], uint32_t address);
void load_matrices_transposed(uint32_t (&r)[4], uint32_t address);
uint32_t load_word(uint32_t address);
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t round_tf32(float x);
void multiply_add_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
inline void multiply_add_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
  std::copy(c, c + 4, d);
  multiply_add_int8(d, a, b0, b1);
}

float shuffle_xor(float x, int mask);
int shuffle_xor(int x, int mask);
int shuffle(int x, int from);
uint32_t ballot(bool x);
inline uint32_t lanes_alike(uint32_t x, uint32_t bit) {
  const uint32_t votes = ballot((x & bit) != 0);
  return x & bit ? votes : ~votes;
}
uint32_t warp_max(uint32_t x);
int warp_sum(int x);
inline int dot4(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
  return c;
}
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
inline void add_atomic(uint32_t* target, uint32_t x) { *target += x; }  // threads take turns only where they meet
inline int fetch_add_atomic(int* target, int x) { return (*target += x) - x; }
inline void max_atomic(uint32_t* target, uint32_t x) { *target = max(*target, x); }
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

uint32_t float_bits(float x);
float bits_float(uint32_t x);
float to_float(Bfloat16 x);
float to_float(Half x);
inline float to_float(float x) { return x; }
template <class T>
uint32_t pack(float low, float high);

template <class T>
T load_once(const T* source) {
  return *source;
}
inline Words4 load16(const void* source) { return *static_cast<const Words4*>(source); }

}  // namespace ha
