// distillation_loss for NVIDIA GPUs: the loss of each row and both gradients in one kernel, then
// the sum over rows.
//   class head  loss = sum of t' (log sum - (x - top)), dx = softmax(x) * sum of t' - t'
//   soft        loss = T^2 KL(softmax(t / T) || softmax(x / T)), dx = T (softmax - softmax)
//   hard        the class head's, of the teacher's first largest logit
//
// Algorithm: to 1024 classes a warp has a row, to 8192 a block, and a thread holds its classes of
//   all three tensors in registers: every logit is read once, all loads are under way before the
//   first is waited for. Beyond, a block walks the row with a running largest value and sum a
//   thread, joins them, and reads the row again for the gradient: 132 blocks' rows of 65,536
//   classes are 35 MB of student and teacher in 16 bits, which L2 has.
// Accesses of 16 bytes whatever K is: a row that begins behind a 16-byte line is cut at the lines,
//   and what hangs over at its ends is read one by one.
// Launches: two, rows and total; a backward with another incoming gradient than 1 is a third. The
//   host waits for nothing, so a CUDA graph holds them.
// Limits: any K to 2^30, any dtypes; each row of unit column stride (the launcher copies others).
// Floor: three tensors read, two written; 1024 x 1000 fp32 are 20 MB, 4.8 us at 4.3 TB/s (launch
//   and latency are as long), 4096 x 65,536 bf16 2.7 GB, 624 us with both gradients. An element has
//   six exponentials, three of the sums and three of the gradients: about 60 instructions in 16
//   bits and 120 in fp32. 132 x 4 x 32 lanes at 1.7 GHz do 0.48 and 0.24 elements a ps, the memory
//   brings 0.43 and 0.21. Not measured.
#pragma once

#include <cmath>

#include "common/device.cuh"
#include "distillation_loss/distillation_loss_plan.h"

namespace vitkernels {
namespace {

using namespace distillation_loss;

struct Head {  // (B, K) of unit column stride; null data: absent
  const void* data;
  int64_t stride;
  DType dtype;
};

struct Gradient {  // (B, K) contiguous; null data: not wanted
  void* data;
  DType dtype;
};

struct ForwardArgs {
  Head logits, distill, teacher, soft_targets;
  const int64_t* ids;  // (B,), where soft_targets is absent
  Gradient dlogits, ddistill;
  float* losses;  // (B,), weighted
  int64_t rows;
  int K;
  bool hard;
  float smoothing, inverse_temperature;
  float class_weight, distill_weight;  // of a row's loss in the batch's
  float class_grad, distill_grad;      // what a row's kept gradients are multiplied by
};

enum class Types { kAny, kF32, kBF16 };  // of all tensors; kAny reads them from the arguments

constexpr int kIntMax = 0x7fffffff;
constexpr float kMinusInf = -INFINITY;

// ---- The threads that have a row

template <bool BLOCK>
struct Team {
  int rank, size;
  float* partial;  // shared: two buffers of 8 x 32 words, used in turn
  int turn = 0;

  VK_DEVICE explicit Team(float* partial) : partial(partial) {
    const int thread = static_cast<int>(threadIdx.x);
    rank = BLOCK ? thread : thread % kWarp;
    size = BLOCK ? static_cast<int>(blockDim.x) : kWarp;
  }

  // Each of the N values joined over the team, in a fixed order, by join(a, b).
  template <int N, class T, class Join>
  VK_DEVICE void reduce(T (&v)[N], Join&& join) {
    static_assert(N <= 8 && sizeof(T) == sizeof(float));
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = join(v[n], __shfl_xor_sync(kAllLanes, v[n], offset));
    if constexpr (BLOCK) {
      T* const words = reinterpret_cast<T*>(partial + turn * 8 * kWarp);
      turn ^= 1;
      if (rank % kWarp == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) words[n * kWarp + rank / kWarp] = v[n];
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < N; ++n) {
        v[n] = words[n * kWarp];
        for (int warp = 1; warp < size / kWarp; ++warp) v[n] = join(v[n], words[n * kWarp + warp]);
      }
    }
  }
  template <int N>
  VK_DEVICE void sum(float (&v)[N]) {
    reduce(v, [](float a, float b) { return a + b; });
  }
  template <int N>
  VK_DEVICE void max(float (&v)[N]) {
    reduce(v, [](float a, float b) { return fmaxf(a, b); });
  }
};

// ---- Eight classes of a row

// Which ones a thread has as its chunk i. VEC: neighbours on 16-byte lines, `phase` classes before
// the row's first, so that first may be negative; else every size-th one.
template <bool VEC>
struct Classes {
  int first, step, end;

  VK_DEVICE Classes(int chunk, int rank, int size, int phase, int K)
      : first(VEC ? (chunk * size + rank) * 8 - phase : chunk * 8 * size + rank),
        step(VEC ? 1 : size),
        end(K) {}
  VK_DEVICE int operator[](int j) const { return first + j * step; }
  VK_DEVICE bool holds(int j) const { return (*this)[j] >= 0 && (*this)[j] < end; }
  VK_DEVICE bool whole() const { return VEC && first >= 0 && first + 8 <= end; }
};

template <class Operand>
VK_DEVICE auto row_of(const Operand& head, int64_t row, int64_t stride) {
  return element(head.data, row * stride, head.dtype);
}

// Classes outside the row are 0.
template <bool VEC>
VK_DEVICE Raw8 load(const Head& head, int64_t row, const Classes<VEC>& classes) {
  const char* const begin = row_of(head, row, head.stride);
  if (classes.whole()) {
    const Columns<true> columns(0, 0, 1, 8);
    return load_raw<true>(element(static_cast<const void*>(begin), classes.first, head.dtype),
                          head.dtype, columns);
  }
  Raw8 raw = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (!classes.holds(j)) continue;
    if (is_wide(head.dtype))
      raw.w[j] = reinterpret_cast<const uint32_t*>(begin)[classes[j]];
    else
      raw.w[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(begin)[classes[j]])
                      << (j % 2 * 16);
  }
  return raw;
}

// The logits of a chunk, -inf outside the row.
template <bool VEC>
VK_DEVICE void to_logits(const Raw8& raw, DType dtype, const Classes<VEC>& classes, float (&v)[8]) {
  to_floats(raw, dtype, v);
  if (classes.whole()) return;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (!classes.holds(j)) v[j] = kMinusInf;
}

template <bool VEC>
VK_DEVICE void store(const Gradient& gradient, int64_t row, const Classes<VEC>& classes,
                     const float (&v)[8]) {
  char* const begin = row_of(gradient, row, classes.end);
  if (classes.whole()) {
    const Columns<true> columns(0, 0, 1, 8);
    vitkernels::store<true>(element(static_cast<void*>(begin), classes.first, gradient.dtype),
                            gradient.dtype, columns, v);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (classes.holds(j)) store_scalar(begin, gradient.dtype, classes[j], v[j]);
}

// ---- Exponentials

// What exponents are taken from: 0 as long as all values were -inf.
VK_DEVICE float finite(float top) { return top == kMinusInf ? 0.0f : top; }

// e^x for x <= 0; a NaN stays one. PRECISE: within an ulp, fifteen instructions (T^2 times the
// difference of two sums follows); else, where logits have 16 bits, with the hardware's 2^-22.
template <bool PRECISE>
VK_DEVICE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f;
  if constexpr (!PRECISE) return exp2_approx(x * kLog2E);
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = fmaf(x, kLog2E, kMagic);
  const float n = shifted - kMagic;
  const float r = fmaf(n, -kLn2Low, fmaf(n, -kLn2High, x));
  float p = 1.37513562e-3f;  // of (e^r - 1 - r) / r^2, least squares on |r| <= ln(2) / 2
  p = fmaf(p, r, 8.36893078e-3f);
  p = fmaf(p, r, 4.16695364e-2f);
  p = fmaf(p, r, 0.166665182f);
  p = fmaf(p, r, 0.499999881f);
  p = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
  const float power = bits_to_float((float_to_bits(shifted) + 127) << 23);  // 2^n
  return x < -87.0f ? 0.0f : p * power;
}

// Calls use(i, classes) for each chunk of a thread; raw(i) is there before where it is held.
template <bool VEC, int CHUNKS, bool BLOCK, class Use>
VK_DEVICE void for_chunks(const Team<BLOCK>& team, int phase, int K, Use&& use) {
  if constexpr (CHUNKS > 0) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) use(i, Classes<VEC>(i, team.rank, team.size, phase, K));
  } else {
    const int chunks = (K + phase + 8 * team.size - 1) / (8 * team.size);
    for (int i = 0; i < chunks; ++i) use(0, Classes<VEC>(i, team.rank, team.size, phase, K));
  }
}

// A head's classes of one thread: in registers, or read when they are asked for.
template <bool VEC, int CHUNKS>
struct Row {
  static constexpr int HELD = CHUNKS == 0 ? 1 : CHUNKS;
  Head head;
  int64_t row;
  Raw8 raw[HELD];

  template <bool BLOCK>
  VK_DEVICE Row(const Head& head, int64_t row, const Team<BLOCK>& team, int phase, int K)
      : head(head), row(row) {
    if (CHUNKS > 0 && head.data != nullptr)
      for_chunks<VEC, CHUNKS>(
          team, phase, K, [&](int i, const auto& classes) { raw[i] = load(head, row, classes); });
  }
  VK_DEVICE Raw8 bits(int i, const Classes<VEC>& classes) const {
    return CHUNKS > 0 ? raw[i] : load(head, row, classes);
  }
  VK_DEVICE void logits(int i, const Classes<VEC>& classes, float (&v)[8]) const {
    to_logits(bits(i, classes), head.dtype, classes, v);
  }
  VK_DEVICE void values(int i, const Classes<VEC>& classes, float (&v)[8]) const {
    to_floats(bits(i, classes), head.dtype, v);
  }
};

VK_DEVICE float largest(const float (&v)[8]) {
  float top = v[0];
#pragma unroll
  for (int j = 1; j < 8; ++j) top = fmaxf(top, v[j]);
  return top;
}

// ---- Cross entropy of a row with class `id`, or with targets t

template <bool PRECISE, bool VEC, int CHUNKS, bool BLOCK>
VK_DEVICE float class_head(Team<BLOCK>& team, const Row<VEC, CHUNKS>& x, const Row<VEC, CHUNKS>& t,
                           int64_t id, float smoothing, float grad, const Gradient& gradient,
                           int phase, int K) {
  const bool soft = t.head.data != nullptr;
  float top = kMinusInf;
  if constexpr (CHUNKS > 0) {
    for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
      float v[8];
      x.logits(i, classes, v);
      top = fmaxf(top, largest(v));
    });
    float tops[1] = {top};
    team.max(tops);
    top = tops[0];
  }
  // Sums from a base that rises, in a walk, with the largest value so far.
  float sum = 0.0f, weighted = 0.0f, targets = 0.0f, deviations = 0.0f, count = 0.0f;
  const auto raise = [&](float to) {
    const float shift = finite(top) - finite(to);
    sum *= exponential<PRECISE>(top - finite(to));
    deviations += count * shift;
    weighted += targets == 0.0f ? 0.0f : targets * shift;
    top = to;
  };
  for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
    float v[8];
    x.logits(i, classes, v);
    if constexpr (CHUNKS == 0) {
      const float high = fmaxf(top, largest(v));
      if (high > top) raise(high);
    }
    const float base = finite(top);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += exponential<PRECISE>(v[j] - base);
    if (smoothing != 0.0f) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (classes.holds(j)) deviations += v[j] - base, count += 1.0f;
    }
    if (soft) {
      float target[8];
      t.values(i, classes, target);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        weighted += target[j] == 0.0f ? 0.0f : target[j] * (v[j] - base);
        targets += target[j];
      }
    }
  });
  if constexpr (CHUNKS == 0) {
    float tops[1] = {top};
    team.max(tops);
    raise(tops[0]);
  }
  float sums[4] = {sum, weighted, targets, deviations};
  team.sum(sums);
  const float base = finite(top);

  const float hit = 1.0f - smoothing, spread = smoothing / static_cast<float>(K);
  const bool valid = id >= 0 && id < K;
  float mass = 1.0f;
  if (soft) {
    mass = hit * sums[2] + smoothing;
  } else {
    const float at_id =
        valid ? load_scalar(x.head.data, x.head.dtype, x.row * x.head.stride + id) : NAN;
    sums[1] = at_id - base;
  }
  float loss = mass * logf(sums[0]) - spread * sums[3];
  if (hit != 0.0f) loss -= hit * sums[1];

  if (gradient.data != nullptr) {
    const float factor = grad * mass / sums[0], everywhere = grad * spread, here = grad * hit;
    for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
      float v[8], target[8];
      x.logits(i, classes, v);
      if (soft) t.values(i, classes, target);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = exponential<PRECISE>(v[j] - base) * factor - everywhere;
        if (soft)
          v[j] -= here * target[j];
        else if (classes[j] == id)
          v[j] -= here;
      }
      store(gradient, x.row, classes, v);
    });
  }
  return loss;
}

// ---- KL(softmax(t / T) || softmax(x / T)) * T^2 of a row; scale = 1 / T

template <bool PRECISE, bool VEC, int CHUNKS, bool BLOCK>
VK_DEVICE float soft_head(Team<BLOCK>& team, const Row<VEC, CHUNKS>& x, const Row<VEC, CHUNKS>& t,
                          float scale, float grad, const Gradient& gradient, int phase, int K) {
  float tops[2] = {kMinusInf, kMinusInf};
  if constexpr (CHUNKS > 0) {
    for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
      float v[8], u[8];
      x.logits(i, classes, v);
      t.logits(i, classes, u);
      tops[0] = fmaxf(tops[0], largest(v));
      tops[1] = fmaxf(tops[1], largest(u));
    });
    team.max(tops);
  }
  float x_sum = 0.0f, t_sum = 0.0f, weighted = 0.0f;
  const auto raise = [&](float x_to, float t_to) {
    const float shift = (finite(tops[1]) - finite(t_to)) - (finite(tops[0]) - finite(x_to));
    const float shrink = exponential<PRECISE>((tops[1] - finite(t_to)) * scale);
    weighted = (weighted + (t_sum == 0.0f ? 0.0f : t_sum * shift)) * shrink;
    t_sum *= shrink;
    x_sum *= exponential<PRECISE>((tops[0] - finite(x_to)) * scale);
    tops[0] = x_to, tops[1] = t_to;
  };
  for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
    float v[8], u[8];
    x.logits(i, classes, v);
    t.logits(i, classes, u);
    if constexpr (CHUNKS == 0) {
      const float x_high = fmaxf(tops[0], largest(v)), t_high = fmaxf(tops[1], largest(u));
      if (x_high > tops[0] || t_high > tops[1]) raise(x_high, t_high);
    }
    const float x_base = finite(tops[0]), t_base = finite(tops[1]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float e = exponential<PRECISE>((u[j] - t_base) * scale);
      x_sum += exponential<PRECISE>((v[j] - x_base) * scale);
      t_sum += e;
      weighted += e == 0.0f ? 0.0f : e * ((u[j] - t_base) - (v[j] - x_base));
    }
  });
  if constexpr (CHUNKS == 0) {
    float joined[2] = {tops[0], tops[1]};
    team.max(joined);
    raise(joined[0], joined[1]);
  }
  float sums[3] = {x_sum, t_sum, weighted};
  team.sum(sums);
  // One logarithm of the ratio: at a high temperature the sums are nearly equal, and T^2 follows.
  const float kl = sums[2] / sums[1] * scale + logf(sums[0] / sums[1]);

  if (gradient.data != nullptr) {
    const float x_base = finite(tops[0]), t_base = finite(tops[1]);
    const float x_factor = grad / sums[0], t_factor = grad / sums[1];
    for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
      float v[8], u[8];
      x.logits(i, classes, v);
      t.logits(i, classes, u);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        v[j] = exponential<PRECISE>((v[j] - x_base) * scale) * x_factor -
               exponential<PRECISE>((u[j] - t_base) * scale) * t_factor;
      store(gradient, x.row, classes, v);
    });
  }
  return kl / (scale * scale);
}

// ---- The teacher's decision: the first of its largest logits, -1 where one is NaN

template <bool VEC, int CHUNKS, bool BLOCK>
VK_DEVICE int decision(Team<BLOCK>& team, const Row<VEC, CHUNKS>& t, int phase, int K) {
  float top = kMinusInf, nan = 0.0f;
  int first = kIntMax;
  for_chunks<VEC, CHUNKS>(team, phase, K, [&](int i, const auto& classes) {
    float u[8];
    t.logits(i, classes, u);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (!classes.holds(j)) continue;
      if (u[j] != u[j]) nan = 1.0f;
      if (u[j] > top || first == kIntMax) top = fmaxf(top, u[j]), first = classes[j];
    }
  });
  float tops[2] = {top, nan};
  team.max(tops);
  int firsts[1] = {top == tops[0] ? first : kIntMax};
  team.reduce(firsts, [](int a, int b) { return a < b ? a : b; });
  return tops[1] != 0.0f ? -1 : firsts[0];
}

// ---- Rows

template <Types TYPES>
VK_DEVICE void set_types(ForwardArgs& a) {
  if constexpr (TYPES != Types::kAny) {
    const DType dtype = TYPES == Types::kF32 ? DType::kF32 : DType::kBF16;
    a.logits.dtype = a.distill.dtype = a.teacher.dtype = a.soft_targets.dtype = dtype;
    a.dlogits.dtype = a.ddistill.dtype = dtype;
  }
}

template <Types TYPES, bool VEC, bool BLOCK, int CHUNKS>
__global__ void __launch_bounds__(BLOCK ? kBlockThreads : 32 * kWarps, 1)
    forward_kernel(const __grid_constant__ ForwardArgs arguments) {
  check_launch_bounds<BLOCK ? kBlockThreads : 32 * kWarps>();
  ForwardArgs a = arguments;
  set_types<TYPES>(a);
  constexpr bool PRECISE = TYPES != Types::kBF16;
  VK_SHARED(float, partial, [BLOCK ? 2 * 8 * kWarp : 1]);
  Team<BLOCK> team(partial);
  const int64_t row = BLOCK ? static_cast<int64_t>(blockIdx.x)
                            : static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.rows) return;  // a whole warp, or nobody
  const int K = a.K;
  // Rows of all tensors begin equally far behind a 16-byte line.
  const int per_line = is_wide(a.logits.dtype) ? 4 : 8;
  const int phase = VEC ? static_cast<int>(row % per_line * (K % per_line)) % per_line : 0;
  const int64_t id = a.ids == nullptr ? -1 : a.ids[row];
  const Row<VEC, CHUNKS> x(a.logits, row, team, phase, K);
  const Row<VEC, CHUNKS> targets(a.soft_targets, row, team, phase, K);
  const Row<VEC, CHUNKS> z(a.distill, row, team, phase, K);
  const Row<VEC, CHUNKS> t(a.teacher, row, team, phase, K);

  float loss = a.class_weight * class_head<PRECISE>(team, x, targets, id, a.smoothing, a.class_grad,
                                                    a.dlogits, phase, K);
  if (a.hard) {
    const int choice = decision(team, t, phase, K);
    const float valid = choice < 0 ? NAN : 1.0f;
    const Row<VEC, CHUNKS> none({nullptr, 0, a.logits.dtype}, row, team, phase, K);
    loss += a.distill_weight * valid *
            class_head<PRECISE>(team, z, none, choice < 0 ? 0 : choice, 0.0f,
                                a.distill_grad * valid, a.ddistill, phase, K);
  } else {
    loss += a.distill_weight * soft_head<PRECISE>(team, z, t, a.inverse_temperature, a.distill_grad,
                                                  a.ddistill, phase, K);
  }
  if (team.rank == 0) a.losses[row] = loss;
}

// ---- The sum over rows, by one block, in a fixed order

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const float* losses, int64_t rows, float* loss) {
  check_launch_bounds<kTotalThreads>();
  VK_SHARED(float, partial, [2 * 8 * kWarp]);
  Team<true> team(partial);
  float sums[1] = {0.0f};
  for (int64_t row = team.rank; row < rows; row += team.size) sums[0] += losses[row];
  team.sum(sums);
  if (team.rank == 0) *loss = sums[0];
}

// ---- out = kept * dloss * inverse_unit of one gradient, or of both

struct ScaleArgs {
  const float* dloss;
  const void* kept[2];  // contiguous, `size` elements; null: absent
  void* out[2];
  float inverse_unit[2];
  bool aligned[2];  // kept begins on a 16-byte line
  DType dtype[2];
  int64_t size;
};

// A block has kScaleThreads x 8 elements of the gradient blockIdx.y.
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const __grid_constant__ ScaleArgs a) {
  check_launch_bounds<kScaleThreads>();
  const int which = static_cast<int>(blockIdx.y);
  if (a.kept[which] == nullptr) return;
  const DType dtype = a.dtype[which];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * 8;
  if (begin >= a.size) return;
  const int64_t left = a.size - begin;
  const int elements = left < 8 ? static_cast<int>(left) : 8;
  const Classes<true> eight(0, 0, 1, 0, elements);
  const Head in{element(a.kept[which], begin, dtype), 0, dtype};
  const Gradient out{element(a.out[which], begin, dtype), dtype};
  const float factor = *a.dloss * a.inverse_unit[which];
  float v[8];
  to_floats(
      a.aligned[which] ? load(in, 0, eight) : load(in, 0, Classes<false>(0, 0, 1, 0, elements)),
      dtype, v);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= factor;
  store(out, 0, eight, v);
}

}  // namespace
}  // namespace vitkernels
