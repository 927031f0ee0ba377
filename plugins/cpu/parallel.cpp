#include "parallel.h"

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ha::cpu {

OwnThreads::OwnThreads(int threads) : threads_(threads > 0 ? threads : int(std::thread::hardware_concurrency())) {}

void OwnThreads::run(const std::function<void()>& worker) {
  std::exception_ptr first;
  std::mutex guard;
  const auto caught = [&] {
    try {
      worker();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!first) first = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads_; ++i) others.emplace_back(caught);
  } catch (...) {  // no more threads to be had: those that run, and this one, do all units
  }
  caught();
  for (auto& thread : others) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace ha::cpu
