// Launches of compiled Triton kernels by the GPU's driver, and functions that only launch, replayed.
#ifndef IMF_LAUNCH
#define IMF_LAUNCH

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "key.h"

namespace imf {

namespace py = pybind11;

// cuLaunchKernel: function, grid, block, bytes of shared memory, stream, addresses of the parameters, none.
using DriverLaunch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             void*, void**, void**);
using Grid = std::pair<unsigned, unsigned>;

// A kernel as the driver launches it.
struct Compiled {
  DriverLaunch launch;
  void* function;
  unsigned threads, shared;
  py::object owner;  // of the code
};

// A launch: a kernel with the values of its parameters, those of tensors left open.
struct Launch {
  struct Place {
    std::size_t parameter, argument;
    char type;
  };
  static constexpr std::size_t most = 128;  // parameters

  std::shared_ptr<const Compiled> kernel;
  Grid grid;
  std::vector<std::uint64_t> values;
  std::vector<Place> tensors;  // which argument's address a parameter is

  // Launches on the current device; returns false in a thread that has no context yet.
  bool run(const std::uintptr_t* addresses, void* stream) const {
    constexpr int no_context = 201;
    std::uint64_t given[most];
    void* parameters[most];
    std::copy(values.begin(), values.end(), given);
    for (const Place& p : tensors) given[p.parameter] = addresses[p.argument];
    for (std::size_t i = 0; i < values.size(); ++i) parameters[i] = &given[i];
    int code;
    {
      const py::gil_scoped_release unlocked;  // where the device's queue is full the driver waits
      code = kernel->launch(kernel->function, grid.first, grid.second, 1, kernel->threads, 1, 1,
                            kernel->shared, stream, parameters, nullptr);
    }
    if (code && code != no_context) {
      throw std::runtime_error("imf_kernels: a kernel was not launched, CUDA error " + std::to_string(code));
    }
    return !code;
  }
};

// PyTorch's current device and stream, and whether a profiler of Triton's launches is active.
class Surroundings {
 public:
  // hooks: what has the attributes launch_enter_hook and launch_exit_hook.
  static void watch(py::object hooks) { instance().hooks_ = std::move(hooks).release(); }

  // Returns whether a kernel can be launched on the device without Triton.
  static bool allow(int device) {
    const Surroundings& now = instance();
    return device >= 0 && PyTorch::ask(now.device_.ptr()) == device && !now.hooked(now.enter_) &&
           !now.hooked(now.exit_);
  }
  static void* stream(int device) {
    void* stream = nullptr;
    if (PyTorch::instance().api->current_work_stream(dl_cuda, device, &stream)) throw py::error_already_set();
    return stream;
  }

 private:
  static Surroundings& instance() {
    static Surroundings found;
    return found;
  }
  bool hooked(py::handle name) const {
    const py::object hook = py::getattr(hooks_, name);
    return !hook.is_none() && py::bool_(py::getattr(hook, calls_, hook));
  }

  // Never released: the interpreter may end before this module does.
  py::handle device_ = py::object(py::module_::import("torch._C").attr("_cuda_getDevice")).release();
  py::handle enter_ = py::str("launch_enter_hook").release(), exit_ = py::str("launch_exit_hook").release();
  py::handle calls_ = py::str("calls").release(), hooks_;
};

// A call of a `Replayed` function that is being recorded, in its thread.
struct Recording {
  const py::tuple& arguments;
  std::vector<Launch> launches;
  bool complete = true;  // so far there were only launches on the arguments

  explicit Recording(const py::tuple& of) : arguments(of), around_(current()) { current() = this; }
  ~Recording() { current() = around_; }
  Recording(const Recording&) = delete;

  static Recording*& current() {
    thread_local Recording* recording = nullptr;
    return recording;
  }
  static void give_up() {
    if (current()) current()->complete = false;
  }

  void add(Launch launch, const py::tuple& tensors) {
    for (Launch::Place& p : launch.tensors) {
      const PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), p.argument);
      p.argument = 0;
      while (p.argument < arguments.size() && PyTuple_GET_ITEM(arguments.ptr(), p.argument) != tensor)
        ++p.argument;
      complete = complete && p.argument < arguments.size();
    }
    launches.push_back(std::move(launch));
  }

 private:
  Recording* around_;
};

// The compiled kernels of a launcher by kind of launch: all that Triton specialises a kernel on, which is the
// device, each tensor's dtype and alignment to 16 bytes, which tensors are None, and which integers need 64
// bits.
class Kinds {
 public:
  // Launches a kernel on tensors and numbers. Returns None, or what Triton must launch: the kind and the
  // device.
  py::object launch(const Grid& grid, const py::tuple& tensors, const py::tuple& numbers) {
    std::string kind;
    std::vector<std::uintptr_t> addresses;
    int device = -1;
    for (const py::handle tensor : tensors) {
      DLTensor x{};
      if (tensor.is_none()) {
        kind += '0';
      } else {
        if (PyTorch::instance().api->dltensor_from_py_object_no_sync(tensor.ptr(), &x))
          throw py::error_already_set();
        if (x.device_type != dl_cpu) device = x.device_id;
        kind += static_cast<char>(x.dtype.code);
        kind += static_cast<char>(address_of(x) % 16 ? -x.dtype.bits : x.dtype.bits);
      }
      addresses.push_back(address_of(x));
    }
    for (const py::handle x : numbers) {
      if (PyLong_CheckExact(x.ptr())) kind += PyLong_AsLongLong(x.ptr()) >> 31 ? 'l' : 'i';
    }
    kind += static_cast<char>(device);
    const auto found = launches_.find(kind);
    if (found != launches_.end() && Surroundings::allow(device)) {
      Launch launch = found->second.first;
      launch.grid = grid;
      for (const Launch::Place& p : found->second.second) {
        launch.values[p.parameter] = bits_of(p.type, numbers[p.argument]);
      }
      if (launch.run(addresses.data(), Surroundings::stream(device))) {
        if (Recording::current()) Recording::current()->add(std::move(launch), tensors);
        return py::none();
      }
    }
    Recording::give_up();
    return py::make_tuple(py::bytes(kind), device);
  }

  // Adds the kernel that Triton compiled for a kind.
  // types: per argument p for a pointer, i and l for integers of 32 and 64 bits, f for a float, c for a
  // constant, which the kernel does not take. fixed: the arguments behind the tensors.
  void add(const std::string& kind, std::uintptr_t launch, std::uintptr_t function, unsigned threads,
           unsigned shared, const std::string& types, std::size_t tensors, const py::tuple& fixed,
           py::object owner) {
    Launch made{std::make_shared<Compiled>(Compiled{reinterpret_cast<DriverLaunch>(launch),
                                                    reinterpret_cast<void*>(function), threads, shared,
                                                    std::move(owner)}),
                {},
                {},
                {}};
    std::vector<Launch::Place> numbers;
    for (std::size_t i = 0; i < types.size(); ++i) {
      if (types[i] == 'c') continue;
      const Launch::Place place{made.values.size(), i, types[i]};
      made.values.push_back(0);
      if (i < tensors) {
        made.tensors.push_back(place);
      } else if (i < tensors + fixed.size()) {
        made.values.back() = bits_of(types[i], fixed[i - tensors]);
      } else {
        numbers.push_back({place.parameter, i - tensors - fixed.size(), types[i]});
      }
    }
    made.values.resize(made.values.size() + 2);  // Triton's memory for each program and for profiles: none
    if (made.values.size() > Launch::most) throw std::invalid_argument("a kernel has too many parameters");
    launches_[kind] = {std::move(made), std::move(numbers)};
  }

 private:
  static std::uint64_t bits_of(char type, const py::handle& x) {
    std::uint64_t bits = 0;
    if (type == 'f') {
      const float number = x.cast<float>();
      std::memcpy(&bits, &number, sizeof number);
    } else {
      bits =
          static_cast<std::uint64_t>(x.cast<std::int64_t>());  // little-endian: its half is that of 32 bits
    }
    return bits;
  }
  std::unordered_map<std::string, std::pair<Launch, std::vector<Launch::Place>>> launches_;
};

// A function that only launches kernels on its arguments, with grids and numbers that depend on their shapes,
// strides, dtypes and values alone: the first call of a kind runs it, later ones repeat its launches.
class Replayed {
 public:
  void clear() { calls_.clear(); }
  explicit Replayed(py::object function) : function_(std::move(function)) {}

  void operator()(const py::args& arguments) {
    Key key(true);
    std::vector<std::uintptr_t> addresses;
    bool known = true;
    for (std::size_t i = 0; known && i < arguments.size(); ++i) {
      known = key.add(PyTuple_GET_ITEM(arguments.ptr(), i), PyTorch::instance());
      addresses.push_back(key.address);
    }
    if (!known || key.device < 0) {
      function_(*arguments);
      return;
    }
    Recording::give_up();  // of a function around this one, which does not see these launches
    const auto found = calls_.find(key.bytes());
    if (found != calls_.end() && Surroundings::allow(key.device)) {
      const auto launches = found->second;  // others may run while a launch waits
      void* const stream = Surroundings::stream(key.device);
      std::size_t done = 0;
      while (done < launches->size() && (*launches)[done].run(addresses.data(), stream)) ++done;
      if (done) return;  // a thread without a context fails at the first
    }
    Recording recording(arguments);
    function_(*arguments);
    if (!recording.complete || recording.launches.empty()) return;
    if (calls_.size() >= most_calls) calls_.clear();
    calls_[key.bytes()] = std::make_shared<const std::vector<Launch>>(std::move(recording.launches));
  }

 private:
  static constexpr std::size_t most_calls = 1024;
  py::object function_;
  std::unordered_map<std::string, std::shared_ptr<const std::vector<Launch>>> calls_;
};

}  // namespace imf

#endif
