// The tiles of the products: rows and columns of a block's share of y, which is 64 deep, and the cluster.
//
// Pingpong: two groups of warps, each with a tile of its own, one in its epilogue while the other multiplies.
// docs/kernels.md says why these.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "products.cuh"

namespace xclip_fast {

template <int name, int rows, int columns, int subtile = 0>
struct Tile {
  static constexpr int kName = name, kRows = rows, kColumns = columns, kCluster = 2;
  static constexpr int kSubtile = subtile;  // columns that an epilogue takes at a time; 0: CUTLASS's choice
  using Shape = cute::Shape<cute::Int<rows>, cute::Int<columns>, cute::_64>;
  using Cluster = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
};

using Square = Tile<XCLIP_FAST_TILE_SQUARE, 128, 128>;
using Wide = Tile<XCLIP_FAST_TILE_WIDE, 128, 192>;
// as Wide; with CUTLASS's subtiles of 32 columns the compiler spills
using WideStatistics = Tile<XCLIP_FAST_TILE_WIDE, 128, 192, 16>;

// Cycles of a product, estimated: whole waves of tiles, each bound by the tensor cores (2,048 multiply-adds a cycle) or
// by what it reads of L2 (64 bytes a cycle; a cluster reads w once), about 2,000 more for each tile, by an H200's
// times, and the last epilogue, which nothing hides. It only orders the tiles.
template <class Tile>
int64_t estimated_cycles(Operands const& given) {
  constexpr int kMultiplied = Tile::kRows * Tile::kColumns / 2048;
  constexpr int kRead = (Tile::kRows + Tile::kColumns / Tile::kCluster) * 2 / 64;
  int64_t const tiles = ((given.m + Tile::kRows - 1) / Tile::kRows) * ((given.n + Tile::kColumns - 1) / Tile::kColumns);
  int64_t const waves = (tiles + given.processors - 1) / given.processors;
  return waves * (given.k * (kMultiplied > kRead ? kMultiplied : kRead) + 2000) + Tile::kRows * Tile::kColumns / 5;
}

}  // namespace xclip_fast
