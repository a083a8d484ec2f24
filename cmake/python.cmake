# pybind11 module of host facts.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import pybind11, sysconfig; print(pybind11.get_include()); print(sysconfig.get_path('include')); print(sysconfig.get_config_var('EXT_SUFFIX'))"
  OUTPUT_VARIABLE facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "quantkernels: ${Python_EXECUTABLE} has no pybind11. pip install pybind11 and build again.")
endif()
string(REPLACE "\n" ";" facts "${facts}")
list(GET facts 0 pybind_include)
list(GET facts 1 python_include)
list(GET facts 2 suffix)

add_library(_host MODULE csrc/python/module.cpp csrc/cpu/isa.cpp csrc/cpu/peaks.cpp)
# Loops that measure the processor are worth their full optimisation, whatever the rest of the module gets.
set_source_files_properties(csrc/cpu/peaks.cpp PROPERTIES COMPILE_OPTIONS "-O3;-fno-math-errno")
target_include_directories(_host PRIVATE csrc)
target_include_directories(_host SYSTEM PRIVATE "${pybind_include}" "${python_include}")
target_compile_definitions(
  _host PRIVATE QK_VERSION="${QK_VERSION}" QK_TORCH_TARGET="${QK_TORCH_TARGET}" QK_CUDA_REASON="${QK_CUDA_REASON}"
                QK_CUDA_ARCH_LIST="${QK_CUDA_BUILT}" QK_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
target_compile_options(_host PRIVATE -O2)
target_link_libraries(_host PRIVATE qk_warnings)
set_target_properties(_host PROPERTIES PREFIX "" SUFFIX "${suffix}" LIBRARY_OUTPUT_DIRECTORY "${QK_OUTPUT_DIR}")
