// Checks of a call's tensors against what stands beside the fields of its arguments: IMF_IS(T, 2 rows,
// width). T is a dtype, and the sizes follow; equal names stand for equal ones. The first size is that of all
// leading dimensions together, or `...` the last one that of all others.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "views.h"

namespace imf {

// A product of a number and named sizes.
struct Size {
  index_t factor = 1;
  int count = 0, names[3] = {};
};

// What is declared of an argument.
struct Field {
  std::string name, shape;  // as it is written
  bool output = false;
  bool rest = false;  // the last size is that of all the last dimensions
  int dtype = -1;     // index of its name
  std::vector<Size> sizes;
  int primal = -1;  // index of the field whose tangent it is
};

struct Fields {
  std::vector<Field> fields;
  std::vector<std::string> names;  // of sizes and dtypes

  // From "Rows x IMF_IS(T, rows, width); float eps;".
  explicit Fields(const std::string& text) {
    for (std::size_t begin = 0, end; (end = text.find(';', begin)) != std::string::npos; begin = end + 1) {
      const std::string declared = text.substr(begin, end - begin);
      const std::size_t shape = declared.find(" IMF_IS(");
      const std::string before = declared.substr(0, shape);
      Field field;
      field.name = before.substr(before.rfind(' ') + 1);
      field.output = before.find("Out<") != std::string::npos;
      if (shape != std::string::npos) {
        read(declared.substr(shape + 8, declared.size() - shape - 9), field);
      }
      fields.push_back(field);
    }
    for (Field& tangent : fields) {
      for (int i = 0; i < static_cast<int>(fields.size()); ++i) {
        if (tangent.name == fields[i].name + "_dot") tangent.primal = i;
      }
    }
  }

  // Throws unless the tensors (null where there is none) are as declared.
  void check(const Tensor* const* tensors, bool forward) const {
    check_tangents(tensors);
    if (forward) check_given(tensors);
    Found found;
    bool known = true;
    const auto check_fields = [&] {
      for (std::size_t i = 0; i < fields.size(); ++i) {
        if (tensors[i] && !fields[i].sizes.empty()) known &= check_field(fields[i], *tensors[i], found);
      }
    };
    check_fields();
    if (!known) check_fields();
  }

 private:
  // Sizes and dtypes by the index of their name.
  struct Found {
    static constexpr std::size_t most = 16;
    index_t values[most];
    Found() { std::fill_n(values, most, index_t{-1}); }
  };

  int index_of(const std::string& name) {
    const auto at = std::find(names.begin(), names.end(), name);
    if (at != names.end()) return static_cast<int>(at - names.begin());
    if (names.size() == Found::most) throw std::logic_error("too many names of sizes");
    names.push_back(name);
    return static_cast<int>(names.size()) - 1;
  }

  void read(const std::string& text, Field& field) {
    field.shape = text;
    Size size;
    std::string word;
    const auto end_word = [&] {
      if (word.empty()) return;
      if (word[0] >= '0' && word[0] <= '9') {
        size.factor = std::stoll(word);
      } else {
        size.names[size.count++] = index_of(word);
      }
      field.rest = word == "...";
      word.clear();
    };
    for (const char c : text + ",") {
      if (c != ' ' && c != ',') {
        word += c;
        continue;
      }
      if (c == ',' && word.size() == 1 && word[0] >= 'A' && word[0] <= 'Z') {
        field.dtype = index_of(word);
        field.shape = text.substr(3);
        word.clear();
        continue;
      }
      end_word();
      if (c == ',') {
        field.sizes.push_back(size);
        size = {};
      }
    }
  }

  [[noreturn]] void refuse(const Field& field, const Tensor& x, const std::string& wanted) const {
    throw std::invalid_argument(field.name + " must have " + wanted + ", got " + list_of(x.sizes, x.dim));
  }

  // A tangent has its primal's dtype and shape, but for the first dimension: that may be smaller, and equally
  // so where several primals of rows have as many samples.
  void check_tangents(const Tensor* const* tensors) const {
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (fields[i].primal < 0) continue;
      const Tensor *x = tensors[fields[i].primal], *x_dot = tensors[i];
      if (!x || !x_dot) continue;
      const std::string& name = fields[fields[i].primal].name;
      if (x_dot->dtype != x->dtype) {
        throw std::invalid_argument(fields[i].name + " must have the dtype of " + name);
      }
      bool fits = x_dot->dim == x->dim && (x->dim == 0 || x_dot->sizes[0] <= x->sizes[0]);
      for (int d = 1; fits && d < x->dim; ++d) fits = x_dot->sizes[d] == x->sizes[d];
      if (!fits) refuse(fields[i], *x_dot, "the shape of " + name + " or fewer samples");
      for (std::size_t j = 0; x->dim > 1 && j < i; ++j) {
        const Tensor *y = fields[j].primal < 0 ? nullptr : tensors[fields[j].primal], *y_dot = tensors[j];
        if (!y || !y_dot || y->dim < 2 || y->sizes[0] != x->sizes[0] || y_dot->sizes[0] == x_dot->sizes[0])
          continue;
        refuse(fields[i], *x_dot, "the samples of " + fields[j].name);
      }
    }
  }

  // A kernel that computes tangents has places for all of them.
  void check_given(const Tensor* const* tensors) const {
    const Field* moving = nullptr;
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (tensors[i] && fields[i].primal >= 0 && !fields[i].output) moving = &fields[i];
    }
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (fields[i].primal < 0 || !fields[i].output || !!tensors[i] == !!moving) continue;
      throw std::invalid_argument(moving ? fields[i].name + " must be given with " + moving->name
                                         : fields[i].name + " is given without a tangent");
    }
  }

  // Returns false if a size has several names that are not known yet.
  bool check_field(const Field& field, const Tensor& x, Found& found) const {
    if (field.dtype >= 0) {
      index_t& dtype = found.values[field.dtype];
      if (dtype < 0) dtype = static_cast<index_t>(x.dtype);
      if (dtype != static_cast<index_t>(x.dtype)) {
        const auto same = std::find_if(fields.begin(), fields.end(),
                                       [&](const Field& other) { return other.dtype == field.dtype; });
        throw std::invalid_argument(field.name + " must have the dtype of " + same->name);
      }
    }
    const int count = static_cast<int>(field.sizes.size()), more = field.rest ? 0 : x.dim - count;
    bool known = true, fits = field.rest || x.dim >= count - 1;
    for (int i = 0; fits && i < count; ++i) {
      const int first = i ? more + i : 0, end = field.rest && i == count - 1 ? x.dim : more + i + 1;
      const index_t value = count_of(x, first, std::min(end, x.dim));
      index_t product = field.sizes[i].factor;
      int unknown = -1;
      for (int j = 0; j < field.sizes[i].count; ++j) {
        const int name = field.sizes[i].names[j];
        if (found.values[name] >= 0) {
          product *= found.values[name];
        } else if (unknown >= 0) {
          known = false;
        } else {
          unknown = name;
        }
      }
      if (unknown < 0) {
        fits = value == product;
      } else if (known) {
        fits = product ? value % product == 0 : value == 0;
        found.values[unknown] = product ? value / product : 0;
      }
    }
    if (!fits) refuse(field, x, wanted(field, found));
    return known;
  }

  std::string wanted(const Field& field, const Found& found) const {
    std::string text = "the shape [" + field.shape + "]";
    const char* before = " with ";
    std::vector<int> told;
    for (const Size& size : field.sizes) {
      for (int i = 0; i < size.count; ++i) {
        const int name = size.names[i];
        if (found.values[name] < 0 || std::count(told.begin(), told.end(), name)) continue;
        text += before + names[name] + " = " + std::to_string(found.values[name]);
        before = ", ";
        told.push_back(name);
      }
    }
    return text;
  }
};

}  // namespace imf
