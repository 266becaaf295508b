// A block of a Hopper GPU, emulated on the host: its threads take turns as fibers, its asynchronous units
// finish their work at any time that the rules allow, drawn from a seed. What a kernel must not rely on is
// made to fail:
// - where a copy will write, shared memory is full of NaN from its issue on, and the data comes late;
// - a product reads shared memory at any time between its issue by the last thread and the wait for it, and
// its
//   registers hold a NaN meanwhile that must still be there at the wait;
// - barriers that never complete, products without a fence, commits or matching operands are errors.
// Layouts follow the PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Tensor Copy".
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

constexpr int warp = 32, warpgroup = 128, stack_bytes = 128 << 10, shared_bytes = 227 << 10;
constexpr std::uint32_t poison = 0x7fc0dead;  // a NaN

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// A tensor of two-byte elements and the box of it that a copy takes; ptx::Boxes, checked.
struct TensorMap {
  const char* data;
  std::int64_t sizes[4], strides[4];  // in bytes, of dimension 0 too
  int rows, columns, swizzle;
};

struct Copy {
  std::uint32_t target, barrier;
  const TensorMap* map;
  int at[4];
};

struct Barrier {
  int arrivals, missing;
  std::int64_t bytes = 0;  // announced and not yet there
  unsigned phases = 0;     // ended
  bool fenced = false;
};

// A product of a warpgroup's: sum (+)= a b. The operands' layouts are those of the instruction.
struct Product {
  int n;
  bool a_in_registers, add;
  std::uint64_t a, b;
  int issued = 0;
  bool done = false;
  std::array<float*, warpgroup> sums{};
  std::array<std::array<std::uint32_t, 4>, warpgroup> a_registers{};
  bool same(const Product& x) const {
    return n == x.n && a_in_registers == x.a_in_registers && add == x.add && (a_in_registers || a == x.a) &&
           b == x.b;
  }
};

// Registers that products in flight add to.
struct Flight {
  std::vector<float> values;
  std::size_t last;  // product
};

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  bool started = false, ended = false;
  std::function<bool()> ready;
  const char* waits_for = "";
  std::size_t shuffles = 0, products = 0;
  std::vector<std::size_t> commits;  // products issued before each
  std::map<float*, Flight> flights;
  bool fenced = false;
};

struct Block {
  Index index, blocks;
  std::vector<Thread> threads;
  std::function<void()> kernel;
  std::mt19937 random;
  jmp_buf scheduler;
  ucontext_t unused;
  int current = -1;
  int slow = -1;  // a warpgroup
  std::string error;
  std::vector<char> shared;
  std::map<std::uint32_t, Barrier> barriers;
  std::vector<Copy> copies;
  std::vector<std::vector<Product>> products;  // of each warpgroup, in order
  std::vector<std::size_t> products_done;
  struct Collective {
    std::size_t came = 0;
    int threads = 0;
  };
  std::array<Collective, 16> named;
  struct Exchange {
    std::size_t came = 0;
    std::uint32_t values[2][warp];
  };
  std::vector<Exchange> exchanges;  // of each warp
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}
inline Thread& thread() { return block()->threads[static_cast<std::size_t>(block()->current)]; }
inline Index thread_index() { return {static_cast<unsigned>(block()->current), 0, 0}; }
inline bool chance(unsigned of) { return block()->random() % of == 0; }

[[noreturn]] inline void fail(const std::string& what) {
  block()->error = "thread " + std::to_string(block()->current) + ": " + what;
  _longjmp(block()->scheduler, 1);
}

// Leaves the processor to other threads until `ready`, at times even if it is: what a thread does next may
// come at any time. From then on its warpgroup may be slow for long.
__attribute__((noinline)) inline void wait_until(const char* what, std::function<bool()> ready) {
  const bool pause = chance(32);
  if (pause) block()->slow = block()->current / warpgroup;
  if (ready() && !pause) return;
  Thread& me = thread();
  me.ready = std::move(ready);
  me.waits_for = what;
  if (_setjmp(me.resume) == 0) _longjmp(block()->scheduler, 1);
}

// ---- barriers ----

inline Barrier& barrier_at(std::uint32_t address) {
  const auto found = block()->barriers.find(address);
  if (found == block()->barriers.end()) fail("no mbarrier at " + std::to_string(address));
  return found->second;
}

inline void end_phase(Barrier& b) {
  if (b.missing == 0 && b.bytes == 0) {
    ++b.phases;
    b.missing = b.arrivals;
  }
}

inline void arrive(std::uint32_t address, std::int64_t bytes) {
  wait_until("its turn", [] { return true; });
  Barrier& b = barrier_at(address);
  if (b.missing == 0) fail("more arrivals at an mbarrier than it counts");
  b.bytes += bytes;
  --b.missing;
  end_phase(b);
}

// Barrier `id` of the block: this thread comes, and goes on when a multiple of `count` have come.
inline void meet(int id, int count, bool wait) {
  auto& b = block()->named.at(static_cast<std::size_t>(id));
  if (b.threads != 0 && b.threads != count) fail("a named barrier with different numbers of threads");
  b.threads = count;
  const std::size_t end = (b.came++ / static_cast<std::size_t>(count) + 1) * static_cast<std::size_t>(count);
  if (wait) wait_until("a named barrier", [&b, end] { return b.came >= end; });
}

// The value of lane `from` of the warp; all lanes call it.
inline std::uint32_t exchange(std::uint32_t value, int from) {
  const int lane = block()->current % warp;
  auto& e = block()->exchanges[static_cast<std::size_t>(block()->current / warp)];
  const std::size_t step = thread().shuffles++;
  e.values[step % 2][lane] = value;
  ++e.came;
  wait_until("a shuffle", [&e, step] { return e.came >= warp * (step + 1); });
  return e.values[step % 2][from];
}

// ---- shared memory and copies ----

// Chunks of 16 bytes, permuted by the number of the row: a function of the address.
inline std::uint32_t swizzled(std::uint32_t address, int swizzle) {
  const std::uint32_t mask = static_cast<std::uint32_t>(swizzle) / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

inline std::uint16_t& element(std::uint32_t address) {
  if (address + 2 > block()->shared.size()) fail("beyond shared memory: " + std::to_string(address));
  return *reinterpret_cast<std::uint16_t*>(&block()->shared[address]);
}

template <typename Visit>
void visit_box(const Copy& c, Visit visit) {
  for (int row = 0; row < c.map->rows; ++row) {
    for (int column = 0; column < c.map->columns; ++column) {
      const auto offset = static_cast<std::uint32_t>(row * c.map->swizzle + column * 2);
      visit(element(swizzled(c.target + offset, c.map->swizzle)), row, column);
    }
  }
}

inline void issue(const Copy& c) {
  if (!barrier_at(c.barrier).fenced) fail("a copy to an mbarrier whose initialisation was not fenced");
  if (c.target % static_cast<std::uint32_t>(8 * c.map->swizzle)) fail("a copy that begins within a swizzle");
  visit_box(c, [](std::uint16_t& x, int, int) { x = 0xffff; });
  block()->copies.push_back(c);
}

inline void finish(std::size_t i) {
  const Copy c = block()->copies[i];
  block()->copies.erase(block()->copies.begin() + static_cast<std::ptrdiff_t>(i));
  visit_box(c, [&](std::uint16_t& x, int row, int column) {
    const std::int64_t at[4] = {c.at[0] + column, c.at[1] + row, c.at[2], c.at[3]};
    x = 0;
    std::int64_t offset = 0;
    for (int d = 0; d < 4; ++d) {
      if (at[d] < 0 || at[d] >= c.map->sizes[d]) return;
      offset += at[d] * c.map->strides[d];
    }
    std::memcpy(&x, c.map->data + offset, 2);
  });
  Barrier& b = barrier_at(c.barrier);
  b.bytes -= 2 * c.map->rows * c.map->columns;
  end_phase(b);
}

// ---- products ----

inline float number(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

struct Operand {
  std::uint32_t address, leading, stride;
  int swizzle;
  explicit Operand(std::uint64_t d)
      : address(static_cast<std::uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<std::uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<std::uint32_t>(d >> 32 & 0x3fff) << 4),
        swizzle(256 >> (d >> 62)) {
    if (d >> 62 == 0) fail("a product of operands without a swizzle: the kernels have none");
  }
  // The summed dimension `k` along the columns of the box, `i` along its rows.
  std::uint32_t row_major(int i, int k) const {
    return place(static_cast<std::uint32_t>(i / 8) * stride +
                 static_cast<std::uint32_t>(i % 8 * swizzle + k * 2));
  }
  // `k` along the rows of the box, `i` along its columns and on into further boxes.
  std::uint32_t column_major(int i, int k) const {
    const int chunk = i / 8, chunks = swizzle / 16;
    return place(static_cast<std::uint32_t>(chunk / chunks) * leading +
                 static_cast<std::uint32_t>(k / 8) * stride +
                 static_cast<std::uint32_t>(chunk % chunks * 16 + k % 8 * swizzle + i % 8 * 2));
  }
  std::uint32_t place(std::uint32_t offset) const { return swizzled(address + offset, swizzle); }
};

// Where register `i` of thread `t` lies in a [64, n] tile.
inline int row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
inline int column_of(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

inline void compute(std::size_t group, Product& p) {
  static float a[64][16], b[16][256], sum[64][256];
  if (p.a_in_registers) {
    for (int t = 0; t < warpgroup; ++t) {
      for (int i = 0; i < 8; ++i) {
        const std::uint32_t pair =
            p.a_registers[static_cast<std::size_t>(t)][static_cast<std::size_t>(i / 2)];
        a[row_of(t, i)][column_of(t, i)] = number(static_cast<std::uint16_t>(i % 2 ? pair >> 16 : pair));
      }
    }
  } else {
    const Operand operand(p.a);
    for (int i = 0; i < 64; ++i) {
      for (int k = 0; k < 16; ++k) a[i][k] = number(element(operand.row_major(i, k)));
    }
  }
  const Operand operand(p.b);
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < p.n; ++i) {
      b[k][i] = number(element(p.a_in_registers ? operand.column_major(i, k) : operand.row_major(i, k)));
    }
  }
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < p.n; ++j) sum[i][j] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < p.n; ++j) sum[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int t = 0; t < warpgroup; ++t) {
    Thread& owner = block()->threads[group * warpgroup + static_cast<std::size_t>(t)];
    auto& values = owner.flights.at(p.sums[static_cast<std::size_t>(t)]).values;
    for (int i = 0; i < p.n / 2; ++i) {
      const float x = sum[row_of(t, i)][column_of(t, i)];
      values[static_cast<std::size_t>(i)] = p.add ? values[static_cast<std::size_t>(i)] + x : x;
    }
  }
  p.done = true;
}

inline bool poisoned(const float* x, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (std::memcmp(x + i, &poison, 4) != 0) return false;
  }
  return true;
}

inline void issue(Product p, float* sum, const std::uint32_t* a_registers) {
  Thread& me = thread();
  const auto group = static_cast<std::size_t>(block()->current / warpgroup),
             lane = static_cast<std::size_t>(block()->current % warpgroup);
  if (!me.fenced) fail("a product without a fence after the last wait");
  auto& products = block()->products[group];
  const std::size_t number = me.products++;
  if (number == products.size()) products.push_back(p);
  Product& shared = products[number];
  if (!shared.same(p)) fail("the threads of a warpgroup issue different products");
  const auto count = static_cast<std::size_t>(p.n / 2);
  const auto flight = me.flights.find(sum);
  if (flight == me.flights.end()) {
    me.flights[sum] = {std::vector<float>(sum, sum + count), number};
    for (std::size_t i = 0; i < count; ++i) std::memcpy(sum + i, &poison, 4);
  } else {
    if (!poisoned(sum, count)) fail("registers of a product in flight were written");
    flight->second.last = number;
  }
  shared.sums[lane] = sum;
  if (a_registers) std::memcpy(shared.a_registers[lane].data(), a_registers, 16);
  ++shared.issued;
  std::size_t& done = block()->products_done[group];
  while (done < products.size() && products[done].issued == warpgroup && chance(2)) {
    compute(group, products[done]);
    ++done;
  }
}

inline void commit() { thread().commits.push_back(thread().products); }

// Returns when all but the latest `pending` groups are done.
inline void wait_for_products(std::size_t pending) {
  Thread& me = thread();
  const auto group = static_cast<std::size_t>(block()->current / warpgroup);
  if (me.commits.empty() || me.commits.back() != me.products) fail("a wait with products that no group has");
  const std::size_t end = me.commits.size() > pending ? me.commits[me.commits.size() - 1 - pending] : 0;
  auto& products = block()->products[group];
  wait_until("the products of all threads", [&products, end] {
    return end == 0 || (products.size() >= end && products[end - 1].issued == warpgroup);
  });
  std::size_t& done = block()->products_done[group];
  for (; done < end; ++done) compute(group, products[done]);
  for (auto i = me.flights.begin(); i != me.flights.end();) {
    const auto count = i->second.values.size();
    if (i->second.last >= end) {
      ++i;
      continue;
    }
    if (!poisoned(i->first, count)) fail("registers of a product in flight were written");
    std::memcpy(i->first, i->second.values.data(), 4 * count);
    i = me.flights.erase(i);
  }
  me.fenced = false;
}

// ---- running ----

inline void fiber() {
  block()->kernel();
  thread().ended = true;
  _longjmp(block()->scheduler, 1);
}

inline void resume(int i) {
  Block& b = *block();
  Thread& t = b.threads[static_cast<std::size_t>(i)];
  b.current = i;
  if (_setjmp(b.scheduler) == 0) {
    if (t.started) _longjmp(t.resume, 1);
    t.started = true;
    getcontext(&t.start);
    t.start.uc_stack = {t.stack.get(), 0, stack_bytes};
    t.start.uc_link = nullptr;
    makecontext(&t.start, fiber, 0);
    setcontext(&t.start);
  }
  if (!b.error.empty()) throw std::runtime_error(b.error);
}

// A pass over the warps in any order. Unless `all`, some are left out, and so is the warpgroup that is slow.
// Whether any thread went on.
inline bool pass(bool all) {
  Block& b = *block();
  std::vector<int> warps(b.threads.size() / warp);
  for (std::size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  std::shuffle(warps.begin(), warps.end(), b.random);
  bool moved = false;
  if (chance(64)) b.slow = -1;
  for (const int w : warps) {
    if (!all && (w / 4 == b.slow || chance(4))) continue;
    for (int i = w * warp; i < (w + 1) * warp; ++i) {
      Thread& t = b.threads[static_cast<std::size_t>(i)];
      if (t.ended || (t.started && !t.ready())) continue;
      resume(i);
      moved = true;
    }
  }
  return moved;
}

inline void run(Block& b, int threads) {
  block() = &b;
  b.threads = std::vector<Thread>(static_cast<std::size_t>(threads));
  b.exchanges.resize(static_cast<std::size_t>(threads / warp));
  b.products.resize(static_cast<std::size_t>(threads / warpgroup));
  b.products_done.resize(b.products.size());
  for (;;) {
    const bool moved = pass(false) || pass(true);
    if (!b.copies.empty() && (!moved || chance(2))) {
      finish(b.random() % b.copies.size());
    } else if (!moved) {
      break;
    }
  }
  for (std::size_t i = 0; i < b.threads.size(); ++i) {
    const Thread& t = b.threads[i];
    b.current = static_cast<int>(i);
    if (!t.ended)
      throw std::runtime_error("thread " + std::to_string(i) + " waits forever for " + t.waits_for);
    if (!t.flights.empty()) throw std::runtime_error("products in flight at the end");
  }
  for (const auto& [address, barrier] : b.barriers) {
    if (barrier.bytes != 0)
      throw std::runtime_error("bytes that never came to mbarrier " + std::to_string(address));
  }
  block() = nullptr;
}

}  // namespace machine
