// Checks on the host, without a GPU, what the epilogues assume of CUTLASS's layouts: which rows and columns of a tile a
// thread holds (column_sums.cuh), by running the sums of a tile of numbers through those layouts, lane by lane.
#include <cstdio>
#include <vector>

#include "gemm.cuh"
#include "reference.hpp"

namespace {

using namespace cute;
using namespace xclip_fast;

template <class Tile, class Element>
void check_column_sums() {
  using Sloped = xclip_fast::Product<Tile, Element, Slope>;
  using Epilogue = typename Sloped::CollectiveEpilogue;
  using EpilogueTile = typename Epilogue::EpilogueTile;
  constexpr int kRows = size<0>(typename Tile::Shape{}), kColumns = size<1>(typename Tile::Shape{});
  auto const atom =
      make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, typename Sloped::CollectiveMainloop::TiledMma{});
  auto const tiled_copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, Element>{}, atom);
  constexpr int kThreads = decltype(size(tiled_copy))::value;
  expect(kThreads == 32 * kWarpsOfTile, "a group of four warps shares a tile");

  std::vector<int> times(kRows * kColumns, 0);
  std::vector<long> sums(kColumns, 0), wanted(kColumns, 0);
  Tensor coordinates = make_identity_tensor(make_shape(Int<kRows>{}, Int<kColumns>{}));
  std::vector<float> const nothing(kRows * kColumns);
  for (int warp = 0; warp < kWarpsOfTile; ++warp) {
    // what each lane of the warp has summed: (lane, part of the tile, column of the lane)
    constexpr int kParts = kColumns / size<1>(EpilogueTile{});
    static long held[32][kParts][kColumnsOfLane];
    static long column[32][kParts][kColumnsOfLane];
    for (int lane = 0; lane < 32; ++lane) {
      int const thread = 32 * warp + lane;
      Tensor mine = fusion::sm90_partition_for_epilogue<true>(coordinates, EpilogueTile{}, tiled_copy, thread);
      Tensor tile =
          make_tensor(nothing.data(), make_layout(take<0, 2>(typename Tile::Shape{}), make_stride(_0{}, _1{})));
      Tensor out = fusion::sm90_partition_for_epilogue<true>(tile, EpilogueTile{}, tiled_copy, thread);
      Tensor registers = make_tensor_like<float>(out);
      for (int part = 0; part < kParts; ++part) {
        Tensor columns = filter(registers(_, _, _, 0, part));
        Tensor places = filter(out(_, _, _, 0, part));
        for (int slot = 0; slot < kColumnsOfLane; ++slot) {
          held[lane][part][slot] = 0;
          column[lane][part][slot] = &places(slot) - nothing.data();
        }
        for (int m = 0; m < size<3>(mine); ++m) {
          Tensor values = mine(_, _, _, m, part);
          Tensor kept = registers(_, _, _, m, part);
          for (int i = 0; i < size(values); ++i) {
            int const row = get<0>(values(i)), at = get<1>(values(i));
            int const slot = static_cast<int>(&kept(i) - &columns(0));
            ++times[row * kColumns + at];
            wanted[at] += 1000 * row + at;
            expect(slot >= 0 && slot < kColumnsOfLane && column[lane][part][slot] == at, "a register is of one column");
            expect(row % 64 / 16 == warp, "a warp has 16 rows of each 64");
            held[lane][part][slot] += 1000 * row + at;
          }
        }
      }
    }
    // what add_over_rows leaves: in lane 4 g + t the g-th column, summed over the lanes with this t
    for (int lane = 0; lane < 32; ++lane) {
      for (int part = 0; part < kParts; ++part) {
        int const slot = lane / 4;
        for (int g = 0; g < 8; ++g) {
          int const other = 4 * g + lane % 4;
          expect(column[other][part][slot] == column[lane][part][slot], "lanes with one t have the same columns");
          sums[column[lane][part][slot]] += held[other][part][slot];
        }
      }
    }
  }
  bool once = true;
  for (int count : times) {
    once = once && count == 1;
  }
  expect(once, "each element of the tile belongs to one thread");
  expect(sums == wanted, "the columns' sums");
}

}  // namespace

int main() {
  check_column_sums<Square, cutlass::bfloat16_t>();
  check_column_sums<Square, cutlass::half_t>();
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
