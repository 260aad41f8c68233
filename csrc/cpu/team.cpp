#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

namespace internlm2 {
namespace {

// One loop at a time. A helper enters (`inside`), looks whether the loop is open, and works; the main thread works as well,
// then closes the loop and waits until nobody is inside. All orderings are sequentially consistent: a helper either is seen
// inside, or sees the loop closed.
struct Team {
  std::atomic<bool> open{false}, finished{false};
  std::atomic<int64_t> inside{0}, next{0};
  int64_t items = 0;
  void* context = nullptr;
  void (*body)(void*, int64_t) = nullptr;

  void work() {
    for (int64_t i; (i = next.fetch_add(1)) < items;) body(context, i);
  }
  void run(int64_t count, void* with, void (*what)(void*, int64_t)) {
    items = count, context = with, body = what;
    next = 0;
    open = true;
    work();
    open = false;
    while (inside != 0) pause();
  }
  void help() {
    for (int idle = 0; !finished; idle++) {
      if (open) {
        inside++;
        if (open) work(), idle = 0;
        inside--;
      }
      // About 20 microseconds: longer than any serial part of a decoding step.
      if (idle < 1000)
        pause();
      else
        std::this_thread::yield();
    }
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

thread_local Team* current = nullptr;

}  // namespace

void parallel(int64_t items, void* context, void (*body)(void*, int64_t)) {
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < items; i++) body(context, i);
    return;
  }
  if (current != nullptr) return current->run(items, context, body);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
  });
}

void with_team(void* context, void (*main)(void*)) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || current != nullptr) return main(context);
  Team team;
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.help();  // where torch has fewer threads than it says, nobody comes to help
    current = &team;
    try {
      main(context);
    } catch (...) {
      error = std::current_exception();
    }
    current = nullptr;
    team.finished = true;
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace internlm2
