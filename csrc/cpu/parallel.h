// OpenMP threads, shared with PyTorch if it has the same runtime (its Linux wheels do: libgomp); the caller
// gives their number. Work is divided by position alone, so results do not depend on timing.
#pragma once

#include <exception>

#include "types.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace imf::IMF_ISA {
namespace {

// Below this many elements a thread costs more than it gains (a team takes about 3 us to start).
constexpr index_t min_elements_per_thread = 1 << 13;

inline int team_size(int threads, index_t elements, index_t tasks) {
  index_t n = elements / min_elements_per_thread;
  if (n > tasks) n = tasks;
  if (n > threads) n = threads;
  return n < 1 ? 1 : static_cast<int>(n);
}

// Calls body(thread) once on each of `team` threads. An exception (out of memory) must not leave a parallel
// region, so it is rethrown after all threads are done.
template <typename Body>
inline void on_each_thread(int team, Body body) {
#if defined(_OPENMP)
  if (team > 1) {
    std::exception_ptr thrown;
#pragma omp parallel num_threads(team)
    {
      try {
        // The runtime may grant fewer threads than asked for; every share must still be done.
        for (int share = omp_get_thread_num(); share < team; share += omp_get_num_threads()) body(share);
      } catch (...) {
#pragma omp critical(imf_exception)
        thrown = std::current_exception();
      }
    }
    if (thrown) std::rethrow_exception(thrown);
    return;
  }
#endif
  for (int share = 0; share < team; ++share) body(share);
}

struct Range {
  index_t begin;
  index_t end;
};

inline Range share_of(index_t n, int thread, int team) {
  return {n * thread / team, n * (thread + 1) / team};
}

// Returns a share of equal cost of rows [0, rows), of which the last `tangent_rows` cost twice as much.
inline Range share_of_rows(index_t rows, index_t tangent_rows, int thread, int team) {
  const index_t cheap = rows - tangent_rows;
  const auto row_at = [&](index_t cost) { return cost <= cheap ? cost : cheap + (cost - cheap) / 2; };
  const index_t total = rows + tangent_rows;
  return {row_at(total * thread / team), row_at(total * (thread + 1) / team)};
}

// A queue of tasks of unequal cost, handed out one at a time. The thread that runs a task depends on timing,
// so a task must write only its own memory.
class TaskQueue {
 public:
  explicit TaskQueue(index_t tasks) : tasks_(tasks) {}
  bool next(index_t& task) {
    task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return task < tasks_;
  }

 private:
  index_t tasks_, next_ = 0;
};

}  // namespace
}  // namespace imf::IMF_ISA
