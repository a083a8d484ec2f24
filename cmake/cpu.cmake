# The CPU library: the kernels of csrc/cpu once for each instruction set, behind the ops of csrc/ops.
set(QK_CPU_ELEMENT_WISE stats fake_quantize attention learned_basis element_wise)
set(QK_CPU_LOW_BIT bitplanes matmul conv lowbit prepacked low_bit)

add_library(qk_warnings INTERFACE)
target_compile_options(qk_warnings INTERFACE -Wall -Wextra -Wno-psabi)

function(qk_add_isa isa files)
  list(TRANSFORM files PREPEND csrc/cpu/ OUTPUT_VARIABLE sources)
  list(TRANSFORM sources APPEND .cpp)
  add_library(qk_cpu_${isa} OBJECT ${sources})
  target_include_directories(qk_cpu_${isa} PRIVATE csrc)
  target_compile_definitions(qk_cpu_${isa} PRIVATE QK_CPU_ISA=${isa})
  # Bit-equality between backends needs every product rounded before it is added; where a sum may fuse, the code says so.
  target_compile_options(qk_cpu_${isa} PRIVATE -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math
                         -Wno-maybe-uninitialized -Wno-uninitialized ${ARGN})
  target_link_libraries(qk_cpu_${isa} PRIVATE qk_warnings)
endfunction()

set(QK_CPU_ALL ${QK_CPU_ELEMENT_WISE} ${QK_CPU_LOW_BIT})
qk_add_isa(portable "${QK_CPU_ALL}")
set(QK_CPU_ISAS portable)
set(QK_CPU_OBJECTS $<TARGET_OBJECTS:qk_cpu_portable>)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  qk_add_isa(avx2 "${QK_CPU_ALL}" -mavx2 -mfma -mf16c -mpopcnt)
  # avx512bf16 is for one function (csrc/cpu/halves.h), called where the processor has it; the compiler has no use for it of its own.
  set(QK_AVX512 -mavx2 -mfma -mf16c -mpopcnt -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mgfni -mavx512vnni -mavx512vpopcntdq
                -mavx512bf16 -mprefer-vector-width=512)
  qk_add_isa(avx512 "${QK_CPU_ALL}" ${QK_AVX512})
  qk_add_isa(zen4 "${QK_CPU_ELEMENT_WISE}" ${QK_AVX512} -DQK_HALVES_VECTORS)
  set(QK_CPU_ISAS "portable, avx2, avx512, zen4")
  foreach(isa avx2 avx512 zen4)
    list(APPEND QK_CPU_OBJECTS $<TARGET_OBJECTS:qk_cpu_${isa}>)
  endforeach()
endif()

add_library(qk_cpu_dispatch OBJECT csrc/cpu/dispatch.cpp csrc/cpu/isa.cpp csrc/cpu/blocks.cpp)
target_include_directories(qk_cpu_dispatch PRIVATE csrc)
target_link_libraries(qk_cpu_dispatch PRIVATE qk_warnings)

add_library(quantkernels_cpu MODULE csrc/ops/library.cpp csrc/ops/register_cpu.cpp $<TARGET_OBJECTS:qk_cpu_dispatch>
                                    ${QK_CPU_OBJECTS})
target_include_directories(quantkernels_cpu PRIVATE csrc)
target_compile_options(quantkernels_cpu PRIVATE -O2)
target_link_libraries(quantkernels_cpu PRIVATE qk_torch qk_warnings)
set_target_properties(quantkernels_cpu PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${QK_OUTPUT_DIR}")
