// Stand-in for pybind11 with which csrc/bindings.cpp becomes a program instead of a module: it reads calls
// from its input, runs them on copies of the caller's memory and writes the copies back.
// tests/helpers/remote_kernels.py is the other side.
//
// A call is a line
//     function  threads  blocks {address bytes}  arguments
// followed by the bytes of the blocks, the memory of its tensors. Among the arguments a tensor is
//     dimensions  dtype  address  {size}  {stride}
// and -1 where there is none; a list is preceded by its length. The answer is a line, "ok VALUE" in JSON or
// "ValueError TEXT" or "RuntimeError TEXT", and the bytes of the blocks.
//
// Each copy ends where a page begins that cannot be accessed, and another one lies before it, so that a
// kernel that leaves its memory is killed, or found out by the bytes between that page and the copy.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensor.h"

// In the place of csrc/dlpack.h and csrc/key.h.
#define IMF_DLPACK
#define IMF_KEY

namespace imf {

// The caller's threads, in the call that is being answered.
inline int& caller_threads() {
  static int threads = 1;
  return threads;
}
inline Place place_of(int device) { return {device, nullptr, caller_threads()}; }
inline bool key() { return false; }  // the caller has its own

}  // namespace imf

namespace pybind11 {

struct gil_scoped_release {
  gil_scoped_release() {}
};
struct dict {};

// A copy of `bytes` bytes that the caller has at `address`.
class Block {
 public:
  Block(std::uintptr_t address, std::size_t bytes) : address_(address), bytes_(bytes) {
    const std::size_t page = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    void* const pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::runtime_error("no memory for a block of the caller's");
    pages_ = static_cast<char*>(pages);
    mprotect(pages_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE);
    begin_ = pages_ + page;
    data_ = pages_ + mapped_ - page - bytes;
    std::memset(begin_, filling, data_ - begin_);
  }
  Block(const Block&) = delete;
  ~Block() { munmap(pages_, mapped_); }

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  // Where the caller's pointer `p` points to in this copy; null where it does not.
  char* translate(std::uintptr_t p) const {
    return p >= address_ && p - address_ <= bytes_ ? data_ + (p - address_) : nullptr;
  }
  bool written_before() const {
    for (const char* p = begin_; p < data_; ++p) {
      if (*p != filling) return true;
    }
    return false;
  }

 private:
  static constexpr char filling = 0x5a;
  std::uintptr_t address_;
  std::size_t bytes_, mapped_;
  char *pages_, *begin_, *data_;
};

class Arguments {
 public:
  Arguments(std::istream& words, const std::vector<std::unique_ptr<Block>>& blocks)
      : words_(words), blocks_(blocks) {}

  template <typename T>
  T read() {
    return read(static_cast<T*>(nullptr));
  }

 private:
  std::string word() {
    std::string text;
    if (!(words_ >> text)) throw std::runtime_error("too few arguments");
    return text;
  }
  imf::index_t integer() { return std::stoll(word()); }

  bool read(bool*) { return integer() != 0; }
  float read(float*) { return static_cast<float>(std::stod(word())); }
  std::string read(std::string*) { return word(); }
  imf::Optional<imf::Tensor> read(imf::Optional<imf::Tensor>*) {
    const auto dim = static_cast<int>(integer());
    if (dim < 0) return {{nullptr, imf::DType::other, imf::cpu_device, dim, nullptr, nullptr}};
    const auto dtype = static_cast<imf::DType>(integer());
    void* const data = memory(std::stoull(word()));
    std::vector<imf::index_t>& shape = shapes_.emplace_back(2 * dim);
    for (imf::index_t& number : shape) number = integer();
    return {{data, dtype, imf::cpu_device, dim, shape.data(), shape.data() + dim}};
  }
  imf::Tensor read(imf::Tensor*) {
    const auto tensor = read<imf::Optional<imf::Tensor>>();
    if (tensor.dim < 0) throw std::runtime_error("a tensor was expected");
    return tensor;
  }
  char* memory(std::uintptr_t address) {
    if (address == 0) return nullptr;  // of a tensor without elements
    for (const auto& block : blocks_) {
      if (char* const p = block->translate(address)) return p;
    }
    throw std::runtime_error("a pointer to memory that did not come with the call");
  }
  template <typename T>
  std::vector<T> read(std::vector<T>*) {
    std::vector<T> values;
    for (imf::index_t left = integer(); left > 0; --left) values.push_back(read<T>());
    return values;
  }

  std::istream& words_;
  const std::vector<std::unique_ptr<Block>>& blocks_;
  std::deque<std::vector<imf::index_t>> shapes_;  // sizes and strides, where tensors point to
};

inline std::string json(bool value) { return value ? "true" : "false"; }
inline std::string json(const std::string& text) { return '"' + text + '"'; }
inline std::string json(const char* text) { return json(std::string(text)); }
inline std::string json(const std::vector<std::string>& texts) {
  std::string list;
  for (const std::string& text : texts) list += (list.empty() ? "" : ", ") + json(text);
  return "[" + list + "]";
}

class module_ {
 public:
  class Attribute {
   public:
    template <typename T>
    void operator=(const T& x) {
      value_ = json(x);
    }
    void operator=(dict) { value_.clear(); }
    Attribute& operator[](const std::string& name) { return items_[name]; }
    std::string text() const {
      if (!value_.empty()) return value_;
      std::string list;
      for (const auto& [name, item] : items_) {
        list += (list.empty() ? "" : ", ") + json(name) + ": " + item.text();
      }
      return "{" + list + "}";
    }

   private:
    std::string value_;  // in JSON; empty of a dict
    std::map<std::string, Attribute> items_;
  };
  Attribute& attr(const std::string& name) { return attributes_[name]; }
  std::string& doc() { return doc_; }
  template <typename Function, typename... Extra>
  void def(const char* name, Function function, Extra...) {
    add(name, std::function(function));
  }

  // Answers calls until the input ends. The function `attributes` gives those of the module, among them the
  // list of its functions.
  void serve() {
    std::vector<std::string> names;
    for (const auto& function : functions_) names.push_back(function.first);
    attr("functions") = names;
    functions_["attributes"] = [this](Arguments&) { return attributes_.text(); };
    std::ios::sync_with_stdio(false);
    for (std::string line; std::getline(std::cin, line);) answer(line);
  }

 private:
  template <typename Result, typename... T>
  void add(const std::string& name, std::function<Result(T...)> function) {
    functions_[name] = [function](Arguments& arguments) -> std::string {
      std::tuple<std::decay_t<T>...> values{arguments.read<std::decay_t<T>>()...};
      if constexpr (std::is_void_v<Result>) {
        std::apply(function, values);
        return "null";
      } else {
        return json(std::apply(function, values));
      }
    };
  }

  std::string call(const std::string& name, Arguments& arguments) {
    try {
      return "ok " + functions_.at(name)(arguments);
    } catch (const std::invalid_argument& error) {
      return std::string("ValueError ") + error.what();
    } catch (const std::exception& error) {
      return std::string("RuntimeError ") + error.what();
    }
  }

  void answer(const std::string& line) {
    std::istringstream words(line);
    std::string name;
    std::size_t count = 0;
    words >> name >> imf::caller_threads() >> count;
    std::vector<std::unique_ptr<Block>> blocks;
    while (blocks.size() < count) {
      std::uintptr_t address = 0;
      std::size_t bytes = 0;
      words >> address >> bytes;
      blocks.push_back(std::make_unique<Block>(address, bytes));
    }
    for (const auto& block : blocks) std::cin.read(block->data(), block->bytes());
    Arguments arguments(words, blocks);
    std::string result = call(name, arguments);
    for (const auto& block : blocks) {
      if (block->written_before())
        result = "RuntimeError " + name + " wrote before the beginning of a tensor";
    }
    std::cout << result << '\n';
    for (const auto& block : blocks) std::cout.write(block->data(), block->bytes());
    std::cout.flush();
  }

  std::string doc_;
  Attribute attributes_;  // a dict
  std::map<std::string, std::function<std::string(Arguments&)>> functions_;
};

}  // namespace pybind11

#define PYBIND11_MODULE(name, module)                 \
  void register_functions(pybind11::module_& module); \
  int main() {                                        \
    pybind11::module_ functions;                      \
    register_functions(functions);                    \
    functions.serve();                                \
  }                                                   \
  void register_functions(pybind11::module_& module)
