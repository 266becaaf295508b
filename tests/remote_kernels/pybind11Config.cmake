# Stand-in for pybind11's own: makes a program of the module (pybind11/pybind11.h says which).
function(pybind11_add_module name)
  list(REMOVE_ITEM ARGN NO_EXTRAS)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE ${pybind11_DIR})
endfunction()
