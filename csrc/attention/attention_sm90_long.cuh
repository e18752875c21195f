// What the sm_90 kernels of long attention (attention_sm90_long.cu, _sm90_long_backward.cu) share:
// boxes of rows, and scores with whatever is added to them or hides them.
#pragma once

#include "attention/attention_plan_sm90_long.h"
#include "attention/attention_sm90.cuh"

namespace vitkernels::attention::sm90_long {

using namespace sm90;

// Begins to load the rows from `row` on, a box's height of them.
template <int WIDTH>
VK_DEVICE void load_rows(const Tile& tile, const Maps& maps, int which, MBarrier* barrier, int row,
                         Head head) {
  using P = Parts<WIDTH>;
  tma_load(tile.first, maps.first[which], barrier, {0, row, head.h, head.b});
  if constexpr (P::kRest > 0)
    tma_load(tile.rest, maps.rest[which], barrier, {P::kFirst, row, head.h, head.b});
}

// a / b, of which nothing stays in registers for the next time, and a % b.
struct Division {
  int quotient, rest;
  VK_DEVICE Division(int a, int b) {
    pin_registers(b);
    quotient = static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
    rest = a - quotient * b;
  }
};

struct Place {
  int query, key;
};

// Where a thread's elements of a tile are: its rows are queries or (BY_KEY) keys.
template <bool BY_KEY>
struct Places {
  int row, column;  // of element 0

  VK_DEVICE Place operator()(int i) const {
    const int r = row + i % 4 / 2 * 8, c = column + i / 4 * 8 + i % 2;
    return BY_KEY ? Place{c, r} : Place{r, c};
  }
};

// What is not a float bias: -inf where a bool bias is false or the padding mask hides the key.
// at(i) is the Place of s[i].
template <int C, class At>
VK_DEVICE void hide_scores(float (&s)[C], const Args& a, Head head, At at) {
  if (a.bias.data != nullptr && a.bias.dtype == DType::kBool) {
    const auto* attend =
        static_cast<const uint8_t*>(a.bias.data) + head.b * a.bias.batch + head.h * a.bias.head;
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const Place place = at(i);
      if (place.query < a.Nq && place.key < a.Nk &&
          attend[place.query * a.bias.row + place.key * a.bias.column] == 0)
        s[i] = -INFINITY;
    }
  }
  if (a.padding != nullptr) {
    const uint8_t* padding = a.padding + head.b * a.padding_batch;
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const Place place = at(i);
      if (place.key < a.Nk && padding[place.key * a.padding_column] != 0) s[i] = -INFINITY;
    }
  }
}

VK_DEVICE bool has_float_bias(const Args& a) {
  return a.bias.data != nullptr && a.bias.dtype != DType::kBool;
}

// Products of queries and keys there are become scores in units of log2, which need no factor more.
template <int C, class At>
VK_DEVICE void add_float_bias(float (&s)[C], const Args& a, Head head, float by, At at) {
  const int64_t start = head.b * a.bias.batch + head.h * a.bias.head;
#pragma unroll
  for (int i = 0; i < C; ++i) {
    const Place place = at(i);
    if (place.query >= a.Nq || place.key >= a.Nk) continue;
    const int64_t index = start + place.query * a.bias.row + place.key * a.bias.column;
    s[i] = fmaf(s[i], by, load_scalar(a.bias.data, a.bias.dtype, index) * kLog2e);
  }
}

// s = 2^(by * s - low), added to the sums. Apart from the conversion to 16 bits, for registers that
// a product reads may not be written while any is under way (ptxas would put them one after
// another).
template <int C>
VK_DEVICE void exponentiate_here(float (&s)[C], Softmax& rows, float by, const float (&low)[2]) {
#pragma unroll
  for (int i = 0; i < C; ++i) {
    s[i] = exp2_approx(fmaf(s[i], by, -low[i % 4 / 2]));
    rows.sum[i % 4 / 2] += s[i];
  }
}

// In 16 bits as the A operand of STEPS steps of 16 columns, 0 where the last has columns beyond.
template <DType TYPE, int C, int STEPS>
VK_DEVICE void to_operand(FragmentA (&p)[STEPS], const float (&s)[C]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * step + 2 * i;
      p[step].r[i] = at < C ? pack<TYPE>(s[at], s[at + 1]) : 0;
    }
}

// Which of the thread's C elements dropout keeps, a bit each; a loop, for the generator is long.
template <int C>
struct Kept {
  uint32_t words[(C + 31) / 32];

  // at(i) is the Place of element i.
  template <class At>
  VK_DEVICE Kept(const Args& a, Head head, At at) {
    const uint64_t seed = static_cast<uint64_t>(*a.dropout.seed);
    const int64_t matrix = (static_cast<int64_t>(head.b) * a.H + head.h) * a.Nq;
#pragma unroll
    for (int word = 0; word < (C + 31) / 32; ++word) {
      uint32_t bits = 0;
#pragma unroll 1
      for (int i = 0; i < 32 && 32 * word + i < C; ++i) {
        const Place place = at(32 * word + i);
        const uint64_t index = static_cast<uint64_t>((matrix + place.query) * a.Nk + place.key);
        bits |= (keeps(a.dropout, seed, index) ? 1u : 0u) << i;
      }
      words[word] = bits;
    }
  }
  VK_DEVICE bool operator[](int i) const { return (words[i / 32] >> i % 32 & 1) != 0; }
};

// Zeros in P where dropout says so; what is kept is scaled at the end.
template <int C, class At>
VK_DEVICE void drop_weights(float (&s)[C], const Args& a, Head head, At at) {
  const Kept<C> kept(a, head, at);
#pragma unroll
  for (int i = 0; i < C; ++i) s[i] = kept[i] ? s[i] : 0.0f;
}

}  // namespace vitkernels::attention::sm90_long
