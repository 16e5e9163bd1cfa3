// Runs kernels on the host, so that those without WGMMA can be tested where there is no GPU: a fiber a thread, switched
// at barriers, shuffles and warp-wide multiplications, in an order that a seed decides. A kernel that waits for what
// will never come ends the program instead of hanging. Include it before the kernels' headers; not nvcc, any C++
// compiler.
#pragma once

#define XCLIP_FAST_EMULATED

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

namespace emulator {

struct Barrier {
  int wanted = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread, block;
  int global = 0;  // its number
  Barrier* waits_for = nullptr;
  int waits_from = 0;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<Barrier> of_block, of_warp;
inline Barrier of_grid;
inline int threads = 0, blocks = 0;
inline std::mt19937 order(1);

// What the lanes of each warp show each other.
struct Shown {
  uint32_t words[32][6];
};
inline std::vector<Shown> shown;

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.wanted) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->waits_from = barrier.generation;
  swapcontext(&current->context, &scheduler);
}

inline int warp() { return current->global / 32; }
inline int lane() { return current->global % 32; }

inline void enter() {
  body();
  current->done = true;
}

// Runs `kernel` on blocks of `size` threads, all at once.
inline void launch(int grid, int size, std::function<void()> kernel) {
  threads = size;
  blocks = grid;
  body = std::move(kernel);
  fibers = std::vector<Fiber>(grid * size);
  of_block = std::vector<Barrier>(grid, Barrier{size, 0, 0});
  of_warp = std::vector<Barrier>(grid * size / 32, Barrier{32, 0, 0});
  of_grid = Barrier{grid * size, 0, 0};
  shown = std::vector<Shown>(of_warp.size());
  constexpr size_t kStack = 1 << 16;
  for (int i = 0; i < grid * size; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.reset(new char[kStack]);
    fiber.thread = {unsigned(i % size), 0, 0};
    fiber.block = {unsigned(i / size), 0, 0};
    fiber.global = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> turn(fibers.size());
  std::iota(turn.begin(), turn.end(), 0);
  // every third warp is slow: a barrier that is missing shows only where warps drift apart
  int const phase = int(order() % 3);
  for (bool alive = true; alive;) {
    std::shuffle(turn.begin(), turn.end(), order);
    int const awake = int(order() % 16);
    bool moved = false;
    alive = false;
    for (int i : turn) {
      Fiber& fiber = fibers[i];
      if (fiber.done) {
        continue;
      }
      alive = true;
      if (fiber.waits_for && fiber.waits_for->generation == fiber.waits_from) {
        continue;
      }
      if (i / 32 % 3 == phase && awake != 0) {
        moved = true;  // it could
        continue;
      }
      fiber.waits_for = nullptr;
      current = &fiber;
      moved = true;
      swapcontext(&scheduler, &fiber.context);
    }
    if (alive && !moved) {
      std::printf("FAILED: a barrier that not all threads reach\n");
      std::exit(1);
    }
  }
}

template <class T>
T from_lane(T value, int other) {
  static_assert(sizeof(T) == 4);
  std::memcpy(shown[warp()].words[lane()], &value, 4);
  wait(of_warp[warp()]);
  std::memcpy(&value, shown[warp()].words[other & 31], 4);
  wait(of_warp[warp()]);
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define gridDim (uint3{unsigned(emulator::blocks), 1, 1})

inline void __syncthreads() { emulator::wait(emulator::of_block[emulator::current->global / emulator::threads]); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::from_lane(value, emulator::lane() ^ distance);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane(value, lane);
}
inline float __expf(float x) { return std::exp(x); }
using std::max;
using std::min;

namespace xclip_fast {

// instructions.cuh in plain C++. A copy becomes visible when it is waited for, not before.
struct Copy {
  void* to;
  void const* from;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, in groups

inline std::vector<std::vector<Copy>>& groups() {
  copies.resize(std::max(copies.size(), emulator::fibers.size()));
  auto& mine = copies[emulator::current->global];
  if (mine.empty()) {
    mine.emplace_back();
  }
  return mine;
}
inline void copy_async(void* shared, void const* global) { groups().back().push_back({shared, global}); }
inline void end_copies() { groups().emplace_back(); }
template <int kPending>
void wait_for_copies() {
  auto& mine = groups();  // the last one is open
  for (size_t group = 0; group + 1 + kPending < mine.size(); ++group) {
    for (Copy const& copy : mine[group]) {
      std::memcpy(copy.to, copy.from, 16);
    }
    mine[group].clear();
  }
}
inline void wait_for_grid() { emulator::wait(emulator::of_grid); }

template <class T>
double element(uint32_t word, int half) {
  T values[2];
  std::memcpy(values, &word, 4);
  return static_cast<float>(values[half]);
}

template <class T>
void multiply(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  auto& seen = emulator::shown[emulator::warp()];
  auto* const mine = seen.words[emulator::lane()];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  emulator::wait(emulator::of_warp[emulator::warp()]);
  int const g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int part = 0; part < 4; ++part) {
    int const high = part / 2, column = 2 * t + part % 2;
    double sum = c[part];
    for (int k = 0; k < 16; ++k) {
      int const other = k % 8 / 2, word = k / 8;  // which lane of a row holds column k, and in which word
      sum += element<T>(seen.words[4 * g + other][2 * word + high], k % 2) *
             element<T>(seen.words[4 * column + other][4 + word], k % 2);
    }
    c[part] = static_cast<float>(sum);
  }
  emulator::wait(emulator::of_warp[emulator::warp()]);
}

}  // namespace xclip_fast
