// Derives a kernel's Python function and its torch.library schema from the struct of its arguments.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "dlpack.h"

namespace imf {

// Converter of a Python argument into a field: a tensor into a view, a number unchanged.
template <typename Field>
struct Argument {
  static constexpr bool is_number = std::is_arithmetic_v<Field>;
  using Type = std::conditional_t<is_number, Field, Tensor>;

  static Field make(const Type& x, const std::string& name) {
    if constexpr (is_number) {
      return x;
    } else {
      Field field{};
      view(x, name, field);
      return field;
    }
  }
  static std::string type(char& alias) {
    (void)alias;
    return !is_number ? "Tensor" : std::is_same_v<Field, bool> ? "bool" : "float";
  }
};

template <typename View>
struct Argument<Out<View>> {
  using Type = Tensor;
  static Out<View> make(const Type& x, const std::string& name) { return {Argument<View>::make(x, name)}; }
  static std::string type(char& alias) { return std::string("Tensor(") + alias++ + "!)"; }
};

template <typename View>
struct Argument<Optional<View>> {
  using Type = Optional<Tensor>;
  static Optional<View> make(const Type& x, const std::string& name) {
    return x.dim < 0 ? Optional<View>{} : Optional<View>{Argument<View>::make(x, name)};
  }
  static std::string type(char& alias) { return Argument<View>::type(alias) + "?"; }
};

constexpr int count_fields(const char* fields) {
  int count = 0;
  for (; *fields; ++fields) count += *fields == ';';
  return count;
}

// Returns the fields of a struct of arguments as a tuple of references.
template <typename Arguments>
auto tied(Arguments& arguments) {
#define IMF_TIED(count, ...)                                \
  if constexpr (count_fields(Arguments::fields) == count) { \
    auto& [__VA_ARGS__, place] = arguments;                 \
    return std::tie(__VA_ARGS__);                           \
  }
  IMF_TIED(3, a, b, c)
  IMF_TIED(4, a, b, c, d)
  IMF_TIED(5, a, b, c, d, e)
  IMF_TIED(6, a, b, c, d, e, f)
  IMF_TIED(7, a, b, c, d, e, f, g)
  IMF_TIED(8, a, b, c, d, e, f, g, h)
  IMF_TIED(9, a, b, c, d, e, f, g, h, i)
  IMF_TIED(10, a, b, c, d, e, f, g, h, i, j)
  IMF_TIED(11, a, b, c, d, e, f, g, h, i, j, k)
  IMF_TIED(12, a, b, c, d, e, f, g, h, i, j, k, l)
  IMF_TIED(17, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q)
  IMF_TIED(18, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r)
#undef IMF_TIED
}

inline const Tensor* tensor_of(const Tensor& x) { return &x; }
inline const Tensor* tensor_of(const Optional<Tensor>& x) { return x.dim < 0 ? nullptr : &x; }
inline const Tensor* tensor_of(float) { return nullptr; }
inline const Tensor* tensor_of(bool) { return nullptr; }

template <typename Arguments>
using Kernel = void (*)(const Arguments&);

// The common device of a call's tensors; throws if there are several.
struct CommonDevice {
  int device = cpu_device;
  bool found = false;

  void operator()(const Tensor& x) {
    if (found && x.device != device) throw std::invalid_argument("all tensors must be on one device");
    device = x.device;
    found = true;
  }
  void operator()(const Optional<Tensor>& x) {
    if (x.dim >= 0) (*this)(static_cast<const Tensor&>(x));
  }
  void operator()(float) {}
  void operator()(bool) {}
};

// Defines the module's function `name`, which runs `cpu` or `cuda` (null if missing) by the tensors' device.
template <typename Arguments, typename... Types>
void define(pybind11::module_& m, const char* name, Kernel<Arguments> cpu, Kernel<Arguments> cuda,
            std::tuple<Types&...>*) {
  static const Fields declared(Arguments::fields);
  const bool forward = std::string(name).rfind("_forward") != std::string::npos;
  std::string schema;
  char alias = 'a';
  int i = 0;
  ((schema += (i ? ", " : "") + Argument<Types>::type(alias) + " " + declared.fields[i].name, ++i), ...);
  m.attr("schemas")[name] = "(" + schema + ") -> ()";
  m.def(name, [=](typename Argument<Types>::Type... given) {
    try {
      CommonDevice common;
      (common(given), ...);
      const Kernel<Arguments> kernel = common.device == cpu_device ? cpu : cuda;
      if (!kernel) throw std::invalid_argument("there is no kernel for this device");
      const Tensor* const tensors[] = {tensor_of(given)...};
      declared.check(tensors, forward);
      const Field* next = declared.fields.data();
      // Braced initialisers are evaluated from left to right.
      const Arguments arguments{Argument<Types>::make(given, next++->name)..., place_of(common.device)};
      const pybind11::gil_scoped_release unlocked;
      kernel(arguments);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string(name) + ": " + error.what());
    }
  });
}

template <typename Arguments>
void define(pybind11::module_& m, const char* name, Kernel<Arguments> cpu, Kernel<Arguments> cuda) {
  define(m, name, cpu, cuda, static_cast<decltype(tied(std::declval<Arguments&>()))*>(nullptr));
}

using Definition = void (*)(pybind11::module_&);

// The functions of csrc/ops, entered by IMF_DECLARE.
inline std::vector<Definition>& definitions() {
  static std::vector<Definition> entered;
  return entered;
}

struct Entered {
  explicit Entered(Definition definition) { definitions().push_back(definition); }
};

}  // namespace imf
