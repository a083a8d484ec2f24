# Where this Python's torch keeps headers and libraries. torch's own CMake package would pull in compilers and flags of its
# build; the stable ABI needs three paths.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
  OUTPUT_VARIABLE QK_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "quantkernels: ${Python_EXECUTABLE} has no torch. Install torch >= 2.10 first, then build with "
                      "pip install --no-build-isolation .")
endif()

set(QK_TORCH_TARGET "2.10")
add_library(qk_torch INTERFACE)
target_include_directories(qk_torch SYSTEM INTERFACE "${QK_TORCH_ROOT}/include")
target_compile_definitions(qk_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(qk_torch INTERFACE "${QK_TORCH_ROOT}/lib")
target_link_libraries(qk_torch INTERFACE torch_cpu)
