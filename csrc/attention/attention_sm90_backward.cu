// Backward of attention on Hopper for up to 256 tokens of head dim up to 64, bf16 and fp16: a block
// has one (batch item, head) at a time, all of it in shared memory.
//
//   S = Q K^T, P = 2^(S - lse)                 query tiles of 64; P in 16 bits to shared memory
//   dV = P^T dO                                key tiles of 64; P is A, transposed as it lies
//   dP = dO V^T, dS = P (dP - rowsum(P dP))    query tiles; dS in 16 bits takes P's place, and from
//                                              registers is A of dQ = dS K
//   dK = dS^T Q                                key tiles
//
// Two warpgroups share the tiles (one to 64 tokens, three to 144). TMA brings q, k, v, dout by
// their strides: the next item's q while this one's is in use, the others when dK alone is left.
// From 209 tokens of head dim 64 on, v takes the room of q once S is done, and q comes a second
// time for dK.
//
// 7 tensors of traffic, no atomics, nothing of size N x N in global memory but, for dbias, one fp32
// matrix a block, which every thread adds to in its own places, and finish_kernel to dbias.
// ViT-B, B 256, H 12, N 197, D 64: 542 MB = 126 us at 4.3 TB/s; 76 GFLOP = 97 us at 790 TFLOP/s,
// 131 us with padding to 256 x 200. There 215 KB of shared memory, four barriers an item.
// Launch settings: attention_plan_sm90_backward.h.
#include "attention/attention_sm90_backward.cuh"

namespace vitkernels::attention {
namespace {

using namespace sm90_backward;

template <int WIDTH>
constexpr int kThreads = kWarpgroup * warpgroups(WIDTH);
template <int WIDTH>
constexpr int kBlocks = resident_blocks(WIDTH);

enum Barrier { kQ, kK, kDout, kV, kQAgain };  // of the loads; each is used once an item

// partial: matrices of dS by block or, where dbias has a batch dimension, by item; null: no dbias.
template <DType TYPE, int WIDTH, int DEPTH, bool BIAS>
__global__ void __launch_bounds__(kThreads<WIDTH>, kBlocks<WIDTH>)
    backward_kernel(const __grid_constant__ TensorMap q_map,
                    const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map,
                    const __grid_constant__ TensorMap dout_map, const Args a, float* partial) {
  check_launch_bounds<kThreads<WIDTH>>();
  constexpr Layout kLayout = layout(WIDTH, DEPTH);
  constexpr int kRows = kLayout.rows, kSteps = kRows / 16, kRowBytes = 2 * DEPTH;
  constexpr int kGroups = warpgroups(WIDTH);
  constexpr int kNarrow = kLayout.narrow ? kRows / kTile : -1;  // which panel
  using Place = ScorePlace<kRows, kNarrow>;
  VK_SWIZZLED_SHARED(char, shared);
  char *const k = shared + kLayout.k, *const dout = shared + kLayout.dout;
  char *const v = shared + kLayout.v, *const scores = shared + kLayout.scores;
  auto* const loaded = reinterpret_cast<MBarrier*>(shared + kLayout.barriers);
  const int items = a.B * a.H, step = static_cast<int>(gridDim.x);

  const auto load = [&](Barrier barrier, char* to, const TensorMap& map, int item) {
    if (item >= items) return;
    const int b = item / a.H, h = item - b * a.H;
    mbarrier_arrive_expect(&loaded[barrier], kRows * kRowBytes);
    tma_load(to, map, &loaded[barrier], {0, h, 0, b});
  };
  const int first = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    for (int i = kQ; i <= kQAgain; ++i) mbarrier_init(&loaded[i], 1);
    mbarrier_fence_init();
    load(kQ, shared, q_map, first);
    load(kK, k, k_map, first);
    load(kDout, dout, dout_map, first);
    if (!kLayout.late_v) load(kV, v, v_map, first);
  }
  __syncthreads();

  int phase = 0;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += step, phase ^= 1) {
    const int b = item / a.H, h = item - b * a.H;
    int thread = static_cast<int>(threadIdx.x);
    pin_registers(thread);  // so that no place that follows from it is kept from item to item
    const int group = thread / kWarpgroup;
    const int row_in_tile = thread % kWarpgroup / kWarp * 16 + thread % kWarp / 4;  // and 8 below
    char* const q = shared + phase * kLayout.next_q;
    // to (of this head) = by * scores^T rows
    const auto key_gradient = [&](const HeadView& to, const char* rows, float by) {
      if (to.data == nullptr) return;
#pragma unroll 1
      for (int tile = group; tile * kTile < a.Nk; tile += kGroups) {
        float c[DEPTH / 2];
        const char* const panel = scores + tile * kRows * 128;
        if (kNarrow > 0 && tile == kNarrow)
          multiply_panel<TYPE, DEPTH, kSteps, Swizzle::k32>(c, panel, rows);
        else
          multiply_panel<TYPE, DEPTH, kSteps, Swizzle::k128>(c, panel, rows);
        store_rows<TYPE, DEPTH>(c, by, a, to, b, h, tile * kTile, 0, a.Nk);
      }
    };

    mbarrier_wait(&loaded[kQ], phase);
    mbarrier_wait(&loaded[kK], phase);
#pragma unroll 1
    for (int tile = group; tile * kTile < kRows; tile += kGroups) {
      const int row = first_row(tile, kRows) + row_in_tile;
      const Centers centers = centers_of(a.lse + int64_t{item} * a.Nq, row, a.Nq);
      float s[WIDTH / 2];
      multiply_rows<TYPE, DEPTH>(s, q + first_row(tile, kRows) * kRowBytes, k);
      if (row >= tile * kTile)  // all of a warp's rows, or none
        store_probabilities<TYPE, BIAS>(s, a, Place(scores, row), b, h, row, centers);
    }
    fence_proxy_async();
    __syncthreads();  // P is there; nobody reads q
    if (thread == 0) {
      if (kLayout.late_v)
        load(kV, v, v_map, item);
      else
        load(kQ, shared + (1 - phase) * kLayout.next_q, q_map, item + step);
    }

    mbarrier_wait(&loaded[kDout], phase);
    key_gradient(a.dv, dout, 1.0f);
    __syncthreads();  // nobody reads P but the threads that have stored it

    mbarrier_wait(&loaded[kV], phase);
#pragma unroll 1
    for (int tile = group; tile * kTile < kRows; tile += kGroups) {
      const int row = first_row(tile, kRows) + row_in_tile;
      float4* mine = nullptr;
      if (BIAS && partial != nullptr) {
        const int64_t matrix = a.dbias_batch == 1 ? first : item;
        mine = reinterpret_cast<float4*>(partial + matrix * matrix_floats(WIDTH)) +
               tile * (WIDTH / 8) * kWarpgroup + row % kTile / 16 * kWarp + thread % kWarp;
      }
      FragmentA ds[kSteps] = {};
      {
        float dp[WIDTH / 2];
        multiply_rows<TYPE, DEPTH>(dp, dout + first_row(tile, kRows) * kRowBytes, v);
        if (row >= tile * kTile)
          differentiate<TYPE, BIAS>(ds, dp, Place(scores, row), a.Nq - row, mine,
                                    a.dbias_batch == 1 && item >= step);
      }
      if (a.dq.data == nullptr) continue;
      float dq[DEPTH / 2];
      multiply_registers<TYPE, DEPTH>(dq, ds, k);
      store_rows<TYPE, DEPTH>(dq, a.scale, a, a.dq, b, h, first_row(tile, kRows), tile * kTile,
                              a.Nq);
    }
    fence_proxy_async();
    __syncthreads();  // dS is there; nobody reads k, v or dout
    if (thread == 0) {
      if (kLayout.late_v) load(kQAgain, q, q_map, item);
      load(kK, k, k_map, item + step);
      load(kDout, dout, dout_map, item + step);
      if (!kLayout.late_v) load(kV, v, v_map, item + step);
    }
    if (kLayout.late_v) mbarrier_wait(&loaded[kQAgain], phase);
    key_gradient(a.dk, q, a.scale);
    __syncthreads();  // nobody reads dS or q
    if (kLayout.late_v && thread == 0) load(kQ, q, q_map, item + step);
  }
}

// dbias from the matrices of backward_kernel: `lanes` threads (1, or a warp where bias is broadcast
// along queries or keys) an element, each over its share of the terms, in order.
__global__ void __launch_bounds__(kWarpgroup)
    finish_kernel(const Args a, int64_t groups, int width, int lanes, const float* partial) {
  check_launch_bounds<kWarpgroup>();
  const int64_t elements =
      static_cast<int64_t>(a.dbias_batch) * a.dbias_heads * a.dbias_rows * a.dbias_columns;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kWarpgroup + threadIdx.x;
  const int64_t element = divide(thread, lanes);
  const int rank = static_cast<int>(thread - element * lanes);
  const int64_t matrix = divide(element, static_cast<int64_t>(a.dbias_rows) * a.dbias_columns);
  const int place = static_cast<int>(element - matrix * a.dbias_rows * a.dbias_columns);
  const int64_t first_b = divide(matrix, a.dbias_heads);
  const int first_h = static_cast<int>(matrix - first_b * a.dbias_heads);
  const int first_i = place / a.dbias_columns, first_j = place - first_i * a.dbias_columns;
  const int heads = a.dbias_heads == 1 ? a.H : 1, rows = a.dbias_rows == 1 ? a.Nq : 1;
  const int keys = a.dbias_columns == 1 ? a.Nk : 1;
  const int64_t size = matrix_floats(width);
  double sum[1] = {0.0};  // the terms nearly cancel
  if (element < elements)
    for (int64_t group = 0; group < groups; ++group)
      for (int h = first_h; h < first_h + heads; ++h) {
        const float* terms = partial + ((first_b * groups + group) * a.H + h) * size;
        for (int at = rank; at < rows * keys; at += lanes)
          sum[0] += terms[place_of_score(width, first_i + at / keys, first_j + at % keys)];
      }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    if (offset < lanes) sum[0] += __shfl_xor_sync(kAllLanes, sum[0], offset);
  if (element < elements && rank == 0)
    store_scalar(a.dbias, a.bias.dtype, element, static_cast<float>(sum[0]));
}

// ---- Host

TensorMap map_of(const Args& a, const HeadView& view, int N, const Plan& p) {
  // The stride of a dimension of one element is never used; it must be legal all the same.
  const auto stride = [](int size, int64_t given, int64_t legal) {
    return size == 1 ? legal : given;
  };
  const int64_t row = int64_t{a.H} * a.D;
  const TensorLayout tensor{
      4,
      {a.D, a.H, N, a.B},
      {1, stride(a.H, view.head, a.D), stride(N, view.row, row), stride(a.B, view.batch, N * row)},
      {p.depth, 1, layout(p.width, p.depth).rows, 1}};
  return make_tensor_map(view.data, a.dtype, tensor, static_cast<Swizzle>(2 * p.depth));
}

template <DType TYPE, int WIDTH, bool BIAS>
void launch(const Device& device, const Args& a, const Plan& p, float* partial) {
  auto kernel = backward_kernel<TYPE, WIDTH, 64, BIAS>;
  if constexpr (depth_for(WIDTH, 1) == 32)
    if (p.depth == 32) kernel = backward_kernel<TYPE, WIDTH, 32, BIAS>;
  device.launch(kernel, dim3(static_cast<unsigned>(p.blocks)), dim3(kThreads<WIDTH>),
                static_cast<size_t>(layout(WIDTH, p.depth).bytes), map_of(a, a.q, a.Nq, p),
                map_of(a, a.k, a.Nk, p), map_of(a, a.v, a.Nk, p), map_of(a, a.dout, a.Nq, p), a,
                partial);
}

template <DType TYPE, bool BIAS>
void launch_width(const Device& device, const Args& a, const Plan& p, float* partial) {
  switch (p.width) {
    case 64:
      return launch<TYPE, 64, BIAS>(device, a, p, partial);
    case 144:
      return launch<TYPE, 144, BIAS>(device, a, p, partial);
    case 200:
      return launch<TYPE, 200, BIAS>(device, a, p, partial);
    case 208:
      return launch<TYPE, 208, BIAS>(device, a, p, partial);
    default:
      return launch<TYPE, 256, BIAS>(device, a, p, partial);
  }
}

// TMA needs 16-byte lines; a stride of 0 is not for it.
bool suits_tma(const Args& a, const HeadView& view, int N) {
  const auto fits = [](int size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0);
  };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && fits(a.B, view.batch) &&
         fits(N, view.row) && fits(a.H, view.head);
}

}  // namespace

Refusal sm90_refuses_backward(const Args& a) {
  if (static_cast<int64_t>(a.B) * a.H > 1 << 30) return "it takes 2^30 heads";
  if (a.dtype == DType::kF32) return "it takes bf16 and fp16";
  if (a.Nq > kMaxTokens || a.Nk > kMaxTokens) return "its backward takes 256 queries and keys";
  if (a.D > kMaxHeadDim) return "its backward takes head dims to 64";
  if (a.D % 8 != 0) return "it takes head dims that are multiples of 8";
  if (a.dropout.seed != nullptr) return "it has no dropout";
  if (a.padding != nullptr) return "it has no key_padding_mask";
  if (a.bias.data != nullptr && a.bias.dtype == DType::kBool) return "it has no bool bias";
  if (a.bias.data != nullptr && a.bias.column != 0 && a.bias.column != 1)
    return "keys of the bias must lie side by side";
  if (!suits_tma(a, a.q, a.Nq) || !suits_tma(a, a.k, a.Nk) || !suits_tma(a, a.v, a.Nk))
    return "rows of q, k and v must begin on 16-byte lines, none twice";
  if (!suits_tma(a, a.dout, a.Nq)) return "rows of dout must begin on 16-byte lines, none twice";
  return "";
}

void backward_sm90(const Device& device, const Tensor& like, const Args& a) {
  const Bias bias = a.bias.data == nullptr ? Bias::kNone
                    : a.dbias == nullptr   ? Bias::kConstant
                    : a.dbias_batch == 1   ? Bias::kShared
                                           : Bias::kPerItem;
  const Plan p = plan(a.B, a.H, a.Nq, a.Nk, a.D, device.multiprocessors(), bias);
  OptTensor scratch;
  float* partial = nullptr;
  if (p.matrices > 0) {
    scratch = empty_like_shape(like, {p.matrices, matrix_floats(p.width)}, ScalarType::Float);
    partial = static_cast<float*>(scratch->mutable_data_ptr());
  }
  const bool bf16 = a.dtype == DType::kBF16;
  if (a.bias.data == nullptr)
    bf16 ? launch_width<DType::kBF16, false>(device, a, p, nullptr)
         : launch_width<DType::kF16, false>(device, a, p, nullptr);
  else
    bf16 ? launch_width<DType::kBF16, true>(device, a, p, partial)
         : launch_width<DType::kF16, true>(device, a, p, partial);
  if (partial == nullptr) return;
  const int lanes =
      (a.dbias_rows == 1 && a.Nq > 1) || (a.dbias_columns == 1 && a.Nk > 1) ? kWarp : 1;
  const int64_t threads =
      int64_t{a.dbias_batch} * a.dbias_heads * a.dbias_rows * a.dbias_columns * lanes;
  device.launch(finish_kernel, dim3(static_cast<unsigned>((threads + kWarpgroup - 1) / kWarpgroup)),
                dim3(kWarpgroup), 0, a, p.groups, p.width, lanes,
                static_cast<const float*>(partial));
}

}  // namespace vitkernels::attention
