// Runs the kernels that need no WGMMA on the host (emulator.hpp), against references in double. No GPU; plain C++,
// which nvcc hands to the host's compiler with the place of CUDA's headers:
//
//   nvcc -std=c++17 -O2 -I csrc/include csrc/tests/emulated.cpp -o emulated && ./emulated
#include "emulator.hpp"

#include "message.cuh"
#include "reference.hpp"
#include "statistics.cuh"

#include <string>

namespace {

using namespace xclip_fast;

std::mt19937 generator(2);

// Random values that T holds exactly, and as doubles.
template <class T>
struct Values {
  std::vector<T> as;
  std::vector<double> wide;
  Values(size_t count, double scale, double center = 0.0) : as(count), wide(count) {
    std::normal_distribution<double> normal(center, scale);
    for (size_t i = 0; i < count; ++i) {
      as[i] = make(normal(generator));
      wide[i] = to_float(as[i]);
    }
  }
  static T make(double value) {
    if constexpr (std::is_same_v<T, float>) {
      return float(value);
    } else {
      return rounded<T>(float(value));
    }
  }
};

// Memory for a result, every byte of it and of a guard behind it 0xff, which is NaN in every type. Whole 16 bytes.
template <class T>
struct Poisoned {
  static constexpr size_t kGuard = 64;
  std::vector<T> memory;
  size_t count;
  explicit Poisoned(size_t count) : memory(count + kGuard), count(count) {
    std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(T));
  }
  T* data() { return memory.data(); }
  std::vector<double> read(std::string const& what) const {
    std::vector<double> values;
    for (size_t i = 0; i < count + kGuard; ++i) {
      double const value = static_cast<float>(memory[i]);
      if (i < count) {
        values.push_back(value);
      } else {
        expect(std::isnan(value), what + ": wrote past the end");
      }
    }
    return values;
  }
};

template <class T, class P>
void check_message(int videos, int frames, int width, int blocks) {
  constexpr double eps = 1e-5;
  int const rows = videos * frames;
  std::string const what = "message path of " + std::to_string(rows) + " rows, " + std::to_string(frames) +
                           " frames, width " + std::to_string(width) + ", " + std::to_string(blocks) + " blocks";
  int64_t const x_row = width + 8;
  Values<T> const x(rows * x_row, 1.0);
  double const scale = 1 / std::sqrt(double(width));
  Values<T> const weights[4] = {{size_t(width) * width, scale},
                                {size_t(width) * width * 3, 2 * scale},
                                {size_t(width) * width, scale},
                                {size_t(width) * width * 2, scale}};
  Values<P> const biases[4] = {
      {size_t(width), 0.3}, {size_t(width) * 3, 0.3}, {size_t(width), 0.3}, {size_t(width) * 2, 0.3}};
  Values<P> const norms[4] = {
      {size_t(width), 0.3, 1.0}, {size_t(width), 0.3}, {size_t(width), 0.3, 1.0}, {size_t(width), 0.3}};
  Poisoned<float> m(rows * width), qkv(rows * 3 * width);
  Poisoned<T> mixed(rows * width), key_value(rows * 2 * width);

  MessageArguments<T, P> given{};
  given.x = x.as.data();
  given.x_row = x_row;
  for (int i = 0; i < 4; ++i) {
    given.weights[i] = weights[i].as.data();
    given.biases[i] = biases[i].as.data();
    (i < 2 ? given.norm_m : given.norm_1)[i % 2] = norms[i].as.data();
  }
  given.eps = float(eps);
  given.rows = rows;
  given.frames = frames;
  given.width = width;
  given.m = m.data();
  given.qkv = qkv.data();
  given.mixed = mixed.data();
  given.key_value = key_value.data();
  MessageLayout const layout{width, blocks};
  std::vector<std::vector<Eight<T>>> shared;
  for (int block = 0; block < blocks; ++block) {
    shared.emplace_back(layout.bytes() / 16 + 4);
    std::memset(static_cast<void*>(shared.back().data()), 0xff, shared.back().size() * 16);
  }
  copies.clear();
  emulator::launch(blocks, kMessageThreads, [&] {
    auto* const memory = reinterpret_cast<unsigned char*>(shared[blockIdx.x].data());
    MessagePath<T, P>(given, memory).run();
  });
  for (auto const& memory : shared) {  // the guard behind what the layout asks for
    auto const* const bytes = reinterpret_cast<unsigned char const*>(memory.data());
    bool untouched = true;
    for (size_t at = layout.bytes(); at < memory.size() * 16; ++at) {
      untouched = untouched && bytes[at] == 0xff;
    }
    expect(untouched, what + ": wrote past its shared memory");
  }

  Doubles rows_of_x;
  for (int row = 0; row < rows; ++row) {
    rows_of_x.insert(rows_of_x.end(), x.wide.begin() + row * x_row, x.wide.begin() + row * x_row + width);
  }
  Doubles const wanted = message_path(rows_of_x, {weights[0].wide, weights[1].wide, weights[2].wide, weights[3].wide},
                                      {biases[0].wide, biases[1].wide, biases[2].wide, biases[3].wide},
                                      {norms[0].wide, norms[1].wide, norms[2].wide, norms[3].wide}, frames, eps);
  // three roundings to T on the way, each of values near 1, that average over a row
  double const ulp = std::is_same_v<T, __half> ? 1.0 / 2048 : 1.0 / 256;
  close(key_value.read(what), wanted, 1.01 * ulp, 8 * ulp, what);
  m.read(what);
  qkv.read(what);
  mixed.read(what);
}

// What the epilogues leave: sums and squares of each row of each tile.
void check_merge_statistics(size_t m, int n, int tile_columns) {
  std::string const what = "statistics of " + std::to_string(n) + " columns";
  size_t const padded = (m + 127) / 128 * 128, tiles = (n + tile_columns - 1) / tile_columns;
  Values<float> const x(m * n, 1.0, 3.0);
  std::vector<float> sums(tiles * padded, NAN), squares(tiles * padded, NAN);
  Doubles means, rstds;
  for (size_t i = 0; i < m; ++i) {
    double mean, variance;
    moments(&x.wide[i * n], n, mean, variance);
    means.push_back(mean);
    rstds.push_back(1 / std::sqrt(variance + 1e-5));
    for (size_t tile = 0; tile < tiles; ++tile) {
      float sum = 0, square = 0;
      for (int j = int(tile) * tile_columns; j < std::min(n, int(tile + 1) * tile_columns); ++j) {
        sum += x.as[i * n + j];
        square += x.as[i * n + j] * x.as[i * n + j];
      }
      sums[tile * padded + i] = sum;
      squares[tile * padded + i] = square;
    }
  }
  Poisoned<float> mean(m), rstd(m);
  emulator::launch(int(m + kMergeThreads - 1) / kMergeThreads, kMergeThreads, [&] {
    merge_statistics_kernel(sums.data(), squares.data(), 1e-5f, mean.data(), rstd.data(), int64_t(m), int64_t(padded),
                            n, tile_columns);
  });
  close(mean.read(what), means, 1e-6, 1e-6, what + ", mean");
  close(rstd.read(what), rstds, 1e-4, 0, what + ", rstd");
}

}  // namespace

int main() {
  check_message<__nv_bfloat16, __nv_bfloat16>(1, 8, 128, 3);
  check_message<__nv_bfloat16, float>(1, 1, 64, 1);
  check_message<__half, __half>(3, 7, 192, 2);  // two tiles of rows, the second not full; more units than registers
  check_message<__half, float>(1, 64, 64, 5);   // frames past a warp; blocks without work in some steps
  check_message<__half, __half>(9, 5, 320, 7);  // steps of K that the warps do not share evenly
  check_merge_statistics(150, 768, 128);
  check_merge_statistics(150, 520, 256);
  check_merge_statistics(1, 8, 128);
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
