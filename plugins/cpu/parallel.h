// Work shared out among threads, whoever owns them.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace ha::cpu {

// Runs `worker` on several threads at once and waits; what one of them throws is thrown here.
class Workers {
 public:
  virtual ~Workers() = default;
  virtual void run(const std::function<void()>& worker) = 0;
};

// Carries the first exception of several threads to the one that waits for them.
class FirstFailure {
 public:
  void guard(const std::function<void()>& body) noexcept;
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr failure_;
};

// Threads of its own, started for each run; the calling thread is one of them.
class OwnThreads : public Workers {
 public:
  explicit OwnThreads(int threads);  // 0 = one for each processor that this process may use
  void run(const std::function<void()>& worker) override;

 private:
  int threads_;
};

// Hands out 0..count-1, each once. What unit a thread gets never changes what the unit computes.
class Units {
 public:
  explicit Units(int64_t count) : count_(count) {}
  bool take(int64_t& unit) { return (unit = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// make_body() runs once on each thread and returns the function that is called with each unit it takes.
template <class MakeBody>
void for_each_unit(Workers& workers, int64_t count, MakeBody&& make_body) {
  if (count == 0) return;
  Units units(count);
  workers.run([&] {
    int64_t unit;
    if (!units.take(unit)) return;
    auto body = make_body();
    do body(unit);
    while (units.take(unit));
  });
}

}  // namespace ha::cpu
