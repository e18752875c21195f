// The next rows of a kernel that walks over rows, on their way to shared memory (cp.async) while it
// works on this one: memory stays busy through reductions and stores, and no register waits.
//
// A thread copies and reads pieces of its own only, so there is no barrier: its own wait is enough.
// A place is written again after the row that was there has been worked on, in program order.
#pragma once

#include "common/async_copy.cuh"
#include "common/device.cuh"

namespace vitkernels {

// Bytes of shared memory for one row of each thread.
constexpr int row_ring_bytes(int pieces, int words) { return 16 * pieces + 4 * words; }

// `slots` (1 to 3) rows at a time, the one that is worked on included. Of a row a thread has PIECES
// of 16 bytes and WORDS of 4; the lanes' follow each other, without bank conflicts. slots - 1 rows
// are begun before the loop; then each turn begins one, waits for its own, reads it and ends. The
// slot that a turn begins comes before the one it reads.
template <int PIECES, int WORDS>
class RowRing {
 public:
  // `shared` has slots * blockDim.x * row_ring_bytes(PIECES, WORDS) bytes.
  VK_DEVICE RowRing(char* shared, int slots)
      : pieces_(shared + static_cast<int>(threadIdx.x) / kWarp * slots * kRow +
                static_cast<int>(threadIdx.x) % kWarp * 16),
        words_(shared + static_cast<int>(threadIdx.x) / kWarp * slots * kRow + PIECES * 16 * kWarp +
               static_cast<int>(threadIdx.x) % kWarp * 4),
        slots_(slots) {}

  // Of the row that is begun. A piece that is not `there` is not read and becomes zeros.
  VK_DEVICE void begin_piece(int piece, const void* from, bool there) {
    copy_async<16>(pieces_ + begins_ + piece * 16 * kWarp, from, there ? 16 : 0);
  }
  VK_DEVICE void begin_word(int word, const void* from, bool there) {
    copy_async<4>(words_ + begins_ + word * 4 * kWarp, from, there ? 4 : 0);
  }
  VK_DEVICE void set_word(int word, float value) {
    *reinterpret_cast<float*>(words_ + begins_ + word * 4 * kWarp) = value;
  }
  VK_DEVICE void begun() const { commit_copies(); }

  // The row that is worked on.
  VK_DEVICE void wait() {
    reads_ = next();
    if (slots_ == 3)
      wait_copies<2>();
    else if (slots_ == 2)
      wait_copies<1>();
    else
      wait_copies<0>();
  }
  VK_DEVICE uint4 piece(int piece) const {
    return *reinterpret_cast<const uint4*>(pieces_ + reads_ + piece * 16 * kWarp);
  }
  VK_DEVICE float word(int word) const {
    return *reinterpret_cast<const float*>(words_ + reads_ + word * 4 * kWarp);
  }

  VK_DEVICE void ended() { begins_ = next(); }

  VK_DEVICE int slots() const { return slots_; }

 private:
  static constexpr int kRow = row_ring_bytes(PIECES, WORDS) * kWarp;  // of a warp

  VK_DEVICE int next() const { return begins_ + kRow == slots_ * kRow ? 0 : begins_ + kRow; }

  char *pieces_, *words_;
  int slots_, begins_ = 0, reads_ = 0;  // bytes
};

}  // namespace vitkernels
