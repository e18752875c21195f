// patch_merge_layer_norm on the CPU, compiled once per instruction set (VK_ISA).
//
// A row of 4 * C is four pixels, each C contiguous elements: they are read where they lie into an
// fp32 buffer of the L1 cache, and from there on it is LayerNorm of a row, as in add_layer_norm.
// The backward writes dx through the same addresses; a pixel belongs to one row, so nothing is
// summed but the weight gradients. A pixel beyond an odd edge counts as zeros and has no gradient.
#include "common/cpu_layer_norm.h"
#include "patch_merge/patch_merge_cpu.h"

namespace vitkernels {
namespace {

constexpr int kPixels = 4;  // of a row

// Whether a row's sums are emptied after each pixel (see kSumBlock) instead of at its end.
VK_INLINE bool sums_by_pixel(int64_t C) { return kPixels * C > kSumBlock; }

// The pixels of a row as pointers, null beyond an odd edge.
template <class T>
struct Pixels {
  T* at[kPixels];
};

template <class T>
VK_INLINE Pixels<T> pixels_of(const MapArg& map, int64_t row) {
  const int64_t j = row % map.rows_w(), above = row / map.rows_w();
  const int64_t i = above % map.rows_h(), b = above / map.rows_h();
  T* const sample = static_cast<T*>(map.data) + b * map.stride_b;
  Pixels<T> pixels;
  for (int s = 0; s < kPixels; ++s) {
    const int64_t h = 2 * i + s % 2, w = 2 * j + s / 2;
    pixels.at[s] = h < map.H && w < map.W ? sample + h * map.stride_h + w * map.stride_w : nullptr;
  }
  return pixels;
}

// The buffers hold whole vectors from every pixel's start on: a pixel's last, partial vector runs
// into the next pixel, which is written after it.
template <int kBuffers>
struct MergeBuffers : RowBuffers<kBuffers> {
  explicit MergeBuffers(int64_t C) : RowBuffers<kBuffers>(kPixels * C, kVec) {}
};

// ---- forward

// The row as fp32 into the buffer; returns its sum.
template <class X>
float read_row(const MapArg& x, int64_t row, float* z) {
  const Pixels<const X> pixels = pixels_of<const X>(x, row);
  float total = 0.0f;
  Sums sums;
  for (int s = 0; s < kPixels; ++s, z += x.C) {
    const X* const pixel = pixels.at[s];
    if (pixel == nullptr) {
      for_row(x.C, [&](int64_t c, int, int) { store(z + c, Vec{}); });
      continue;
    }
    for_row(x.C, [&](int64_t c, int n, int k) {
      const Vec v = load_or(pixel + c, n);
      store(z + c, v);
      sums.lane[k] += v;
    });
    if (!sums_by_pixel(x.C)) continue;
    total += sums.total();
    sums = Sums{};
  }
  return total + sums.total();
}

template <class Y>
void write_row(const MergeForwardArgs& args, int64_t row, const float* z, float mean, float rstd) {
  normalize_row(row_of<Y>(args.y, row), kRowBlock * args.y.stride, kPixels * args.x.C, args.weight,
                args.bias, z, mean, rstd);
}

void forward(const MergeForwardArgs& args, int64_t begin, int64_t end) {
  float (*read)(const MapArg&, int64_t, float*) = nullptr;
  void (*write)(const MergeForwardArgs&, int64_t, const float*, float, float) = nullptr;
  VK_SWITCH_FLOAT(args.x.dtype, read = read_row<scalar_t>);
  VK_SWITCH_FLOAT(args.y.dtype, write = write_row<scalar_t>);
  const int64_t columns = kPixels * args.x.C;
  MergeBuffers<1> z(args.x.C);
  float mean[kRowBlock], rstd[kRowBlock];
  for (int64_t first = begin; first < end; first += z.rows) {
    const int rows = end - first < z.rows ? static_cast<int>(end - first) : z.rows;
    for (int r = 0; r < rows; ++r)
      mean[r] = read(args.x, first + r, z.at(0, r)) / static_cast<float>(columns);
    for (int r = 0; r < rows; ++r) rstd[r] = reciprocal_std(z.at(0, r), columns, mean[r], args.eps);
    for (int r = 0; r < rows; ++r) {
      args.mean[first + r] = mean[r];
      args.rstd[first + r] = rstd[r];
      write(args, first + r, z.at(0, r), mean[r], rstd[r]);
    }
  }
}

// ---- backward

// xhat and weight * dy of kRows rows into the buffers, the chunk's dweight and dbias, and the two
// means of the LayerNorm backward. Each pass asks for its rows of the next block, as in
// add_layer_norm.
template <class Y, class X, int kRows>
void normalize_grad(const MergeBackwardArgs& args, int64_t row, MergeBuffers<2>& buffers,
                    const float* zeros, RowMeans* means) {
  const int64_t C = args.x.C, dy_ahead = kRows * args.dy.stride;
  const int64_t x_ahead = 2 * kRows * args.x.stride_w;
  Pixels<const X> pixels[kRows];
  Vec centre[kRows], factor[kRows], first[kRows] = {}, second[kRows] = {};
  float first_sum[kRows] = {}, second_sum[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    pixels[r] = pixels_of<const X>(args.x, row + r);
    centre[r] = splat(args.mean[row + r]);
    factor[r] = splat(args.rstd[row + r]);
  }
  for (int s = 0; s < kPixels; ++s) {
    const int64_t start = s * C;
    const Y* dy[kRows];
    const X* x[kRows];
    float *xhat[kRows], *wdy[kRows];
    for (int r = 0; r < kRows; ++r) {
      dy[r] = row_of<Y>(args.dy, row + r) + start;
      x[r] = pixels[r].at[s];
      if (x[r] == nullptr) x[r] = reinterpret_cast<const X*>(zeros);
      xhat[r] = buffers.at(0, r) + start;
      wdy[r] = buffers.at(1, r) + start;
    }
    const float* weight = args.weight + start;
    float* const dweight = args.dweight == nullptr ? nullptr : args.dweight + start;
    float* const dbias = args.dbias == nullptr ? nullptr : args.dbias + start;
    for_each_vec(C, [&](int64_t c, int n) {
      const Vec w = load_or(weight + c, n);
      Vec dw = dweight == nullptr ? Vec{} : load_or(dweight + c, n);
      Vec db = dbias == nullptr ? Vec{} : load_or(dbias + c, n);
      for (int r = 0; r < kRows; ++r) {
        // Subtracted first: a constant row then has xhat = 0 exactly, whatever rstd is.
        const Vec h = first_n((load_or(x[r] + c, n) - centre[r]) * factor[r], n);
        const Vec d = load_or(dy[r] + c, n);
        __builtin_prefetch(dy[r] + dy_ahead + c);
        __builtin_prefetch(x[r] + x_ahead + c);
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
    if (!sums_by_pixel(C) && s + 1 < kPixels) continue;
    for (int r = 0; r < kRows; ++r) {
      first_sum[r] += reduce_add(first[r]);
      second_sum[r] += reduce_add(second[r]);
      first[r] = second[r] = Vec{};
    }
  }
  const float columns = static_cast<float>(kPixels * C);
  for (int r = 0; r < kRows; ++r) means[r] = {first_sum[r] / columns, second_sum[r] / columns};
}

// dx = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)), each pixel to its place.
template <class X>
void write_grad(const MergeBackwardArgs& args, int64_t row, const float* xhat, const float* wdy,
                const RowMeans& means) {
  const Pixels<X> pixels = pixels_of<X>(args.dx, row);
  const Vec factor = splat(args.rstd[row]), mean1 = splat(-means.wdy),
            mean2 = splat(-means.wdy_xhat);
  for (int s = 0; s < kPixels; ++s, xhat += args.x.C, wdy += args.x.C) {
    X* const pixel = pixels.at[s];
    if (pixel == nullptr) continue;
    for_each_vec(args.x.C, [&](int64_t c, int n) {
      store_or(pixel + c, fma(load(xhat + c), mean2, load(wdy + c) + mean1) * factor, n);
    });
  }
}

// Rows [begin, end) in blocks of kRows; returns the first row that no full block holds.
template <class Y, class X, int kRows>
int64_t backward_blocks(const MergeBackwardArgs& args, int64_t begin, int64_t end,
                        MergeBuffers<2>& buffers, const float* zeros) {
  RowMeans means[kRows];
  for (; begin + kRows <= end; begin += kRows) {
    normalize_grad<Y, X, kRows>(args, begin, buffers, zeros, means);
    if (args.dx.data == nullptr) continue;
    for (int r = 0; r < kRows; ++r)
      write_grad<X>(args, begin + r, buffers.at(0, r), buffers.at(1, r), means[r]);
  }
  return begin;
}

template <class Y, class X>
void backward_rows(const MergeBackwardArgs& args, int64_t begin, int64_t end) {
  MergeBuffers<2> buffers(args.x.C);
  RowBuffers<1> zeros(args.x.C);
  for_each_vec(zeros.size, [&](int64_t c, int n) { store_or(zeros.at(0, 0) + c, Vec{}, n); });
  const float* no_pixel = zeros.at(0, 0);
  if (buffers.rows == kRowBlock)
    begin = backward_blocks<Y, X, kRowBlock>(args, begin, end, buffers, no_pixel);
  backward_blocks<Y, X, 1>(args, begin, end, buffers, no_pixel);
}

template <class Y>
void backward_of(const MergeBackwardArgs& args, int64_t begin, int64_t end) {
  VK_SWITCH_FLOAT(args.x.dtype, (backward_rows<Y, scalar_t>(args, begin, end)));
}

void backward(const MergeBackwardArgs& args, int64_t begin, int64_t end) {
  VK_SWITCH_FLOAT(args.dy.dtype, backward_of<scalar_t>(args, begin, end));
}

}  // namespace

const PatchMergeTable& VK_ISA_TABLE(patch_merge)() {
  static const PatchMergeTable table = {forward, backward, sum_partials};
  return table;
}

}  // namespace vitkernels
