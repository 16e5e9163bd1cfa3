// y = epilogue(x W^T) as a CUTLASS 3.x kernel: TMA loads and stores, warp-specialized, persistent, WGMMA, sm_90a.
//
// x (M, K) is row-major, W (N, K) is row-major too: for CUTLASS a column-major (K, N). y (M, N) is row-major. Slope
// takes x W in place of x W^T, with W (K, N) row-major.
//
// A product starts early (overlap.cuh). CUTLASS's producer warps wait for the kernel before it: one loads x and W, one
// the residual. The consumer warps read the vectors and write y and the sums of tiles behind a tile's first WGMMA, and
// so behind the mbarrier that a load of x completes, which is behind the wait.
#pragma once

#include <atomic>
#include <type_traits>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_store_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/device_kernel.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/functional.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

#include "column_sums.cuh"
#include "epilogues.cuh"
#include "overlap.cuh"
#include "products.cuh"
#include "tiles.cuh"
#include "xclip_fast.h"

namespace xclip_fast {

namespace fusion = cutlass::epilogue::fusion;
namespace epilogue = cutlass::epilogue::collective;

inline constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

template <template <class> class Node, class Output, class... Children>
using Apply = fusion::Sm90EVT<fusion::Sm90Compute<Node, Output, float, kRound>, Children...>;

// A float of each row of y, and one of each column; null pointers stand for a constant. CUTLASS calls the first a
// column vector and the second a row vector.
template <class Tile>
using OfRow =
    fusion::Sm90ColBroadcast<0, typename Tile::Shape, float, float, cute::Stride<cute::_1, cute::_0, cute::_0>>;
template <class Tile>
using OfColumn =
    fusion::Sm90RowBroadcast<0, typename Tile::Shape, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;

using RowMajorStride = cute::Stride<int64_t, cute::_1, int64_t>;

inline RowMajorStride row_major(int64_t row) { return {row, cute::_1{}, int64_t(0)}; }

// u = r (x W^T - mu s) + b
template <class Tile, class Output>
using NormNode =
    Apply<NormLinear, Output, fusion::Sm90AccFetch, OfRow<Tile>, OfRow<Tile>, OfColumn<Tile>, OfColumn<Tile>>;

template <class Node>
typename Node::Arguments norm_arguments(NormArguments const& given) {
  return {{}, {given.mean, 0.0f, {}}, {given.rstd, 1.0f, {}}, {given.sums, 0.0f, {}}, {given.bias, 0.0f, {}}, {}};
}

// What most products have: W as (N, K), and nothing that the epilogue reads beside vectors.
struct Usual {
  using Source = void;
  using Weight = cutlass::layout::ColumnMajor;
};

// y = u
template <class Tile, class Element>
struct Norm : Usual {
  using Tree = NormNode<Tile, Element>;
  static typename Tree::Arguments arguments(NormArguments const& given) { return norm_arguments<Tree>(given); }
};

// y = quick_gelu(u)
template <class Tile, class Element>
struct NormGelu : Usual {
  using Inner = NormNode<Tile, float>;
  using Tree = Apply<QuickGelu, Element, Inner>;
  static typename Tree::Arguments arguments(NormArguments const& given) { return {norm_arguments<Inner>(given), {}}; }
};

// A node that stores its input (M, N) in `Element` as well, by TMA, and passes it on.
template <class Tile, class Element, class Source>
struct Keep {
  static_assert(Tile::kSubtile == 0, "its stages are those of CUTLASS's choice, or a store may not have read them");
  using Descriptor = epilogue::detail::EpilogueDescriptor<typename Tile::Shape, epilogue::EpilogueTileAuto, Source,
                                                          Element, typename Tile::EpilogueSchedule>;
  using Store = epilogue::detail::AuxStoreDescriptor<Descriptor, cutlass::layout::RowMajor, Element>;
  using Node = fusion::Sm90AuxStore<Store::Stages, typename Descriptor::EpilogueTile, Element, kRound,
                                    typename Store::Stride, typename Store::SmemLayoutAtom, typename Store::CopyOpR2S>;
};

// y = quick_gelu(u); u is stored as well.
template <class Tile, class Element>
struct NormGeluKept : Usual {
  using Inner = NormNode<Tile, float>;
  using Kept = fusion::Sm90EVT<typename Keep<Tile, Element, void>::Node, Inner>;
  using Tree = Apply<QuickGelu, Element, Kept>;
  static typename Tree::Arguments arguments(NormArguments const& given) {
    typename Kept::Arguments kept = {norm_arguments<Inner>(given),
                                     {static_cast<Element*>(given.u), row_major(given.n)}};
    return {kept, {}};
  }
};

// y = (x W) quick_gelu'(u) and the sums of its columns; h = quick_gelu(u) is stored as well.
template <class Tile, class Element>
struct Slope {
  using Source = Element;
  using Weight = cutlass::layout::RowMajor;
  using U = fusion::Sm90SrcFetch<Element>;
  using H = fusion::Sm90EVT<typename Keep<Tile, Element, Source>::Node, Apply<QuickGelu, float, U>>;
  using Wide = Apply<TimesSlope, float, fusion::Sm90AccFetch, H, U>;
  using Sums = fusion::Sm90EVT<SumColumns<typename Tile::Shape>, Wide>;
  using Tree = Apply<cutlass::epilogue::thread::Identity, Element, Sums>;
  static typename Tree::Arguments arguments(SlopeArguments const& given) {
    typename H::Arguments h = {{{}, {}}, {static_cast<Element*>(given.h), row_major(given.n)}};
    typename Sums::Arguments sums = {{{}, h, {}, {}}, {given.partials}};
    return {sums, {}};
  }
};

// y = residual + s (x W^T + b)
template <class Tile, class Output, class Source>
using ResidualNode =
    Apply<AddResidual, Output, fusion::Sm90AccFetch, OfColumn<Tile>, OfRow<Tile>, fusion::Sm90SrcFetch<Source>>;

template <class Node>
typename Node::Arguments residual_arguments(ResidualArguments const& given) {
  return {{}, {given.bias, 0.0f, {}}, {given.scale, 1.0f, {}}, {}, {}};
}

template <class Tile, class Element>
struct Residual : Usual {
  using Source = Element;
  using Tree = ResidualNode<Tile, Element, Element>;
  static typename Tree::Arguments arguments(ResidualArguments const& given) {
    return residual_arguments<Tree>(given);
  }
};

// Sums along a row of the tile, in float32; `Add` takes what was summed so far and the next value. CUTLASS writes those
// of each tile to memory and leaves it to us to merge them: no atomics, the same bits in every run.
template <class Tile, template <class> class Add>
using SumRow = fusion::Sm90ColReduction<Add, cutlass::plus, cutlass::plus, 0, typename Tile::Shape, float, float,
                                        kRound, cute::Stride<cute::_1, cute::_0, cute::_0>, 4, /*EnableNullptr=*/false,
                                        /*FinalReduction=*/false, /*VisitCheckOOB=*/false>;

// y as above, and the sums of y and y^2 along each row of each tile
template <class Tile, class Element>
struct ResidualStatistics : Usual {
  using Source = Element;
  using Inner = ResidualNode<Tile, float, Element>;
  using Sums = fusion::Sm90EVT<SumRow<Tile, cutlass::plus>, Inner>;
  using Squares = fusion::Sm90EVT<SumRow<Tile, cutlass::square_and_plus>, Sums>;
  using Tree = Apply<cutlass::epilogue::thread::Identity, Element, Squares>;
  static typename Tree::Arguments arguments(ResidualArguments const& given) {
    typename Sums::Arguments sums = {residual_arguments<Inner>(given), {given.sums, 0.0f, {}}};
    return {{sums, {given.squares, 0.0f, {}}}, {}};
  }
};

template <class Tile, class Element, template <class, class> class Epilogue>
struct Product {
  using Fusion = Epilogue<Tile, Element>;
  static constexpr int kAlignment = 16 / sizeof(Element);

  using Whole =
      epilogue::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape,
                                  typename Tile::Cluster, epilogue::EpilogueTileAuto, float, float,
                                  typename Fusion::Source, cutlass::layout::RowMajor, kAlignment, Element,
                                  cutlass::layout::RowMajor, kAlignment, typename Tile::EpilogueSchedule,
                                  typename Fusion::Tree>;

  // Narrow subtiles: 8 stages of the residual and 4 of y, which share memory, in place of CUTLASS's 4 and 2.
  using Narrow =
      epilogue::detail::Sm90TmaBuilderImpl<typename Tile::Shape, cute::Shape<cute::_64, cute::Int<Tile::kSubtile>>,
                                           float, float, typename Fusion::Source, cutlass::layout::RowMajor,
                                           kAlignment, Element, cutlass::layout::RowMajor, kAlignment,
                                           typename Fusion::Tree,
                                           cutlass::epilogue::Sm90TmaWarpSpecialized<8, 4, Tile::kSubtile / 2, true,
                                                                                     false>>;

  using CollectiveEpilogue = typename std::conditional_t<Tile::kSubtile == 0, Whole, Narrow>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      typename Fusion::Weight, kAlignment, float, typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Tile::Schedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  template <class Arguments>
  static int run(Operands const& given, Arguments const& extra) {
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = given.device;
    hardware.sm_count = given.processors;
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {int(given.m), int(given.n), int(given.k), 1},
                                       {static_cast<Element const*>(given.x), row_major(given.x_row),
                                        static_cast<Element const*>(given.w), weight_stride(given.w_row)},
                                       {Fusion::arguments(extra), static_cast<Element const*>(given.source),
                                        row_major(given.source_row), static_cast<Element*>(given.y), row_major(given.n)},
                                       hardware};
    // the persistent scheduler and these trees need no workspace; should CUTLASS change that, refuse
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess || Gemm::get_workspace_size(arguments) != 0) {
      return XCLIP_FAST_REFUSED;
    }
    if (int const code = allow_shared_memory(given.device)) {
      return code;
    }
    typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
    cudaLaunchAttribute attributes[2] = {start_early()};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {Tile::kCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = static_cast<cudaStream_t>(given.stream);
    config.attrs = attributes;
    config.numAttrs = 2;
    void* pointers[] = {&params};
    if (cudaLaunchKernelExC(&config, entry(), pointers) != cudaSuccess) {
      return failure();
    }
    if constexpr (std::is_same_v<Fusion, ResidualStatistics<Tile, Element>>) {
      return merge_statistics(given, extra, Tile::kRows, Tile::kColumns);
    }
    return XCLIP_FAST_OK;
  }

 private:
  static auto weight_stride(int64_t row) {
    if constexpr (std::is_same_v<typename Fusion::Weight, cutlass::layout::ColumnMajor>) {
      return row_major(row);
    } else {
      return cute::Stride<cute::_1, int64_t, int64_t>{cute::_1{}, row, int64_t(0)};
    }
  }

  static void const* entry() { return reinterpret_cast<void const*>(cutlass::device_kernel<Kernel>); }

  // Once for each device: the setting stays. `device` is current; facts() has checked that it is below 64.
  static int allow_shared_memory(int device) {
    static std::atomic<uint64_t> allowed{0};
    uint64_t const bit = uint64_t(1) << device;
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
      if (cudaFuncSetAttribute(entry(), cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize) !=
          cudaSuccess) {
        return failure();
      }
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
    return XCLIP_FAST_OK;
  }
};

// Runs a product on the tile that is asked for, or else on the one that takes the fewest cycles by the estimate.
template <class Element, template <class, class> class Epilogue, class... Tiles, class Arguments>
int run_on_tile(int tile, Operands const& given, Arguments const& extra) {
  if (tile == XCLIP_FAST_TILE_AUTO) {
    int64_t least = INT64_MAX;
    auto const consider = [&](int name, int64_t cycles) {
      if (cycles < least) {
        least = cycles;
        tile = name;
      }
    };
    (consider(Tiles::kName, estimated_cycles<Tiles>(given)), ...);
  }
  int code = XCLIP_FAST_BAD_TILE;
  ((tile == Tiles::kName && (code = Product<Tiles, Element, Epilogue>::run(given, extra), true)) || ...);
  return code;
}

}  // namespace xclip_fast
