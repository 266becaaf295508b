#pragma once

#include <pybind11/pybind11.h>

namespace imf::cuda {

// Registers the functions of the kernels that are compiled for sm_90a alone.
void register_sm90(pybind11::module_&);

}  // namespace imf::cuda
