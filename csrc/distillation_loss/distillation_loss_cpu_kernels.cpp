// distillation_loss on the CPU, compiled once per instruction set (VK_ISA).
//
// A row is read from memory once, in blocks of kBlock columns that stay in the L1 cache: the
// block's largest value, then e = exp(x - largest), its sum and the sums that the loss needs. Where
// the gradient is wanted, e is kept, in the gradient's own row in fp32, in a buffer of the L2 cache
// in 16 bits; when the row's end is reached, exp(largest - row's largest) / sum turns every block's
// e into probabilities, and those into the gradient. So three exponentials an element, three
// tensors read and two written.
#include <cmath>

#include "common/cpu_softmax.h"
#include "distillation_loss/distillation_loss_cpu.h"

namespace vitkernels {
namespace {

constexpr int64_t kBlock = 1024;

template <class T>
VK_INLINE T* row_of(const RowsArg& arg, int64_t row) {
  return static_cast<T*>(arg.data) + row * arg.stride;
}

// load_or with `fill` beyond the end of a row.
template <class T>
VK_INLINE Vec load_filled(const T* p, int n, float fill) {
  if (n == kVec) return load(p);
  return select(lane_index() < n, load_n(p, n), splat(fill));
}

// Runs body(c, n, k) over [begin, end), k cycling through four accumulators.
template <class Body>
VK_INLINE void for_block(int64_t begin, int64_t end, Body&& body) {
  int64_t c = begin;
  for (; c + 4 * kVec <= end; c += 4 * kVec)
    for (int k = 0; k < 4; ++k) body(c + k * kVec, kVec, k);
  int k = 0;
  for (; c + kVec <= end; c += kVec, ++k) body(c, kVec, k);
  if (c < end) body(c, static_cast<int>(end - c), 3);
}

struct Lanes {
  Vec lane[4] = {};
  VK_INLINE float sum() const { return reduce_add((lane[0] + lane[1]) + (lane[2] + lane[3])); }
};

// The largest value of [begin, end), or 0 where all are -inf: what exponents are taken from.
template <class T>
VK_INLINE float largest(const T* x, int64_t begin, int64_t end) {
  Vec top[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for_block(begin, end, [&](int64_t c, int n, int k) {
    top[k] = max_of_numbers(top[k], load_filled(x + c, n, -kInf));
  });
  const float high =
      reduce_max(max_of_numbers(max_of_numbers(top[0], top[1]), max_of_numbers(top[2], top[3])));
  return high == -kInf ? 0.0f : high;
}

// What is known of a block of a row. The exponent of a block that is -inf everywhere is 0, its sum
// too: it does not count.
struct Block {
  float top, sum;  // largest value; sum of e
  float weighted;  // class head: sum of t (x - top); soft distillation: of e_t ((t - top_t) - ...)
  float deviations;  // class head: sum of x - top
  float targets;     // class head: sum of t
  float factor;      // from e to what the gradient has of it
};

// Where e of a row lies until its sum is known.
template <class X>
VK_INLINE float* kept_row(X* gradient, float* buffer) {
  (void)gradient;
  return buffer;
}
template <>
VK_INLINE float* kept_row<float>(float* gradient, float*) {
  return gradient;
}

// exp(x - top) of a block, stored when kept is given.
template <class T>
VK_INLINE Vec exponential(const T* x, int64_t c, int n, Vec top, Vec scale, float* kept) {
  const Vec e = exp((load_filled(x + c, n, -kInf) - top) * scale);
  if (kept != nullptr) store_or(kept + c, e, n);
  return e;
}

// The row's largest value and sum of exponentials, from its blocks'.
struct Total {
  double top, sum;
};

template <class Sum, class Top>
VK_INLINE Total total_of(int64_t blocks, double scale, Top&& top_of, Sum&& sum_of) {
  Total row{-kInf, 0.0};
  for (int64_t b = 0; b < blocks; ++b)
    if (sum_of(b) != 0.0f && !(top_of(b) <= row.top)) row.top = top_of(b);
  for (int64_t b = 0; b < blocks; ++b)
    if (sum_of(b) != 0.0f) row.sum += sum_of(b) * std::exp((top_of(b) - row.top) * scale);
  return row;
}

// ---- cross entropy of a row with class `id`, or with targets t

// loss = sum of t' (log sum - (x - top)); gradient = grad * (softmax * sum of t' - t'), where
// t' = (1 - smoothing) t + smoothing / K.
template <class X, class T>
double cross_entropy_row(const X* x, const T* t, int64_t id, int64_t K, float smoothing, float grad,
                         X* gradient, Block* blocks, float* buffer) {
  float* const kept = gradient == nullptr ? nullptr : kept_row(gradient, buffer);
  int64_t count = 0;
  for (int64_t begin = 0; begin < K; begin += kBlock, ++count) {
    const int64_t end = begin + kBlock < K ? begin + kBlock : K;
    Block& block = blocks[count];
    block = {largest(x, begin, end), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const Vec top = splat(block.top), one = splat(1.0f);
    Lanes sum, weighted, deviations, targets;
    const bool smooth = smoothing != 0.0f;
    for_block(begin, end, [&](int64_t c, int n, int k) {
      sum.lane[k] += exponential(x, c, n, top, one, kept);
      if (smooth) deviations.lane[k] += load_filled(x + c, n, block.top) - top;
      if (t != nullptr) {
        const Vec target = load_or(t + c, n);
        targets.lane[k] += target;
        weighted.lane[k] += select(target == Vec{}, Vec{}, target * (load_or(x + c, n) - top));
      }
    });
    block.sum = sum.sum();
    block.deviations = deviations.sum();
    block.weighted = weighted.sum();
    block.targets = targets.sum();
  }

  const Total row = total_of(
      count, 1.0, [&](int64_t b) { return blocks[b].top; },
      [&](int64_t b) { return blocks[b].sum; });
  const double hit = 1.0 - static_cast<double>(smoothing),
               spread = smoothing / static_cast<double>(K);
  double targets = t == nullptr ? 1.0 : 0.0, weighted = 0.0, deviations = 0.0;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t columns = b + 1 < count ? kBlock : K - b * kBlock;
    const double shift = blocks[b].top - row.top;
    deviations += blocks[b].deviations + static_cast<double>(columns) * shift;
    if (t == nullptr) continue;
    targets += blocks[b].targets;
    weighted += blocks[b].weighted + (blocks[b].targets == 0.0f ? 0.0 : blocks[b].targets * shift);
  }
  if (t == nullptr) weighted = to_float(x[id]) - row.top;
  const double mass = hit * targets + (smoothing != 0.0f ? smoothing : 0.0);
  double loss = mass * std::log(row.sum) - hit * weighted;
  if (hit == 0.0) loss = mass * std::log(row.sum);
  if (smoothing != 0.0f) loss -= spread * deviations;
  if (gradient == nullptr) return loss;

  const float at_id = id >= 0 && t == nullptr ? kept[id] : 0.0f;
  const Vec everywhere = splat(static_cast<float>(-grad * spread));
  const Vec of_target = splat(static_cast<float>(-grad * hit));
  float factor = 0.0f;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = b * kBlock, end = begin + kBlock < K ? begin + kBlock : K;
    const double share = blocks[b].sum == 0.0f ? 0.0 : std::exp(blocks[b].top - row.top);
    const float scale = static_cast<float>(grad * mass / row.sum * share);
    if (t == nullptr && id >= begin && id < end) factor = scale;
    const Vec s = splat(scale);
    for_block(begin, end, [&](int64_t c, int n, int) {
      Vec g = fma(load_or(kept + c, n), s, everywhere);
      if (t != nullptr) g = fma(load_or(t + c, n), of_target, g);
      store_or(gradient + c, g, n);
    });
  }
  if (t == nullptr)
    gradient[id] = from_float<X>(
        static_cast<float>(static_cast<double>(at_id) * factor - grad * spread - grad * hit));
  return loss;
}

// ---- KL(softmax(t / T) || softmax(x / T)) * T^2 of a row

// gradient = grad * (softmax(x / T) - softmax(t / T)).
template <class X, class T>
double soft_row(const X* x, const T* t, int64_t K, float inverse_temperature, float grad,
                X* gradient, Block* student, Block* teacher, float* x_buffer, float* t_buffer) {
  float* const x_kept = gradient == nullptr ? nullptr : kept_row(gradient, x_buffer);
  float* const t_kept = gradient == nullptr ? nullptr : t_buffer;
  const Vec scale = splat(inverse_temperature);
  int64_t count = 0;
  for (int64_t begin = 0; begin < K; begin += kBlock, ++count) {
    const int64_t end = begin + kBlock < K ? begin + kBlock : K;
    student[count].top = largest(x, begin, end);
    teacher[count].top = largest(t, begin, end);
    const Vec x_top = splat(student[count].top), t_top = splat(teacher[count].top);
    Lanes x_sum, t_sum, weighted;
    for_block(begin, end, [&](int64_t c, int n, int k) {
      x_sum.lane[k] += exponential(x, c, n, x_top, scale, x_kept);
      const Vec e = exponential(t, c, n, t_top, scale, t_kept);
      t_sum.lane[k] += e;
      const Vec difference = (load_or(t + c, n) - t_top) - (load_or(x + c, n) - x_top);
      weighted.lane[k] += select(e == Vec{}, Vec{}, e * difference);
    });
    student[count].sum = x_sum.sum();
    teacher[count].sum = t_sum.sum();
    teacher[count].weighted = weighted.sum();
  }

  const double s = inverse_temperature;
  const Total xs = total_of(
      count, s, [&](int64_t b) { return student[b].top; },
      [&](int64_t b) { return student[b].sum; });
  const Total ts = total_of(
      count, s, [&](int64_t b) { return teacher[b].top; },
      [&](int64_t b) { return teacher[b].sum; });
  double weighted = 0.0;
  for (int64_t b = 0; b < count; ++b) {
    const double shift = teacher[b].top - ts.top;
    const double x_share = student[b].sum == 0.0f ? 0.0 : std::exp((student[b].top - xs.top) * s);
    const double t_share = teacher[b].sum == 0.0f ? 0.0 : std::exp(shift * s);
    if (teacher[b].sum != 0.0f)
      weighted +=
          t_share * (teacher[b].weighted + teacher[b].sum * (shift - (student[b].top - xs.top)));
    student[b].factor = static_cast<float>(grad / xs.sum * x_share);
    teacher[b].factor = static_cast<float>(-grad / ts.sum * t_share);
  }
  const double kl = weighted / ts.sum * s - std::log(ts.sum) + std::log(xs.sum);
  const double loss = kl / (s * s);
  if (gradient == nullptr) return loss;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = b * kBlock, end = begin + kBlock < K ? begin + kBlock : K;
    const Vec x_factor = splat(student[b].factor), t_factor = splat(teacher[b].factor);
    for_block(begin, end, [&](int64_t c, int n, int) {
      const Vec g = fma(load_or(t_kept + c, n), t_factor, load_or(x_kept + c, n) * x_factor);
      store_or(gradient + c, g, n);
    });
  }
  return loss;
}

// ---- the teacher's decision

// The first of the largest values of a row; -1 when one is NaN.
template <class T>
int64_t first_largest(const T* t, int64_t K) {
  Vec top = splat(-kInf);
  IVec nan = {};
  for_block(0, K, [&](int64_t c, int n, int) {
    const Vec v = load_filled(t + c, n, -kInf);
    top = max_of_numbers(v, top);
    nan = nan | (v != v);
  });
  for (int i = 0; i < kVec; ++i)
    if (nan[i] != 0) return -1;
  const float high = reduce_max(top);
  for (int64_t c = 0; c < K; ++c)
    if (to_float(t[c]) == high) return c;
  return 0;
}

// ---- rows

// What a row's blocks leave until its end: e of the student and the teacher, and their sums.
struct RowMemory {
  RowMemory(void* scratch, int64_t K)
      : x(static_cast<float*>(scratch)),
        t(x + floats(K)),
        student(reinterpret_cast<Block*>(t + floats(K))),
        teacher(student + blocks(K)) {}
  static int64_t floats(int64_t K) { return (K + 15) / 16 * 16; }
  static int64_t blocks(int64_t K) { return (K + kBlock - 1) / kBlock; }
  float *x, *t;
  Block *student, *teacher;
};

int64_t scratch_bytes(int64_t K) {
  return 2 * (RowMemory::floats(K) * static_cast<int64_t>(sizeof(float)) +
              RowMemory::blocks(K) * static_cast<int64_t>(sizeof(Block)));
}

template <class X>
X* gradient_row(const RowsArg& arg, int64_t row) {
  return arg.data == nullptr ? nullptr : row_of<X>(arg, row);
}

template <class X>
double class_loss(const DistillationArgs& args, int64_t row, const RowMemory& memory) {
  const X* const x = row_of<const X>(args.logits, row);
  X* const gradient = gradient_row<X>(args.dlogits, row);
  const auto loss = [&](auto* t, int64_t id) {
    return cross_entropy_row(x, t, id, args.K, args.label_smoothing, args.class_grad, gradient,
                             memory.student, memory.x);
  };
  if (args.ids != nullptr) return loss(static_cast<const float*>(nullptr), args.ids[row]);
  VK_SWITCH_FLOAT(args.soft_targets.dtype,
                  return loss(row_of<const scalar_t>(args.soft_targets, row), -1));
  return 0.0;
}

template <class X, class T>
double distill_loss_of(const DistillationArgs& args, int64_t row, const RowMemory& memory) {
  const X* const x = row_of<const X>(args.distill, row);
  const T* const t = row_of<const T>(args.teacher, row);
  X* const gradient = gradient_row<X>(args.ddistill, row);
  if (!args.hard)
    return soft_row(x, t, args.K, args.inverse_temperature, args.distill_grad, gradient,
                    memory.student, memory.teacher, memory.x, memory.t);
  const int64_t id = first_largest(t, args.K);
  const double loss =
      cross_entropy_row(x, static_cast<const float*>(nullptr), id < 0 ? 0 : id, args.K, 0.0f,
                        args.distill_grad, gradient, memory.student, memory.x);
  if (id >= 0) return loss;
  if (gradient != nullptr)
    for_each_vec(args.K, [&](int64_t c, int n) { store_or(gradient + c, splat(NAN), n); });
  return NAN;
}

template <class X>
double distill_loss(const DistillationArgs& args, int64_t row, const RowMemory& memory) {
  VK_SWITCH_FLOAT(args.teacher.dtype, return (distill_loss_of<X, scalar_t>(args, row, memory)));
  return 0.0;
}

void forward(const DistillationArgs& args, void* scratch, int64_t begin, int64_t end) {
  const RowMemory memory(scratch, args.K);
  for (int64_t row = begin; row < end; ++row) {
    VK_SWITCH_FLOAT(
        args.logits.dtype,
        args.losses[row] = args.class_weight * class_loss<scalar_t>(args, row, memory) +
                           args.distill_weight * distill_loss<scalar_t>(args, row, memory));
  }
}

void scale(RowsArg in, RowsArg out, float factor, int64_t begin, int64_t end) {
  const Vec f = splat(factor);
  VK_SWITCH_FLOAT(in.dtype, {
    const scalar_t* const source = static_cast<const scalar_t*>(in.data) + begin;
    scalar_t* const target = static_cast<scalar_t*>(out.data) + begin;
    for_each_vec(end - begin,
                 [&](int64_t c, int n) { store_or(target + c, load_or(source + c, n) * f, n); });
  });
}

}  // namespace

const DistillationTable& VK_ISA_TABLE(distillation_loss)() {
  static const DistillationTable table = {scratch_bytes, forward, scale};
  return table;
}

}  // namespace vitkernels
