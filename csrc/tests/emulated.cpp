// Runs the kernels that need no WGMMA on the host (emulator.hpp), against references in double. No GPU; plain C++,
// which nvcc hands to the host's compiler with the place of CUDA's headers:
//
//   nvcc -std=c++17 -O2 -I csrc/include csrc/tests/emulated.cpp -o emulated && ./emulated
#include "emulator.hpp"

#include "message.cuh"
#include "statistics.cuh"

#include <string>

namespace {

using namespace xclip_fast;

int failures = 0;

void expect(bool holds, std::string const& what) {
  if (!holds) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

// |got - wanted| <= relative |wanted| + absolute, everywhere.
void close(std::vector<double> const& got, std::vector<double> const& wanted, double relative, double absolute,
                  std::string const& what) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!(std::abs(got[i] - wanted[i]) <= relative * std::abs(wanted[i]) + absolute)) {
      expect(false, what + ": at " + std::to_string(i) + " got " + std::to_string(got[i]) + ", wanted " +
                        std::to_string(wanted[i]));
      return;
    }
  }
}

using Doubles = std::vector<double>;

// x (M, K) W (N, K)^T + b
Doubles linear(Doubles const& x, Doubles const& w, Doubles const& bias, size_t width) {
  size_t const rows = x.size() / width, columns = bias.size();
  Doubles y(rows * columns);
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) {
      y[i * columns + j] = bias[j];
      for (size_t k = 0; k < width; ++k) {
        y[i * columns + j] += x[i * width + k] * w[j * width + k];
      }
    }
  }
  return y;
}

void moments(double const* row, size_t width, double& mean, double& variance) {
  mean = variance = 0;
  for (size_t k = 0; k < width; ++k) {
    mean += row[k] / width;
  }
  for (size_t k = 0; k < width; ++k) {
    variance += (row[k] - mean) * (row[k] - mean) / width;
  }
}

Doubles layer_norm(Doubles const& x, Doubles const& gamma, Doubles const& beta, double eps) {
  size_t const width = gamma.size();
  Doubles y(x.size());
  for (size_t start = 0; start < x.size(); start += width) {
    double mean, variance;
    moments(&x[start], width, mean, variance);
    for (size_t k = 0; k < width; ++k) {
      y[start + k] = (x[start + k] - mean) / std::sqrt(variance + eps) * gamma[k] + beta[k];
    }
  }
  return y;
}

Doubles attention(Doubles const& qkv, size_t rows, size_t frames, size_t width) {
  Doubles mixed(rows * width, 0.0);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t head = 0; head < width / 64; ++head) {
      Doubles scores(frames);
      double largest = -INFINITY, sum = 0;
      for (size_t frame = 0; frame < frames; ++frame) {
        size_t const other = row / frames * frames + frame;
        for (size_t c = head * 64; c < (head + 1) * 64; ++c) {
          scores[frame] += qkv[row * 3 * width + c] * qkv[other * 3 * width + width + c] / 8;
        }
        largest = std::max(largest, scores[frame]);
      }
      for (double& score : scores) {
        sum += score = std::exp(score - largest);
      }
      for (size_t frame = 0; frame < frames; ++frame) {
        size_t const other = row / frames * frames + frame;
        for (size_t c = head * 64; c < (head + 1) * 64; ++c) {
          mixed[row * width + c] += scores[frame] / sum * qkv[other * 3 * width + 2 * width + c];
        }
      }
    }
  }
  return mixed;
}

// Message token, CFA, LayerNorm, key and value: x (F, D) to (F, 2D). weights, biases and norms as the C interface has
// them.
Doubles message_path(Doubles const& x, Doubles const (&weights)[4], Doubles const (&biases)[4],
                            Doubles const (&norms)[4], size_t frames, double eps) {
  size_t const width = norms[0].size(), rows = x.size() / width;
  Doubles message = linear(x, weights[0], biases[0], width);
  Doubles const projected = linear(layer_norm(message, norms[0], norms[1], eps), weights[1], biases[1], width);
  Doubles const added = linear(attention(projected, rows, frames, width), weights[2], biases[2], width);
  for (size_t i = 0; i < message.size(); ++i) {
    message[i] += added[i];
  }
  return linear(layer_norm(message, norms[2], norms[3], eps), weights[3], biases[3], width);
}

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
