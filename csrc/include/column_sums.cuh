// Sums of a tile's columns as a node of CUTLASS's epilogue visitor trees.
//
// CUTLASS's Sm90RowReduction keeps its sums in local memory for tiles of 128 x 128 (CUTLASS 4.2). Here a warp finishes
// the columns of one part of the tile before the next part begins, so the sums stay in eight registers, and it writes
// them as a row of its own: no shared memory, no barrier, no atomics.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"

namespace xclip_fast {

// A warp of a group of four has 16 rows of each 64: lane 4 g + t holds rows g and g + 8, and of every 8 columns 2 t and
// 2 t + 1. Parts of a tile are 32 columns wide, so a lane has 8 columns of each.
inline constexpr int kColumnsOfLane = 8, kWarpsOfTile = 4;

// Adds over the 8 lanes with the same t; what is left in values[0] belongs to the lane's g-th column.
CUTLASS_DEVICE void add_over_rows(float (&values)[kColumnsOfLane], int lane) {
  CUTLASS_PRAGMA_UNROLL
  for (int half = kColumnsOfLane / 2; half > 0; half /= 2) {
    int const distance = 4 * half;
    bool const upper = lane & distance;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < half; ++i) {
      float const kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
}

// Passes its input on. Rows past M add nothing: what it is given there must be 0.
template <class Shape>
struct SumColumns {
  struct SharedStorage {};
  struct Arguments {
    float* partials = nullptr;  // (kWarpsOfTile tiles along M, N)
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& given, void*) {
    return given;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE SumColumns() {}
  CUTLASS_HOST_DEVICE SumColumns(Params const& params, SharedStorage const&) : params(params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // out and sums (CPY, CPY_M, CPY_N, EPI_M, EPI_N): a thread's elements of the tile, those of one column being one
  template <class Out, class Sums>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Out const& out, Sums const& sums, float const* row_end)
        : out(out), sums(sums), row_end(row_end) {}
    Out out;
    Sums sums;
    float const* row_end;  // of the row that is written

    template <class Accumulator, class Input, int Size>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, Size> const&, int epi_v, int epi_m, int epi_n,
                              cutlass::Array<Input, Size> const& input) {
      cute::Tensor part = sums(cute::_, cute::_, cute::_, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        part(epi_v * Size + i) += input[i];
      }
      return input;
    }

    template <class Shared, class Sync, class Results>
    CUTLASS_DEVICE void reduce(Shared&&, Sync const&, int epi_m, int epi_n, bool, Results const&) {
      if (epi_m + 1 < cute::size<3>(sums)) {
        return;
      }
      cute::Tensor columns = cute::filter(sums(cute::_, cute::_, cute::_, 0, epi_n));
      static_assert(decltype(cute::size(columns))::value == kColumnsOfLane, "a lane has other columns than assumed");
      float values[kColumnsOfLane];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kColumnsOfLane; ++i) {
        values[i] = columns(i);
      }
      int const lane = cutlass::canonical_lane_idx();
      add_over_rows(values, lane);
      cute::Tensor places = cute::filter(out(cute::_, cute::_, cute::_, 0, epi_n));
      if (&places(lane / 4) < row_end) {
        places(lane / 4) = values[0];
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    constexpr int kRows = size<0>(Shape{}), kColumns = size<1>(Shape{});
    static_assert(decltype(size(args.tiled_copy))::value == kWarpsOfTile * cutlass::NumThreadsPerWarp,
                  "a tile is shared by other threads than assumed");
    auto const [m, n, k, l] = args.tile_coord_mnkl;
    auto const [M, N, K, L] = args.problem_shape_mnkl;
    int64_t const row = int64_t(m) * kWarpsOfTile + args.thread_idx / cutlass::NumThreadsPerWarp;
    float* const to = params.partials + row * int64_t(N);
    Tensor tile = make_tensor(make_gmem_ptr(to + int64_t(n) * kColumns),
                              make_layout(take<0, 2>(Shape{}), make_stride(_0{}, _1{})));
    Tensor out = cutlass::epilogue::fusion::sm90_partition_for_epilogue<ReferenceSrc>(tile, args.epi_tile,
                                                                                      args.tiled_copy, args.thread_idx);
    Tensor sums = make_tensor_like<float>(out);
    fill(sums, 0.0f);
    // a block of a cluster may have a tile past the last row, which writes nothing
    return Callbacks<decltype(out), decltype(sums)>(out, sums, m * kRows < M ? to + N : params.partials);
  }

  Params params;
};

}  // namespace xclip_fast
