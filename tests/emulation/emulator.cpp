// Fibers and their scheduler, the block's own barrier, and copies into shared memory.
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace ha {

Block block;

namespace {

constexpr int kMaxThreads = 1024, kRegisters = 64 * 1024;
constexpr size_t kStack = 256 * 1024, kMostShared = 227 * 1024, kAlignment = 1024;

// Saves the callee-saved registers, stores the stack pointer in *from and goes on at `to`.
extern "C" void ha_switch_fiber(void** from, void* to);
asm(R"(
.text
.globl ha_switch_fiber
.hidden ha_switch_fiber
.type ha_switch_fiber,@function
ha_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void run_fiber() {
  (*block.body)();
  for (const auto& group : self().groups) require(group.empty(), "a thread ended with a copy in flight");
  require(self().open.empty(), "a thread ended with a copy that was never committed");
  require(!self().counted, "a thread ended with a copy in flight that a barrier counts");
  require(self().commits.empty(), "a thread ended with a product in flight");
  self().done = true;
  ++block.progress;
  yield();
  fail("a finished thread ran again");
}

void start_fiber(Fiber& fiber) {
  fiber.stack.reset(new unsigned char[kStack]);
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t{63};
  void** stack = reinterpret_cast<void**>(top) - 8;  // six registers, the return address and its alignment
  std::memset(stack, 0, 64);
  stack[6] = reinterpret_cast<void*>(&run_fiber);
  fiber.stack_pointer = stack;
}

uint32_t random_number() {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

void land_one() {
  const size_t i = random_number() % block.flying.size();
  const auto landing = std::move(block.flying[i]);
  block.flying.erase(block.flying.begin() + i);
  landing();
  ++block.progress;
}

// Lets the last of the threads that fell behind go on: the first is as far behind as can be.
bool wake_one() {
  Fiber* last = nullptr;
  for (auto& fiber : block.fibers)
    if (fiber.asleep && (!last || fiber.asleep > last->asleep)) last = &fiber;
  if (last) last->asleep = 0;
  return last;
}

// Says first what each thread waits for.
[[noreturn]] void fail_deadlock() {
  for (int i = 0, start = 0; i < block.threads; ++i) {
    const Fiber& fiber = block.fibers[i];
    const Fiber& next = block.fibers[i + 1 < block.threads ? i + 1 : i];
    if (&next != &fiber && fiber.waits == next.waits && fiber.place == next.place && fiber.done == next.done) continue;
    const char* const state = fiber.done ? "done, last" : fiber.waits;
    std::fprintf(stderr, "  threads %d to %d: %s %lld\n", start, i, state, static_cast<long long>(fiber.place));
    start = i + 1;
  }
  fail("deadlock: some threads wait for others that never come");
}

void run_block(int threads) {
  for (auto& fiber : block.fibers) start_fiber(fiber);
  for (int left = threads; left;) {
    const uint64_t before = block.progress;
    const int first = int(random_number() % uint32_t(threads)), direction = random_number() % 2 ? 1 : threads - 1;
    for (int i = 0; i < threads; ++i) {
      block.current = int((first + int64_t(i) * direction) % threads);
      if (self().done || self().asleep) continue;
      ha_switch_fiber(&block.scheduler, self().stack_pointer);
      left -= self().done;
    }
    for (size_t chances = block.flying.size(); chances; --chances)
      if (random_number() % 4 == 0) land_one();
    if (left && block.progress == before) {
      if (!block.flying.empty()) land_one();
      else if (!wake_one()) fail_deadlock();
    }
  }
  require(block.flying.empty(), "the block ended before a load had landed");
}

}  // namespace

void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %lld, thread %d)\n", message, static_cast<long long>(block.index), block.current);
  std::abort();
}

void fall_behind() {
  constexpr uint32_t kOneIn = 256;
  if (random_number() % kOneIn) return;
  self().asleep = ++block.clock;
  yield();
}

void yield() { ha_switch_fiber(&self().stack_pointer, block.scheduler); }

void emulate(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  require(threads % kWarp == 0 && threads <= kMaxThreads, "threads must be a multiple of 32, up to 1024");
  require(shared <= kMostShared, "more shared memory than a block can have");
  for (int64_t index = 0; index < blocks; ++index) {
    block = Block();
    block.body = &body;
    block.index = index;
    block.blocks = blocks;
    block.threads = threads;
    block.fibers.resize(threads);
    for (auto& fiber : block.fibers) fiber.registers = kRegisters / threads / 8 * 8;
    block.warps.resize(threads / kWarp);
    block.groups.resize((threads + kGroup - 1) / kGroup);
    std::vector<unsigned char> storage(shared + kAlignment, 0xff);  // all ones: NaN in every type
    block.base = storage.data() + (kAlignment - reinterpret_cast<uintptr_t>(storage.data()) % kAlignment);
    block.shared = shared;
    block.written.resize(shared / 16 + 1);
    run_block(threads);
  }
}

int compute_capability() { return HA_EMULATE; }
int64_t shared_limit() {
  const char* limit = std::getenv("HA_EMULATED_SHARED");
  return limit ? std::atoll(limit) : 96 * 1024;
}
int thread_index() { return block.current; }
int64_t block_index() { return block.index; }
int64_t grid_size() { return block.blocks; }
unsigned char* shared_memory() { return block.base; }
uint32_t shared_address(const void* pointer) { return uint32_t(static_cast<const unsigned char*>(pointer) - block.base); }
void sync_block() { meet(block.meeting, block.threads, "sync_block", 0, [] {}); }

uint32_t load_word(uint32_t address) {
  require_shared(address, 4, 4, "ld.shared outside shared memory");
  uint32_t word;
  std::memcpy(&word, block.base + address, 4);
  return word;
}

void copy_async(uint32_t target, const void* source, bool valid) {
  require_shared(target, 16, 16, "cp.async outside shared memory");
  std::memset(block.base + target, 0xff, 16);  // what is there in the meantime is not to be read
  self().open.push_back({target, source, valid});
}
void copy_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
  self().committed = true;
}
void copy_wait(int pending) {
  auto& groups = self().groups;
  while (int(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) land(copy, block.current);
    groups.erase(groups.begin());
  }
  if (!pending && self().committed) wait_until("copies", 0, [] { return !self().counted; });
}
void land(const Copy& copy, int thread) {
  if (copy.valid) std::memcpy(block.base + copy.target, copy.source, 16);
  else std::memset(block.base + copy.target, 0, 16);
  block.written[copy.target / 16] = {++block.clock, thread};
}

}  // namespace ha
