#pragma once

#include <initializer_list>

#include "types.h"

namespace imf {

// Throws std::invalid_argument of a text with numbers in the places of "%". For kernels: what is compiled for
// an instruction set defines no inline functions of the standard library, of which the linker keeps one for
// all processors.
[[noreturn]] void refuse(const char* text, std::initializer_list<index_t> numbers = {});

}  // namespace imf
