// vitkernels._C: what Python may ask of the native side without running a kernel. Nothing at run
// time needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "add_layer_norm/add_layer_norm_plan.h"
#include "attention/attention_plan_sm90_backward.h"
#include "common/cpu_isa.h"
#include "window_attention/window_attention_plan_simt.h"

namespace py = pybind11;
using namespace pybind11::literals;

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
  m.def(
      "add_layer_norm_plan",
      [](int64_t rows, int64_t C, bool aligned, bool common_types, int multiprocessors,
         const std::string& pass) {
        using vitkernels::add_layer_norm::Pass;
        const std::map<std::string, Pass> passes{{"forward", Pass::kForward},
                                                 {"backward", Pass::kBackward},
                                                 {"backward_gamma", Pass::kBackwardGamma}};
        const auto p = vitkernels::add_layer_norm::plan(rows, C, aligned, common_types,
                                                        multiprocessors, passes.at(pass));
        return py::dict("fixed_types"_a = p.fixed_types, "vectorized"_a = p.vectorized,
                        "block_per_row"_a = p.block_per_row, "chunks"_a = p.chunks,
                        "lanes"_a = p.lanes, "threads"_a = p.threads, "blocks"_a = p.blocks,
                        "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("rows"), py::arg("C"), py::arg("aligned"), py::arg("common_types"),
      py::arg("multiprocessors"), py::arg("pass_"),
      "Launch settings of add_layer_norm's CUDA kernels.");
  m.def(
      "window_attention_simt_plan",
      [](int64_t windows, int heads, int N, int D, int table_rows, int multiprocessors,
         bool backward) {
        namespace wa = vitkernels::window_attention;
        const wa::SimtPlan p =
            backward ? wa::simt_backward_plan(windows, heads, N, D, table_rows, multiprocessors)
                     : wa::simt_forward_plan(windows, heads, N, D);
        return py::dict("blocks"_a = p.blocks, "shared_bytes"_a = p.shared_bytes,
                        "chunks"_a = p.chunks);
      },
      py::arg("windows"), py::arg("heads"), py::arg("N"), py::arg("D"), py::arg("table_rows"),
      py::arg("multiprocessors"), py::arg("backward"),
      "Launch settings of window_attention's SIMT kernels.");
  m.def(
      "attention_sm90_backward_plan",
      [](int64_t B, int H, int Nq, int Nk, int D, int multiprocessors, const std::string& bias) {
        namespace backward = vitkernels::attention::sm90_backward;
        using backward::Bias;
        const std::map<std::string, Bias> kinds{{"none", Bias::kNone},
                                                {"constant", Bias::kConstant},
                                                {"shared", Bias::kShared},
                                                {"per_item", Bias::kPerItem}};
        if (!backward::serves(Nq, Nk, D)) return py::dict("serves"_a = false);
        const auto p = backward::plan(B, H, Nq, Nk, D, multiprocessors, kinds.at(bias));
        const auto l = backward::layout(p.width, p.depth);
        return py::dict("serves"_a = true, "width"_a = p.width, "depth"_a = p.depth,
                        "groups"_a = p.groups, "blocks"_a = p.blocks, "matrices"_a = p.matrices,
                        "matrix_floats"_a = backward::matrix_floats(p.width), "rows"_a = l.rows,
                        "late_v"_a = l.late_v, "warpgroups"_a = backward::warpgroups(p.width),
                        "resident_blocks"_a = backward::resident_blocks(p.width),
                        "shared_bytes"_a = l.bytes);
      },
      py::arg("B"), py::arg("H"), py::arg("Nq"), py::arg("Nk"), py::arg("D"),
      py::arg("multiprocessors"), py::arg("bias"),
      "Launch settings of attention's backward on Hopper.");
  m.def("attention_sm90_backward_place", &vitkernels::attention::sm90_backward::place_of_score,
        py::arg("width"), py::arg("i"), py::arg("j"),
        "Where element (i, j) of dS lies in its matrix in scratch memory.");
}
