// Kernel arguments, listed once: kernels take the struct; the Python binding, its stub and the operator's
// schema are derived from it (csrc/bindings.h).
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

// Stands after a field for its dtype and sizes (csrc/checks.h), or is absent.
#define IMF_IS(...)

// Declares the fields of a struct of arguments, in Python's order, and their names.
#define IMF_ARGUMENTS(...) \
  __VA_ARGS__              \
  Place place;             \
  static constexpr char fields[] = #__VA_ARGS__;

// Declares `function` for each CPU instruction set and for CUDA, and registers it (csrc/bindings.cpp). `on`:
// CPU alone, or CUDA for both.
#define IMF_DECLARE(function, Arguments, on)            \
  IMF_DECLARE_PER_ISA(void function(const Arguments&);) \
  namespace cuda {                                      \
  void function(const Arguments&);                      \
  }                                                     \
  IMF_REGISTER(function, Arguments, on)

#ifndef IMF_REGISTER
#define IMF_REGISTER(function, Arguments, on)
#endif
