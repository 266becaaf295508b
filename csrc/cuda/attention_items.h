// Assignment of units and heads to the two consumer warpgroups of a block; plain integers.
#pragma once

#include "cuda/ptx/descriptor.h"

namespace imf::cuda::sm90 {

// A pair of units, one per consumer warpgroup.
struct Item {
  int head[2], unit[2];
  bool together;  // of one head
};

IMF_PTX int items_of(int heads, int units) {
  if (units % 2 == 0) return heads * (units / 2);
  return heads / 2 * units + heads % 2 * (units / 2 + 1);
}

// Pairs the last units of two heads with an odd number of units each. A single unit left at the very end is
// paired with one beyond the last query, whose results are not stored.
IMF_PTX Item item_of(int item, int heads, int units) {
  const int half = units / 2;
  if (units % 2 == 0) {
    const int head = item / half, unit = item % half * 2;
    return {{head, head}, {unit, unit + 1}, true};
  }
  const int head = item / units * 2, i = item % units;
  if (head + 1 == heads || i < half) return {{head, head}, {2 * i, 2 * i + 1}, true};
  if (i < 2 * half) return {{head + 1, head + 1}, {2 * (i - half), 2 * (i - half) + 1}, true};
  return {{head, head + 1}, {units - 1, units - 1}, false};
}

}  // namespace imf::cuda::sm90
