// Barriers that count bytes, barriers of some warps, loads by the copy engine, and registers that change hands.
#include "machine.h"
#include "sm90_emulator.h"

namespace ha {
namespace {

constexpr int kRowBytes = 128;  // of a swizzled tile

PhaseBarrier& barrier_at(uint32_t address) {
  const auto found = block.barriers.find(address);
  require(found != block.barriers.end(), "a barrier that was never initialised");
  require(found->second.published, "a barrier that was not published after its initialisation");
  return found->second;
}

void complete(PhaseBarrier& barrier) {
  require(barrier.missing >= 0, "more threads arrived at a barrier than it was initialised for");
  ++block.progress;
  if (barrier.missing || barrier.bytes) return;
  barrier.missing = barrier.expected;
  barrier.phase ^= 1;
}

void arrive(uint32_t address, int count) {
  PhaseBarrier& barrier = barrier_at(address);
  barrier.missing -= count;
  complete(barrier);
}

void land_tile(const TileMap& map, uint32_t target, uint32_t address, int column, int row, int slice) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int chunk = 0; chunk < kRowBytes / 16; ++chunk) {
      const uint32_t at = swizzled(target + r * kRowBytes + chunk * 16);
      uint16_t values[8] = {};
      for (int i = 0; i < 8; ++i) {
        const int64_t x = column + chunk * 8 + i, y = int64_t{row} + r;
        if (x >= 0 && x < map.columns && y >= 0 && y < map.rows && slice >= 0 && slice < map.slices)
          values[i] = static_cast<const uint16_t*>(map.base)[(slice * map.rows + y) * map.columns + x];
      }
      std::memcpy(block.base + at, values, 16);
      block.written[at / 16] = {};
    }
  PhaseBarrier& barrier = barrier_at(address);
  barrier.bytes -= map.box_rows * kRowBytes;
  complete(barrier);
}

Meeting& named(int id, int threads) {
  require(id >= 1 && id < 16 && threads % kWarp == 0, "bar.sync takes ids 1 to 15 and whole warps");
  Meeting& meeting = block.named[id];
  require(meeting.arrived == 0 || meeting.expected == threads, "warps disagree on how many threads a barrier is for");
  meeting.expected = threads;
  return meeting;
}

}  // namespace

void barrier_init(uint32_t address, int arrivals) {
  require_shared(address, 8, 8, "mbarrier.init outside shared memory");
  block.barriers[address] = {arrivals, arrivals, 0, 0, false};
}
void barrier_publish() {
  for (auto& entry : block.barriers) entry.second.published = true;
}
void barrier_arrive(uint32_t barrier, int count) {
  arrive(barrier, count);
  fall_behind();  // what it says to be done with may change before this thread goes on
}
void barrier_expect(uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  ++block.progress;
}
void barrier_arrive_copied(uint32_t barrier) {
  for (auto& group : self().groups) {  // it waits for them, too: they land now, and stay counted by copy_wait
    for (const Copy& copy : group) land(copy, block.current);
    group.clear();
  }
  block.flying.push_back([copies = std::move(self().open), thread = block.current, barrier] {
    for (const Copy& copy : copies) land(copy, thread);
    --block.fibers[thread].counted;
    arrive(barrier, 1);
  });
  self().open.clear();
  self().committed = false;
  ++self().counted;
}
void barrier_wait(uint32_t address, int parity) {
  fall_behind();  // a barrier that goes on by two phases meanwhile is waited for without end
  const PhaseBarrier& barrier = barrier_at(address);
  wait_until(parity ? "barrier, odd phase, at" : "barrier, even phase, at", address, [&] { return barrier.phase != parity; });
  fall_behind();
}

bool barrier_test(uint32_t address, int parity) {
  const bool done = barrier_at(address).phase != parity;
  if (done) fall_behind();
  return done;
}

void sync_named(int id, int threads) { meet(named(id, threads), threads, "sync_named", id, [] {}); }
void arrive_named(int id, int threads) {
  Meeting& meeting = named(id, threads);
  ++block.progress;
  if (++meeting.arrived < threads) return;
  meeting.arrived = 0;
  ++meeting.round;
}

void fence_products() { self().fenced = ++block.clock; }

void load_tile(const TileMap& map, uint32_t target, uint32_t barrier, int column, int row, int slice) {
  require(map.slices > 0 && map.rows > 0 && map.columns > 0 && map.columns % 8 == 0, "a tile map of nothing, or of rows of odd chunks");
  require(reinterpret_cast<uintptr_t>(map.base) % 16 == 0, "a tile map of a tensor that is not aligned to 16 bytes");
  require(map.box_columns * 2 == kRowBytes && map.box_rows <= 256, "a box that is not 128 bytes wide, or of more than 256 rows");
  require_shared(target, map.box_rows * kRowBytes, kRowBytes, "a tile load outside shared memory");
  barrier_at(barrier);
  std::memset(block.base + target, 0xff, map.box_rows * kRowBytes);
  block.flying.push_back([=] { land_tile(map, target, barrier, column, row, slice); });
}

void change_registers(int count) {
  require(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  const int more = (count - self().registers) * kGroup;
  meet(block.groups[block.current / kGroup].registers, kGroup, "setmaxnreg of group", block.current / kGroup, [&] {
    if (more < 0) block.registers -= more;
  });
  if (more > 0 && block.current % kGroup == 0) {
    wait_until("registers", more, [&] { return block.registers >= more; });
    block.registers -= more;
  }
  self().registers = count;
}

}  // namespace ha
