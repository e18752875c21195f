#include "emulator/wgmma.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "common/mma.cuh"

namespace vitkernels::emulator {

namespace {

// What a descriptor says [PTX ISA, "Matrix Descriptor"]. The memory of a block is addressed from 0.
struct Tile {
  uint32_t start;
  int leading, stride;  // bytes
  Swizzle swizzle;

  explicit Tile(WgmmaOperand operand)
      : start(static_cast<uint32_t>(field(operand, 0, 13)) * 16),
        leading(field(operand, 16, 29) * 16),
        stride(field(operand, 32, 45) * 16) {
    constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
    swizzle = kModes[field(operand, 62, 63)];
  }
  static int field(WgmmaOperand operand, int first, int last) {
    return static_cast<int>(operand.bits >> first & ((uint64_t{1} << (last - first + 1)) - 1));
  }
};

// Eight neighbours of an operand, as they were when the product was issued.
struct Chunk {
  uint32_t offset;
  std::array<uint16_t, 8> halves;
};

// The product of one warp: its 16 rows.
struct Product {
  float a[16][16];
  std::vector<float> b;  // (16, n)
  std::vector<Chunk> chunks;
  int n;
  std::array<Fiber*, 32> lanes;
  std::array<float*, 32> c;
  Place place;
};

struct Issue {  // the record of a lane
  const WgmmaRequest* request;
  Fiber* fiber;
  Place place;
};

int warp_of(const Fiber& fiber) { return fiber.id / 32; }

float widened(DType type, uint16_t half) {
  return type == DType::kBF16 ? half_of<DType::kBF16>(half, 0) : half_of<DType::kF16>(half, 0);
}

// Where eight neighbours of an operand begin, before swizzling: in k from row mn on (kK), or in mn
// at one k (kMN) [PTX ISA, "Shared Memory Layout" of wgmma: canonical layouts].
uint32_t chunk_start(const Tile& tile, Major major, int mn, int k) {
  const int width = static_cast<int>(tile.swizzle);
  int offset;
  if (major == Major::kK)
    offset = width == 0 ? mn % 8 * 16 + mn / 8 * tile.stride + k / 8 * tile.leading
                        : mn % 8 * width + mn / 8 * tile.stride + k * 2;
  else
    offset = width == 0 ? k % 8 * 16 + k / 8 * tile.leading + mn / 8 * tile.stride
                        : k % 8 * width + k / 8 * tile.stride + mn % (width / 2) * 2 +
                              mn / (width / 2) * tile.leading;
  return tile.start + static_cast<uint32_t>(offset);
}

// Reads rows (columns) first to first + count of an operand; element(mn, k) is where they go.
template <class Element>
void gather(const char* which, const Tile& tile, Major major, int first, int count, DType type,
            Product& product, Element element) {
  const int period = swizzle_period(tile.swizzle);
  if (tile.swizzle != Swizzle::kNone && tile.start % static_cast<uint32_t>(period) >= 128)
    fail(std::string(which) + " begins inside the swizzle's period of " + std::to_string(period) +
             " bytes",
         product.place);
  const bool along_k = major == Major::kK;
  for (int mn = first; mn < first + count; mn += along_k ? 1 : 8)
    for (int k = 0; k < 16; k += along_k ? 8 : 1) {
      Chunk chunk;
      const char* at = shared_base() + swizzled(tile.swizzle, chunk_start(tile, major, mn, k));
      chunk.offset = shared_offset(which, at, 16, 16, product.place);
      async_proxy().check_published(which, chunk.offset, 16, product.place);
      std::memcpy(chunk.halves.data(), at, 16);
      for (int i = 0; i < 8; ++i)
        element(along_k ? mn : mn + i, along_k ? k + i : k) =
            widened(type, chunk.halves[static_cast<size_t>(i)]);
      product.chunks.push_back(chunk);
    }
}

Accumulators& accumulators_of(Fiber& fiber, float* c) {
  return *std::find_if(fiber.accumulators.begin(), fiber.accumulators.end(),
                       [&](const Accumulators& a) { return a.registers == c; });
}

// Takes the accumulators out of the lane's sight.
void take_accumulators(const Issue& issue) {
  const WgmmaRequest& request = *issue.request;
  auto& in_flight = issue.fiber->accumulators;
  const auto size = static_cast<size_t>(request.n / 2);
  auto found = std::find_if(in_flight.begin(), in_flight.end(), [&](const Accumulators& a) {
    return a.registers == request.c && a.values.size() == size;
  });
  if (found == in_flight.end()) {
    if (!issue.fiber->wgmma_fenced)
      fail("wgmma without wgmma_fence between it and what wrote its registers", issue.place);
    in_flight.push_back({request.c, std::vector<float>(request.c, request.c + size), 0});
    found = in_flight.end() - 1;
    std::memset(request.c, 0xFF, size * sizeof(float));
  }
  ++found->operations;
}

void give_back(Fiber& fiber, float* c, Place place) {
  Accumulators& mine = accumulators_of(fiber, c);
  if (--mine.operations > 0) return;
  const size_t bytes = mine.values.size() * sizeof(float);
  const std::vector<char> poison(bytes, static_cast<char>(0xFF));
  if (std::memcmp(c, poison.data(), bytes) != 0)
    fail("accumulators were written between wgmma and its wgmma_wait", place);
  std::memcpy(c, mine.values.data(), bytes);
  fiber.accumulators.erase(fiber.accumulators.begin() + (&mine - fiber.accumulators.data()));
}

void check_unchanged(const Product& product) {
  for (const Chunk& chunk : product.chunks)
    if (std::memcmp(shared_base() + chunk.offset, chunk.halves.data(), 16) != 0)
      fail("shared memory of a wgmma operand changed before its wgmma_wait", product.place);
}

// One fp32 addition after another, in k's order: as mma_m16n8k16.
void compute(const Product& product, bool accumulate) {
  check_unchanged(product);
  const int n = product.n;
  std::vector<float> sums(static_cast<size_t>(n));
  for (int row = 0; row < 16; ++row) {
    const auto each = [&](auto use) {  // the places of this row's sums
      for (int quad = 0; quad < 4; ++quad) {
        const auto lane = static_cast<size_t>(row % 8 * 4 + quad);
        float* values = accumulators_of(*product.lanes[lane], product.c[lane]).values.data();
        for (int i = 0; i < n / 2; ++i)
          if (fragment_c_row(static_cast<int>(lane), i % 4) == row)
            use(sums[static_cast<size_t>(i / 4 * 8 +
                                         fragment_c_column(static_cast<int>(lane), i % 4))],
                values[i]);
      }
    };
    each([&](float& sum, float& value) { sum = accumulate ? value : 0.0f; });
    for (int k = 0; k < 16; ++k) {
      const float a = product.a[row][k];
      const float* b = &product.b[static_cast<size_t>(k * n)];
      for (int column = 0; column < n; ++column) sums[static_cast<size_t>(column)] += a * b[column];
    }
    each([&](float& sum, float& value) { value = sum; });
  }
  for (size_t lane = 0; lane < 32; ++lane)
    give_back(*product.lanes[lane], product.c[lane], product.place);
}

void issue(void* const* records) {
  const Unwatched emulator;
  const Issue& first = *static_cast<const Issue*>(records[0]);
  const WgmmaRequest& request = *first.request;
  auto product = std::make_shared<Product>();
  product->n = request.n;
  product->place = first.place;
  for (size_t lane = 0; lane < 32; ++lane) {
    const Issue& mine = *static_cast<const Issue*>(records[lane]);
    if (mine.request->a.bits != request.a.bits || mine.request->b.bits != request.b.bits ||
        mine.request->accumulate != request.accumulate)
      fail("the lanes of a warp give wgmma different operands", first.place);
    take_accumulators(mine);
    product->lanes[lane] = mine.fiber;
    product->c[lane] = mine.request->c;
  }
  async_proxy().check_sequence(
      warp_of(*first.fiber),
      "wgmma of N " + std::to_string(request.n) + ", A " +
          (request.a_registers != nullptr ? "in registers" : std::to_string(request.a.bits)) +
          ", B " + std::to_string(request.b.bits) + (request.accumulate ? ", accumulating" : ""),
      first.place);

  const int first_row = warp_of(*first.fiber) % 4 * 16;
  if (request.a_registers == nullptr) {
    gather("operand A of wgmma", Tile(request.a), request.a_major, first_row, 16, request.type,
           *product, [&](int mn, int k) -> float& { return product->a[mn - first_row][k]; });
  } else {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair =
            static_cast<const Issue*>(records[lane])->request->a_registers->r[i / 2];
        product->a[fragment_a_row(lane, i / 2)][fragment_a_k(lane, i / 2) + i % 2] =
            widened(request.type, static_cast<uint16_t>(pair >> i % 2 * 16));
      }
  }
  product->b.resize(static_cast<size_t>(16 * request.n));
  gather(
      "operand B of wgmma", Tile(request.b), request.b_major, 0, request.n, request.type, *product,
      [&](int mn, int k) -> float& { return product->b[static_cast<size_t>(k * request.n + mn)]; });
  first.fiber->products.add(
      [product, accumulate = request.accumulate] { compute(*product, accumulate); });
}

struct Step {  // the record of fence, commit and wait
  Fiber* fiber;
  size_t newest_left_pending;
  Place place;
};

void step(const char* what, size_t newest_left_pending, Finish finish, Place place) {
  const unsigned threads = block_dim().x * block_dim().y * block_dim().z;
  if (static_cast<unsigned>(running->id / 128 + 1) * 128 > threads)
    fail(std::string(what) + " needs the four warps of a warpgroup", place);
  Step record{running, newest_left_pending, place};
  meet_whole_warp(what, &record, finish, place);
}

const Step& first_of(void* const* records) { return *static_cast<const Step*>(records[0]); }

}  // namespace

void wgmma_fence(Place place) {
  step("wgmma_fence", 0, nullptr, place);
  running->wgmma_fenced = true;
}

void wgmma(const WgmmaRequest& request, Place place) {
  Issue record{&request, running, place};
  meet_whole_warp("wgmma", &record, &issue, place);
  running->place = place;  // what an end of the thread without a wait is reported at
}

void wgmma_commit(Place place) {
  const auto commit = [](void* const* records) {
    const Unwatched emulator;
    first_of(records).fiber->products.commit();
  };
  step("wgmma_commit", 0, commit, place);
}

void wgmma_wait(int newest_left_pending, Place place) {
  const auto wait = [](void* const* records) {
    const Unwatched emulator;
    first_of(records).fiber->products.wait(first_of(records).newest_left_pending);
  };
  step("wgmma_wait", static_cast<size_t>(newest_left_pending), wait, place);
  running->wgmma_fenced = false;
}

void set_registers(const char* what, int count, Place place) {
  const auto agree = [](void* const* records) {
    const Unwatched emulator;
    const Step& first = first_of(records);
    async_proxy().check_sequence(warp_of(*first.fiber),
                                 "registers " + std::to_string(first.newest_left_pending),
                                 first.place);
  };
  step(what, static_cast<size_t>(count), agree, place);
}

}  // namespace vitkernels::emulator
