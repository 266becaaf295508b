#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(IMF_AMX_BF16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace imf {
namespace {

struct Named {
  Isa isa;
  const char* name;
};

// Slowest first.
constexpr Named all[] = {{Isa::plain, "plain"},
                         {Isa::neon, "neon"},
                         {Isa::avx2, "avx2"},
                         {Isa::avx512, "avx512"},
                         {Isa::avx512_bf16, "avx512_bf16"},
                         {Isa::amx_bf16, "amx_bf16"}};

#if defined(IMF_AMX_BF16)
// Whether the processor has AMX for bf16, and Linux lets this process use the registers of tiles.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned tiles_and_bf16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles_and_bf16) != tiles_and_bf16) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

bool processor_has(Isa isa) {
#if defined(IMF_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(IMF_AVX512_BF16)
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return avx512_bf16;
#endif
#if defined(IMF_AMX_BF16)
  static const bool amx = has_amx();
  if (isa == Isa::amx_bf16) return avx512_bf16 && amx;
#endif
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(IMF_ARM64)
  if (isa == Isa::neon) return true;  // part of the architecture
#endif
  return isa == Isa::plain;
}

Isa best_isa() {
  Isa best = Isa::plain;
  for (const Named& known : all) {
    if (processor_has(known.isa)) best = known.isa;
  }
  return best;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Named& known : all) {
    if (processor_has(known.isa)) names.emplace_back(known.name);
  }
  return names;
}

std::string isa_unavailable(const std::string& name) {
  std::string names;
  for (const Named& known : all) {
    if (name == known.name) {
      return processor_has(known.isa) ? "" : "this processor does not support " + name;
    }
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  return "unknown instruction set '" + name + "'; there are " + names;
}

void set_isa(const std::string& name) {
  const std::string reason = isa_unavailable(name);
  if (!reason.empty()) throw std::invalid_argument(reason);
  for (const Named& known : all) {
    if (name == known.name) selected() = known.isa;
  }
}

std::string get_isa() { return all[static_cast<int>(current_isa())].name; }

bool is_intel() {
#if defined(IMF_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

}  // namespace imf
