// add_layer_norm and layer_norm_add on the CPU, compiled once per instruction set (VK_ISA).
//
// A row is read once and kept as fp32 in a buffer of the L1 cache: first pass sum (forward) or the
// two inner products (backward), last pass output. Every activation crosses memory once, so the
// floor is cost()'s bytes over bandwidth; at C = 384 a row is 24 AVX-512 vectors and the arithmetic
// hides behind the loads. Statistics are two-pass in fp32. The order of every sum depends on C and
// on the chunk of rows alone, never on threads.
#include "add_layer_norm/add_layer_norm_cpu.h"
#include "common/cpu_vec.h"
#include "common/philox.h"

namespace vitkernels {
namespace {

constexpr int kUnroll =
    4;  // independent accumulators of a row sum: hides the latency of the vector add
// Rows that go through a pass together: while one row's sum, division and square root are on their
// way, the next row's loads run (76 -> 45 ns a row at C = 384, bf16). Wide rows go alone, so that
// the buffers stay in the L1 cache.
constexpr int kRowBlock = 4;
constexpr int64_t kRowBlockElements = 4096;

// fp32 buffers: `a` and `b` hold what the next pass needs of each row of a block, `keep` the
// dropout factors of one row.
struct Scratch {
  explicit Scratch(int64_t C)
      : size((C + kVec - 1) / kVec * kVec),
        rows(C * kRowBlock <= kRowBlockElements ? kRowBlock : 1),
        memory(new float[(2 * rows + 2) * size]) {}
  ~Scratch() { delete[] memory; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* a(int i) { return memory + i * size; }
  float* b(int i) { return memory + (rows + i) * size; }
  float* keep() { return memory + 2 * rows * size; }
  float* multiplier() { return memory + (2 * rows + 1) * size; }
  int64_t size;
  int rows;
  float* memory;
};

template <class T>
VK_INLINE T* row_of(const RowsArg& arg, int64_t row) {
  return static_cast<T*>(arg.data) + row * arg.stride;
}

VK_INLINE float scale_of(const float* row_scale, const BranchArgs& branch, int64_t row) {
  return row_scale == nullptr ? 1.0f : row_scale[row / branch.rows_per_sample];
}

// The branch's per-column factor of this row: gamma, dropout, both, or null for 1.
VK_INLINE const float* multiplier_of(const BranchArgs& branch, int64_t row, int64_t C,
                                     Scratch& scratch) {
  if (branch.dropout_scale == 0.0f) return branch.gamma;
  const Dropout dropout{branch.seed, branch.threshold, branch.dropout_scale, true};
  dropout_factors(dropout, static_cast<uint64_t>(row * C), C, scratch.keep());
  if (branch.gamma == nullptr) return scratch.keep();
  for (int64_t c = 0; c < C; ++c) scratch.multiplier()[c] = scratch.keep()[c] * branch.gamma[c];
  return scratch.multiplier();
}

// Runs body(c, n, k) over the vectors of a row, k cycling through the accumulators.
template <class Body>
VK_INLINE void for_row(int64_t C, Body&& body) {
  int64_t c = 0;
  for (; c + kUnroll * kVec <= C; c += kUnroll * kVec)
    for (int k = 0; k < kUnroll; ++k) body(c + k * kVec, kVec, k);
  int k = 0;
  for (; c + kVec <= C; c += kVec, ++k) body(c, kVec, k);
  if (c < C) body(c, static_cast<int>(C - c), 0);
}

struct Sums {
  Vec lane[kUnroll] = {};
  VK_INLINE float total() const { return reduce_add((lane[0] + lane[1]) + (lane[2] + lane[3])); }
};

// Lanes at and beyond n of a last, partial vector must not enter a sum.
VK_INLINE Vec first_n(Vec v, int n) {
  if (n == kVec) return v;
  float lanes[kVec];
  store(lanes, v);
  for (int i = n; i < kVec; ++i) lanes[i] = 0.0f;
  return load(lanes);
}

// --- forward
// ----------------------------------------------------------------------------------------------------------

using RowPass = float (*)(const NormForwardArgs&, int64_t row, float scale, const float* multiplier,
                          float* z);

// z = residual + scale * multiplier * x, as new_residual stores it, into the buffer and out;
// returns the row's sum.
template <class X, class R, bool kMultiply>
float add_row(const NormForwardArgs& args, int64_t row, float scale, const float* multiplier,
              float* z) {
  const X* x = row_of<X>(args.x, row);
  const R* residual = row_of<R>(args.residual, row);
  R* out = row_of<R>(args.z, row);
  Sums sums;
  const Vec factor = splat(scale);
  for_row(args.C, [&](int64_t c, int n, int k) {
    Vec branch = load_or(x + c, n) * factor;
    if (kMultiply) branch = branch * load_or(multiplier + c, n);
    const Vec v = round_to<R>(load_or(residual + c, n) + branch);
    store(z + c, v);
    store_or(out + c, v, n);
    sums.lane[k] += v;
  });
  return sums.total();
}

// A sample whose branch was dropped: the branch is not read, z = residual.
template <class R>
float keep_row(const NormForwardArgs& args, int64_t row, float, const float*, float* z) {
  const R* residual = row_of<R>(args.residual, row);
  R* out = row_of<R>(args.z, row);
  Sums sums;
  for_row(args.C, [&](int64_t c, int n, int k) {
    const Vec v = load_or(residual + c, n);
    store(z + c, v);
    store_or(out + c, v, n);
    sums.lane[k] += v;
  });
  return sums.total();
}

// Plain LayerNorm: z = x, nothing else is written.
template <class X>
float read_row(const NormForwardArgs& args, int64_t row, float, const float*, float* z) {
  const X* x = row_of<X>(args.x, row);
  Sums sums;
  for_row(args.C, [&](int64_t c, int n, int k) {
    const Vec v = load_or(x + c, n);
    store(z + c, v);
    sums.lane[k] += v;
  });
  return sums.total();
}

VK_INLINE float reciprocal_std(const float* z, int64_t C, float mean, float eps) {
  Sums squares;
  const Vec centre = splat(mean);
  for_row(C, [&](int64_t c, int n, int k) {
    const Vec d = first_n(load(z + c) - centre, n);
    squares.lane[k] = fma(d, d, squares.lane[k]);
  });
  return 1.0f / __builtin_sqrtf(squares.total() / static_cast<float>(C) + eps);
}

using WritePass = void (*)(const NormForwardArgs&, int64_t row, float scale, const float* z,
                           float mean, float rstd);

template <class Y>
void write_normalized(const NormForwardArgs& args, int64_t row, float, const float* z, float mean,
                      float rstd) {
  Y* y = row_of<Y>(args.y, row);
  const float *weight = args.weight, *bias = args.bias;
  const Vec centre = splat(mean), factor = splat(rstd);
  for_row(args.C, [=](int64_t c, int n, int) {
    const Vec xhat = (load(z + c) - centre) * factor;
    store_or(y + c, fma(xhat, load_or(weight + c, n), load_or(bias + c, n)), n);
  });
}

template <class R>
void write_post(const NormForwardArgs& args, int64_t row, float scale, const float* z, float mean,
                float rstd) {
  R* y = row_of<R>(args.y, row);
  const R* residual = row_of<R>(args.residual, row);
  const float *weight = args.weight, *bias = args.bias;
  const Vec centre = splat(mean), factor = splat(rstd), sample = splat(scale);
  for_row(args.C, [=](int64_t c, int n, int) {
    Vec out = load_or(residual + c, n);
    const Vec xhat = (load(z + c) - centre) * factor;
    if (scale != 0.0f)
      out = fma(fma(xhat, load_or(weight + c, n), load_or(bias + c, n)), sample, out);
    store_or(y + c, out, n);
  });
}

void forward_rows(const NormForwardArgs& args, int64_t begin, int64_t end, RowPass add,
                  RowPass keep, WritePass write) {
  Scratch scratch(args.C);
  float scale[kRowBlock], mean[kRowBlock], rstd[kRowBlock];
  for (int64_t first = begin; first < end; first += scratch.rows) {
    const int rows = end - first < scratch.rows ? static_cast<int>(end - first) : scratch.rows;
    for (int i = 0; i < rows; ++i) {
      const int64_t row = first + i;
      scale[i] = scale_of(args.branch.row_scale, args.branch, row);
      const bool dropped = keep != nullptr && scale[i] == 0.0f;
      const float* multiplier =
          dropped || keep == nullptr ? nullptr : multiplier_of(args.branch, row, args.C, scratch);
      const float sum = (dropped ? keep : add)(args, row, scale[i], multiplier, scratch.a(i));
      mean[i] = sum / static_cast<float>(args.C);
    }
    for (int i = 0; i < rows; ++i)
      rstd[i] = reciprocal_std(scratch.a(i), args.C, mean[i], args.eps);
    for (int i = 0; i < rows; ++i) {
      args.mean[first + i] = mean[i];
      args.rstd[first + i] = rstd[i];
      write(args, first + i, scale[i], scratch.a(i), mean[i], rstd[i]);
    }
  }
}

template <class X>
RowPass pick_add(const NormForwardArgs& args) {
  const bool multiply = args.branch.gamma != nullptr || args.branch.dropout_scale != 0.0f;
  VK_SWITCH_FLOAT(args.residual.dtype,
                  return multiply ? add_row<X, scalar_t, true> : add_row<X, scalar_t, false>);
  return nullptr;
}

void forward(const NormForwardArgs& args, int64_t begin, int64_t end) {
  RowPass add = nullptr, keep = nullptr;
  WritePass write = nullptr;
  if (args.residual.data == nullptr) {
    VK_SWITCH_FLOAT(args.x.dtype, add = read_row<scalar_t>);
  } else {
    VK_SWITCH_FLOAT(args.x.dtype, add = pick_add<scalar_t>(args));
    VK_SWITCH_FLOAT(args.residual.dtype, keep = keep_row<scalar_t>);
  }
  VK_SWITCH_FLOAT(args.y.dtype, write = write_normalized<scalar_t>);
  forward_rows(args, begin, end, add, keep, write);
}

void post_forward(const NormForwardArgs& args, int64_t begin, int64_t end) {
  RowPass read = nullptr;
  WritePass write = nullptr;
  VK_SWITCH_FLOAT(args.x.dtype, read = read_row<scalar_t>);
  VK_SWITCH_FLOAT(args.residual.dtype, write = write_post<scalar_t>);
  forward_rows(args, begin, end, read, nullptr, write);
}

// --- backward
// ---------------------------------------------------------------------------------------------------------

struct RowMeans {
  float wdy, wdy_xhat;  // mean(weight * dy) and mean(weight * dy * xhat)
};

using GradPass = RowMeans (*)(const NormBackwardArgs&, int64_t row, float* xhat, float* wdy);

// xhat and weight * dy into the buffers, the chunk's dweight and dbias, and the two means of the
// LayerNorm backward.
template <class Y, class Z>
RowMeans normalize_grad(const NormBackwardArgs& args, int64_t row, float* xhat, float* wdy) {
  const Y* dy = row_of<Y>(args.dy, row);
  const Z* z = row_of<Z>(args.z, row);
  const Vec centre = splat(args.mean[row]), factor = splat(args.rstd[row]);
  const Vec sample = splat(scale_of(args.dy_row_scale, args.branch, row));
  const float* weight = args.weight;
  float *dweight = args.dweight, *dbias = args.dbias;
  Sums first, second;
  for_row(args.C, [&, weight, dweight, dbias](int64_t c, int n, int k) {
    const Vec h = first_n((load_or(z + c, n) - centre) * factor, n);
    const Vec d = load_or(dy + c, n) * sample;
    if (dweight != nullptr) store_or(dweight + c, fma(d, h, load_or(dweight + c, n)), n);
    if (dbias != nullptr) store_or(dbias + c, load_or(dbias + c, n) + d, n);
    const Vec wd = d * load_or(weight + c, n);
    store(xhat + c, h);
    store(wdy + c, wd);
    first.lane[k] += wd;
    second.lane[k] = fma(wd, h, second.lane[k]);
  });
  const float C = static_cast<float>(args.C);
  return {first.total() / C, second.total() / C};
}

using OutPass = void (*)(const NormBackwardArgs&, int64_t row, RowMeans means, const float* xhat,
                         const float* wdy, const float* multiplier, const float* keep);

// g = dz + rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)); dresidual = g; dx = branch factor *
// g; dgamma += g * branch.
template <class Z, class X>
void write_grads(const NormBackwardArgs& args, int64_t row, RowMeans means, const float* xhat,
                 const float* wdy, const float* multiplier, const float* keep) {
  const Z* dz = args.dz.data == nullptr ? nullptr : row_of<Z>(args.dz, row);
  Z* dresidual = args.dresidual.data == nullptr ? nullptr : row_of<Z>(args.dresidual, row);
  X* dx = args.dx.data == nullptr ? nullptr : row_of<X>(args.dx, row);
  const X* x = args.x.data == nullptr ? nullptr : row_of<X>(args.x, row);
  float* dgamma = args.dgamma;
  const float scale = scale_of(args.branch.row_scale, args.branch, row);
  const bool normalized = args.dy.data != nullptr;
  const Vec sample = splat(scale), factor = splat(args.rstd[row]);
  const Vec mean1 = splat(-means.wdy), mean2 = splat(-means.wdy_xhat);
  for_row(args.C, [=](int64_t c, int n, int) {
    Vec g = dz == nullptr ? Vec{} : load_or(dz + c, n);
    if (normalized) g = fma(fma(load(xhat + c), mean2, load(wdy + c) + mean1), factor, g);
    if (dresidual != nullptr) store_or(dresidual + c, g, n);
    if (dx != nullptr) {
      Vec d = scale == 0.0f ? Vec{} : g * sample;
      if (multiplier != nullptr) d = d * load_or(multiplier + c, n);
      store_or(dx + c, d, n);
    }
    if (x != nullptr && scale != 0.0f) {
      Vec branch = load_or(x + c, n) * sample;
      if (keep != nullptr) branch = branch * load_or(keep + c, n);
      store_or(dgamma + c, fma(g, branch, load_or(dgamma + c, n)), n);
    }
  });
}

template <class Y>
GradPass pick_grad(const NormBackwardArgs& args) {
  VK_SWITCH_FLOAT(args.z.dtype, return normalize_grad<Y, scalar_t>);
  return nullptr;
}

template <class Z>
OutPass pick_out(DType x_dtype) {
  VK_SWITCH_FLOAT(x_dtype, return write_grads<Z, scalar_t>);
  return nullptr;
}

void backward(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  Scratch scratch(args.C);
  GradPass grad = nullptr;
  OutPass out = nullptr;
  if (args.dy.data != nullptr) VK_SWITCH_FLOAT(args.dy.dtype, grad = pick_grad<scalar_t>(args));
  VK_SWITCH_FLOAT(args.z.dtype, out = pick_out<scalar_t>(args.dx.dtype));
  const bool dropout = args.branch.dropout_scale != 0.0f;
  RowMeans means[kRowBlock] = {};
  for (int64_t first = begin; first < end; first += scratch.rows) {
    const int rows = end - first < scratch.rows ? static_cast<int>(end - first) : scratch.rows;
    for (int i = 0; i < rows && grad != nullptr; ++i)
      means[i] = grad(args, first + i, scratch.a(i), scratch.b(i));
    for (int i = 0; i < rows; ++i) {
      const float* multiplier = multiplier_of(args.branch, first + i, args.C, scratch);
      out(args, first + i, means[i], scratch.a(i), scratch.b(i), multiplier,
          dropout ? scratch.keep() : nullptr);
    }
  }
}

void sum_partials(const float* partials, int64_t count, int64_t C, RowsArg out, int64_t begin,
                  int64_t end) {
  for (int64_t c = begin; c < end; c += kVec) {
    const int n = end - c < kVec ? static_cast<int>(end - c) : kVec;
    Vec total{}, lost{};  // Kahan: the number of chunks does not show in the result
    for (int64_t i = 0; i < count; ++i) {
      const Vec term = load_or(partials + i * C + c, n) - lost;
      const Vec next = total + term;
      lost = (next - total) - term;
      total = next;
    }
    VK_SWITCH_FLOAT(out.dtype, store_or(static_cast<scalar_t*>(out.data) + c, total, n));
  }
}

}  // namespace

const AddLayerNormTable& VK_ISA_TABLE(add_layer_norm)() {
  static const AddLayerNormTable table = {forward, post_forward, backward, sum_partials};
  return table;
}

}  // namespace vitkernels
