// What the kernels of add_layer_norm share besides common/layer_norm_rows.cuh: arguments, dtypes,
// dropout, and where rows come from. add_layer_norm_cuda.cu has the map.
#pragma once

#include <type_traits>
#include <utility>

#include "add_layer_norm/add_layer_norm_plan.h"
#include "add_layer_norm/row_ring.cuh"
#include "common/layer_norm_rows.cuh"

namespace vitkernels {
namespace {

using add_layer_norm::kBackwardParameters;
using add_layer_norm::kForwardParameters;
using add_layer_norm::kThreads;
using add_layer_norm::Pass;
using add_layer_norm::Plan;

enum class Form { kAddNorm, kNormAdd };

struct RowsView {  // (rows, C) with unit column stride; null data: absent
  const void* data;
  int64_t stride;
  DType dtype;
};

struct Output {  // (rows, C) contiguous; null data: not wanted
  void* data;
  DType dtype;
};

struct ForwardArgs {
  RowsView x, residual;
  Parameter weight, bias, gamma;
  const float* row_scale;
  Dropout dropout;
  Output y, z;
  DType narrow;  // of all 16-bit operands, where Widths say which those are
  float *mean, *rstd;
  int64_t rows, rows_per_sample;
  int64_t step_samples, step_rest;  // from a team's row to its next: whole samples, rows more
  int C, lanes, slots;
  Divisor divisor{1};  // C
  float eps;
};

struct BackwardArgs {
  RowsView dy, dz, z, x;
  const float *mean, *rstd;
  Parameter weight, gamma;
  const float* row_scale;
  bool scale_dy;  // row_scale belongs to dy (layer_norm_add), not to the branch
  Dropout dropout;
  Output dx, dresidual;
  DType narrow;    // of all 16-bit operands, where Widths say which those are
  float* partial;  // (dweight, dbias, dgamma) x blocks x C; null: none wanted
  int64_t rows, rows_per_sample;
  int64_t step_samples, step_rest;  // from a team's row to its next: whole samples, rows more
  int C, lanes, slots;
  Divisor divisor{1};  // C
};

// ---- Widths fixed at compile time

// The combinations that models use: all operands alike, or a 16-bit branch on an fp32 residual
// stream (autocast), with y in 16 bits (pre-norm) or fp32 (post-norm and layer_norm_add, whose
// backward k16Y32 is: there z is the branch). Which of the two 16-bit formats it is, is asked for
// every eight elements. kAny asks for each operand's width too, and has three times the
// instructions.
enum class Widths { kAny, k32, k16, k16Stream32, k16StreamY32, k16Y32 };

// 16-byte pieces of eight elements: of x, dx; of residual, z and their gradients; of y, dy.
constexpr int branch_pieces(Widths w) { return w == Widths::k32 ? 2 : 1; }
constexpr int stream_pieces(Widths w) {
  return w == Widths::k32 || w == Widths::k16Stream32 || w == Widths::k16StreamY32 ? 2 : 1;
}
constexpr int y_pieces(Widths w) {
  return w == Widths::k32 || w == Widths::k16StreamY32 || w == Widths::k16Y32 ? 2 : 1;
}

VK_BOTH DType type_of(int pieces, DType narrow) { return pieces == 2 ? DType::kF32 : narrow; }

VK_BOTH void set_types(ForwardArgs& a, Widths w, DType narrow) {
  a.x.dtype = type_of(branch_pieces(w), narrow);
  a.residual.dtype = a.z.dtype = type_of(stream_pieces(w), narrow);
  a.y.dtype = type_of(y_pieces(w), narrow);
  a.narrow = narrow;
}
VK_BOTH void set_types(BackwardArgs& a, Widths w, DType narrow) {
  a.x.dtype = a.dx.dtype = type_of(branch_pieces(w), narrow);
  a.z.dtype = a.dz.dtype = a.dresidual.dtype = type_of(stream_pieces(w), narrow);
  a.dy.dtype = type_of(y_pieces(w), narrow);
  a.narrow = narrow;
}

// The same once more in a kernel, where it tells the compiler what is known of the arguments.
template <Widths WIDTHS, class Args>
VK_DEVICE void fix_types(Args& a) {
  if constexpr (WIDTHS != Widths::kAny)
    set_types(a, WIDTHS, a.narrow == DType::kBF16 ? DType::kBF16 : DType::kF16);
}

// ---- What both directions share

// row_scale of a row's sample; 0 past the last row.
template <class Args>
VK_DEVICE float scale_of(const Args& a, int64_t row) {
  return row >= a.rows            ? 0.0f
         : a.row_scale == nullptr ? 1.0f
                                  : a.row_scale[divide(row, a.rows_per_sample)];
}

// Rows of the instances with fixed widths are fewer than 2^31 (plan): shorter sums and comparisons.
template <Widths WIDTHS>
using RowIndex = std::conditional_t<WIDTHS == Widths::kAny, int64_t, uint32_t>;

// One row of the team. A team past the last row goes on with a row of length 0, so that its warp
// stays together.
struct Row {
  int64_t index;
  int length;
  float scale;  // row_scale of its sample

  template <class Args, class Index>
  VK_DEVICE Row(const Args& a, Index row, float scale)
      : index(row < static_cast<Index>(a.rows) ? row : 0),
        length(row < static_cast<Index>(a.rows) ? a.C : 0),
        scale(scale) {}
};

template <bool VEC>
VK_DEVICE Raw8 load_row(const RowsView& rows, const Row& row, const Columns<VEC>& columns) {
  return load_raw(element(rows.data, row.index * rows.stride, rows.dtype), rows.dtype, columns);
}

// In the warp's instances of several chunks a row has the whole warp.
template <Widths WIDTHS, bool BLOCK, int CHUNKS>
constexpr int kLanes = WIDTHS != Widths::kAny && !BLOCK && CHUNKS > 1 ? kWarp : 0;

template <Widths WIDTHS, bool BLOCK, int CHUNKS>
constexpr int kForwardBlocks =
    WIDTHS == Widths::kAny
        ? 1
        : add_layer_norm::residency(true, BLOCK, CHUNKS, Pass::kForward, stream_pieces(WIDTHS))
              .blocks;

// ---- Dropout

// Which of a thread's elements dropout keeps: bit 8 i + j speaks of element j of chunk first + i.
// Called while no element of the row is held: four calls of Philox at a time share its keys and
// hide its latency.
template <int N, bool VEC>
VK_DEVICE unsigned kept_by(const Dropout& dropout, const Row& row, int64_t C, int rank, int size,
                           int first) {
  static_assert(N <= 4);
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const uint64_t index = static_cast<uint64_t>(row.index * C);
  const uint32_t least = static_cast<uint32_t>(dropout.threshold);
  unsigned kept = 0;
#pragma unroll 1
  for (int half = 0; half < 2 * N; ++half) {
    const Columns<VEC> columns(first + half / 2, rank, size, row.length);
    const auto at = [&](int j) { return index + static_cast<uint64_t>(columns[half % 2 * 4 + j]); };
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // with VEC the indices differ in their last two bits only
      const uint64_t at_j = VEC ? at(0) | static_cast<uint64_t>(j) : at(j);
      bits |= philox_word<true>(seed, at_j) >= least ? 1u << j : 0u;
    }
    kept |= bits << (4 * half);
  }
  return dropout.threshold >> 32 == 0 ? kept : 0;  // beyond any word: p rounds to 1
}

// Eight elements of the branch, or of its gradient.
VK_DEVICE void drop(const Dropout& dropout, unsigned kept, float (&v)[8]) {
  if (dropout.seed == nullptr) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= kept >> j & 1 ? dropout.scale : 0.0f;
}

// ---- What a direction reads of a row, in the order of its places in the ring

template <Form FORM>
struct ForwardReads {  // x, residual
  using Args = ForwardArgs;
  static constexpr int kCount = 2;
  static constexpr bool kStatistics = false;

  template <int S>
  static VK_DEVICE const RowsView& view(const Args& a) {
    if constexpr (S == 0) return a.x;
    return a.residual;
  }
  // Whether a row of this scale needs it: add_layer_norm does not read a dropped branch.
  template <int S>
  static VK_DEVICE bool wanted(const Args&, float scale) {
    return S != 0 || FORM == Form::kNormAdd || scale != 0.0f;
  }
  static constexpr int pieces(int s, Widths w) {
    return s == 0 ? branch_pieces(w) : stream_pieces(w);
  }
};

template <bool DGAMMA>
struct BackwardReads {  // z, dz, dy and x
  using Args = BackwardArgs;
  static constexpr int kCount = DGAMMA ? 4 : 3;
  static constexpr bool kStatistics = true;

  template <int S>
  static VK_DEVICE const RowsView& view(const Args& a) {
    if constexpr (S == 0) return a.z;
    if constexpr (S == 1) return a.dz;
    if constexpr (S == 2) return a.dy;
    return a.x;
  }
  // A dropped row has no dy in layer_norm_add, and no x in add_layer_norm.
  template <int S>
  static VK_DEVICE bool wanted(const Args& a, float scale) {
    return scale != 0.0f || (S == 2 ? !a.scale_dy : S == 3 ? a.scale_dy : true);
  }
  static constexpr int pieces(int s, Widths w) {
    return s < 2 ? stream_pieces(w) : s == 2 ? y_pieces(w) : branch_pieces(w);
  }
};

// ---- Where rows come from

// Memory, when they are asked for: any type, any alignment.
template <class Reads, class Team, bool VEC>
class DirectRows {
 public:
  using Args = typename Reads::Args;
  static constexpr bool kAtHand = false;

  VK_DEVICE DirectRows(const Args& a, const Team& team, int chunks)
      : row(at(a, team.first + team.offset)), next_(row), a_(a), team_(team), chunks_(chunks) {}

  Row row;

  VK_DEVICE void open(int64_t first) {
    row = next_;
    next_ = at(a_, first + team_.step + team_.offset);
    if constexpr (VEC && Reads::kStatistics)
      prefetch_next(std::make_integer_sequence<int, Reads::kCount>());
  }
  VK_DEVICE void close() {}
  VK_DEVICE void end() {}

  template <int S>
  VK_DEVICE Raw8 load(int, Columns<VEC> columns) const {
    if (!Reads::template wanted<S>(a_, row.scale)) columns.end = 0;
    return load_row(Reads::template view<S>(a_), row, columns);
  }
  VK_DEVICE float mean() const { return row.length > 0 ? a_.mean[row.index] : 0.0f; }
  VK_DEVICE float rstd() const { return row.length > 0 ? a_.rstd[row.index] : 0.0f; }

 private:
  static VK_DEVICE Row at(const Args& a, int64_t row) { return Row(a, row, scale_of(a, row)); }

  // The few warps whose sums fit in registers cannot have enough loads under way to hide memory: L2
  // fetches the next row.
  template <int... S>
  VK_DEVICE void prefetch_next(std::integer_sequence<int, S...>) {
#pragma unroll 1
    for (int i = 0; i < chunks_; ++i) {
      const Columns<true> columns(i, team_.rank, team_.size, next_.length);
      const auto from = [&](const RowsView& rows, bool wanted) {
        if (rows.data != nullptr && wanted)
          prefetch(element(rows.data, next_.index * rows.stride, rows.dtype), rows.dtype, columns);
      };
      (from(Reads::template view<S>(a_), Reads::template wanted<S>(a_, next_.scale)), ...);
    }
  }

  Row next_;
  const Args& a_;
  const Team& team_;
  int chunks_;
};

// The ring of row_ring.cuh: rows of CHUNKS chunks, widths known, 16-byte accesses.
template <class Reads, Widths WIDTHS, class Team, int CHUNKS>
class RingRows {
  // Pieces of eight elements of operand s, and the first piece of its first chunk.
  static constexpr int width(int s) { return Reads::pieces(s, WIDTHS); }
  static constexpr int place(int s) { return s == 0 ? 0 : place(s - 1) + CHUNKS * width(s - 1); }

 public:
  using Args = typename Reads::Args;
  using Index = RowIndex<WIDTHS>;
  static constexpr bool kAtHand = true;

  VK_DEVICE RingRows(const Args& a, const Team& team, char* shared)
      : row(a, static_cast<Index>(a.rows), 0.0f),
        a_(a),
        team_(team),
        ring_(shared, a.slots),
        ahead_(static_cast<Index>(team.first + team.offset)) {
    if (a.row_scale != nullptr) {
      sample_ = ahead_ / static_cast<Index>(a.rows_per_sample);
      rest_ = ahead_ % static_cast<Index>(a.rows_per_sample);
    }
    ahead_scale_ = scale_ahead();
#pragma unroll 1
    for (int i = 1; i < a.slots; ++i) begin(), ring_.ended();
  }

  Row row;

  VK_DEVICE void open(Index first) {
    begin();
    ring_.wait();
    row = Row(a_, first + static_cast<Index>(team_.offset), ring_.word(0));
  }
  VK_DEVICE void close() { ring_.ended(); }
  VK_DEVICE void end() { wait_copies<0>(); }

  template <int S>
  VK_DEVICE Raw8 load(int chunk, const Columns<true>&) const {
    Raw8 raw = {};
    const uint4 low = ring_.piece(place(S) + chunk * width(S));
    raw.w[0] = low.x, raw.w[1] = low.y, raw.w[2] = low.z, raw.w[3] = low.w;
    if constexpr (width(S) == 2) {
      const uint4 high = ring_.piece(place(S) + chunk * width(S) + 1);
      raw.w[4] = high.x, raw.w[5] = high.y, raw.w[6] = high.z, raw.w[7] = high.w;
    }
    return raw;
  }
  VK_DEVICE float mean() const { return ring_.word(1); }
  VK_DEVICE float rstd() const { return ring_.word(2); }

 private:
  template <int S>
  VK_DEVICE void begin_operand(const Row& next) {
    const RowsView& rows = Reads::template view<S>(a_);
    if (rows.data == nullptr) return;
    const char* from = element(rows.data, next.index * rows.stride, rows.dtype);
    const int length = Reads::template wanted<S>(a_, next.scale) ? next.length : 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const Columns<true> columns = team_.template columns<true, CHUNKS>(i, length);
#pragma unroll
      for (int half = 0; half < width(S); ++half)
        ring_.begin_piece(place(S) + i * width(S) + half, columns.in(from, rows.dtype) + 16 * half,
                          columns.whole ? length > 0 : columns.holds(0));
    }
  }
  template <int... S>
  VK_DEVICE void begin_operands(const Row& next, std::integer_sequence<int, S...>) {
    (begin_operand<S>(next), ...);
  }
  VK_DEVICE void begin() {
    const Row next(a_, ahead_, ahead_scale_);
    begin_operands(next, std::make_integer_sequence<int, Reads::kCount>());
    ring_.set_word(0, next.scale);
    if constexpr (Reads::kStatistics) {
      ring_.begin_word(1, a_.mean + next.index, next.length > 0);
      ring_.begin_word(2, a_.rstd + next.index, next.length > 0);
    }
    ring_.begun();
    ahead_ += static_cast<Index>(team_.step);
    if (a_.row_scale != nullptr) {  // a sum is shorter than a division
      const Index rows_per_sample = static_cast<Index>(a_.rows_per_sample);
      sample_ += static_cast<Index>(a_.step_samples);
      rest_ += static_cast<Index>(a_.step_rest);
      if (rest_ >= rows_per_sample) rest_ -= rows_per_sample, ++sample_;
    }
    ahead_scale_ = scale_ahead();  // long before it says what is read of that row
  }
  VK_DEVICE float scale_ahead() const {
    if (ahead_ >= static_cast<Index>(a_.rows)) return 0.0f;
    return a_.row_scale == nullptr ? 1.0f : a_.row_scale[sample_];
  }

  const Args& a_;
  const Team& team_;
  RowRing<place(Reads::kCount), Reads::kStatistics ? 3 : 1> ring_;
  Index ahead_;  // the row that is begun next, its sample and its place there
  Index sample_ = 0, rest_ = 0;
  float ahead_scale_;
};

}  // namespace
}  // namespace vitkernels
