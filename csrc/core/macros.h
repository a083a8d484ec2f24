#pragma once
// What lets one header serve the host compiler, nvcc and the emulator.

#if defined(__CUDACC__)
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QK_HOST_DEVICE inline
#endif
