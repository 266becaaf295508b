#pragma once

#include <pybind11/pybind11.h>

namespace imf::cuda {

// Registers every function of the CUDA kernels; each name ends in _cuda.
void register_functions(pybind11::module_&);

}  // namespace imf::cuda
