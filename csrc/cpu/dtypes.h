// From element types known at run time to template arguments.
#pragma once

#include <stdexcept>

#include "common/types.h"

namespace imf {
namespace IMF_ISA {
namespace {

// Calls body with a value of the C++ type that stands for `type`.
template <typename Body>
inline void with_type(DType type, Body body) {
  if (type == DType::bfloat16) {
    body(bfloat16{});
  } else if (type == DType::float32) {
    body(float{});
  } else {
    throw std::invalid_argument("the kernels of the CPU take float32 and bfloat16");
  }
}

// The pairs that operations take: equal types, or an fp32 stream beside bf16 operands.
template <typename Body>
inline void with_types(DType stream, DType operand, Body body) {
  if (stream == DType::bfloat16) {
    body(bfloat16{}, bfloat16{});
  } else {
    with_type(operand, [&](auto o) { body(float{}, o); });
  }
}

}  // namespace
}  // namespace IMF_ISA
}  // namespace imf
