#pragma once
// One form for every complaint: "op: argument must be ..., got ...".

#include <torch/csrc/stable/tensor.h>
#include "ops/allocate.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace qk::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
std::string text_of(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}
inline std::string text_of(ScalarType type) { return torch::headeronly::toString(type); }
inline std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t d = 0; d < t.dim(); ++d) out += (d ? ", " : "") + std::to_string(t.size(d));
  return out + "]";
}

template <class Got>
[[noreturn]] void complain(const char* op, const char* argument, const std::string& expected, const Got& got) {
  // Not STD_TORCH_CHECK: it would put this file and line before the sentence.
  throw std::runtime_error(std::string(op) + ": " + argument + " must be " + expected + ", got " + text_of(got));
}

// QK_CHECK(ok, op, argument, expected, got). A macro, so that words are put together only where they are needed: that takes
// longer than all the checks of a call.
#define QK_CHECK(ok, ...)                        \
  do {                                           \
    if (!(ok)) ::qk::ops::complain(__VA_ARGS__); \
  } while (false)

inline void check_float(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  QK_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, argument,
           "float32, float16 or bfloat16", type);
}

inline void check_type(const char* op, const char* argument, const Tensor& t, ScalarType type) {
  QK_CHECK(t.scalar_type() == type, op, argument, text_of(type), t.scalar_type());
}

inline void check_shape(const char* op, const char* argument, const Tensor& t, std::initializer_list<int64_t> shape) {
  const IntHeaderOnlyArrayRef sizes = t.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) return;
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  complain(op, argument, "of shape [" + expected + "]", shape_of(t));
}

inline void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  QK_CHECK(t.device() == x.device(), op, argument, "on the device of x", "another one");
}

// float32 parameters of a kernel: on x's device, of the shape given, made contiguous if they are not.
inline Tensor parameters(const char* op, const char* argument, const Tensor& t, const Tensor& x,
                         std::initializer_list<int64_t> shape) {
  check_type(op, argument, t, ScalarType::Float);
  check_shape(op, argument, t, shape);
  check_same_device(op, argument, t, x);
  return as_contiguous(t);
}

}  // namespace qk::ops
