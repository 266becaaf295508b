// Dispatch from run-time element types to template arguments.
#pragma once

#include <stdexcept>

#include "types.h"

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
    throw std::invalid_argument("the kernels of the CPU take float32 and bfloat16");
  }
}

// Calls body with values of a supported pair of types: equal ones, or an fp32 stream with bf16 operands.
template <typename Body>
inline void with_types(DType stream, DType operand, Body body) {
  if (stream == DType::bfloat16) {
    body(bfloat16{}, bfloat16{});
  } else {
    with_type(operand, [&](auto o) { body(float{}, o); });
  }
}

}  // namespace
}  // namespace imf::IMF_ISA
