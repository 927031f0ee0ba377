#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

namespace ha::cpu {

void FirstFailure::guard(const std::function<void()>& body) noexcept {
  try {
    body();
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

OwnThreads::OwnThreads(int threads) : threads_(threads > 0 ? threads : int(std::thread::hardware_concurrency())) {}

void OwnThreads::run(const std::function<void()>& worker) {
  FirstFailure failure;
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads_; ++i) others.emplace_back([&] { failure.guard(worker); });
  } catch (const std::system_error&) {  // no more threads to be had: those that run, and this one, do all units
  }
  failure.guard(worker);
  for (auto& thread : others) thread.join();
  failure.rethrow();
}

}  // namespace ha::cpu
