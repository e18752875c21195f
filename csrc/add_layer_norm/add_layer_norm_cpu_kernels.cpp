// add_layer_norm and layer_norm_add on the CPU, compiled once per instruction set (VK_ISA).
//
// A row is read once and kept as fp32 in a buffer of the L1 cache: first pass sum (forward) or the
// two inner products (backward), last pass output. Every activation crosses memory once, so the
// floor is cost()'s bytes over bandwidth; at C = 384 a row is 24 AVX-512 vectors and the arithmetic
// hides behind the loads. Statistics are two-pass in fp32. The order of every sum depends on C and
// on the chunk of rows alone, never on threads.
#include "add_layer_norm/add_layer_norm_cpu.h"
#include "common/cpu_layer_norm.h"
#include "common/philox.h"

namespace vitkernels {
namespace {

// `a` and `b` hold what the next pass needs, `keep` the dropout factors, `multiplier` those times
// gamma.
struct Scratch : RowBuffers<4> {
  using RowBuffers::RowBuffers;
  float* a(int i) { return at(0, i); }
  float* b(int i) { return at(1, i); }
  float* keep(int i) { return at(2, i); }
  float* multiplier(int i) { return at(3, i); }
};

VK_INLINE float scale_of(const float* row_scale, const BranchArgs& branch, int64_t row) {
  return row_scale == nullptr ? 1.0f : row_scale[row / branch.rows_per_sample];
}

// The branch's per-column factor of this row: gamma, dropout, both, or null for 1.
VK_INLINE const float* multiplier_of(const BranchArgs& branch, int64_t row, int64_t C,
                                     Scratch& scratch, int i) {
  if (branch.dropout_scale == 0.0f) return branch.gamma;
  const Dropout dropout{branch.seed, branch.threshold, branch.dropout_scale};
  float *keep = scratch.keep(i), *multiplier = scratch.multiplier(i);
  dropout_factors(dropout, static_cast<uint64_t>(row * C), C, keep);
  if (branch.gamma == nullptr) return keep;
  for (int64_t c = 0; c < C; ++c) multiplier[c] = keep[c] * branch.gamma[c];
  return multiplier;
}

// ---- forward

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
  const int64_t ahead = kRowBlock * args.z.stride;
  Sums sums;
  const Vec factor = splat(scale);
  for_row(args.C, [&](int64_t c, int n, int k) {
    Vec branch = load_or(x + c, n) * factor;
    prefetch_output(out + ahead + c);
    if (kMultiply) branch = branch * load_or(multiplier + c, n);
    const Vec v = store_rounded(out + c, load_or(residual + c, n) + branch, n);
    store(z + c, v);
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

using WritePass = void (*)(const NormForwardArgs&, int64_t row, float scale, const float* z,
                           float mean, float rstd);

template <class Y>
void write_normalized(const NormForwardArgs& args, int64_t row, float, const float* z, float mean,
                      float rstd) {
  normalize_row(row_of<Y>(args.y, row), kRowBlock * args.y.stride, args.C, args.weight, args.bias,
                z, mean, rstd);
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
      const float* multiplier = dropped || keep == nullptr
                                    ? nullptr
                                    : multiplier_of(args.branch, row, args.C, scratch, i);
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

// ---- backward

// Both passes take kRows rows at once: the weight gradients, read and written for every vector,
// then cross the L1 cache once for all of them. That many short streams escape the hardware
// prefetcher, so each pass asks for its rows of the next block (255 -> 155 ns a row of 384 in bf16,
// out of cache).
using GradPass = void (*)(const NormBackwardArgs&, int64_t row, Scratch&, RowMeans* means);
using OutPass = void (*)(const NormBackwardArgs&, int64_t row, Scratch&, const RowMeans* means);

// xhat and weight * dy into the buffers, the chunk's dweight and dbias, and the two means of the
// LayerNorm backward.
template <class Y, class Z, bool kScaled, int kRows>
void normalize_grad(const NormBackwardArgs& args, int64_t row, Scratch& scratch, RowMeans* means) {
  const Y* dy[kRows];
  const Z* z[kRows];
  float *xhat[kRows], *wdy[kRows];
  Vec centre[kRows], factor[kRows], sample[kRows], first[kRows] = {}, second[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    dy[r] = row_of<Y>(args.dy, row + r);
    z[r] = row_of<Z>(args.z, row + r);
    xhat[r] = scratch.a(r);
    wdy[r] = scratch.b(r);
    centre[r] = splat(args.mean[row + r]);
    factor[r] = splat(args.rstd[row + r]);
    sample[r] = splat(scale_of(args.dy_row_scale, args.branch, row + r));
  }
  const float* weight = args.weight;
  float *dweight = args.dweight, *dbias = args.dbias;
  for_each_vec(args.C, [&](int64_t c, int n) {
    const Vec w = load_or(weight + c, n);
    Vec dw = dweight == nullptr ? Vec{} : load_or(dweight + c, n);
    Vec db = dbias == nullptr ? Vec{} : load_or(dbias + c, n);
    for (int r = 0; r < kRows; ++r) {
      // Subtracted first: a constant row then has xhat = 0 exactly, whatever rstd is.
      const Vec h = first_n((load_or(z[r] + c, n) - centre[r]) * factor[r], n);
      Vec d = load_or(dy[r] + c, n);
      __builtin_prefetch(dy[r] + kRows * args.dy.stride + c);
      __builtin_prefetch(z[r] + kRows * args.z.stride + c);
      if (kScaled) d = d * sample[r];
      dw = fma(d, h, dw);
      db = db + d;
      const Vec wd = d * w;
      store(xhat[r] + c, h);
      store(wdy[r] + c, wd);
      first[r] += wd;
      second[r] = fma(wd, h, second[r]);
    }
    if (dweight != nullptr) store_or(dweight + c, dw, n);
    if (dbias != nullptr) store_or(dbias + c, db, n);
  });
  const float C = static_cast<float>(args.C);
  for (int r = 0; r < kRows; ++r) means[r] = {reduce_add(first[r]) / C, reduce_add(second[r]) / C};
}

// g = dz + rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)); dresidual = g;
// dx = row_scale * multiplier * g; dgamma += g * row_scale * keep * x.
template <class Z, class X, int kRows>
void write_grads(const NormBackwardArgs& args, int64_t row, Scratch& scratch,
                 const RowMeans* means) {
  const bool normalized = args.dy.data != nullptr, has_dz = args.dz.data != nullptr;
  const bool has_dresidual = args.dresidual.data != nullptr, has_dx = args.dx.data != nullptr;
  const bool has_x = args.x.data != nullptr, dropout = args.branch.dropout_scale != 0.0f;
  const Z* dz[kRows];
  const X* x[kRows];
  Z* dresidual[kRows];
  X* dx[kRows];
  const float *xhat[kRows], *wdy[kRows], *multiplier[kRows], *keep[kRows];
  float scale[kRows];
  Vec sample[kRows], factor[kRows], mean1[kRows], mean2[kRows];
  for (int r = 0; r < kRows; ++r) {
    dz[r] = has_dz ? row_of<Z>(args.dz, row + r) : nullptr;
    x[r] = has_x ? row_of<X>(args.x, row + r) : nullptr;
    dresidual[r] = has_dresidual ? row_of<Z>(args.dresidual, row + r) : nullptr;
    dx[r] = has_dx ? row_of<X>(args.dx, row + r) : nullptr;
    xhat[r] = scratch.a(r);
    wdy[r] = scratch.b(r);
    multiplier[r] = multiplier_of(args.branch, row + r, args.C, scratch, r);
    keep[r] = scratch.keep(r);
    scale[r] = scale_of(args.branch.row_scale, args.branch, row + r);
    sample[r] = splat(scale[r]);
    factor[r] = splat(args.rstd[row + r]);
    mean1[r] = splat(-means[r].wdy);
    mean2[r] = splat(-means[r].wdy_xhat);
  }
  float* dgamma = args.dgamma;
  for_each_vec(args.C, [&](int64_t c, int n) {
    Vec dg = has_x ? load_or(dgamma + c, n) : Vec{};
    for (int r = 0; r < kRows; ++r) {
      Vec g = has_dz ? load_or(dz[r] + c, n) : Vec{};
      if (has_dz) __builtin_prefetch(dz[r] + kRows * args.dz.stride + c);
      if (normalized) {
        const Vec centred = fma(load(xhat[r] + c), mean2[r], load(wdy[r] + c) + mean1[r]);
        g = fma(centred, factor[r], g);
      }
      if (has_dresidual) store_or(dresidual[r] + c, g, n);
      const Vec scaled = scale[r] == 0.0f ? Vec{} : g * sample[r];
      if (has_dx) {
        const bool plain = multiplier[r] == nullptr;
        store_or(dx[r] + c, plain ? scaled : scaled * load_or(multiplier[r] + c, n), n);
      }
      if (has_x && scale[r] != 0.0f) {
        Vec branch = load_or(x[r] + c, n);
        __builtin_prefetch(x[r] + kRows * args.x.stride + c);
        if (dropout) branch = branch * load_or(keep[r] + c, n);
        dg = fma(scaled, branch, dg);
      }
    }
    if (has_x) store_or(dgamma + c, dg, n);
  });
}

template <class Y, bool kScaled, int kRows>
GradPass pick_grad_for(DType z_dtype) {
  VK_SWITCH_FLOAT(z_dtype, return normalize_grad<Y, scalar_t, kScaled, kRows>);
  return nullptr;
}

template <int kRows>
GradPass pick_grad(const NormBackwardArgs& args) {
  const DType z = args.z.dtype;
  VK_SWITCH_FLOAT(args.dy.dtype, return args.dy_row_scale != nullptr
                                            ? pick_grad_for<scalar_t, true, kRows>(z)
                                            : pick_grad_for<scalar_t, false, kRows>(z));
  return nullptr;
}

template <class Z, int kRows>
OutPass pick_out_for(DType x_dtype) {
  VK_SWITCH_FLOAT(x_dtype, return write_grads<Z, scalar_t, kRows>);
  return nullptr;
}

template <int kRows>
OutPass pick_out(const NormBackwardArgs& args) {
  VK_SWITCH_FLOAT(args.z.dtype, return pick_out_for<scalar_t, kRows>(args.dx.dtype));
  return nullptr;
}

// Rows [begin, end) in blocks of kRows; returns the first row that no full block holds.
template <int kRows>
int64_t backward_blocks(const NormBackwardArgs& args, int64_t begin, int64_t end,
                        Scratch& scratch) {
  const GradPass grad = args.dy.data == nullptr ? nullptr : pick_grad<kRows>(args);
  const OutPass out = pick_out<kRows>(args);
  RowMeans means[kRows] = {};
  for (; begin + kRows <= end; begin += kRows) {
    if (grad != nullptr) grad(args, begin, scratch, means);
    out(args, begin, scratch, means);
  }
  return begin;
}

void backward(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  Scratch scratch(args.C);
  if (scratch.rows == kRowBlock) begin = backward_blocks<kRowBlock>(args, begin, end, scratch);
  backward_blocks<1>(args, begin, end, scratch);
}

}  // namespace

const AddLayerNormTable& VK_ISA_TABLE(add_layer_norm)() {
  static const AddLayerNormTable table = {forward, post_forward, backward, sum_partials};
  return table;
}

}  // namespace vitkernels
