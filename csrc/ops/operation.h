// Arguments of kernels, listed once: the functions of the CPU and of CUDA take the struct, and the Python
// binding, its stub and the schema of its operator are made from it (csrc/bindings.h).
#pragma once

#include "cpu/isa.h"
#include "tensor.h"

// The fields of a struct of arguments, in Python's order, and their names.
#define IMF_ARGUMENTS(...) \
  __VA_ARGS__              \
  Place place;             \
  static constexpr char fields[] = #__VA_ARGS__;

// Declares `function` of these arguments for each instruction set of the CPU and for CUDA, and enters it into
// the module (csrc/bindings.cpp). `on` says for what it has kernels: CPU, CUDA for both, HOPPER for the CPU
// and sm_90a.
#define IMF_DECLARE(function, Arguments, on)            \
  IMF_DECLARE_PER_ISA(void function(const Arguments&);) \
  namespace cuda {                                      \
  void function(const Arguments&);                      \
  }                                                     \
  IMF_REGISTER(function, Arguments, on)

#ifndef IMF_REGISTER
#define IMF_REGISTER(function, Arguments, on)
#endif
