# The emulator: the sources of csrc/cuda compiled by the host compiler, for tests. No CUDA toolkit is asked for.
set(QK_EMU "0" CACHE STRING "1: build the emulator of the CUDA kernels")
set(QK_EMU_SANITIZE "" CACHE STRING "Sanitizers for the emulator, as -fsanitize takes them: address,undefined")
if(NOT QK_EMU)
  file(REMOVE "${QK_OUTPUT_DIR}/quantkernels_emu.so")  # one of an older build would pass for this one's
  return()
endif()

# CMake gives a source one language for the whole directory, so each .cu is included by a .cpp of its own.
set(kernels "")
foreach(name context ${QK_CUDA_FAMILIES})
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/emu/${name}.cpp" CONTENT "#include \"cuda/${name}.cu\"\n")
  list(APPEND kernels "${CMAKE_BINARY_DIR}/emu/${name}.cpp")
endforeach()
add_library(qk_emu_options INTERFACE)
target_include_directories(qk_emu_options INTERFACE csrc/emu/include csrc)
# -U_FORTIFY_SOURCE: its longjmp refuses to go from one fiber to another.
target_compile_options(qk_emu_options INTERFACE -O1 -g1 -ffp-contract=off -Wno-unknown-pragmas -fno-gnu-unique
                       -U_FORTIFY_SOURCE)
if(QK_EMU_SANITIZE)
  target_compile_options(qk_emu_options INTERFACE -fsanitize=${QK_EMU_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(qk_emu_options INTERFACE -fsanitize=${QK_EMU_SANITIZE})
endif()

# Indexing is checked by the compiler; the emulator answers (csrc/emu/emulator.cpp). Kernels keep their names, for its messages.
add_library(qk_emu_scheduler OBJECT csrc/emu/emulator.cpp csrc/emu/banks.cpp)
target_link_libraries(qk_emu_scheduler PRIVATE qk_emu_options qk_warnings)
add_library(qk_emu_kernels OBJECT ${kernels})
target_link_libraries(qk_emu_kernels PRIVATE qk_emu_options qk_warnings)
target_compile_options(qk_emu_kernels PRIVATE -fsanitize=bounds-strict -fsanitize-recover=bounds-strict)
set_target_properties(qk_emu_scheduler qk_emu_kernels PROPERTIES CXX_VISIBILITY_PRESET default)

add_library(quantkernels_emu MODULE csrc/ops/register_emu.cpp $<TARGET_OBJECTS:qk_emu_scheduler>
                                    $<TARGET_OBJECTS:qk_emu_kernels>)
target_link_libraries(quantkernels_emu PRIVATE qk_torch qk_emu_options qk_warnings ${CMAKE_DL_LIBS} "-Wl,-Bsymbolic")
set_target_properties(quantkernels_emu PROPERTIES PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${QK_OUTPUT_DIR}")

# Kernels of the tests: with planted bugs, and what the wrappers of csrc/cuda/ptx compute.
foreach(name planted conformance)
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/emu/${name}.cpp" CONTENT "#include \"${CMAKE_SOURCE_DIR}/tests/emu/${name}.cu\"\n")
  add_executable(emu_${name} "${CMAKE_BINARY_DIR}/emu/${name}.cpp" $<TARGET_OBJECTS:qk_emu_scheduler>)
  target_link_libraries(emu_${name} PRIVATE qk_emu_options qk_warnings ${CMAKE_DL_LIBS})
  target_compile_options(emu_${name} PRIVATE -fsanitize=bounds-strict -fsanitize-recover=bounds-strict)
  set_target_properties(emu_${name} PROPERTIES ENABLE_EXPORTS ON CXX_VISIBILITY_PRESET default)
endforeach()
