// The attention of csrc/cuda for Hopper, compiled for the emulated machine.
#include "cuda/attention_sm90.cu"

// `tensors`: address, sizes, and strides of batch, head and position of q, k, v, their tangents, out and its
// tangent; zeros of one that is absent. Returns what went wrong, or null.
extern "C" const char* attention_forward(int type, const std::int64_t (*tensors)[8], float* lse, float scale,
                                         int processors, unsigned seed) {
  using namespace imf;
  static std::string error;
  Heads x[8];
  for (int i = 0; i < 8; ++i) {
    const std::int64_t* n = tensors[i];
    auto* data = reinterpret_cast<void*>(n[0]);
    x[i] = {data, static_cast<DType>(type), n[1], n[2], n[3], n[4], {n[5], n[6], n[7]}};
  }
  const Floats statistics{lse, x[0].batch * x[0].heads, x[0].length};
  cuda::ptx::processor_count() = processors;
  cuda::ptx::seed() = seed;
  try {
    cuda::attention_forward(
        {x[0], x[1], x[2], {x[3]}, {x[4]}, {x[5]}, {}, {x[6]}, {{x[7]}}, {statistics}, scale, false, {}});
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

// head and unit of either side of an item, and whether they are of one head; -1 as the number of items.
extern "C" int item(int i, int heads, int units, int* numbers) {
  if (i < 0) return imf::cuda::sm90::items_of(heads, units);
  const auto found = imf::cuda::sm90::item_of(i, heads, units);
  for (int side = 0; side < 2; ++side) {
    numbers[2 * side] = found.head[side];
    numbers[2 * side + 1] = found.unit[side];
  }
  return found.together;
}
