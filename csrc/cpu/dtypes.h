// Dispatch from run-time element types to template arguments.
#pragma once

#include <type_traits>

#include "errors.h"

namespace imf::IMF_ISA {
namespace {

// Calls body with a value of the C++ type of `type`.
template <typename Body>
inline void with_type(DType type, Body body) {
  if (type == DType::bfloat16) {
    body(bfloat16{});
  } else if (type == DType::float32) {
    body(float{});
  } else {
    refuse("the kernels of the CPU take float32 and bfloat16");
  }
}

// Calls body with values of a supported pair of types: equal ones, or an fp32 stream with bf16 operands.
template <typename Body>
inline void with_types(DType stream, DType operand, Body body) {
  with_type(stream, [&](auto s) {
    if constexpr (std::is_same_v<decltype(s), bfloat16>) {
      if (operand != stream) refuse("an operand of a bfloat16 stream must be of bfloat16");
      body(s, s);
    } else {
      with_type(operand, [&](auto o) { body(s, o); });
    }
  });
}

}  // namespace
}  // namespace imf::IMF_ISA
