// Threads for the kernels: torch's own, called together once for each loop, or once for a whole row of loops.
#pragma once

#include <cstdint>

namespace internlm2 {

// body(context, i) for every i in [0, items), handed out one by one to torch's threads (a `Parallel` of arguments.h). Inside
// `with_team` the threads are there already: a loop starts in a fraction of a microsecond, where waking them costs several.
void parallel(int64_t items, void* context, void (*body)(void* context, int64_t item));

// Runs main(context) on the calling thread while torch's other threads stand by for its loops. They spin, and give their
// core away when nothing comes for a while; a thread that the system has put to sleep is not waited for.
void with_team(void* context, void (*main)(void* context));

}  // namespace internlm2
