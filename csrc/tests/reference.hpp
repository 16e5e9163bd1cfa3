// What the check programs share: expectations, and the message path and its parts in double, plainly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

inline int failures = 0;

inline void expect(bool holds, std::string const& what) {
  if (!holds) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

// |got - wanted| <= relative |wanted| + absolute, everywhere.
inline void close(std::vector<double> const& got, std::vector<double> const& wanted, double relative, double absolute,
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
inline Doubles linear(Doubles const& x, Doubles const& w, Doubles const& bias, size_t width) {
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

inline void moments(double const* row, size_t width, double& mean, double& variance) {
  mean = variance = 0;
  for (size_t k = 0; k < width; ++k) {
    mean += row[k] / width;
  }
  for (size_t k = 0; k < width; ++k) {
    variance += (row[k] - mean) * (row[k] - mean) / width;
  }
}

inline Doubles layer_norm(Doubles const& x, Doubles const& gamma, Doubles const& beta, double eps) {
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

inline Doubles attention(Doubles const& qkv, size_t rows, size_t frames, size_t width) {
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
inline Doubles message_path(Doubles const& x, Doubles const (&weights)[4], Doubles const (&biases)[4],
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
