// The tiles of the products: rows, columns and depth of a block's share of y, the cluster, the schedule.
//
// Pingpong: two groups of warps, each with a tile of its own, one in its epilogue while the other multiplies. Tiles of
// 8-bit operands have the same names, and twice the depth. docs/kernels.md says why these.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "products.cuh"

namespace xclip_fast {

template <int name, int rows, int columns, int cluster, int depth = 64,
          class MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong, int subtile = 0>
struct Tile {
  static constexpr int kName = name, kRows = rows, kColumns = columns, kCluster = cluster;
  static constexpr int kSubtile = subtile;  // columns that an epilogue takes at a time; 0: CUTLASS's choice
  using Shape = cute::Shape<cute::Int<rows>, cute::Int<columns>, cute::Int<depth>>;
  using Cluster = cute::Shape<cute::Int<cluster>, cute::_1, cute::_1>;
  using Schedule = MainSchedule;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
};

using Fp8Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;

using Square = Tile<XCLIP_FAST_TILE_SQUARE, 128, 128, 2>;
using Wide = Tile<XCLIP_FAST_TILE_WIDE, 128, 192, 2>;
// as Wide; with CUTLASS's subtiles of 32 columns the compiler spills
using WideStatistics =
    Tile<XCLIP_FAST_TILE_WIDE, 128, 192, 2, 64, cutlass::gemm::KernelTmaWarpSpecializedPingpong, 16>;
using SquareFp8 = Tile<XCLIP_FAST_TILE_SQUARE, 128, 128, 2, 128, Fp8Schedule>;
using WideFp8 = Tile<XCLIP_FAST_TILE_WIDE, 128, 192, 2, 128, Fp8Schedule>;

// Cycles of a product, estimated: whole waves of tiles, each bound by the tensor cores (2,048 multiply-adds a cycle) or
// by what it reads of L2 (64 bytes a cycle; a cluster reads w once), about 2,000 more for each tile, by an H200's
// times, and the last epilogue, which nothing hides. It only orders the tiles; with 8-bit operands the first two are
// half.
template <class Tile>
int64_t estimated_cycles(Operands const& given) {
  constexpr int kMultiplied = Tile::kRows * Tile::kColumns / 2048;
  constexpr int kRead = (Tile::kRows + Tile::kColumns / Tile::kCluster) * 2 / 64;
  int64_t const tiles = ((given.m + Tile::kRows - 1) / Tile::kRows) * ((given.n + Tile::kColumns - 1) / Tile::kColumns);
  int64_t const waves = (tiles + given.processors - 1) / given.processors;
  return waves * (given.k * (kMultiplied > kRead ? kMultiplied : kRead) + 2000) + Tile::kRows * Tile::kColumns / 5;
}

}  // namespace xclip_fast
