// Host-only facts for Python. No tensors pass here: those go through the op registry.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/peaks.h"
#include "cuda/plan.h"

namespace py = pybind11;

namespace {

// The loops run without the interpreter's lock, so that Python threads measure several cores at once.
template <class Run>
py::tuple timed(const Run& run) {
  qk::cpu::PeakRun result{};
  {
    const py::gil_scoped_release release;
    result = run();
  }
  return py::make_tuple(result.begin, result.end, result.operations);
}

py::tuple peak(const std::string& unit, int64_t rounds) {
  using qk::cpu::Unit;
  static const std::map<std::string, Unit> units{
      {"fp32", Unit::kFp32}, {"int8", Unit::kInt8}, {"popcount", Unit::kPopcount}, {"lookup", Unit::kLookup}};
  const auto found = units.find(unit);
  if (found == units.end()) throw std::invalid_argument("peak: unit must be fp32, int8, popcount or lookup, got " + unit);
  const Unit which = found->second;
  return timed([&] { return qk::cpu::run_peak(which, rounds); });
}

size_t lines_of(const char* argument, const py::buffer_info& info) {
  constexpr size_t kLine = 64;
  const size_t bytes = static_cast<size_t>(info.size * info.itemsize);
  if (bytes % kLine != 0 || reinterpret_cast<uintptr_t>(info.ptr) % kLine != 0)
    throw std::invalid_argument(std::string(argument) + " must be aligned to 64 bytes and a multiple of them long");
  return bytes;
}

py::tuple read_stream(const py::buffer& source, int64_t repeats) {
  const py::buffer_info from = source.request();
  const size_t bytes = lines_of("read_stream: source", from);
  return timed([&] { return qk::cpu::run_read(from.ptr, bytes, repeats); });
}

py::tuple copy_stream(const py::buffer& destination, const py::buffer& source, int64_t repeats, bool bypass) {
  const py::buffer_info to = destination.request(true), from = source.request();
  const size_t bytes = lines_of("copy_stream: source", from);
  if (lines_of("copy_stream: destination", to) != bytes)
    throw std::invalid_argument("copy_stream: destination must have the size of source");
  return timed([&] { return qk::cpu::run_copy(to.ptr, from.ptr, bytes, repeats, bypass); });
}

// geometry: the numbers of qk::ConvGeometry, in its order.
py::dict plan(const std::vector<int64_t>& n, int x_bits, int w_bits, bool learned, int architecture, int multiprocessors) {
  using qk::cuda::Engine;
  if (n.size() != 16) throw std::invalid_argument("plan: geometry must be 16 numbers, got " + std::to_string(n.size()));
  const qk::ConvGeometry g{n[0], n[1], n[2],  n[3],  n[4],  n[5],  n[6],  n[7],
                           n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15]};
  for (size_t i = 0; i < n.size(); ++i)
    if (n[i] < (i == 11 || i == 12 ? 0 : 1))
      throw std::invalid_argument("plan: sizes must describe an output that is not empty");
  if (g.in_channels % g.groups != 0 || g.out_channels % g.groups != 0)
    throw std::invalid_argument("plan: groups must divide the channels, got " + std::to_string(g.groups));
  if (x_bits < 1 || x_bits > qk::kMaxBits || w_bits < 1 || w_bits > qk::kMaxBits)
    throw std::invalid_argument("plan: x_bits and w_bits must be from 1 to 8");
  const auto plan = qk::cuda::plan_product(g, x_bits, w_bits, learned, {architecture, multiprocessors});
  py::dict result;
  switch (plan.engine) {
    case Engine::kDotProduct:
      result["engine"] = "dot product";
      return result;
    case Engine::kPlaneProduct:
      result["engine"] = "plane product";
      return result;
    case Engine::kDepthwise:
      result["engine"] = "depthwise";
      return result;
    default:
      result["engine"] = plan.engine == Engine::kBits ? "bits" : "bytes";
  }
  result["tile"] = py::make_tuple(qk::cuda::channels_of(plan.tile), qk::cuda::pixels_of(plan.tile));
  result["copy_bytes"] = plan.chunk;
  result["steps"] = plan.steps;
  result["splits"] = plan.splits;
  result["blocks"] = plan.tiles * plan.splits;
  return result;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build and this processor";
  m.def(
      "cpu_isa", [] { return std::string(qk::cpu::name_of(qk::cpu::chosen_isa())); },
      "The instruction set whose kernels run here");
  m.def("peak", &peak, py::arg("unit"), py::arg("rounds"),
        "(begin, end, operations) of a loop of nothing but the unit's instruction: fp32, int8, popcount or lookup");
  m.def("read_stream", &read_stream, py::arg("source"), py::arg("repeats"), "(begin, end, bytes) of reading a buffer");
  m.def("copy_stream", &copy_stream, py::arg("destination"), py::arg("source"), py::arg("repeats"), py::arg("bypass"),
        "(begin, end, bytes read and written) of copying a buffer; bypass: around the caches where that is possible");
  m.def("plan", &plan, py::arg("geometry"), py::arg("x_bits"), py::arg("w_bits"), py::arg("learned"),
        py::arg("architecture"), py::arg("multiprocessors"), "The CUDA kernel of a low-bit product: quantkernels.plan");
  m.attr("version") = QK_VERSION;
  m.attr("torch_target") = QK_TORCH_TARGET;
  m.attr("compiler") = QK_COMPILER;
  m.attr("cuda_archs") = QK_CUDA_ARCH_LIST;
  m.attr("cuda_reason") = QK_CUDA_REASON;
}
