// What the forward and the backward of CPU patch_embed share: blocks of work, and operand rows made
// from pixels.
//
// The patches of one grid row lie side by side, so a line of pixels (one channel, one row of the
// patches) is read and converted as one contiguous run, then cut into patch_w wide pieces, one for
// each patch's operand row.
#pragma once

#include "common/cpu_gemm.h"
#include "common/cpu_vec.h"
#include "patch_embed/patch_embed_cpu.h"

namespace vitkernels {
namespace {

constexpr bool kBf16Pairs = kElements<UnitOf<BF16>::type> == 2;

template <class Unit>
using Element = typename ElementOf<Unit>::type;

// Calls the statements with `unit_t` bound to the unit of the products.
#define VK_SWITCH_UNIT(args, ...)                                  \
  if (kBf16Pairs && (args).dtype == ::vitkernels::DType::kBF16) {  \
    using unit_t = ::vitkernels::UnitOf<::vitkernels::BF16>::type; \
    __VA_ARGS__;                                                   \
  } else {                                                         \
    using unit_t = float;                                          \
    __VA_ARGS__;                                                   \
  }

// Storage of a uint8 pixel.
struct U8 {
  uint8_t value;
};

// Calls the statements with `pixel_t` bound to the storage type of the images.
#define VK_SWITCH_PIXEL(images, ...)  \
  if ((images).bytes) {               \
    using pixel_t = U8;               \
    __VA_ARGS__;                      \
  } else {                            \
    VK_SWITCH_FLOAT((images).dtype, { \
      using pixel_t = scalar_t;       \
      __VA_ARGS__;                    \
    });                               \
  }

constexpr int64_t kBlockColumns = 64;  // of a tile of products: 4 vectors at AVX-512
constexpr int64_t kBlockVecs = kBlockColumns / kVec;

inline int64_t patches(const PatchEmbedArgs& a) { return a.grid_h * a.grid_w; }
inline int64_t patch_elements(const PatchEmbedArgs& a) { return a.C * a.patch_h * a.patch_w; }

// Block `index` of `count` over [0, total), as even as possible.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range part(int64_t total, int64_t index, int64_t count) {
  return {index * total / count, (index + 1) * total / count};
}

// The embedding's columns as blocks of whole vectors, at most kBlockColumns wide.
inline int64_t column_blocks(const PatchEmbedArgs& a) { return ceil_div(vecs_of(a.D), kBlockVecs); }
inline Range column_block(const PatchEmbedArgs& a, int64_t index) {
  const Range vecs = part(vecs_of(a.D), index, column_blocks(a));
  return {vecs.begin * kVec, vecs.end * kVec < a.D ? vecs.end * kVec : a.D};
}

// How many rows of `row_bytes` a block of `rows` rows should have: it stays in L2 beside what it is
// multiplied with, and small batches still make enough items for a few threads.
inline int64_t blocks_of_rows(int64_t rows, int64_t row_bytes) {
  constexpr int64_t kMost = 96, kLeast = 24, kBytes = 384 << 10, kItems = 8;
  int64_t most = kBytes / row_bytes / kLeast * kLeast;
  most = most < kLeast ? kLeast : most > kMost ? kMost : most;
  const int64_t coarse = ceil_div(rows, most), fine = ceil_div(rows, kLeast);
  return coarse >= kItems ? coarse : fine < kItems ? fine : kItems;
}

// ---- pixels

VK_INLINE Vec load(const U8* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kVec)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, IVec), Vec);
#endif
}

VK_INLINE float to_float(U8 x) { return static_cast<float>(x.value); }

// n pixels side by side, as operands. `out` has room for whole vectors.
template <class T, class E>
VK_INLINE void planar_line(const T* p, int64_t n, const ChannelArgs& channel, E* out) {
  const Vec center = splat(channel.center), factor = splat(channel.factor);
  for_each_vec(
      n, [&](int64_t x, int lanes) { store(out + x, (load_or(p + x, lanes) - center) * factor); });
}

// Every third of 3 * kVec values, from kChannel on.
template <int kChannel>
VK_INLINE Vec every_third(Vec a, Vec b, Vec c) {
  IVec of_ab = {}, of_all = {};
#pragma GCC unroll 16
  for (int i = 0; i < kVec; ++i) {
    const int source = 3 * i + kChannel;
    of_ab[i] = source < 2 * kVec ? source : 0;
    of_all[i] = source < 2 * kVec ? i : source - kVec;
  }
  return __builtin_shuffle(__builtin_shuffle(a, b, of_ab), c, of_all);
}

// The same from three interleaved channels (channels_last RGB); p is at channel 0.
template <int kChannel, class T, class E>
VK_INLINE void rgb_line(const T* p, int64_t n, const ChannelArgs& channel, E* out) {
  const Vec center = splat(channel.center), factor = splat(channel.factor);
  const auto lanes_from = [](int64_t left) {
    return static_cast<int>(left < 0 ? 0 : left > kVec ? kVec : left);
  };
  for_each_vec(n, [&](int64_t x, int lanes) {
    const T* q = p + 3 * x;
    const int64_t left = 3 * lanes;
    const Vec third = every_third<kChannel>(load_or(q, lanes_from(left)),
                                            load_or(q + kVec, lanes_from(left - kVec)),
                                            load_or(q + 2 * kVec, lanes_from(left - 2 * kVec)));
    store(out + x, (third - center) * factor);
  });
}

// n pixels of channel c from p, which is at channel 0.
template <class T, class E>
VK_INLINE void read_line(const PatchEmbedArgs& a, const T* p, int64_t c, int64_t n, E* out) {
  const ImageView& v = a.images;
  const ChannelArgs& channel = a.channels[c];
  if (v.column == 1) return planar_line(p + c * v.channel, n, channel, out);
  if (v.column == 3 && a.C == 3) {
    if (c == 0) return rgb_line<0>(p, n, channel, out);
    if (c == 1) return rgb_line<1>(p, n, channel, out);
    return rgb_line<2>(p, n, channel, out);
  }
  for (int64_t x = 0; x < n; ++x)
    out[x] = from_float<E>((to_float(p[c * v.channel + x * v.column]) - channel.center) *
                           channel.factor);
}

// One pixel of n interleaved channels that are treated alike.
template <class T, class E>
VK_INLINE void channel_run(const T* p, int64_t n, const ChannelArgs& channel, E* out) {
  const Vec center = splat(channel.center), factor = splat(channel.factor);
  for_each_vec(n, [&](int64_t c, int lanes) {
    store_or(out + c, (load_or(p + c, lanes) - center) * factor, lanes);
  });
}

// Cuts a line into `count` pieces of `n` elements, `stride` elements apart in the rows.
template <int kElementsOf, class E>
VK_INLINE void cut_fixed(const E* line, int64_t count, E* rows, int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(rows + i * stride, line + i * kElementsOf, kElementsOf * sizeof(E));
}

template <class E>
VK_INLINE void cut_line(const E* line, int64_t count, int64_t n, E* rows, int64_t stride) {
  switch (n) {
    case 1:
      return cut_fixed<1>(line, count, rows, stride);
    case 4:
      return cut_fixed<4>(line, count, rows, stride);
    case 8:
      return cut_fixed<8>(line, count, rows, stride);
    case 14:
      return cut_fixed<14>(line, count, rows, stride);
    case 16:
      return cut_fixed<16>(line, count, rows, stride);
    case 32:
      return cut_fixed<32>(line, count, rows, stride);
    default:
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(rows + i * stride, line + i * n, static_cast<size_t>(n) * sizeof(E));
  }
}

// Elements of scratch that operand_rows needs for a line.
inline int64_t line_elements(const PatchEmbedArgs& a) { return round_up(a.width, kVec); }

// Operand rows of the patches [first, last), which may cross images: line l = channel * patch_h +
// row of the patch, of [lines.begin, lines.end), goes to element offset(channel, row) of each row.
template <class T, class E, class Offset>
VK_INLINE void operand_rows(const PatchEmbedArgs& a, Range tokens, Range lines, Offset&& offset,
                            E* rows, int64_t stride, E* line) {
  const ImageView& v = a.images;
  const int64_t N = patches(a);
  for (int64_t m = tokens.begin; m < tokens.end;) {
    const int64_t b = m / N, y = m % N / a.grid_w, x = m % a.grid_w;  // N is a multiple of grid_w
    const int64_t left = tokens.end - m, count = a.grid_w - x < left ? a.grid_w - x : left;
    const T* p = static_cast<const T*>(v.data) + b * v.batch + y * a.patch_h * v.row +
                 x * a.patch_w * v.column;
    E* out = rows + (m - tokens.begin) * stride;
    m += count;
    if (v.column != 1 && a.alike && a.patch_h * a.patch_w == 1) {  // a patch is a run of channels
      out += offset(lines.begin, 0);
      for (int64_t i = 0; i < count; ++i)
        channel_run(p + i * v.column + lines.begin, lines.size(), a.channels[0], out + i * stride);
      continue;
    }
    for (int64_t l = lines.begin; l < lines.end; ++l) {
      const int64_t c = l / a.patch_h, row = l % a.patch_h;
      read_line(a, p + row * v.row, c, count * a.patch_w, line);
      cut_line(line, count, a.patch_w, out + offset(c, row), stride);
    }
  }
}

// ---- parameters

// n values of any dtype as elements of an operand.
template <class E>
VK_INLINE void convert(DType dtype, const void* src, int64_t first, int64_t n, E* out) {
  VK_SWITCH_FLOAT(dtype, {
    const scalar_t* p = static_cast<const scalar_t*>(src) + first;
    for_each_vec(n, [&](int64_t i, int lanes) { store_or(out + i, load_or(p + i, lanes), lanes); });
  });
}

// Carves a scratch block into 64-byte aligned arrays; with a null block it only measures.
struct Carver {
  char *memory, *next;
  explicit Carver(void* block) : memory(static_cast<char*>(block)), next(memory) {}
  template <class E>
  E* take(int64_t count) {
    char* taken = next;
    next += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return reinterpret_cast<E*>(taken);
  }
  int64_t bytes() const { return next - memory; }
};

}  // namespace
}  // namespace vitkernels
