// The Python module imf_kernels._C. It checks what kernels need to stay in the tensors' memory: layouts
// (views.h), sizes and dtypes (checks.h); imf_kernels/ops checks the rest. The interpreter lock is released
// while a kernel runs.
#include "bindings.h"

#include <cstdlib>

#include "cpu/isa.h"
#include "digests.h"
#include "key.h"
#include "launch.h"
#if defined(IMF_CUDA)
#include "cuda/runtime.h"
#define IMF_CUDA_KERNEL(function) cuda::function
#else
#define IMF_CUDA_KERNEL(function) nullptr
#endif
#define IMF_CPU_KERNEL(function) nullptr

namespace imf {

#define IMF_REGISTER(function, Arguments, on)                                                          \
  const Entered function##_entered([](pybind11::module_& m) {                                          \
    define<Arguments>(                                                                                 \
        m, #function, [](const Arguments& a) { IMF_CALL(function, a); }, IMF_##on##_KERNEL(function)); \
  });

namespace {

// Makes glibc keep up to 64 MiB that lie free at the end of its heap, and take blocks up to 32 MiB from
// there. Both limits follow the largest block that was mapped and freed, so a process of blocks of 6 MB gives
// all above 12 MB back to the system several times a step, and gets it again zeroed page by page. This block
// is never touched. Limits that the user has set stay, and other allocators do not notice.
void raise_limits_of_kept_memory() {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));
  std::free(block);
}

}  // namespace
}  // namespace imf

#include "operations.h"  // csrc/ops/*.h

PYBIND11_MODULE(_C, m) {
  using namespace imf;
  m.doc() = "Compiled kernels of imf_kernels";
  raise_limits_of_kept_memory();
  m.attr("schemas") = pybind11::dict();
  for (const Definition definition : definitions()) definition(m);

  m.attr("sources") = pybind11::dict();
  m.attr("sources")["cpu"] = digest_of_cpu;
  m.attr("sources")["cuda"] = digest_of_cuda;
  m.def("key", &key);
  m.def("watch", &Surroundings::watch);
  pybind11::class_<Kinds>(m, "Kinds")
      .def(pybind11::init<>())
      .def("launch", &Kinds::launch)
      .def("add", &Kinds::add);
  pybind11::class_<Replayed>(m, "Replayed", pybind11::dynamic_attr())
      .def(pybind11::init<pybind11::object>())
      .def("clear", &Replayed::clear)
      .def("__call__", &Replayed::operator());
  m.def("supported_isas", &supported_isas);
  m.def("isa_unavailable", &isa_unavailable);
  m.def("set_isa", &set_isa);
  m.def("get_isa", &get_isa);
  m.attr("intel") = is_intel();
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(IMF_CUDA)
  m.attr("cuda") = true;
  m.def("cuda_unavailable", &cuda::unavailable);
#else
  m.attr("cuda") = false;
#endif
}
