// imf_kernels._C: what Python may call. Pointers are integers (torch.Tensor.data_ptr()), sizes and
// strides count elements; nothing is checked here, the operation's file in imf_kernels/ops does that.
// The interpreter lock is released while a kernel runs. _C.pyi names every argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/attention.h"
#include "cpu/gated_residual.h"
#include "cpu/gelu.h"
#include "cpu/isa.h"
#include "cpu/layer_norm.h"
#include "cpu/prepend_tokens.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/rms_norm.h"
#include "cpu/silu.h"
#include "cpu/sinusoidal_embedding.h"
#include "cpu/swiglu.h"
#if defined(IMF_CUDA_ARCHITECTURES)
#include "cuda/bindings.h"
#endif
#if defined(IMF_CUDA_SM90)
#include "cuda/bindings_sm90.h"
#endif

namespace py = pybind11;
using imf::DType;
using imf::index_t;
using pointer = std::uintptr_t;

namespace {

template <typename T = void>
T* at(pointer p) {
  return reinterpret_cast<T*>(p);
}

using unlocked = py::call_guard<py::gil_scoped_release>;

void register_isa(py::module_& m) {
  m.def("supported_isas", &imf::supported_isas);
  m.def("isa_unavailable", &imf::isa_unavailable);
  m.def("set_isa", &imf::set_isa);
  m.def("get_isa", &imf::get_isa);
  m.attr("intel") = imf::is_intel();
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(IMF_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = IMF_CUDA_ARCHITECTURES;
  imf::cuda::register_functions(m);
#else
  m.attr("cuda_architectures") = "";
#endif
#if defined(IMF_CUDA_SM90)
  imf::cuda::register_sm90(m);
#endif
}

void register_rms_norm(py::module_& m) {
  using namespace imf;
  m.def(
      "rms_norm_forward",
      [](int x_type, int y_type, pointer x, pointer x_dot, pointer weight, pointer y, pointer y_dot,
         pointer rstd, index_t rows, index_t tangent_rows, index_t width, index_t x_stride,
         index_t x_dot_stride, float eps, int threads) {
        IMF_CALL(rms_norm_forward,
                 {DType(x_type), DType(y_type), at(x), at(x_dot), at<float>(weight), at(y), at(y_dot),
                  at<float>(rstd), rows, tangent_rows, width, x_stride, x_dot_stride, eps, threads});
      },
      unlocked());
  m.def(
      "rms_norm_backward",
      [](int x_type, int y_type, pointer x, pointer dy, pointer weight, pointer rstd, pointer dx,
         pointer dweight, index_t rows, index_t width, index_t x_stride, index_t dy_stride, int threads) {
        IMF_CALL(rms_norm_backward,
                 {DType(x_type), DType(y_type), at(x), at(dy), at<float>(weight), at<float>(rstd), at(dx),
                  at<float>(dweight), rows, width, x_stride, dy_stride, threads});
      },
      unlocked());
}

void register_layer_norm(py::module_& m) {
  using namespace imf;
  m.def(
      "layer_norm_forward",
      [](int x_type, int y_type, pointer x, pointer x_dot, pointer scale, pointer scale_dot, pointer shift,
         pointer shift_dot, pointer y, pointer y_dot, pointer statistics, index_t rows, index_t tangent_rows,
         index_t length, index_t width, index_t x_stride, index_t x_dot_stride, float one, float eps,
         int threads) {
        IMF_CALL(layer_norm_forward, {DType(x_type),
                                      DType(y_type),
                                      at(x),
                                      at(x_dot),
                                      at<float>(scale),
                                      at<float>(scale_dot),
                                      at<float>(shift),
                                      at<float>(shift_dot),
                                      at(y),
                                      at(y_dot),
                                      at<float>(statistics),
                                      rows,
                                      tangent_rows,
                                      length,
                                      width,
                                      x_stride,
                                      x_dot_stride,
                                      one,
                                      eps,
                                      threads});
      },
      unlocked());
  m.def(
      "layer_norm_backward",
      [](int x_type, int y_type, pointer x, pointer dy, pointer scale, pointer statistics, pointer dx,
         pointer sums, index_t groups, index_t length, index_t width, index_t x_stride, index_t dy_stride,
         float one, int threads) {
        IMF_CALL(layer_norm_backward,
                 {DType(x_type), DType(y_type), at(x), at(dy), at<float>(scale), at<float>(statistics),
                  at(dx), at<float>(sums), groups, length, width, x_stride, dy_stride, one, threads});
      },
      unlocked());
}

void register_gelu(py::module_& m) {
  using namespace imf;
  m.def(
      "gelu_forward",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t elements,
         index_t tangent_elements, bool by_tanh, int threads) {
        IMF_CALL(gelu_forward,
                 {DType(type), at(x), at(x_dot), at(y), at(y_dot), elements, tangent_elements, threads},
                 by_tanh);
      },
      unlocked());
  m.def(
      "gelu_backward",
      [](int type, pointer x, pointer dy, pointer dx, index_t elements, bool by_tanh, int threads) {
        IMF_CALL(gelu_backward, {DType(type), at(x), at(dy), at(dx), elements, threads}, by_tanh);
      },
      unlocked());
}

void register_silu(py::module_& m) {
  using namespace imf;
  m.def(
      "silu_forward",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t elements,
         index_t tangent_elements, int threads) {
        IMF_CALL(silu_forward,
                 {DType(type), at(x), at(x_dot), at(y), at(y_dot), elements, tangent_elements, threads});
      },
      unlocked());
  m.def(
      "silu_backward",
      [](int type, pointer x, pointer dy, pointer dx, index_t elements, int threads) {
        IMF_CALL(silu_backward, {DType(type), at(x), at(dy), at(dx), elements, threads});
      },
      unlocked());
}

void register_swiglu(py::module_& m) {
  using namespace imf;
  m.def(
      "swiglu_forward",
      [](int type, pointer x, pointer x_dot, pointer y, pointer y_dot, index_t rows, index_t tangent_rows,
         index_t width, index_t x_stride, index_t x_dot_stride, int threads) {
        IMF_CALL(swiglu_forward, {DType(type), at(x), at(x_dot), at(y), at(y_dot), rows, tangent_rows, width,
                                  x_stride, x_dot_stride, threads});
      },
      unlocked());
  m.def(
      "swiglu_backward",
      [](int type, pointer x, pointer dy, pointer dx, index_t rows, index_t width, index_t x_stride,
         index_t dy_stride, int threads) {
        IMF_CALL(swiglu_backward,
                 {DType(type), at(x), at(dy), at(dx), rows, width, x_stride, dy_stride, threads});
      },
      unlocked());
}

void register_gated_residual(py::module_& m) {
  using namespace imf;
  m.def(
      "gated_residual_forward",
      [](int x_type, int branch_type, pointer x, pointer x_dot, pointer branch, pointer branch_dot,
         pointer gate, pointer gate_dot, pointer y, pointer y_dot, index_t rows, index_t tangent_rows,
         index_t length, index_t width, index_t x_stride, index_t x_dot_stride, index_t branch_stride,
         index_t branch_dot_stride, int threads) {
        IMF_CALL(gated_residual_forward,
                 {DType(x_type), DType(branch_type), at(x), at(x_dot), at(branch), at(branch_dot),
                  at<float>(gate), at<float>(gate_dot), at(y), at(y_dot), rows, tangent_rows, length, width,
                  x_stride, x_dot_stride, branch_stride, branch_dot_stride, threads});
      },
      unlocked());
  m.def(
      "gated_residual_backward",
      [](int x_type, int branch_type, pointer dy, pointer branch, pointer gate, pointer dbranch,
         pointer dgate, index_t groups, index_t length, index_t width, index_t dy_stride,
         index_t branch_stride, int threads) {
        IMF_CALL(gated_residual_backward,
                 {DType(x_type), DType(branch_type), at(dy), at(branch), at<float>(gate), at(dbranch),
                  at<float>(dgate), groups, length, width, dy_stride, branch_stride, threads});
      },
      unlocked());
}

void register_sinusoidal_embedding(py::module_& m) {
  using namespace imf;
  m.def(
      "sinusoidal_embedding_forward",
      [](int type, pointer t, pointer t_dot, pointer frequencies, pointer y, pointer y_dot, index_t rows,
         index_t tangent_rows, index_t half, int threads) {
        IMF_CALL(sinusoidal_embedding_forward, {DType(type), at(t), at(t_dot), at<float>(frequencies), at(y),
                                                at(y_dot), rows, tangent_rows, half, threads});
      },
      unlocked());
}

void register_prepend_tokens(py::module_& m) {
  using namespace imf;
  // A group is (tokens, embedding, embedding_dot, count).
  using Group = std::tuple<pointer, pointer, pointer, index_t>;
  m.def(
      "prepend_tokens_forward",
      [](int type, const std::vector<Group>& groups, pointer x, pointer x_dot, pointer y, pointer y_dot,
         index_t batch, index_t tangent_batch, index_t length, index_t width, int threads) {
        std::vector<TokenGroup> list;
        index_t prefix = 0;
        for (const auto& [tokens, embedding, embedding_dot, count] : groups) {
          list.push_back({at(tokens), at(embedding), at(embedding_dot), count});
          prefix += count;
        }
        IMF_CALL(prepend_tokens_forward,
                 {DType(type), list.data(), static_cast<index_t>(list.size()), prefix, at(x), at(x_dot),
                  at(y), at(y_dot), batch, tangent_batch, length, width, threads});
      },
      unlocked());
}

using Strides = std::array<index_t, 3>;

void register_qk_norm_rope(py::module_& m) {
  using namespace imf;
  m.def(
      "qk_norm_rope_forward",
      [](int type, pointer x, pointer x_dot, pointer weight, pointer cos, pointer sin, pointer y,
         pointer y_dot, pointer rstd, index_t batch, index_t tangent_batch, index_t heads, index_t length,
         index_t width, Strides xs, Strides ts, float eps, int threads) {
        IMF_CALL(qk_norm_rope_forward, {DType(type),
                                        at(x),
                                        at(x_dot),
                                        at<float>(weight),
                                        at<float>(cos),
                                        at<float>(sin),
                                        at(y),
                                        at(y_dot),
                                        at<float>(rstd),
                                        batch,
                                        tangent_batch,
                                        heads,
                                        length,
                                        width,
                                        {xs[0], xs[1], xs[2]},
                                        {ts[0], ts[1], ts[2]},
                                        eps,
                                        threads});
      },
      unlocked());
  m.def(
      "qk_norm_rope_backward",
      [](int type, pointer x, pointer dy, pointer weight, pointer cos, pointer sin, pointer rstd, pointer dx,
         pointer dweight, index_t batch, index_t heads, index_t length, index_t width, Strides xs,
         Strides dys, int threads) {
        IMF_CALL(qk_norm_rope_backward, {DType(type),
                                         at(x),
                                         at(dy),
                                         at<float>(weight),
                                         at<float>(cos),
                                         at<float>(sin),
                                         at<float>(rstd),
                                         at(dx),
                                         at<float>(dweight),
                                         batch,
                                         heads,
                                         length,
                                         width,
                                         {xs[0], xs[1], xs[2]},
                                         {dys[0], dys[1], dys[2]},
                                         threads});
      },
      unlocked());
}

void register_attention(py::module_& m) {
  using namespace imf;
  // A tensor is (pointer, stride of batch, of head, of position); pointer 0: a structural zero.
  using Heads = std::tuple<pointer, index_t, index_t, index_t>;
  static const auto heads_tensor = [](const Heads& x) {
    return HeadsTensor{at(std::get<0>(x)), {std::get<1>(x), std::get<2>(x), std::get<3>(x)}};
  };
  m.def(
      "attention_forward",
      [](int type, Heads q, Heads k, Heads v, Heads out, Heads q_dot, Heads k_dot, Heads v_dot, Heads out_dot,
         pointer row_max, index_t batch, index_t tangent_batch, index_t heads, index_t queries, index_t keys,
         index_t width, index_t value_width, float scale, int threads) {
        IMF_CALL(attention_forward,
                 {DType(type), heads_tensor(q), heads_tensor(k), heads_tensor(v), heads_tensor(out),
                  heads_tensor(q_dot), heads_tensor(k_dot), heads_tensor(v_dot), heads_tensor(out_dot),
                  at<float>(row_max), batch, tangent_batch, heads, queries, keys, width, value_width, scale,
                  threads});
      },
      unlocked());
  m.def(
      "attention_backward",
      [](int type, Heads q, Heads k, Heads v, Heads dout, Heads dq, Heads dk, Heads dv, pointer row_max,
         index_t batch, index_t heads, index_t queries, index_t keys, index_t width, index_t value_width,
         float scale, int threads) {
        IMF_CALL(attention_backward,
                 {DType(type), heads_tensor(q), heads_tensor(k), heads_tensor(v), heads_tensor(dout),
                  heads_tensor(dq), heads_tensor(dk), heads_tensor(dv), at<float>(row_max), batch, heads,
                  queries, keys, width, value_width, scale, threads});
      },
      unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of imf_kernels";
  register_isa(m);
  register_attention(m);
  register_gated_residual(m);
  register_gelu(m);
  register_layer_norm(m);
  register_prepend_tokens(m);
  register_qk_norm_rope(m);
  register_rms_norm(m);
  register_silu(m);
  register_sinusoidal_embedding(m);
  register_swiglu(m);
}
