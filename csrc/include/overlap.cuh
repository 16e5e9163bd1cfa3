// Programmatic dependent launch: a kernel's blocks start while the last blocks of the kernel before it still run.
//
// Such a kernel touches no memory before griddepcontrol.wait, which returns when the kernel before it has ended and its
// writes are visible. Every kernel launched so must wait: one that ended without waiting would let the next one run
// beside the one before it. Then each kernel comes after all earlier ones, and buffers may be reused as on any stream.
#pragma once

#include <cuda_runtime_api.h>

namespace xclip_fast {

inline cudaLaunchAttribute start_early() {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

}  // namespace xclip_fast
