// patch_embed for any dtype, patch, layout and number of channels, in fp32 FMA; and what all paths
// share: sums over images, the prepared weight and bias, the last stage of dweight.
//
// The three products are one tiled loop with other operands, x = (pixel - zero) * scale, g = the
// patches' dtokens:
//   forward   tokens[m, d]  = sum_k x[m, k] W[d, k]      then bias, position; M = B N, K = C ph pw
//   dweight   part[d, k]    = sum_m g[m, d] x[m, k]      splits of M, added in order
//   dimages   dx[m, k]      = sum_d g[m, d] W[d, k]      times scale, written as the patches lie
// A block of 256 threads has 64 x 64 of the result, 4 x 4 a thread, 16 deep at a time through 8.5
// KB of shared memory. Blocks behind the forward's tiles write the prefix tokens.
//
// ViT-B/16, B 256: 59.2 GFLOP each, 1.0 ms at 60 TFLOP/s in fp32. Sums over images read dtokens
// once: 77 MB in bf16, 18 us at 4.3 TB/s; 16-byte loads, two stages. Not measured yet.
// Launch settings: patch_embed_plan.h.
#include "patch_embed/patch_embed_pixels.cuh"
#include "patch_embed/patch_embed_plan.h"

namespace vitkernels::patch_embed {
namespace {

using namespace simt;

enum Product { kForward, kDWeight, kDImages };

// ---- The products

// Where the operands of a thread lie: of each product, A[i, k] and B[k, j] with i, j in the result.
struct Problem {
  int rows, columns, depth;  // of the result, and of the sum
  int tiles_j, splits, steps_per_split;
  float* partial;  // dweight only
};

VK_DEVICE float normalized(const Args& a, float pixel, int k) {
  const int channel = k / a.pixels();
  return (pixel - channel_zero(a, channel)) * channel_scale(a, channel);
}

// Four elements that the thread brings: of an operand whose depth runs fastest in memory, depth t %
// 16 and four outer indices; else outer index t % 64 and four depths. `place` takes the outer
// index and the depth.
template <bool DEPTH_FASTEST>
struct Spot {
  int outer, depth;
  VK_DEVICE Spot(int thread, int i)
      : outer(DEPTH_FASTEST ? thread / kDepth + i * (kThreads / kDepth) : thread % kTile),
        depth(DEPTH_FASTEST ? thread % kDepth : thread / kTile + i * (kThreads / kTile)) {}
};

template <int PRODUCT>
VK_DEVICE float load_a(const Args& a, const Problem& p, int i, int k) {
  if (i >= p.rows || k >= p.depth) return 0.0f;
  if constexpr (PRODUCT == kForward) {
    const int64_t at = patch_place(a, a.images, i) + pixel_place(a, a.images, k);
    return normalized(a, load_pixel(a.images, at), k);
  } else if constexpr (PRODUCT == kDWeight) {
    return load_scalar(a.dtokens, a.dtype, gradient_place(a, k) + i);
  } else {
    return load_scalar(a.dtokens, a.dtype, gradient_place(a, i) + k);
  }
}

template <int PRODUCT>
VK_DEVICE float load_b(const Args& a, const Problem& p, int k, int j) {
  if (j >= p.columns || k >= p.depth) return 0.0f;
  if constexpr (PRODUCT == kForward) {
    return load_scalar(a.weight.data, a.weight.dtype, static_cast<int64_t>(j) * p.depth + k);
  } else if constexpr (PRODUCT == kDWeight) {
    const int64_t at = patch_place(a, a.images, k) + pixel_place(a, a.images, j);
    return normalized(a, load_pixel(a.images, at), j);
  } else {
    return load_scalar(a.weight.data, a.weight.dtype, static_cast<int64_t>(k) * p.columns + j);
  }
}

template <int PRODUCT>
VK_DEVICE void store_result(const Args& a, const Problem& p, int i, int j, float value, int part) {
  if (i >= p.rows || j >= p.columns) return;
  if constexpr (PRODUCT == kForward) {
    if (a.bias.data != nullptr) value += load_scalar(a.bias.data, a.bias.dtype, j);
    if (a.pos.data != nullptr)
      value += load_scalar(a.pos.data, a.pos.dtype,
                           static_cast<int64_t>(a.first_position + i % a.N) * a.D + j);
    store_scalar(a.tokens, a.dtype, token_place(a, i) + j, value);
  } else if constexpr (PRODUCT == kDWeight) {
    p.partial[(static_cast<int64_t>(part) * p.rows + i) * p.columns + j] = value;
  } else {
    const int64_t at = patch_place(a, a.dimages, i) + pixel_place(a, a.dimages, j);
    store_scalar(a.dimages.data, a.dimages.dtype, at, value * channel_scale(a, j / a.pixels()));
  }
}

template <int PRODUCT>
__global__ void __launch_bounds__(kThreads, kBlocks)
    simt_product_kernel(Args a, Problem p, int64_t tiles) {
  check_launch_bounds<kThreads>();
  constexpr int kStride = kTile + 4;
  VK_SHARED(float, left, [kDepth * kStride]);
  VK_SHARED(float, right, [kDepth * kStride]);
  const int thread = static_cast<int>(threadIdx.x);
  if (PRODUCT == kForward && blockIdx.x >= tiles) {
    write_prefix(a, (blockIdx.x - tiles) * kThreads + thread, (gridDim.x - tiles) * kThreads);
    return;
  }
  constexpr bool kDepthFirstA = PRODUCT != kDWeight, kDepthFirstB = PRODUCT == kForward;
  const int tile = static_cast<int>(blockIdx.x % tiles),
            part = static_cast<int>(blockIdx.x / tiles);
  const int i0 = tile / p.tiles_j * kTile, j0 = tile % p.tiles_j * kTile;
  const int first = part * p.steps_per_split * kDepth;
  const int last = min(p.depth, first + p.steps_per_split * kDepth);
  const int ti = thread / 16 * 4, tj = thread % 16 * 4;
  float sum[4][4] = {};
  for (int k0 = first; k0 < last; k0 += kDepth) {
    float la[4], lb[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Spot<kDepthFirstA> sa(thread, i);
      const Spot<kDepthFirstB> sb(thread, i);
      la[i] = load_a<PRODUCT>(a, p, i0 + sa.outer, k0 + sa.depth);
      lb[i] = load_b<PRODUCT>(a, p, k0 + sb.depth, j0 + sb.outer);
    }
    __syncthreads();  // the last step has been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Spot<kDepthFirstA> sa(thread, i);
      const Spot<kDepthFirstB> sb(thread, i);
      left[sa.depth * kStride + sa.outer] = la[i];
      right[sb.depth * kStride + sb.outer] = lb[i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = left[k * kStride + ti + i];
        y[i] = right[k * kStride + tj + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_result<PRODUCT>(a, p, i0 + ti + i, j0 + tj + j, sum[i][j], part);
}

// ---- Sums over images

// partial (splits, P + N, D): sums of dtokens over runs of images. A thread has eight columns of a
// token.
template <bool VEC>
__global__ void __launch_bounds__(kThreads)
    token_sums_kernel(Args a, float* partial, int images_per_split) {
  check_launch_bounds<kThreads>();
  const int T = a.P + a.N, chunks = (a.D + 7) / 8, split = static_cast<int>(blockIdx.y);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(T) * chunks) return;
  const int64_t t = divide(i, chunks);
  const Columns<VEC> columns(0, static_cast<int>(i - t * chunks), chunks, a.D);
  const int first = split * images_per_split, last = min(a.B, first + images_per_split);
  float sum[8] = {};
#pragma unroll 4
  for (int b = first; b < last; ++b) {
    const void* row = element(a.dtokens, b * a.dtokens_batch + t * a.dtokens_row, a.dtype);
    float v[8];
    to_floats(load_raw<VEC>(row, a.dtype, columns), a.dtype, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += v[j];
  }
  store<VEC>(partial + (split * static_cast<int64_t>(T) + t) * a.D, DType::kF32, columns, sum);
}

constexpr int kTokens = 8;  // of a block of token_gradients_kernel

// dpos and dprefix, and the sums of the patches among each eight tokens, of_tokens (blocks, D).
__global__ void __launch_bounds__(kThreads)
    token_gradients_kernel(Args a, const float* partial, int splits, float* of_tokens) {
  check_launch_bounds<kThreads>();
  const int T = a.P + a.N, d = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  const int block = static_cast<int>(blockIdx.x), first_position = a.P - a.first_position;
  if (d >= a.D) return;
  float of_patches = 0.0f;
  for (int t = block * kTokens; t < min(T, (block + 1) * kTokens); ++t) {
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split)
      sum += partial[(split * static_cast<int64_t>(T) + t) * a.D + d];
    if (t >= a.P) of_patches += sum;
    if (t < a.P && a.dprefix.data != nullptr)
      store_scalar(a.dprefix.data, a.dprefix.dtype, static_cast<int64_t>(t) * a.D + d, sum);
    if (t >= first_position && a.dpos.data != nullptr)
      store_scalar(a.dpos.data, a.dpos.dtype, static_cast<int64_t>(t - first_position) * a.D + d,
                   sum);
  }
  if (of_tokens != nullptr) of_tokens[static_cast<int64_t>(block) * a.D + d] = of_patches;
}

// dbias, rounded and in fp32. A warp has a column.
__global__ void __launch_bounds__(kThreads)
    dbias_kernel(Args a, const float* of_tokens, int blocks, float* wide) {
  check_launch_bounds<kThreads>();
  const int d = static_cast<int>(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp);
  if (d >= a.D) return;
  float sum[1] = {0.0f};
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < blocks; i += kWarp)
    sum[0] += of_tokens[static_cast<int64_t>(i) * a.D + d];
  sum_over_lanes(sum, kWarp);
  if (threadIdx.x % kWarp != 0) return;
  if (a.dbias.data != nullptr) store_scalar(a.dbias.data, a.dbias.dtype, d, sum[0]);
  if (wide != nullptr) wide[d] = sum[0];
}

// ---- What 16-bit products need before and after

// One warp a row of the weight: packed (D, padded columns) in the product's dtype, zeros behind
// each segment, and folded (D) = bias + sum over channels of rest * scale * sum of the weight as it
// was rounded. Either may be null.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(Args a, Padded columns, void* packed, float* folded, bool with_rest) {
  check_launch_bounds<kThreads>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (d >= a.D) return;
  float sum[1] = {0.0f};
  if (packed != nullptr || with_rest)
    for (int segment = 0; segment < columns.segments; ++segment) {
      const float by = with_rest ? channel_rest(a, segment) * channel_scale(a, segment) : 0.0f;
      for (int i = lane; i < columns.length; i += kWarp) {
        const int64_t at = d * a.columns() + segment * columns.used + i;
        float w = i < columns.used ? load_scalar(a.weight.data, a.weight.dtype, at) : 0.0f;
        w = rounded(w, a.dtype);
        if (packed != nullptr)
          store_scalar(packed, a.dtype, d * columns.columns() + segment * columns.length + i, w);
        if (with_rest) sum[0] = fmaf(by, w, sum[0]);
      }
    }
  if (folded == nullptr) return;
  sum_over_lanes(sum, kWarp);
  if (lane == 0)
    folded[d] =
        sum[0] + (a.bias.data == nullptr ? 0.0f : load_scalar(a.bias.data, a.bias.dtype, d));
}

// partial (splits, D, padded columns): of operands less the centre without scale where dbias is
// given or `scaled`, else of x itself.
__global__ void __launch_bounds__(kThreads)
    finish_dweight_kernel(Args a, Padded columns, const float* partial, int splits,
                          const float* dbias, bool scaled) {
  check_launch_bounds<kThreads>();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t d = divide(i, a.columns()), size = static_cast<int64_t>(a.D) * columns.columns();
  if (d >= a.D) return;
  const int k = static_cast<int>(i - d * a.columns()), segment = k / columns.used;
  const int64_t at = d * columns.columns() + segment * columns.length + k - segment * columns.used;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += partial[split * size + at];
  const int channel = k / a.pixels();
  if (dbias != nullptr) sum = fmaf(channel_rest(a, channel), dbias[d], sum);
  store_scalar(a.dweight.data, a.dweight.dtype, i, scaled ? sum * channel_scale(a, channel) : sum);
}

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

unsigned blocks_of(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(divide_up(items, per_block));
}

void finish(const Device& device, const Args& a, const Padded& columns, const float* partial,
            int splits, const float* dbias, bool scaled) {
  device.launch(finish_dweight_kernel,
                dim3(blocks_of(static_cast<int64_t>(a.D) * a.columns(), kThreads)), dim3(kThreads),
                0, a, columns, partial, splits, dbias, scaled);
}

template <int PRODUCT>
void launch(const Device& device, const Args& a, Problem p, int64_t extra_blocks) {
  p.tiles_j = static_cast<int>(divide_up(p.columns, kTile));
  const int64_t tiles = divide_up(p.rows, kTile) * p.tiles_j;
  device.launch(simt_product_kernel<PRODUCT>,
                dim3(static_cast<unsigned>(tiles * p.splits + extra_blocks)), dim3(kThreads), 0, a,
                p, tiles);
}

int whole(int depth) { return static_cast<int>(divide_up(depth, kDepth)); }

}  // namespace

void forward_simt(const Device& device, const Args& a) {
  const Problem p{a.rows(), a.D, a.columns(), 0, 1, whole(a.columns()), nullptr};
  const int64_t prefix = divide_up(static_cast<int64_t>(a.B) * a.P * a.D, 16 * kThreads);
  launch<kForward>(device, a, p, std::min<int64_t>(prefix, 1024));
}

void products_simt(const Device& device, const Tensor& like, const Args& a) {
  if (a.dimages.data != nullptr)
    launch<kDImages>(device, a, {a.rows(), a.columns(), a.D, 0, 1, whole(a.D), nullptr}, 0);
  if (a.dweight.data == nullptr) return;
  const int64_t tiles = divide_up(a.D, kTile) * divide_up(a.columns(), kTile);
  const Split s = split(tiles, whole(a.rows()), device.multiprocessors() * kBlocks);
  Tensor partial = empty_like_shape(like, {static_cast<int64_t>(s.splits) * a.D * a.columns()},
                                    ScalarType::Float);
  auto* parts = static_cast<float*>(partial.mutable_data_ptr());
  launch<kDWeight>(device, a, {a.D, a.columns(), a.rows(), 0, s.splits, s.steps, parts}, 0);
  finish(device, a, {1, a.columns(), a.columns()}, parts, s.splits, nullptr, false);
}

void sums_over_images(const Device& device, const Tensor& like, const Args& a, float* dbias) {
  const int64_t T = a.P + a.N, chunks = divide_up(a.D, 8), blocks = divide_up(T, kTokens);
  const unsigned token_blocks = blocks_of(T * chunks, kThreads);
  const Split s = split(token_blocks, a.B, device.multiprocessors() * 8);
  Tensor partial = empty_like_shape(like, {(s.splits * T + blocks) * a.D}, ScalarType::Float);
  auto* sums = static_cast<float*>(partial.mutable_data_ptr());
  const bool with_bias = a.dbias.data != nullptr || dbias != nullptr;
  float* of_tokens = with_bias ? sums + s.splits * T * a.D : nullptr;
  const bool vectorized = a.D % 8 == 0 && aligned(a.dtokens, 16) &&
                          a.dtokens_batch * size_of(a.dtype) % 16 == 0 &&
                          a.dtokens_row * size_of(a.dtype) % 16 == 0;
  device.launch(vectorized ? token_sums_kernel<true> : token_sums_kernel<false>,
                dim3(token_blocks, static_cast<unsigned>(s.splits)), dim3(kThreads), 0, a, sums,
                s.steps);
  device.launch(token_gradients_kernel,
                dim3(static_cast<unsigned>(blocks), blocks_of(a.D, kThreads)), dim3(kThreads), 0, a,
                static_cast<const float*>(sums), s.splits, of_tokens);
  if (with_bias)
    device.launch(dbias_kernel, dim3(blocks_of(a.D, kThreads / kWarp)), dim3(kThreads), 0, a,
                  static_cast<const float*>(of_tokens), static_cast<int>(blocks), dbias);
}

Prepared prepare(const Device& device, const Tensor& like, const Args& a, const Padded& columns) {
  Prepared out;
  const bool as_it_lies =
      a.weight.dtype == a.dtype && columns.used == columns.length && aligned(a.weight.data, 16);
  if (!as_it_lies) {
    const int64_t words = divide_up(static_cast<int64_t>(a.D) * columns.columns(), 2);
    out.weight_owner = empty_like_shape(like, {words}, ScalarType::Float);
  }
  out.bias_owner = empty_like_shape(like, {a.D}, ScalarType::Float);
  void* packed = as_it_lies ? nullptr : out.weight_owner.mutable_data_ptr();
  auto* folded = static_cast<float*>(out.bias_owner.mutable_data_ptr());
  device.launch(prepare_kernel, dim3(blocks_of(a.D, kThreads / kWarp)), dim3(kThreads), 0, a,
                columns, packed, folded, adds_rest(a));
  out.weight = as_it_lies ? a.weight.data : packed;
  out.bias = folded;
  return out;
}

void finish_dweight(const Device& device, const Args& a, const float* partial, int splits,
                    const float* dbias) {
  finish(device, a, padded(a.C, a.pixels(), true, 16), partial, splits, dbias, true);
}

}  // namespace vitkernels::patch_embed
