// The names of plugins/cuda/sm90_device.cuh for the emulator, with the same meaning. Tile loads, gathered copies that a barrier counts, and
// products are under way for a while and land in any order: a load wipes its target at once, a product its accumulators. It is an error
// when operands change while a product runs, when a thread touches accumulators or operands in registers before product_wait, and when
// a product reads what threads wrote and no fence_products lies between. A thread may stand still before it waits for a barrier, once
// that is complete, and once it has arrived at one, until no other can go on.
#pragma once
#include "emulator.h"

namespace ha {

void barrier_init(uint32_t barrier, int arrivals);
void barrier_publish();
void barrier_arrive(uint32_t barrier, int count = 1);
void barrier_expect(uint32_t barrier, int bytes);
void barrier_arrive_copied(uint32_t barrier);
void barrier_wait(uint32_t barrier, int parity);
bool barrier_test(uint32_t barrier, int parity);
inline const char* settled(const char* address) { return address; }
inline uint32_t settled(uint32_t address) { return address; }

void sync_named(int id, int threads);
void arrive_named(int id, int threads);
void fence_products();

// [slices][rows][columns] of 16-bit elements, loaded in boxes.
struct TileMap {
  const void* base;
  int64_t slices, rows, columns;
  int box_rows, box_columns;
};
inline void prefetch(const void*) {}
inline void prefetch_map(const TileMap&) {}
void load_tile(const TileMap& map, uint32_t target, uint32_t barrier, int column, int row, int slice);

void change_registers(int count);
template <int kCount>
void take_registers() {
  change_registers(kCount);
}
template <int kCount>
void give_registers() {
  change_registers(kCount);
}

// c[64 x 2 count] = a b^T or a b. `a` = a matrix in shared memory, or else four words of every thread.
struct ProductOperands {
  bool half, transposed, add;
  const uint32_t* registers;
  uint64_t a, b;
};
void issue_product(float* c, int count, const ProductOperands& operands);
void product_begin();
void product_commit();
void product_wait(int pending);

template <class T, int kCount>
void multiply_shared(float (&c)[kCount], uint64_t a, uint64_t b, bool add) {
  issue_product(c, kCount, {std::is_same_v<T, Half>, false, add, nullptr, a, b});
}
template <class T, int kCount>
void multiply_registers(float (&c)[kCount], const uint32_t* a, uint64_t b) {
  issue_product(c, kCount, {std::is_same_v<T, Half>, true, true, a, 0, b});
}
template <int kPending>
void product_wait() {
  product_wait(kPending);
}
template <int kCount>
void fence_registers(float (&)[kCount]) {}

}  // namespace ha
