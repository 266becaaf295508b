// Blocks of fibers: see cuda_runtime.h.
#include <ucontext.h>

#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr unsigned warp = 32;
constexpr std::size_t stack_bytes = 64 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  State state;
  dim3 index;
  const char* file;  // of the barrier at which it waits
  int line;
  unsigned exchanges;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
const std::function<void()>* body;
Fiber* current;
std::vector<float> brought[2];  // by every thread, for even exchanges and for odd ones
bool from_the_last = false;

void start() {
  (*body)();
  current->state = State::finished;
  swapcontext(&current->context, &scheduler);
}

void wait(State state, const char* file, int line) {
  Fiber* self = current;
  self->state = state;
  self->file = file;
  self->line = line;
  swapcontext(&self->context, &scheduler);
}

[[noreturn]] void diverged(const Fiber& a, const Fiber& b) {
  std::ostringstream message;
  const auto tell = [&](const Fiber& f) {
    message << "thread (" << f.index.x << ", " << f.index.y << ") ";
    f.state == State::finished ? message << "has finished"
                               : message << "waits at " << f.file << ":" << f.line;
  };
  message << "divergent threads: ";
  tell(a);
  message << ", ";
  tell(b);
  throw std::runtime_error(message.str());
}

// Whether threads [begin, end) all wait at one barrier of this kind; if so they go on.
bool release(std::size_t begin, std::size_t end, State kind) {
  const Fiber& first = fibers[begin];
  for (std::size_t i = begin; i < end; ++i) {
    if (fibers[i].state != kind || fibers[i].line != first.line || fibers[i].file != first.file) return false;
  }
  for (std::size_t i = begin; i < end; ++i) fibers[i].state = State::ready;
  return true;
}

// False when all threads of a block of so many have finished.
bool release_those_who_met(std::size_t threads) {
  bool released = false;
  for (std::size_t i = 0; i + warp <= threads; i += warp) {
    if (fibers[i].state == State::at_warp_barrier) released |= release(i, i + warp, State::at_warp_barrier);
  }
  if (released || release(0, threads, State::at_block_barrier)) return true;
  const Fiber* waiting = nullptr;
  for (std::size_t i = 0; i < threads; ++i) {
    if (fibers[i].state != State::finished) waiting = &fibers[i];
  }
  if (!waiting) return false;
  for (std::size_t i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state != waiting->state || f.line != waiting->line || f.file != waiting->file)
      diverged(*waiting, f);
  }
  throw std::runtime_error("a shuffle in a part of a warp");
}

void run_block(std::size_t threads) {
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    const auto t = static_cast<unsigned>(i);
    f.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    f.state = State::ready;
    f.exchanges = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  do {
    for (std::size_t i = 0; i < threads; ++i) {
      Fiber& f = fibers[from_the_last ? threads - 1 - i : i];
      if (f.state != State::ready) continue;
      current = &f;
      threadIdx = f.index;
      swapcontext(&scheduler, &f.context);
    }
  } while (release_those_who_met(threads));
}

unsigned linear(const dim3& t) { return (t.z * blockDim.y + t.y) * blockDim.x + t.x; }

}  // namespace

void set_backwards(bool backwards) { from_the_last = backwards; }

unsigned lane_id() { return linear(threadIdx) % warp; }

void wait_for_block(const char* file, int line) { wait(State::at_block_barrier, file, line); }

float exchange(float x, unsigned lane, const char* file, int line) {
  const unsigned self = linear(threadIdx);
  // No thread of a warp is more than one exchange ahead of another: two buffers do.
  std::vector<float>& buffer = brought[current->exchanges++ % 2];
  buffer[self] = x;
  wait(State::at_warp_barrier, file, line);
  return buffer[self / warp * warp + lane];
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const std::size_t threads = block.x * block.y * block.z;
  if (fibers.size() < threads) fibers.resize(threads);
  for (auto& buffer : brought) buffer.resize(fibers.size() + warp);
  body = &thread;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
    }
  }
}

}  // namespace cuda_host
