// One block of threads as the emulator sees it: a fiber a thread, shared memory, and what is under way there. Inside tests/emulation only;
// the kernels see emulator.h.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "device.cuh"

namespace ha {

constexpr int kWarp = 32, kGroup = 128;  // threads of a warp, of a warp group

struct Copy {
  uint32_t target;
  const void* source;
  bool valid;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
  uint64_t asleep = 0;  // since when, if it is
  const char* waits = "to start";  // for what, and at which address or of which number
  int64_t place = 0;
  std::vector<Copy> open;                 // not committed
  std::vector<std::vector<Copy>> groups;  // committed, not landed
  int counted = 0;                        // batches under way that a barrier counts
  bool committed = false;                 // and all of them are
  int registers = 0;
  uint64_t fenced = 0;             // when it last ordered writes before products
  bool ready = false;              // product_begin is behind it
  uint64_t issued = 0;             // products
  std::vector<uint64_t> commits;   // of groups not waited for: how many products had been issued
};

// One operation that a set of threads meets at: the last to arrive computes for all.
struct Meeting {
  int arrived = 0, expected = 0;
  uint64_t round = 0;
};

struct Lane {
  uint32_t in[12], out[4];
};

struct Warp {
  Meeting meeting;
  Lane lanes[kWarp];
};

// A barrier in shared memory: the phase is complete when all have arrived and all bytes have landed.
struct PhaseBarrier {
  int expected = 0, missing = 0;
  int64_t bytes = 0;
  int phase = 0;
  bool published = false;
};

struct Product;

struct Group {
  Meeting meeting, registers;
  std::vector<std::shared_ptr<Product>> products;  // issued, not landed
  uint64_t landed = 0;
};

// Who wrote 16 bytes of shared memory, and when; never for what the copy engine wrote.
struct Written {
  uint64_t when = 0;
  int thread = 0;
};

struct Block {
  int64_t index = 0, blocks = 0;
  int threads = 0, current = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Group> groups;
  size_t shared = 0;
  unsigned char* base = nullptr;
  std::vector<Written> written;
  Meeting meeting, named[16];
  std::map<uint32_t, PhaseBarrier> barriers;
  std::vector<std::function<void()>> flying;  // land in any order
  int registers = 0;                          // given and not taken
  uint64_t clock = 0, progress = 0;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
};
extern Block block;

[[noreturn]] void fail(const char* message);
void yield();
// Now and then the calling thread stands still until no other can go on, as a warp may that is not scheduled.
void fall_behind();
inline Fiber& self() { return block.fibers[block.current]; }

template <class Compute>
void meet(Meeting& meeting, int count, const char* what, int64_t place, Compute compute) {
  const uint64_t round = meeting.round;
  ++block.progress;
  if (++meeting.arrived == count) {
    compute();
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  self().waits = what;
  self().place = place;
  while (meeting.round == round) yield();
}

// Waits for others; what `ready` looks at changes only where `progress` counts.
template <class Ready>
void wait_until(const char* what, int64_t place, Ready ready) {
  self().waits = what;
  self().place = place;
  while (!ready()) yield();
  ++block.progress;
}

inline void require(bool ok, const char* message) {
  if (!ok) fail(message);
}
inline void require_shared(uint32_t address, size_t bytes, uint32_t alignment, const char* what) {
  require(address % alignment == 0 && address + bytes <= block.shared, what);
}

// A copy of 16 bytes, or of zeros, arrives.
void land(const Copy& copy, int thread);

// Address of a 16-byte piece in a tile of 128-byte rows.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// As the tensor cores end a sum: rounded towards zero.
inline float round_to_zero(double sum) {
  const float c = float(sum);
  const bool further = (c < 0 ? -double(c) : double(c)) > (sum < 0 ? -sum : sum);
  return further ? bits_float(float_bits(c) - 1) : c;
}

}  // namespace ha
