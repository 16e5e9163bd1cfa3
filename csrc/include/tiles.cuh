// The tiles of the products: rows, columns and depth of a block's share of y, the cluster, the schedule.
//
// Pingpong: two groups of warps, each with a tile of its own, one in its epilogue while the other multiplies.
// Cooperative: two groups share one larger tile. Those of 8-bit operands have the same names, and twice the depth. None
// has been measured; docs/kernels.md says why these.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "products.cuh"

namespace xclip_fast {

struct Small {
  static constexpr int kName = XCLIP_FAST_TILE_SMALL;
  static constexpr int64_t kLeastK = 0;
  using Shape = cute::Shape<cute::_64, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
};

struct Square {
  static constexpr int kName = XCLIP_FAST_TILE_SQUARE;
  static constexpr int64_t kLeastK = 0;
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
};

struct SquareFp8 : Square {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;
};

struct Wide {
  static constexpr int kName = XCLIP_FAST_TILE_WIDE;
  static constexpr int64_t kLeastK = 2048;  // cooperative groups do not hide the epilogue: it must be a small part
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

struct WideFp8 : Wide {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_128>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
};

}  // namespace xclip_fast
