// The instructions that CUDA C++ has no words for, one function each; csrc/tests/emulator.hpp has them in plain C++.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace xclip_fast {

// Copies 16 bytes of global memory into shared memory in the background.
__device__ inline void copy_async(void* shared, void const* global) {
  auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last `kPending` groups of this thread's copies are there.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a b^T of a warp, a (16, 16), b (8, 16), c (16, 8). Lane 4 g + t has of a, two elements each, rows g, g + 8, g, g
// + 8 at columns 2 t, 2 t, 2 t + 8, 2 t + 8; of b row g at columns 2 t and 2 t + 8; of c rows g, g, g + 8, g + 8 at
// columns 2 t and 2 t + 1.
template <class T>
__device__ void multiply(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]);
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply<__half>(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Waits for all threads of all blocks, which were launched together; what they wrote is seen.
__device__ inline void wait_for_grid() { cooperative_groups::this_grid().sync(); }

}  // namespace xclip_fast
