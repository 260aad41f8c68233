#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace internlm2 {

namespace portable {
extern const Kernels table;
}
#if defined(INTERNLM2_HAVE_avx2)
namespace avx2 {
extern const Kernels table;
}
#endif
#if defined(INTERNLM2_HAVE_avx512)
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(INTERNLM2_HAVE_avx512_bf16)
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
  const Kernels* runnable[4];  // widest first
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  (void)avx2, (void)avx512, (void)bf16;
#if defined(INTERNLM2_HAVE_avx512_bf16)
  if (bf16) runnable[count++] = &avx512_bf16::table;
#endif
#if defined(INTERNLM2_HAVE_avx512)
  if (avx512) runnable[count++] = &avx512::table;
#endif
#if defined(INTERNLM2_HAVE_avx2)
  if (avx2) runnable[count++] = &avx2::table;
#endif
#endif
  runnable[count++] = &portable::table;
  const char* wanted = std::getenv("INTERNLM2_CPU_ISA");
  if (wanted == nullptr || *wanted == 0) return *runnable[0];
  for (int i = 0; i < count; i++)
    if (std::strcmp(runnable[i]->name, wanted) == 0) return *runnable[i];
  throw std::runtime_error(std::string("INTERNLM2_CPU_ISA=") + wanted +
                           " was not built or does not run on this processor: avx512_bf16, avx512, avx2, portable.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace internlm2
