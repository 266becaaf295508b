// The attention of csrc/cuda for Hopper, compiled for the emulated machine.
#include "cuda/attention_sm90.cu"

// `tensors`: address and strides of batch, head and position of q, k, v, out and of their tangents. `sizes`:
// batch, tangent_batch, heads, group, queries, keys, width, value_width. Returns what went wrong, or null.
extern "C" const char* attention_forward(int type, const std::int64_t (*tensors)[4], float* lse,
                                         const std::int64_t* sizes, float scale, int processors,
                                         unsigned seed) {
  using namespace imf;
  static std::string error;
  HeadsTensor heads[8];
  for (int i = 0; i < 8; ++i) {
    heads[i] = {reinterpret_cast<void*>(tensors[i][0]), {tensors[i][1], tensors[i][2], tensors[i][3]}};
  }
  cuda::ptx::processor_count() = processors;
  cuda::ptx::seed() = seed;
  try {
    cuda::attention_forward({static_cast<DType>(type),
                             heads[0],
                             heads[1],
                             heads[2],
                             heads[3],
                             heads[4],
                             heads[5],
                             heads[6],
                             heads[7],
                             lse,
                             sizes[0],
                             sizes[1],
                             sizes[2],
                             sizes[3],
                             sizes[4],
                             sizes[5],
                             sizes[6],
                             sizes[7],
                             scale,
                             0,
                             nullptr});
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
