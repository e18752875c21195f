// The implicit im2col of patch_embed's tensor-core paths: pixels as 16-bit operands, from where
// they lie to swizzled shared memory; and the way out of a tile of tokens.
#pragma once

#include "common/fragment.cuh"
#include "common/swizzle.cuh"
#include "patch_embed/patch_embed_pixels.cuh"
#include "patch_embed/patch_embed_plan.h"

namespace vitkernels::patch_embed {

// How 16 neighbouring columns of a row are read: bytes, pixels of the product's own type as they
// are, or pixels of another float type, rounded once; so many bytes of neighbours at a time.
enum class Source : int {
  kBytes16,
  kBytes4,
  kBytes2,
  kBytes1,
  kOwn16,
  kOwn4,
  kOwn2,
  kOther16,
  kOther
};

// Host code. The widest pieces that lie side by side, on their own lines.
inline Source source_of(const Args& a) {
  const ImageView& images = a.images;
  const int size = images.bytes ? 1 : static_cast<int>(size_of(images.dtype));
  const auto serves = [&](int bytes) {
    return (images.column == 1 || bytes == size) && a.patch_w * size % bytes == 0 &&
           reinterpret_cast<uintptr_t>(images.data) % bytes == 0 &&
           images.batch * size % bytes == 0 && images.channel * size % bytes == 0 &&
           images.row * size % bytes == 0;
  };
  if (images.bytes)
    return serves(16)  ? Source::kBytes16
           : serves(4) ? Source::kBytes4
           : serves(2) ? Source::kBytes2
                       : Source::kBytes1;
  if (images.dtype == a.dtype)
    return serves(16) ? Source::kOwn16 : serves(4) ? Source::kOwn4 : Source::kOwn2;
  return images.dtype == DType::kF32 && serves(16) ? Source::kOther16 : Source::kOther;
}

// The farthest place of a patch's pixels, which the kernels hold in 32 bits.
inline int64_t farthest_place(const Args& a) {
  return (a.C - 1) * a.images.channel + (a.patch_h - 1) * a.images.row +
         (a.patch_w - 1) * a.images.column;
}

inline bool on_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Why no path of 16-bit operands serves; empty where one may.
inline Refusal refuses_operands(const Args& a, const Padded& columns) {
  if (a.dtype == DType::kF32) return "it multiplies bf16 and fp16";
  if (a.D % 8 != 0) return "D must be a multiple of 8";
  if (columns.columns() > kMostColumns) return "it takes patches of up to 4096 elements";
  if (farthest_place(a) > INT32_MAX) return "the pixels of a patch lie too far apart";
  if (!on_line(a.pos.data)) return "pos_embed must lie on a 16-byte line";
  return "";
}

inline Padded padded(const Args& a, int step) {
  return padded(a.C, a.pixels(), a.mean != nullptr || a.std != nullptr, step);
}

// Where each padded column lies, from its patch's first pixel; -1 for padding. Whole block.
VK_DEVICE void write_places(const Args& a, const Padded& columns, int* places) {
  for (int i = static_cast<int>(threadIdx.x); i < columns.columns();
       i += static_cast<int>(blockDim.x)) {
    const int segment = i / columns.length, at = i - segment * columns.length;
    places[i] = at < columns.used
                    ? static_cast<int>(pixel_place(a, a.images, segment * columns.used + at))
                    : -1;
  }
}

// 16 columns of a row on their way: bytes in w[0..3], else 16-bit pairs.
struct Unit {
  uint32_t w[8];
};

VK_DEVICE uint32_t bits_8(const char* p, int place) {
  return place < 0 ? 0u : *reinterpret_cast<const uint8_t*>(p + place);
}
VK_DEVICE uint32_t bits_16(const char* p, int64_t place) {
  return place < 0 ? 0u : *reinterpret_cast<const uint16_t*>(p + place);
}
VK_DEVICE uint32_t bits_32(const char* p, int64_t place) {
  return place < 0 ? 0u : *reinterpret_cast<const uint32_t*>(p + place);
}
VK_DEVICE uint4 bits_128(const char* p, int64_t place) {
  return place < 0 ? make_uint4(0u, 0u, 0u, 0u) : load_cached_16(p + place);
}

// Begins to read a unit. patch: the first pixel; places: of the unit's columns. Zeros for padding,
// which the weight's zeros multiply.
template <DType TYPE>
VK_DEVICE Unit fetch(const ImageView& images, Source source, int64_t patch, const int* places,
                     float centre) {
  Unit u = {};
  const char* p = static_cast<const char*>(images.data) +
                  (images.bytes ? patch : patch << (is_wide(images.dtype) ? 2 : 1));
  const auto put = [&u](int i, uint4 v) {
    u.w[i] = v.x, u.w[i + 1] = v.y, u.w[i + 2] = v.z, u.w[i + 3] = v.w;
  };
  switch (source) {
    case Source::kBytes16:
      put(0, bits_128(p, places[0]));
      break;
    case Source::kBytes4:
#pragma unroll
      for (int i = 0; i < 4; ++i) u.w[i] = bits_32(p, places[4 * i]);
      break;
    case Source::kBytes2:
#pragma unroll
      for (int i = 0; i < 8; ++i) u.w[i / 2] |= bits_16(p, places[2 * i]) << (i % 2 * 16);
      break;
    case Source::kBytes1:
#pragma unroll
      for (int i = 0; i < 16; ++i) u.w[i / 4] |= bits_8(p, places[i]) << (i % 4 * 8);
      break;
    case Source::kOwn16:
      put(0, bits_128(p, 2 * int64_t{places[0]}));
      put(4, bits_128(p, 2 * int64_t{places[8]}));
      break;
    case Source::kOwn4:
#pragma unroll
      for (int i = 0; i < 8; ++i) u.w[i] = bits_32(p, 2 * int64_t{places[2 * i]});
      break;
    case Source::kOwn2:
#pragma unroll
      for (int i = 0; i < 16; ++i) u.w[i / 2] |= bits_16(p, 2 * int64_t{places[i]}) << (i % 2 * 16);
      break;
    case Source::kOther16:
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 v = bits_128(p, 4 * int64_t{places[4 * i]});
        u.w[2 * i] = pack<TYPE>(bits_to_float(v.x) - centre, bits_to_float(v.y) - centre);
        u.w[2 * i + 1] = pack<TYPE>(bits_to_float(v.z) - centre, bits_to_float(v.w) - centre);
      }
      break;
    case Source::kOther:
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int place = places[2 * i + j];
          v[j] = place < 0 ? 0.0f : load_scalar(images.data, images.dtype, patch + place) - centre;
        }
        u.w[i] = pack<TYPE>(v[0], v[1]);
      }
      break;
  }
  return u;
}

// Byte i of a word less an integer, exactly: 2^23 + byte is the float 0x4b000000 | byte.
VK_DEVICE float centred_byte(uint32_t word, int i, float centre) {
  return bits_to_float((word >> (8 * i) & 0xffu) | 0x4b000000u) - (8388608.0f + centre);
}

// The unit as two chunks of eight 16-bit operands.
template <DType TYPE>
VK_DEVICE void put_unit(char* low, char* high, const Unit& u, bool bytes, float centre) {
  uint32_t out[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = u.w[i / 2];
    out[i] = bytes ? pack<TYPE>(centred_byte(word, i % 2 * 2, centre),
                                centred_byte(word, i % 2 * 2 + 1, centre))
                   : u.w[i];
  }
  store_16(low, make_uint4(out[0], out[1], out[2], out[3]));
  store_16(high, make_uint4(out[4], out[5], out[6], out[7]));
}

// Chunk `chunk` (eight 16-bit elements) of line `line` of an operand in shared memory: lines of 64
// elements, 128 bytes swizzled; wider operands are blocks of `lines` such lines, side by side.
VK_DEVICE char* chunk_of(char* tile, int lines, int line, int chunk) {
  const int block = chunk / 8;
  return tile + block * lines * 128 +
         swizzled(Swizzle::k128, static_cast<uint32_t>(line * 128 + chunk % 8 * 16));
}

// ---- The way out

// Two token rows of a lane, eight apart: places in tokens and in pos, -1 where there is no row.
struct OutRows {
  int64_t token[2], pos[2];
};

VK_DEVICE OutRows out_rows(const Args& a, int first, int lane) {
  OutRows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    rows.token[half] = row < a.rows() ? token_place(a, row) : -1;
    rows.pos[half] = static_cast<int64_t>(a.first_position + row % a.N) * a.D;
  }
  return rows;
}

// tokens = sums * scale + bias + pos of 16 rows x 32 columns from `column` on; the fragments go
// through the warp's own room, so that a lane writes eight neighbours. D is a multiple of 8.
// fragment(j, i): v[i] of FragmentC for columns 8 j and on.
template <class Fragment>
VK_DEVICE void write_tokens(const Args& a, const float* bias, float* room, const OutRows& rows,
                            int column, int lane, float scale, Fragment fragment) {
  constexpr int kStride = sm90::kWayOutStride;
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      room[fragment_c_row(lane, i) * kStride + 8 * j + fragment_c_column(lane, i)] =
          fragment(j, i) * scale;
  __syncwarp();
  const int mine = column + lane % 4 * 8;
  const Columns<true> columns(0, 0, 1, 8);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (mine >= a.D || rows.token[half] < 0) continue;
    const float* from = room + (lane / 4 + 8 * half) * kStride + lane % 4 * 8;
    float v[8], add[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = from[i] + bias[mine + i];
    if (a.pos.data != nullptr) {
      const void* pos = element(a.pos.data, rows.pos[half] + mine, a.pos.dtype);
      to_floats(load_raw<true, true>(pos, a.pos.dtype, columns), a.pos.dtype, add);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += add[i];
    }
    store<true>(element(a.tokens, rows.token[half] + mine, a.dtype), a.dtype, columns, v);
  }
  __syncwarp();  // the room may be written again
}

}  // namespace vitkernels::patch_embed
