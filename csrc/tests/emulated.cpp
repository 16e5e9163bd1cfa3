// Runs the kernels that need no WGMMA on the host (emulator.hpp), against references in double. No GPU; plain C++,
// which nvcc hands to the host's compiler with the place of CUDA's headers:
//
//   nvcc -std=c++17 -O2 -I csrc/include csrc/tests/emulated.cpp -o emulated && ./emulated
#include "emulator.hpp"

#include "message.cuh"
#include "reference.hpp"
#include "rows.cuh"

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

template <class T>
void check_rows(size_t m, int d, int64_t x_row) {
  std::string const what = "rows of " + std::to_string(d);
  constexpr int V = 16 / sizeof(T);
  Values<T> const x(m * x_row, 1.0, 30.0);
  Doubles rows, means, rstds;
  for (size_t i = 0; i < m; ++i) {
    rows.insert(rows.end(), x.wide.begin() + i * x_row, x.wide.begin() + i * x_row + d);
    double mean, variance;
    moments(&rows[i * d], d, mean, variance);
    means.push_back(mean);
    rstds.push_back(1 / std::sqrt(variance + 1e-5));
  }
  Poisoned<float> mean(m), rstd(m), scale(m);
  int const grid = int(m + kWarps - 1) / kWarps;
  bool const vectors = x_row % V == 0 && d % V == 0;
  auto* const statistics = vectors ? row_statistics_kernel<T, V> : row_statistics_kernel<T, 1>;
  emulator::run(grid, kWarp * kWarps,
                [&] { statistics(x.as.data(), x_row, 1e-5f, mean.data(), rstd.data(), int64_t(m), d); });
  close(mean.read(what), means, 1e-6, 1e-6, what + ", mean");
  close(rstd.read(what), rstds, 1e-5, 0, what + ", rstd");

  Values<float> const gamma(d, 0.3, 1.0), beta(d, 1.0);
  Poisoned<__nv_fp8_e4m3> y(m * d);
  auto* const norm = vectors ? layer_norm_fp8_kernel<T, V> : layer_norm_fp8_kernel<T, 1>;
  emulator::run(grid, kWarp * kWarps, [&] {
    norm(x.as.data(), x_row, gamma.as.data(), beta.as.data(), 1e-5f, y.data(), scale.data(), int64_t(m), d);
  });
  Doubles normed = layer_norm(rows, gamma.wide, beta.wide, 1e-5), scales(m);
  for (size_t i = 0; i < normed.size(); ++i) {
    scales[i / d] = std::max(scales[i / d], std::abs(normed[i]) / 448);
  }
  for (size_t i = 0; i < normed.size(); ++i) {
    normed[i] /= scales[i / d];
  }
  close(scale.read(what), scales, 1e-4, 0, what + ", scale");
  close(y.read(what), normed, 1.01 / 16, 0.002, what + ", e4m3");
}

void check_zero_row() {
  std::vector<float> const x(64, 5.0f), gamma(64, 1.0f), beta(64, 0.0f);
  Poisoned<__nv_fp8_e4m3> y(64);
  Poisoned<float> scale(1);
  emulator::run(1, kWarp * kWarps, [&] {
    layer_norm_fp8_kernel<float, 4>(x.data(), 64, gamma.data(), beta.data(), 1e-5f, y.data(), scale.data(), 1, 64);
  });
  close(y.read("a row of zeros"), Doubles(64, 0.0), 0, 0, "a row of zeros");
  close(scale.read("its scale"), {1.0}, 0, 0, "its scale");
}

template <class T, class P>
void check_fold(size_t n, size_t k) {
  Values<T> const w(n * (k + 3), 0.1);
  Values<P> const gamma(k, 0.2, 1.0), beta(k, 1.0), bias(n, 1.0);
  Poisoned<T> folded(n * k);
  Poisoned<float> sums(n), shift(n);
  emulator::run(int(n + kWarps - 1) / kWarps, kWarp * kWarps, [&] {
    fold_kernel<T, P>(w.as.data(), int64_t(k + 3), 1, gamma.as.data(), beta.as.data(), bias.as.data(), folded.data(),
                      sums.data(), shift.data(), int64_t(n), int64_t(k));
  });
  Doubles products(n * k), totals(n), shifts(bias.wide);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < k; ++j) {
      float const product = to_float(w.as[i * (k + 3) + j]) * to_float(gamma.as[j]);
      products[i * k + j] = to_float(rounded<T>(product));
      totals[i] += products[i * k + j];
      shifts[i] += w.wide[i * (k + 3) + j] * beta.wide[j];
    }
  }
  close(folded.read("folded"), products, 0, 0, "folded");
  close(sums.read("sums"), totals, 1e-5, 1e-5, "sums");
  close(shift.read("shift"), shifts, 1e-5, 1e-5, "shift");
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
  emulator::run(int(m + kWarp * kWarps - 1) / (kWarp * kWarps), kWarp * kWarps, [&] {
    merge_statistics_kernel(sums.data(), squares.data(), 1e-5f, mean.data(), rstd.data(), int64_t(m), int64_t(padded),
                            n, tile_columns);
  });
  close(mean.read(what), means, 1e-6, 1e-6, what + ", mean");
  close(rstd.read(what), rstds, 1e-4, 0, what + ", rstd");
}

void check_merge_column_sums(size_t parts, size_t n) {
  std::string const what = "sums of " + std::to_string(n) + " columns";
  size_t const padded = (n + 127) / 128 * 128;
  Values<float> const partials(parts * padded, 1.0);
  Doubles wanted(n, 0.0);
  for (size_t at = 0; at < parts * padded; ++at) {
    if (at % padded < n) {
      wanted[at % padded] += partials.wide[at];
    }
  }
  Poisoned<float> sums(n);
  emulator::run(int(padded / kWarp), kWarp * kManyWarps, [&] {
    merge_column_sums_kernel(partials.as.data(), sums.data(), int64_t(parts), int64_t(padded), int64_t(n));
  });
  close(sums.read(what), wanted, 1e-5, 1e-4, what);
}

}  // namespace

int main() {
  check_message<__nv_bfloat16, __nv_bfloat16>(1, 8, 128, 3);
  check_message<__nv_bfloat16, float>(1, 1, 64, 1);
  check_message<__half, __half>(3, 7, 192, 2);  // two tiles of rows, the second not full; more units than registers
  check_message<__half, float>(1, 64, 64, 5);   // frames past a warp; blocks without work in some steps
  check_message<__half, __half>(9, 5, 320, 7);  // steps of K that the warps do not share evenly
  for (int d : {8, 50, 96, 776}) {
    check_rows<__nv_bfloat16>(9, d, d + 8);
    check_rows<__half>(9, d, d + 3);
    check_rows<float>(9, d, d);
  }
  check_zero_row();
  check_fold<__nv_bfloat16, __nv_bfloat16>(9, 96);
  check_fold<__nv_bfloat16, float>(5, 50);
  check_fold<__half, __half>(7, 64);
  check_fold<__half, float>(4, 33);
  check_merge_statistics(150, 768, 128);
  check_merge_statistics(150, 520, 256);
  check_merge_statistics(1, 8, 128);
  check_merge_column_sums(70, 136);
  check_merge_column_sums(1, 8);
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
