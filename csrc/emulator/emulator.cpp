// The scheduler: clusters of blocks one after another on each OS thread, the blocks of a cluster
// and the fibers of a block in random order.
#include "emulator/emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "emulator/block.h"

namespace vitkernels::emulator {

namespace {

constexpr size_t kMostEnded = 6000;  // of the 8128 threads that ThreadSanitizer can tell apart

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == 0 ? otherwise : std::strtoull(text, nullptr, 0);
}

// ---- Running

// What one OS thread keeps between clusters and launches: stacks and shared memory.
class Worker {
 public:
  // Threads that ThreadSanitizer still has to know of: it gives a new one the number of one that it
  // has forgotten, and would take the accesses of both for those of one.
  std::vector<SanitizedStack> ended;

  void forget_ended() {
    for (SanitizedStack& stack : ended) stack.destroy();
    ended.clear();
  }

  void run_cluster(const Shape& shape, const std::function<void()>& body, Index3 first,
                   uint64_t seed, void* launch, LeadingGrid* leading);

 private:
  std::vector<std::unique_ptr<Block>> blocks_;

  // Lets threads go on, or else what happens beside them. False when nothing can.
  static bool step(Cluster& cluster, std::minstd_rand& random);
};

bool Worker::step(Cluster& cluster, std::minstd_rand& random) {
  std::vector<Block*> order = cluster.blocks;
  if (order.size() > 1) std::shuffle(order.begin(), order.end(), random);
  for (Block* block : order)
    if (block->live > 0 && block->step(random)) return true;
  for (Block* block : order) {
    running = &block->fibers[0];  // whom an error names
    if (block->async.perform_load(random)) return true;
  }
  for (Block* block : order)
    if (block->async.let_give_up()) return true;
  for (Block* block : order)
    if (block->dependence.advance()) return true;
  return false;
}

void Worker::run_cluster(const Shape& shape, const std::function<void()>& body, Index3 first,
                         uint64_t seed, void* launch, LeadingGrid* leading) {
  if (kFreshMemory) blocks_.clear();
  while (blocks_.size() < shape.cluster) blocks_.push_back(std::make_unique<Block>());
  Cluster cluster;
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    Block& block = *blocks_[rank];
    block.shape = &shape;
    block.body = &body;
    block.index = Index3(first.x + rank, first.y, first.z);
    block.launch = launch;
    block.cluster = &cluster;
    block.rank = static_cast<int>(rank);
    block.dependence = {leading, {}};
    block.begin();
    cluster.blocks.push_back(&block);
  }

  std::minstd_rand random(static_cast<uint32_t>(seed ^ seed >> 32) | 1);
  const auto any = [&](const auto& is) {
    return std::any_of(cluster.blocks.begin(), cluster.blocks.end(), is);
  };
  const auto has_error = [](const Block* block) { return block->error != nullptr; };
  bool stuck = false;
  while (any([](const Block* block) { return block->live > 0; }) && !any(has_error) && !stuck)
    stuck = !step(cluster, random);
  running = nullptr;
  if (ended.size() > kMostEnded) forget_ended();
  for (Block* block : cluster.blocks)
    for (Fiber& fiber : block->fibers)
      if (fiber.state == Fiber::kDone) ended.push_back(fiber.stack);
  for (Block* block : cluster.blocks)
    if (block->error != nullptr) std::rethrow_exception(block->error);
  if (stuck) {
    std::string all;
    for (Block* block : cluster.blocks)
      all += (all.empty() ? "" : "\n") + block->describe() + block->who_waits_where();
    throw std::runtime_error("emulated kernel: deadlock, " + all);
  }
  for (Block* block : cluster.blocks) {
    if (const std::string wrong = block->arena.overrun(); !wrong.empty())
      throw std::runtime_error("emulated kernel: " + wrong + ", " + block->describe());
    if (const std::string wrong = block->async.unfinished(); !wrong.empty())
      throw std::runtime_error("emulated kernel: " + wrong + "\n  " + block->describe());
  }
}

// Workers outlive launches, so that stacks are mapped once.
class Pool {
 public:
  std::unique_ptr<Worker> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(idle_.back());
    idle_.pop_back();
    return worker;
  }
  void give_back(std::unique_ptr<Worker> worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(worker));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

// CUDA C++ Programming Guide, "Compute Capabilities", technical specifications.
void check_shape(const Shape& shape) {
  const auto& [grid, block, shared_bytes, cluster] = shape;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  std::string wrong;
  if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64)
    wrong = "block " + text(block) + "; at most 1024 threads, 64 along z";
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
           grid.z > 65535)
    wrong = "grid " + text(grid) + "; at least 1, at most (2147483647,65535,65535)";
  else if (cluster == 0 || cluster > 8 || grid.x % cluster != 0)
    wrong = "clusters of " + std::to_string(cluster) + " blocks in grid " + text(grid) +
            "; 1 to 8 are there, and the grid is a multiple of them";
  else if (cluster > 1 && settings().architecture < 90)
    wrong = "clusters before compute capability 9.0";
  else if (shared_bytes > settings().shared_limit)
    wrong = std::to_string(shared_bytes) + " bytes of dynamic shared memory; the limit is " +
            std::to_string(settings().shared_limit);
  if (!wrong.empty()) throw std::runtime_error("emulated kernel: cannot launch with " + wrong);
}

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace

Settings& settings() {
  static Settings values{
      from_environment("VITKERNELS_EMULATOR_SEED", 1),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_THREADS", 1)),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_MULTIPROCESSORS", 2)),
      static_cast<int>(from_environment("VITKERNELS_EMULATOR_ARCHITECTURE", 90)),
      std::min<uint64_t>(from_environment("VITKERNELS_EMULATOR_SHARED_LIMIT", 232448),
                         Arena::kBytes / 2)};
  return values;
}

void run(const Shape& shape, const std::function<void()>& thread_body, LeadingGrid* leading) {
  static Pool pool;
  check_shape(shape);
  if (running != nullptr)
    throw std::runtime_error("emulated kernel: a launch from inside a kernel");
  const uint64_t seed = settings().seed;
  const uint64_t across = shape.grid.x / shape.cluster;
  const uint64_t clusters = across * shape.grid.y * shape.grid.z;
  // Clusters promise each other no order: odd strides visit all residues of a power of two,
  // starting anywhere.
  uint64_t span = 1;
  while (span < clusters) span *= 2;
  const uint64_t start = mix(seed), stride = mix(start) | 1;

  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  std::mutex mutex;
  const auto launch = std::make_unique<uint64_t>();
  auto work = [&] {
    const Unwatched emulator;
    std::unique_ptr<Worker> worker = pool.take();
    try {
      for (uint64_t step; !stop && (step = next++) < span;) {
        const uint64_t c = (start + step * stride) % span;
        if (c >= clusters) continue;
        const Index3 first(static_cast<unsigned>(c % across * shape.cluster),
                           static_cast<unsigned>(c / across % shape.grid.y),
                           static_cast<unsigned>(c / across / shape.grid.y));
        worker->run_cluster(shape, thread_body, first, mix(seed ^ mix(c)), launch.get(), leading);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      stop = true;
    }
    running = nullptr;
    worker->forget_ended();
    pool.give_back(std::move(worker));
  };
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(clusters, static_cast<uint64_t>(settings().threads));
       ++i)
    helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  acquire(launch.get());
  if (error) std::rethrow_exception(error);
}

}  // namespace vitkernels::emulator

void vitkernels_emulator_set_seed(uint64_t seed) { vitkernels::emulator::settings().seed = seed; }
uint64_t vitkernels_emulator_seed() { return vitkernels::emulator::settings().seed; }
