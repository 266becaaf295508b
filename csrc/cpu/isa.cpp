#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace imf {
namespace {

bool processor_has(Isa isa) {
#if defined(IMF_X86)
  __builtin_cpu_init();
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::plain;
}

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain"; }

Isa best_isa() {
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (processor_has(isa)) return isa;
  }
  return Isa::plain;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (processor_has(isa)) names.emplace_back(name_of(isa));
  }
  return names;
}

std::string isa_unavailable(const std::string& name) {
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (name != name_of(isa)) continue;
    if (processor_has(isa)) return "";
    return "this processor does not support " + name;
  }
  return "unknown instruction set '" + name + "'; there are plain, avx2 and avx512";
}

void set_isa(const std::string& name) {
  const std::string reason = isa_unavailable(name);
  if (!reason.empty()) throw std::invalid_argument(reason);
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (name == name_of(isa)) selected() = isa;
  }
}

std::string get_isa() { return name_of(current_isa()); }

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

}  // namespace imf
