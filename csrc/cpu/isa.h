// Instruction sets. Each kernel file is compiled once per set (CMakeLists.txt gives the flags and IMF_ISA),
// into a namespace of the set's name; the set to run is chosen here at run time.
#pragma once

#include <string>
#include <vector>

namespace imf {

enum class Isa { plain, neon, avx2, avx512, avx512_bf16 };

// Returns the sets that were compiled in and that this processor runs, the best one last.
std::vector<std::string> supported_isas();
// Returns why `name` cannot be used here; empty if it can.
std::string isa_unavailable(const std::string& name);
void set_isa(const std::string& name);  // throws std::invalid_argument with the reason above
std::string get_isa();
Isa current_isa();
bool is_intel();

}  // namespace imf

#if defined(IMF_AVX512_BF16)
#define IMF_DECLARE_AVX512_BF16(...) \
  namespace avx512_bf16 {            \
  __VA_ARGS__;                       \
  }
#define IMF_CALL_AVX512_BF16(function, ...) \
  ::imf::current_isa() == ::imf::Isa::avx512_bf16 ? avx512_bf16::function(__VA_ARGS__):
#else
#define IMF_DECLARE_AVX512_BF16(...)
#define IMF_CALL_AVX512_BF16(function, ...)
#endif

#if defined(IMF_X86)
#define IMF_DECLARE_PER_ISA(...) \
  namespace plain {              \
  __VA_ARGS__;                   \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__;                   \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__;                   \
  }                              \
  IMF_DECLARE_AVX512_BF16(__VA_ARGS__)
#define IMF_CALL(function, ...)                                                          \
  (IMF_CALL_AVX512_BF16(function, __VA_ARGS__)::imf::current_isa() == ::imf::Isa::avx512 \
       ? avx512::function(__VA_ARGS__)                                                   \
   : ::imf::current_isa() == ::imf::Isa::avx2 ? avx2::function(__VA_ARGS__)              \
                                              : plain::function(__VA_ARGS__))
#elif defined(IMF_ARM64)
#define IMF_DECLARE_PER_ISA(...) \
  namespace plain {              \
  __VA_ARGS__;                   \
  }                              \
  namespace neon {               \
  __VA_ARGS__;                   \
  }
#define IMF_CALL(function, ...) \
  (::imf::current_isa() == ::imf::Isa::neon ? neon::function(__VA_ARGS__) : plain::function(__VA_ARGS__))
#else
#define IMF_DECLARE_PER_ISA(...) \
  namespace plain {              \
  __VA_ARGS__;                   \
  }
#define IMF_CALL(function, ...) plain::function(__VA_ARGS__)
#endif
