// See pybind11.h.
