// Launch settings of attention_sm90.cu (forward): plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::attention::sm90 {

constexpr int kMostRows = 272;  // queries, keys
constexpr int kTile = 64;       // query rows of a warpgroup's product
constexpr int kTailTile = 16;   // query rows of a warp's
constexpr int kMostStages = 8;
constexpr int64_t kSharedLimit = 232448;  // what a block of sm_90 may have
constexpr int64_t kBarrierBytes = 4 * 8 * kMostStages;

// TMA moves rows of whole 16-byte chunks. There are no instances with a bias beyond width 80.
constexpr int most_width(bool bias) { return bias ? 80 : 128; }
constexpr bool takes(int Nq, int Nk, int D, bool bias) {
  return Nq <= kMostRows && Nk <= kMostRows && D % 8 == 0 && D <= most_width(bias);
}

// Head dims share instances; what is missing of the width is zero in shared memory only.
constexpr int padded_width(int D) {
  return D <= 32 ? 32 : D <= 64 ? 64 : D <= 80 ? 80 : D <= 96 ? 96 : 128;
}

// Rows in shared memory are one or two parts, each of one swizzle: up to 64 columns, then the rest.
constexpr int first_part(int width) { return width < 64 ? width : 64; }

// The score columns that an instance computes: the keys, in products of wgmma that fit registers.
constexpr int score_columns(int width, int keys) {
  if (width <= 64 && keys <= 64) return 64;
  if (width == 32 && keys <= 144) return 144;
  return keys <= 200 ? 200 : kMostRows;
}

constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Parts begin where the pattern of the widest swizzle does.
constexpr int first_part_bytes(int rows, int width) {
  return round_up(2 * rows * first_part(width), 1024);
}
constexpr int tile_bytes(int rows, int width) {
  return first_part_bytes(rows, width) + round_up(2 * rows * (width - first_part(width)), 1024);
}

// TMA boxes have at most 256 rows.
constexpr int box_rows(int rows) { return rows <= 256 ? rows : rows / 2; }

// Where the bias of a head is while its scores are computed.
enum class BiasPlace : int { kNone, kShared, kGlobal };

// Warpgroups that multiply: three where 136 registers a thread are enough, else two. One more has
// the loader and the tail's warps.
constexpr int consumer_groups(int width, int columns, BiasPlace bias) {
  return width <= 64 && columns <= 200 && bias == BiasPlace::kNone ? 3 : 2;
}
// Registers of a thread: what ptxas needs to spill none. Together those that a block begins with,
// 4 * 128 or 3 * 168.
constexpr int consumer_registers(int groups, int width, int columns) {
  return groups == 3 ? 136 : width == 128 && columns == kMostRows ? 168 : 192;
}
constexpr int other_registers(int groups, int width, int columns) {
  return (groups == 3 ? 512 : 504) - groups * consumer_registers(groups, width, columns);
}
constexpr int threads(int groups) { return 128 * (groups + 1); }
constexpr int kTailWarps = 2;

struct Plan {
  int width, columns;             // the instance
  int query_rows, key_rows;       // in shared memory
  int tiles, tail;                // of 64 query rows; whether 1 to 16 rows are left over
  int pair_stages, value_stages;  // heads whose Q and K, whose V are in shared memory
  BiasPlace bias_place;
  int groups, threads;
  int64_t bias_bytes;    // of a head, in fragments of 16 x 8
  int64_t shared_bytes;  // pairs (Q, then K), values, bias, barriers
  int64_t blocks;        // block i has heads i, i + blocks, ...; of one index if the bias is shared
};

// bias_size: bytes of an element; 0 without bias. bias_of_batch: whether samples have their own.
inline Plan plan(int B, int H, int Nq, int Nk, int D, int bias_size, bool bias_of_batch,
                 int multiprocessors) {
  Plan p{};
  p.width = padded_width(D);
  p.columns = score_columns(p.width, Nk);
  p.key_rows = round_up(p.columns, 16);
  const int left = Nq % kTile;
  p.tail = left >= 1 && left <= kTailTile ? 1 : 0;
  p.tiles = Nq / kTile + (left > kTailTile ? 1 : 0);
  p.query_rows = p.tiles * kTile + p.tail * kTailTile;

  const int64_t value = tile_bytes(p.key_rows, p.width),
                pair = tile_bytes(p.query_rows, p.width) + value;
  p.bias_place = bias_size == 0 ? BiasPlace::kNone : BiasPlace::kGlobal;
  const int64_t bias = int64_t{bias_size} * p.query_rows * p.columns;
  if (bias_size > 0 && !bias_of_batch && pair + value + bias + kBarrierBytes <= kSharedLimit)
    p.bias_place = BiasPlace::kShared, p.bias_bytes = bias;
  int64_t left_bytes = kSharedLimit - kBarrierBytes - p.bias_bytes - pair - value;
  p.groups = consumer_groups(p.width, p.columns, p.bias_place);
  p.threads = threads(p.groups);
  p.pair_stages = p.value_stages = 1;
  while (p.value_stages < kMostStages) {  // pairs are released first, so they go first
    int& stages = p.pair_stages == p.value_stages ? p.pair_stages : p.value_stages;
    left_bytes -= &stages == &p.pair_stages ? pair : value;
    if (left_bytes < 0) break;
    ++stages;
  }
  p.shared_bytes = p.pair_stages * pair + p.value_stages * value + p.bias_bytes + kBarrierBytes;

  const int64_t heads = static_cast<int64_t>(B) * H;
  p.blocks = std::min<int64_t>(heads, multiprocessors);
  if (p.bias_place == BiasPlace::kShared)
    p.blocks = std::clamp<int64_t>(multiprocessors / H, 1, B) * H;
  return p;
}

// The part of the products that is of queries and keys there are.
inline double useful_fraction(const Plan& p, int Nq, int Nk) {
  return static_cast<double>(Nq) * Nk / (static_cast<double>(p.query_rows) * p.columns);
}

}  // namespace vitkernels::attention::sm90
