// Launch settings of patch_embed's CUDA kernels: plain host arithmetic, so that tests read them
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels::patch_embed {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The columns of a row as 16-bit products see them: segments of one scale, each padded to whole
// steps: 16 columns of sm_80, 64 of sm_90 (fewer, by a branch around a wgmma, make ptxas serialize
// all of them). Without mean and std all channels are one segment (14 x 14: 588 -> 592 or 640),
// else each is one (3 * 196 -> 3 * 208 or 3 * 256), between which the fp32 sums are rescaled.
struct Padded {
  int segments, used, length;  // each segment's columns before and after padding

  constexpr int columns() const { return segments * length; }
  constexpr int steps() const { return length / 16; }
  constexpr int tiles() const { return (length + 63) / 64; }  // of a segment, 64 columns each
};
constexpr Padded padded(int channels, int pixels, bool normalized, int step) {
  const int segments = normalized ? channels : 1, used = normalized ? pixels : channels * pixels;
  return {segments, used, (used + step - 1) / step * step};
}
constexpr int kMostColumns = 4096;  // padded: of which shared memory holds the places

// Parts of a sum over `steps`, that so many tiles give `blocks` blocks work; steps of a part.
struct Split {
  int splits, steps;
};
inline Split split(int64_t tiles, int64_t steps, int64_t blocks) {
  const int64_t most = std::clamp<int64_t>(blocks / std::max<int64_t>(tiles, 1), 1, 64);
  const int64_t each =
      divide_up(std::max<int64_t>(steps, 1), std::min(most, std::max<int64_t>(steps, 1)));
  return {static_cast<int>(divide_up(std::max<int64_t>(steps, 1), each)), static_cast<int>(each)};
}

namespace simt {
constexpr int kThreads = 256, kTile = 64, kDepth = 16;
constexpr int kBlocks = 4;  // that share a multiprocessor
}  // namespace simt

namespace sm80 {
constexpr int kThreads = 256, kTile = 128, kDepth = 64;
constexpr int kBlocks = 1;                      // on a multiprocessor: two would spill
constexpr int kTileBytes = kTile * kDepth * 2;  // of one operand

// Two stages of A and B, then the places of the pixels.
inline int64_t shared_bytes(int places) { return 4 * kTileBytes + 4 * int64_t{places}; }
}  // namespace sm80

namespace sm90 {
constexpr int kThreads = 384;  // two warpgroups multiply, one gathers
constexpr int kRows = 128, kDepth = 64, kStages = 4;
constexpr int kRowBytes = kRows * kDepth * 2;
constexpr int kWayOutColumns = 32, kWayOutStride = 36;  // floats
constexpr int kWayOutBytes = 16 * kWayOutStride * 4;    // of a warp

struct Plan {
  int width;  // columns of a tile of tokens
  int64_t tiles, blocks, shared_bytes;
};

constexpr int64_t shared_bytes(int width, int places) {
  return kStages * (kRowBytes + width * kDepth * 2) + 8 * kWayOutBytes + 4 * int64_t{places} + 128;
}

// The width that leaves the fewest columns empty; of equals the widest, which reads pixels least.
inline int width_for(int D) {
  int best = 256;
  for (const int width : {192, 128})
    if (divide_up(D, width) * width < divide_up(D, best) * best) best = width;
  return best;
}

inline Plan plan(int rows, int D, int places, int multiprocessors) {
  const int width = width_for(D);
  const int64_t tiles = divide_up(rows, kRows) * divide_up(D, width);
  return {width, tiles, std::min<int64_t>(tiles, multiprocessors), shared_bytes(width, places)};
}
}  // namespace sm90

}  // namespace vitkernels::patch_embed
