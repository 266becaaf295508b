// What Python may call of the kernels for sm_90a, in the manner of csrc/bindings.cpp.
#include "cuda/bindings_sm90.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cuda/attention.h"

namespace imf::cuda {

void register_sm90(pybind11::module_& m) {
  using pointer = std::uintptr_t;
  using Heads = std::tuple<pointer, index_t, index_t, index_t>;  // as in csrc/bindings.cpp
  static const auto heads_tensor = [](const Heads& x) {
    return HeadsTensor{reinterpret_cast<void*>(std::get<0>(x)),
                       {std::get<1>(x), std::get<2>(x), std::get<3>(x)}};
  };
  m.def(
      "attention_forward_cuda",
      [](int type, Heads q, Heads k, Heads v, Heads out, Heads q_dot, Heads k_dot, Heads v_dot, Heads out_dot,
         pointer lse, index_t batch, index_t tangent_batch, index_t heads, index_t group, index_t queries,
         index_t keys, index_t width, index_t value_width, float scale, int device, pointer stream) {
        attention_forward({DType(type),
                           heads_tensor(q),
                           heads_tensor(k),
                           heads_tensor(v),
                           heads_tensor(out),
                           heads_tensor(q_dot),
                           heads_tensor(k_dot),
                           heads_tensor(v_dot),
                           heads_tensor(out_dot),
                           reinterpret_cast<float*>(lse),
                           batch,
                           tangent_batch,
                           heads,
                           group,
                           queries,
                           keys,
                           width,
                           value_width,
                           scale,
                           device,
                           reinterpret_cast<void*>(stream)});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace imf::cuda
