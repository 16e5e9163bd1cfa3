// Checks every call of the C interface on a GPU against a reference in double on the host. Without a usable GPU it
// exits with 77, which CTest takes as skipped.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "reference.hpp"
#include "xclip_fast.h"

namespace {

void need(cudaError_t error, char const* what) {
  if (error != cudaSuccess) {
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
  }
}

// One element type: its code, its conversions, half a unit in the last place relative to the value.
struct Bf16 {
  using Type = __nv_bfloat16;
  static constexpr int kCode = XCLIP_FAST_BF16;
  static constexpr double kHalfUlp = 1.0 / 256;
  static Type make(double value) { return __float2bfloat16_rn(static_cast<float>(value)); }
  static double value(Type x) { return __bfloat162float(x); }
};
struct Fp16 {
  using Type = __half;
  static constexpr int kCode = XCLIP_FAST_FP16;
  static constexpr double kHalfUlp = 1.0 / 2048;
  static Type make(double value) { return __float2half_rn(static_cast<float>(value)); }
  static double value(Type x) { return __half2float(x); }
};
struct E4m3 {
  using Type = __nv_fp8_e4m3;
  static constexpr double kHalfUlp = 1.0 / 16;
  static Type make(double value) { return __nv_fp8_e4m3(static_cast<float>(value)); }
  static double value(Type x) { return static_cast<float>(x); }
};
struct Fp32 {
  using Type = float;
  static Type make(double value) { return static_cast<float>(value); }
  static double value(Type x) { return x; }
};

// A matrix on the host in double, its values exact in E, and on the device with rows `row` elements apart.
template <class E>
struct Matrix {
  int64_t rows, columns, row;
  std::vector<double> host;
  typename E::Type* device = nullptr;

  Matrix(int64_t rows, int64_t columns, int64_t row, double scale, double center = 0.0)
      : rows(rows), columns(columns), row(row), host(rows * columns) {
    static std::mt19937 generator(1);
    std::normal_distribution<double> normal(center, scale);
    std::vector<typename E::Type> image(rows * row, E::make(1e4));  // what lies between the rows must not matter
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        image[i * row + j] = E::make(normal(generator));
        host[i * columns + j] = E::value(image[i * row + j]);
      }
    }
    need(cudaMalloc(&device, image.size() * sizeof(image[0])), "cudaMalloc");
    need(cudaMemcpy(device, image.data(), image.size() * sizeof(image[0]), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  explicit Matrix(int64_t columns, double scale = 1.0, double center = 0.0)
      : Matrix(1, columns, columns, scale, center) {}
  Matrix(Matrix const&) = delete;
  ~Matrix() { cudaFree(device); }

  double operator()(int64_t i, int64_t j) const { return host[i * columns + j]; }
  double operator[](int64_t j) const { return host[j]; }
};

// Memory for a result, of NaNs, with a guard of NaNs behind it.
template <class E>
struct Result {
  int64_t size;
  typename E::Type* device = nullptr;
  static constexpr int64_t kGuard = 4096;

  explicit Result(int64_t size) : size(size) {
    need(cudaMalloc(&device, (size + kGuard) * sizeof(*device)), "cudaMalloc");
    poison();
  }
  Result(Result const&) = delete;
  ~Result() { cudaFree(device); }
  void poison() { need(cudaMemset(device, 0xff, (size + kGuard) * sizeof(*device)), "cudaMemset"); }

  // The values; the guard must be untouched.
  std::vector<double> read(std::string const& what) const {
    need(cudaDeviceSynchronize(), what.c_str());
    std::vector<typename E::Type> image(size + kGuard);
    need(cudaMemcpy(image.data(), device, image.size() * sizeof(image[0]), cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::vector<double> values(size);
    for (int64_t i = 0; i < size; ++i) {
      values[i] = E::value(image[i]);
    }
    bool guarded = true;
    for (int64_t i = size; i < size + kGuard; ++i) {
      guarded = guarded && std::isnan(E::value(image[i]));
    }
    expect(guarded, what + ": wrote past the end");
    return values;
  }
};

double quick_gelu(double u) { return u / (1.0 + std::exp(-1.702 * u)); }

template <class E>
void check_products(int64_t m, int64_t n, int64_t k) {
  Matrix<E> const x(m, k, k + 8, 1.0), w(n, k, k + 16, 1.0 / std::sqrt(double(k))), source(m, n, n + 8, 2.0);
  Matrix<Fp32> const mean(m, 0.5), rstd(m, 0.1, 1.0), sums(n), bias(n), scale(m, 0.5, 1.0);
  Doubles const product = linear(x.host, w.host, Doubles(n), k);
  auto const map = [&](auto value) {
    std::vector<double> result(m * n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        result[i * n + j] = value(i, j, product[i * n + j]);
      }
    }
    return result;
  };
  auto const plain = map([&](int64_t, int64_t j, double acc) { return acc + bias[j]; });
  auto const normed =
      map([&](int64_t i, int64_t j, double acc) { return rstd[i] * (acc - mean[i] * sums[j]) + bias[j]; });
  std::vector<double> activated(normed.size());
  std::transform(normed.begin(), normed.end(), activated.begin(), quick_gelu);
  auto const added = map([&](int64_t i, int64_t j, double acc) { return source(i, j) + scale[i] * (acc + bias[j]); });
  auto const bare = map([&](int64_t i, int64_t j, double acc) { return source(i, j) + acc; });

  Doubles means(m), rstds(m);
  for (int64_t i = 0; i < m; ++i) {
    double variance;
    moments(&added[i * n], n, means[i], variance);
    rstds[i] = 1 / std::sqrt(variance + 1e-5);
  }

  Result<E> y(m * n), u(m * n);
  Result<Fp32> partials(xclip_fast_statistics_floats(m, n)), first(m), second(m);
  for (int tile : {XCLIP_FAST_TILE_AUTO, XCLIP_FAST_TILE_SMALL, XCLIP_FAST_TILE_SQUARE, XCLIP_FAST_TILE_WIDE}) {
    std::string const where = " of type " + std::to_string(E::kCode) + " (" + std::to_string(m) + ", " +
                              std::to_string(n) + ", " + std::to_string(k) + ") tile " + std::to_string(tile);
    auto const judge = [&](std::string const& name, int code, Result<E> const& out, std::vector<double> const& wanted) {
      if (code == XCLIP_FAST_BAD_TILE && tile != XCLIP_FAST_TILE_AUTO) {
        return;
      }
      expect(code == XCLIP_FAST_OK, name + where + ": " + xclip_fast_error(code));
      if (code == XCLIP_FAST_OK) {
        close(out.read(name + where), wanted, 1.01 * E::kHalfUlp, 1e-4, name + where);
      }
    };
    auto const norm = [&](bool folded, int activation, void* kept) {
      y.poison();
      u.poison();
      return xclip_fast_norm_linear(E::kCode, tile, x.device, x.row, w.device, w.row, folded ? mean.device : nullptr,
                                    folded ? rstd.device : nullptr, folded ? sums.device : nullptr, bias.device,
                                    activation, kept, y.device, m, n, k, 0, nullptr);
    };
    judge("bias", norm(false, 0, nullptr), y, plain);
    judge("norm", norm(true, 0, nullptr), y, normed);
    judge("norm and gelu", norm(true, 1, nullptr), y, activated);
    int const kept = norm(true, 1, u.device);
    judge("norm and gelu with u", kept, y, activated);
    judge("the kept u", kept, u, normed);
    auto const residual = [&](float const* bias, float const* scale, bool reduced) {
      y.poison();
      return xclip_fast_linear_residual(E::kCode, tile, x.device, x.row, w.device, w.row, bias, scale, source.device,
                                        source.row, 1e-5f, reduced ? partials.device : nullptr,
                                        reduced ? first.device : nullptr, reduced ? second.device : nullptr, y.device,
                                        m, n, k, 0, nullptr);
    };
    judge("residual", residual(bias.device, scale.device, false), y, added);
    judge("residual without bias and scale", residual(nullptr, nullptr, false), y, bare);
    for (auto* out : {&partials, &first, &second}) {
      out->poison();
    }
    int const reduced = residual(bias.device, scale.device, true);
    judge("residual with statistics", reduced, y, added);
    if (reduced == XCLIP_FAST_OK) {
      close(first.read("means" + where), means, 1e-5, 1e-5, "means" + where);
      close(second.read("rstds" + where), rstds, 1e-4, 0, "rstds" + where);
      partials.read("partials" + where);  // its guard
    }
  }
}

// Tensor cores add 8-bit products with fewer bits than float32 has, about 13, and drop the rest at each of K / 32
// steps.
void check_fp8(int64_t m, int64_t n, int64_t k) {
  Matrix<E4m3> const x(m, k, k + 16, 50.0), w(n, k, k + 32, 50.0);
  Matrix<Bf16> const source(m, n, n + 8, 2.0);
  Matrix<Fp32> const x_scale(m, 0.001, 0.01), w_scale(n, 0.0001, 0.002), bias(n);
  Doubles const product = linear(x.host, w.host, Doubles(n), k);
  double const sum = 50.0 * 50.0 * std::sqrt(double(k)), wide = sum * std::max(double(k) / 32 / 8192, 3.0 / 4096);
  std::vector<double> plain(m * n), activated(m * n), added(m * n), slack(m * n);
  for (int64_t i = 0; i < m * n; ++i) {
    plain[i] = x_scale[i / n] * w_scale[i % n] * product[i] + bias[i % n];
    activated[i] = std::min(quick_gelu(plain[i]) / 0.01, 448.0);
    added[i] = source(i / n, i % n) + w_scale[i % n] * product[i] + bias[i % n];
  }
  double const scaled = 0.013 * 0.0024 * wide, unscaled = 0.0024 * wide;
  Result<Bf16> y(m * n);
  Result<E4m3> h(m * n);
  for (int tile : {XCLIP_FAST_TILE_AUTO, XCLIP_FAST_TILE_SQUARE, XCLIP_FAST_TILE_WIDE}) {
    std::string const where = " of e4m3 (" + std::to_string(m) + ", " + std::to_string(n) + ", " + std::to_string(k) +
                              ") tile " + std::to_string(tile);
    auto const built = [&](int code, char const* name) {
      expect(code == XCLIP_FAST_OK || (code == XCLIP_FAST_BAD_TILE && tile != XCLIP_FAST_TILE_AUTO),
             name + where + ": " + xclip_fast_error(code));
      return code == XCLIP_FAST_OK;
    };
    y.poison();
    h.poison();
    if (built(xclip_fast_fp8_linear(tile, x.device, x.row, w.device, w.row, x_scale.device, w_scale.device, bias.device,
                                    0, 1.0f, y.device, m, n, k, 0, nullptr),
              "linear")) {
      close(y.read("linear" + where), plain, 1.01 * Bf16::kHalfUlp, scaled + 1e-4, "linear" + where);
    }
    if (n % 16 == 0 &&
        built(xclip_fast_fp8_linear(tile, x.device, x.row, w.device, w.row, x_scale.device, w_scale.device, bias.device,
                                    1, 0.01f, h.device, m, n, k, 0, nullptr),
              "gelu")) {
      close(h.read("gelu" + where), activated, 1.01 * E4m3::kHalfUlp, 100 * scaled + 0.002, "gelu" + where);
    }
    y.poison();
    if (built(xclip_fast_fp8_linear_residual(tile, x.device, x.row, w.device, w.row, w_scale.device, bias.device,
                                             source.device, source.row, y.device, m, n, k, 0, nullptr),
              "residual")) {
      close(y.read("residual" + where), added, 1.01 * Bf16::kHalfUlp, unscaled + 1e-4, "residual" + where);
    }
  }
}

// On a stream of its own and replayed from a graph, a call gives the same bits.
template <class Call>
void check_capture(std::string const& name, Result<Bf16>& y, Call&& call) {
  cudaStream_t stream;
  need(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  y.poison();
  need(cudaDeviceSynchronize(), "poison");
  expect(call(stream) == XCLIP_FAST_OK, name + ": a call on a stream");
  auto const direct = y.read(name + " on a stream");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  expect(call(stream) == XCLIP_FAST_OK, name + ": a call while a graph is captured");
  need(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  need(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  y.poison();
  need(cudaDeviceSynchronize(), "poison");
  need(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
  close(y.read(name + " replayed"), direct, 0, 0, name + " replayed from a graph");
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

void check_captured_product() {
  int64_t const m = 300, n = 384, k = 768;
  Matrix<Bf16> const x(m, k, k, 1.0), w(n, k, k, 0.04), source(m, n, n, 1.0);
  Matrix<Fp32> const bias(n);
  Result<Bf16> y(m * n);
  check_capture("residual", y, [&](void* stream) {
    return xclip_fast_linear_residual(XCLIP_FAST_BF16, XCLIP_FAST_TILE_AUTO, x.device, k, w.device, k, bias.device,
                                      nullptr, source.device, n, 0.0f, nullptr, nullptr, nullptr, y.device, m, n, k, 0,
                                      stream);
  });
}

template <class E, class P>
void check_message(int parameter_code, int64_t rows, int64_t frames, int64_t width, int blocks) {
  double const scale = 1 / std::sqrt(double(width));
  Matrix<E> const x(rows, width, width + 8, 1.0), fc(width, width, width, scale),
      qkv(3 * width, width, width, 2 * scale), out(width, width, width, scale), kv(2 * width, width, width, scale);
  Matrix<P> const b0(width, 0.3), b1(3 * width, 0.3), b2(width, 0.3), b3(2 * width, 0.3), n0(width, 0.3, 1.0),
      n1(width, 0.3), n2(width, 0.3, 1.0), n3(width, 0.3);
  void const* const weights[] = {fc.device, qkv.device, out.device, kv.device};
  void const* const biases[] = {b0.device, b1.device, b2.device, b3.device};
  void const* const norms[] = {n0.device, n1.device, n2.device, n3.device};
  Result<Fp32> workspace(xclip_fast_message_floats(rows, width));
  Result<E> key_value(rows * 2 * width);
  std::string const what = "message path of " + std::to_string(rows) + " rows, width " + std::to_string(width) + ", " +
                           std::to_string(blocks) + " blocks";
  auto const call = [&] {
    return xclip_fast_message_kv(E::kCode, parameter_code, blocks, x.device, x.row, weights, biases, norms, 1e-5f, rows,
                                 frames, width, workspace.device, key_value.device, 0, nullptr);
  };
  int const done = call();
  expect(done == XCLIP_FAST_OK, what + ": " + xclip_fast_error(done));
  auto const wanted = message_path(x.host, {fc.host, qkv.host, out.host, kv.host}, {b0.host, b1.host, b2.host, b3.host},
                                   {n0.host, n1.host, n2.host, n3.host}, frames, 1e-5);
  auto const first = key_value.read(what);
  close(first, wanted, 1.01 * E::kHalfUlp, 8 * E::kHalfUlp, what);
  workspace.read(what);
  for (int i = 0; i < 50; ++i) {  // a missing barrier shows as a difference between runs
    workspace.poison();
    key_value.poison();
    call();
    close(key_value.read(what), first, 0, 0, what + ", again");
  }
  if constexpr (std::is_same_v<E, Bf16>) {
    check_capture(what, key_value, [&](void* stream) {
      return xclip_fast_message_kv(E::kCode, parameter_code, blocks, x.device, x.row, weights, biases, norms, 1e-5f,
                                   rows, frames, width, workspace.device, key_value.device, 0, stream);
    });
  }
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  // what was compiled for this device: the message path, the products
  int const plain = xclip_fast_check_message(384, 0), products = xclip_fast_check_device(0);
  if (plain) {
    std::printf("skipped: %s\n", xclip_fast_error(plain));
    return 77;
  }
  if (products == XCLIP_FAST_OK) {
    // the last: every group of warps gets several tiles
    int64_t const sizes[][3] = {{1, 128, 64},      {65, 136, 72},    {127, 8, 8},     {300, 384, 768},
                                {1000, 520, 2304}, {1576, 768, 768}, {20000, 520, 64}};
    for (auto const& [m, n, k] : sizes) {
      check_products<Bf16>(m, n, k);
      check_products<Fp16>(m, n, k);
    }
    for (auto const& [m, n, k] :
         {std::array<int64_t, 3>{1, 128, 64}, {65, 136, 80}, {300, 384, 768}, {1000, 528, 3072}, {20000, 528, 64}}) {
      check_fp8(m, n, k);
    }
    check_captured_product();
  } else {
    std::printf("products not checked: %s\n", xclip_fast_error(products));
  }
  if (xclip_fast_check_message(768, 0) == XCLIP_FAST_OK) {
    check_message<Bf16, Bf16>(XCLIP_FAST_BF16, 8, 8, 768, 0);
    check_message<Bf16, Fp32>(XCLIP_FAST_FP32, 48, 16, 768, 0);
  }
  if (xclip_fast_check_message(1024, 0) == XCLIP_FAST_OK) {
    check_message<Fp16, Fp16>(XCLIP_FAST_FP16, 64, 64, 1024, 0);
  }
  check_message<Fp16, Fp32>(XCLIP_FAST_FP32, 15, 5, 384, 50);
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
