// Instruction sets. Each kernel file is compiled once per set (CMakeLists.txt gives the flags and IMF_ISA),
// into a namespace of the set's name; the set to run is chosen here at run time.
#pragma once

#include <string>
#include <vector>

namespace imf {

enum class Isa { plain, neon, avx2, avx512, avx512_bf16, amx_bf16 };

// Returns the sets that were compiled in and that this processor runs, the best one last.
std::vector<std::string> supported_isas();
// Returns why `name` cannot be used here; empty if it can.
std::string isa_unavailable(const std::string& name);
void set_isa(const std::string& name);  // throws std::invalid_argument with the reason above
std::string get_isa();
Isa current_isa();
bool is_intel();

}  // namespace imf

// Expands apply(set, ...) for each set that is compiled in.
#if defined(IMF_AMX_BF16)
#define IMF_FOR_EACH_ISA(apply, ...)                                                      \
  apply(amx_bf16, __VA_ARGS__) apply(avx512_bf16, __VA_ARGS__) apply(avx512, __VA_ARGS__) \
      apply(avx2, __VA_ARGS__) apply(plain, __VA_ARGS__)
#elif defined(IMF_AVX512_BF16)
#define IMF_FOR_EACH_ISA(apply, ...)                                                  \
  apply(avx512_bf16, __VA_ARGS__) apply(avx512, __VA_ARGS__) apply(avx2, __VA_ARGS__) \
      apply(plain, __VA_ARGS__)
#elif defined(IMF_X86)
#define IMF_FOR_EACH_ISA(apply, ...) \
  apply(avx512, __VA_ARGS__) apply(avx2, __VA_ARGS__) apply(plain, __VA_ARGS__)
#elif defined(IMF_ARM64)
#define IMF_FOR_EACH_ISA(apply, ...) apply(neon, __VA_ARGS__) apply(plain, __VA_ARGS__)
#else
#define IMF_FOR_EACH_ISA(apply, ...) apply(plain, __VA_ARGS__)
#endif

#define IMF_DECLARE_IN(isa, ...) \
  namespace isa {                \
  __VA_ARGS__;                   \
  }
#define IMF_DECLARE_PER_ISA(...) IMF_FOR_EACH_ISA(IMF_DECLARE_IN, __VA_ARGS__)
// Statements that return function(...) of the set in use.
#define IMF_CALL_IN(isa, function, ...) \
  if (::imf::current_isa() == ::imf::Isa::isa) return isa::function(__VA_ARGS__);
#define IMF_CALL(function, ...) IMF_FOR_EACH_ISA(IMF_CALL_IN, function, __VA_ARGS__)
