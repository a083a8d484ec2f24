# The CUDA library: built whenever nvcc is there, whether or not this machine has a GPU.
set(QK_CUDA_FAMILIES stats fake_quantize attention learned_basis bitplanes lowbit gemm matmul conv peaks)

set(QK_CUDA_BUILT "")
set(QK_CUDA_REASON "left out (QK_CUDA=0)")
# One that an earlier build left behind would no longer match the schemas.
set(QK_CUDA_LIBRARY "${QK_OUTPUT_DIR}/quantkernels_cuda.so")
if(QK_CUDA STREQUAL "0")
  file(REMOVE "${QK_CUDA_LIBRARY}")
  return()
endif()

find_program(QK_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT QK_NVCC)
  set(QK_CUDA_REASON "left out, no nvcc found (install the CUDA toolkit or set CUDA_HOME)")
  if(QK_CUDA STREQUAL "1")
    message(FATAL_ERROR "quantkernels: QK_CUDA=1, but nvcc was not found. Install the CUDA toolkit or set CUDA_HOME.")
  endif()
  file(REMOVE "${QK_CUDA_LIBRARY}")
  return()
endif()

# Code for each target, and PTX of the newest one without its architecture-specific suffix, for chips that come later.
set(CMAKE_CUDA_COMPILER "${QK_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(QK_GENCODE "")
foreach(arch ${QK_CUDA_ARCHS})
  list(APPEND QK_GENCODE "-gencode=arch=compute_${arch},code=sm_${arch}")
  string(REGEX REPLACE "[a-z]+$" "" QK_NEWEST "${arch}")
endforeach()
list(APPEND QK_GENCODE "-gencode=arch=compute_${QK_NEWEST},code=compute_${QK_NEWEST}")

list(TRANSFORM QK_CUDA_FAMILIES PREPEND csrc/cuda/ OUTPUT_VARIABLE sources)
list(TRANSFORM sources APPEND .cu)
add_library(qk_cuda_kernels OBJECT csrc/cuda/context.cu ${sources})
target_include_directories(qk_cuda_kernels PRIVATE csrc)
# No contraction: element-wise results are bit-equal to the CPU's.
target_compile_options(qk_cuda_kernels PRIVATE ${QK_GENCODE} --fmad=false -O3 -Xcompiler -Wall)

# The shims for streams live in libtorch_cuda, which a CPU-only torch does not have. An empty library of that name lets the
# real one be recorded as needed; it is found, already loaded, when torch with CUDA loads this one.
set(qk_torch_cuda "${QK_TORCH_ROOT}/lib/libtorch_cuda.so")
if(NOT EXISTS "${qk_torch_cuda}")
  file(WRITE "${CMAKE_BINARY_DIR}/stub/empty.cpp" "")
  add_library(qk_torch_cuda_stub SHARED "${CMAKE_BINARY_DIR}/stub/empty.cpp")
  set_target_properties(qk_torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY
                                                                            "${CMAKE_BINARY_DIR}/stub")
  set(qk_torch_cuda qk_torch_cuda_stub)
endif()

add_library(quantkernels_cuda MODULE csrc/ops/register_cuda.cpp $<TARGET_OBJECTS:qk_cuda_kernels>)
target_include_directories(quantkernels_cuda PRIVATE csrc)
target_compile_definitions(quantkernels_cuda PRIVATE USE_CUDA)
target_compile_options(quantkernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2>)
target_link_libraries(quantkernels_cuda PRIVATE qk_torch "-Wl,--no-as-needed" ${qk_torch_cuda} "-Wl,--as-needed")
set_target_properties(quantkernels_cuda PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${QK_OUTPUT_DIR}" CUDA_RUNTIME_LIBRARY
                                                   Static BUILD_RPATH "" INSTALL_RPATH "")

string(REPLACE ";" "," QK_CUDA_BUILT "${QK_CUDA_ARCHS}")
set(QK_CUDA_REASON "built for ${QK_CUDA_BUILT} and PTX ${QK_NEWEST} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
