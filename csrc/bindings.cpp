// vitkernels._C: what Python may ask of the native side without running a kernel. Nothing at run
// time needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/cpu_isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU features and launch plans of vitkernels.";
  m.def("build_facts", [] {
    return std::map<std::string, std::string>{{"cxx", VK_CXX},
                                              {"nvcc", VK_NVCC},
                                              {"isa_levels", VK_ISA_LEVELS},
                                              {"compiler", __VERSION__}};
  });
  m.def(
      "cpu_isa", [] { return std::string(vitkernels::cpu_isa_name(vitkernels::cpu_isa())); },
      "The instruction-set level that the CPU kernels run at in this process.");
}
