// The Python face of roofline.h.
#include <pybind11/pybind11.h>

#include "roofline.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace infoentropy;

void bind_roofline(py::module_& module) {
  module.def(
      "roofline_read",
      [](std::uintptr_t source, std::int64_t bytes, int threads) {
        py::gil_scoped_release unlocked;
        return roofline_read(reinterpret_cast<void*>(source), bytes, threads);
      },
      py::kw_only(), "source"_a, "bytes"_a, "threads"_a, "One pass of reading.");
  module.def(
      "roofline_copy",
      [](std::uintptr_t source, std::uintptr_t out, std::int64_t bytes, int threads) {
        py::gil_scoped_release unlocked;
        roofline_copy(reinterpret_cast<void*>(source), reinterpret_cast<void*>(out), bytes,
                      threads);
      },
      py::kw_only(), "source"_a, "out"_a, "bytes"_a, "threads"_a,
      "One pass of copying, written around the caches.");
  module.def(
      "roofline_change",
      [](std::uintptr_t data, std::int64_t bytes, int threads) {
        py::gil_scoped_release unlocked;
        roofline_change(reinterpret_cast<void*>(data), bytes, threads);
      },
      py::kw_only(), "data"_a, "bytes"_a, "threads"_a, "One pass of reading and writing back.");
  module.def(
      "roofline_exponentials",
      [](const std::string& dtype, std::int64_t count, int threads) {
        const Dtype type = dtype_named(dtype);
        py::gil_scoped_release unlocked;
        return roofline_exponentials(type, count, threads);
      },
      py::kw_only(), "dtype"_a, "count"_a, "threads"_a,
      "About `count` exponentials from the cache; returns how many.");
}
