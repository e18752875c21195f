// vitkernels._C: what Python may ask of the native side without running a kernel. Nothing at run
// time needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "add_layer_norm/add_layer_norm_plan.h"
#include "attention/attention_plan_sm80.h"
#include "attention/attention_plan_sm80_long.h"
#include "attention/attention_plan_sm90.h"
#include "attention/attention_plan_sm90_backward.h"
#include "attention/attention_plan_sm90_long.h"
#include "common/cpu_isa.h"
#include "distillation_loss/distillation_loss_plan.h"
#include "linear_gelu/linear_gelu_plan.h"
#include "patch_embed/patch_embed_plan.h"
#include "patch_merge/patch_merge_plan.h"
#include "window_attention/window_attention_plan_simt.h"
#include "window_attention/window_attention_plan_sm80_large.h"
#include "window_attention/window_attention_plan_sm90.h"

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
      [](int64_t rows, int64_t C, bool aligned, bool common_widths, int multiprocessors,
         const std::string& pass, int architecture, int branch_bytes, int stream_bytes,
         int y_bytes) {
        using vitkernels::add_layer_norm::Pass;
        const std::map<std::string, Pass> passes{{"forward", Pass::kForward},
                                                 {"backward", Pass::kBackward},
                                                 {"backward_gamma", Pass::kBackwardGamma}};
        const auto p = vitkernels::add_layer_norm::plan(
            rows, C, aligned, common_widths, passes.at(pass),
            {multiprocessors, architecture, branch_bytes / 2, stream_bytes / 2, y_bytes / 2});
        return py::dict("fixed_widths"_a = p.fixed_widths, "vectorized"_a = p.vectorized,
                        "block_per_row"_a = p.block_per_row, "chunks"_a = p.chunks,
                        "lanes"_a = p.lanes, "threads"_a = p.threads, "slots"_a = p.slots,
                        "blocks"_a = p.blocks, "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("rows"), py::arg("C"), py::arg("aligned"), py::arg("common_widths"),
      py::arg("multiprocessors"), py::arg("pass_"), py::arg("architecture") = 90,
      py::arg("branch_bytes") = 2, py::arg("stream_bytes") = 2, py::arg("y_bytes") = 2,
      "Launch settings of add_layer_norm's CUDA kernels.");
  m.def(
      "attention_sm80_plan",
      [](int Nq, int Nk, int D, int architecture, bool backward) {
        namespace sm80 = vitkernels::attention::sm80;
        const sm80::Plan p = backward ? sm80::backward_plan(Nq, Nk, D, architecture)
                                      : sm80::forward_plan(Nq, Nk, D, architecture);
        return py::dict("head_dim"_a = p.head_dim, "warps"_a = p.warps, "slots"_a = p.slots,
                        "shared_bytes"_a = p.shared_bytes, "blocks_resident"_a = p.blocks_resident);
      },
      py::arg("Nq"), py::arg("Nk"), py::arg("D"), py::arg("architecture"), py::arg("backward"),
      "Launch settings of attention's sm_80 kernels.");
  m.def(
      "attention_sm80_long_plan",
      [](int D, bool options, bool by_key) {
        namespace plan = vitkernels::attention::sm80_long;
        const int dim = plan::instance_dim(D);
        return py::dict("head_dim"_a = dim, "columns"_a = plan::forward_columns(dim, options),
                        "shared_bytes"_a = plan::forward_shared(dim, options),
                        "backward_rows"_a = plan::backward_rows(dim, by_key),
                        "backward_columns"_a = plan::backward_columns(dim),
                        "backward_shared_bytes"_a = plan::backward_shared(dim, by_key),
                        "bias_shared_bytes"_a = plan::bias_shared(dim));
      },
      py::arg("D"), py::arg("options"), py::arg("by_key"),
      "Launch settings of attention's sm_80 kernels for any number of queries and keys.");
  m.def(
      "attention_sm80_long_bias_plan",
      [](int B, int H, int Nq, int Nk, int batch, int heads, int rows) {
        const auto p =
            vitkernels::attention::sm80_long::bias_plan(B, H, Nq, Nk, batch, heads, rows);
        return py::dict("tiles"_a = p.tiles, "members"_a = p.members, "share"_a = p.share,
                        "splits"_a = p.splits, "partial_floats"_a = p.partial_floats);
      },
      py::arg("B"), py::arg("H"), py::arg("Nq"), py::arg("Nk"), py::arg("batch"), py::arg("heads"),
      py::arg("rows"), "How attention's sm_80 kernels share out the sums of a bias's gradient.");
  m.def(
      "attention_sm90_plan",
      [](int B, int H, int Nq, int Nk, int D, int bias_size, bool bias_of_batch,
         int multiprocessors) {
        namespace sm90 = vitkernels::attention::sm90;
        if (!sm90::takes(Nq, Nk, D, bias_size > 0)) return py::dict();
        const sm90::Plan p = sm90::plan(B, H, Nq, Nk, D, bias_size, bias_of_batch, multiprocessors);
        return py::dict("width"_a = p.width, "columns"_a = p.columns, "query_rows"_a = p.query_rows,
                        "key_rows"_a = p.key_rows, "tiles"_a = p.tiles, "tail"_a = p.tail,
                        "pair_stages"_a = p.pair_stages, "value_stages"_a = p.value_stages,
                        "bias_shared"_a = p.bias_place == sm90::BiasPlace::kShared,
                        "groups"_a = p.groups, "threads"_a = p.threads,
                        "shared_bytes"_a = p.shared_bytes, "blocks"_a = p.blocks,
                        "useful"_a = sm90::useful_fraction(p, Nq, Nk));
      },
      py::arg("B"), py::arg("H"), py::arg("Nq"), py::arg("Nk"), py::arg("D"), py::arg("bias_size"),
      py::arg("bias_of_batch"), py::arg("multiprocessors"),
      "Launch settings of attention's sm_90 forward; empty where it refuses these sizes.");
  m.def(
      "distillation_loss_plan",
      [](int64_t rows, int64_t K, bool aligned, bool one_type) {
        const auto p = vitkernels::distillation_loss::plan(rows, K, aligned, one_type);
        return py::dict("fixed_types"_a = p.fixed_types, "vectorized"_a = p.vectorized,
                        "block_per_row"_a = p.block_per_row, "chunks"_a = p.chunks,
                        "threads"_a = p.threads, "blocks"_a = p.blocks);
      },
      py::arg("rows"), py::arg("K"), py::arg("aligned"), py::arg("one_type"),
      "Launch settings of distillation_loss's CUDA kernels.");
  m.def(
      "linear_gelu_plan",
      [](const std::string& path, int64_t M, int64_t N, int64_t K, int multiprocessors) {
        namespace lg = vitkernels::linear_gelu;
        const std::map<std::string, lg::Tile> known{
            {"simt", lg::kSimtTile}, {"sm80", lg::kSm80Tile}, {"sm90", lg::kSm90Tile}};
        const lg::Tile tile = known.at(path);
        const auto s = lg::splits(tile, M, N, K, multiprocessors, path == "sm80" ? 2 : 1);
        const auto g = lg::grad_plan(M, N, multiprocessors);
        const auto pairs = lg::sm90_plan(M, N, s.count, multiprocessors);
        return py::dict("tile"_a = py::make_tuple(tile.m, tile.n, tile.k), "splits"_a = s.count,
                        "k_per_split"_a = s.k, "small"_a = lg::takes_small(M, N, multiprocessors),
                        "rows_per_program"_a = g.rows_per_program, "programs"_a = g.programs,
                        "cluster"_a = pairs.cluster, "items"_a = pairs.items,
                        "blocks"_a = pairs.blocks,
                        "shared_bytes"_a = path == "sm90"   ? lg::sm90_shared_bytes()
                                           : path == "sm80" ? lg::sm80_shared_bytes(tile)
                                                            : 0);
      },
      py::arg("path"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("multiprocessors"),
      "Launch settings of linear_gelu's CUDA kernels: of a product that may be split, and of dh.");
  m.def(
      "patch_merge_plan",
      [](int64_t rows, int64_t C, bool fixed_widths, int multiprocessors, bool backward) {
        const auto p =
            vitkernels::patch_merge::plan(rows, C, fixed_widths, multiprocessors, backward);
        return py::dict("vectorized"_a = p.vectorized, "block_per_row"_a = p.block_per_row,
                        "chunks"_a = p.chunks, "lanes"_a = p.lanes, "threads"_a = p.threads,
                        "blocks"_a = p.blocks, "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("rows"), py::arg("C"), py::arg("fixed_widths"), py::arg("multiprocessors"),
      py::arg("backward"), "Launch settings of patch_merge_layer_norm's CUDA kernels.");
  m.def(
      "patch_embed_sm90_plan",
      [](int rows, int D, int columns, int multiprocessors) {
        const auto p = vitkernels::patch_embed::sm90::plan(rows, D, columns, multiprocessors);
        return py::dict("width"_a = p.width, "pair"_a = p.pair, "items"_a = p.items,
                        "blocks"_a = p.blocks, "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("rows"), py::arg("D"), py::arg("columns"), py::arg("multiprocessors"),
      "Launch settings of patch_embed's sm_90 forward.");
  m.def(
      "patch_embed_sm90_groups",
      [](int B, int N) {
        const auto g = vitkernels::patch_embed::sm90::groups(B, N);
        return py::make_tuple(g.patches, g.images, g.across, g.count);
      },
      py::arg("B"), py::arg("N"),
      "Groups of 64 rows of patch_embed's sm_90 backward: neighbours of an image and images of "
      "each, groups side by side in an image, and all.");
  m.def(
      "patch_embed_sm90_backward_plan",
      [](int B, int N, int D, int columns, int multiprocessors) {
        namespace sm90 = vitkernels::patch_embed::sm90;
        const auto groups = sm90::groups(B, N);
        const auto w = sm90::dweight_plan(groups, D, columns, multiprocessors);
        const auto x = sm90::dimages_plan(groups, columns, multiprocessors);
        return py::dict("features"_a = w.features, "pair"_a = w.pair, "dweight_tiles"_a = w.tiles,
                        "splits"_a = w.split.splits, "dweight_shared_bytes"_a = w.shared_bytes,
                        "dimages_tiles"_a = x.tiles, "dimages_blocks"_a = x.blocks,
                        "dimages_shared_bytes"_a = x.shared_bytes);
      },
      py::arg("B"), py::arg("N"), py::arg("D"), py::arg("columns"), py::arg("multiprocessors"),
      "Launch settings of patch_embed's sm_90 backward.");
  m.def(
      "patch_embed_padded",
      [](int channels, int pixels, bool normalized, int step) {
        const auto p = vitkernels::patch_embed::padded(channels, pixels, normalized, step);
        return py::make_tuple(p.segments, p.used, p.length);
      },
      py::arg("channels"), py::arg("pixels"), py::arg("normalized"), py::arg("step"),
      "How patch_embed's tensor-core paths pad a patch: segments, and columns of each before and "
      "after.");
  m.def(
      "patch_embed_split",
      [](int64_t tiles, int64_t steps, int64_t blocks) {
        const auto s = vitkernels::patch_embed::split(tiles, steps, blocks);
        return py::make_tuple(s.splits, s.steps);
      },
      py::arg("tiles"), py::arg("steps"), py::arg("blocks"),
      "Parts of patch_embed's sums over patches and images, and the steps of each.");
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
      "window_attention_sm90_plan",
      [](int64_t windows, int heads, int D, int multiprocessors, bool backward) {
        namespace sm90 = vitkernels::window_attention::sm90;
        const sm90::Plan p = sm90::plan(windows, heads, D, multiprocessors, backward);
        return py::dict("groups"_a = p.groups, "blocks"_a = p.blocks, "busy"_a = p.busy,
                        "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("windows"), py::arg("heads"), py::arg("D"), py::arg("multiprocessors"),
      py::arg("backward"), "Launch settings of window_attention's sm_90 kernels.");
  m.def(
      "window_attention_sm90_order",
      [](int Wh, int Ww, int shift_h, int shift_w) {
        namespace sm90 = vitkernels::window_attention::sm90;
        const sm90::Order order = sm90::order_of(Wh, Ww, shift_h, shift_w);
        py::list parts;
        for (int p = 0; p < order.count; ++p) {
          const sm90::Part& part = order.parts[p];
          parts.append(py::make_tuple(part.row, part.y, part.x, part.height, part.width));
        }
        return py::dict("parts"_a = parts, "rows"_a = order.rows, "below"_a = order.below,
                        "right"_a = order.right, "keys"_a = sm90::keys_of(order));
      },
      py::arg("Wh"), py::arg("Ww"), py::arg("shift_h"), py::arg("shift_w"),
      "Where window_attention's sm_90 kernels keep the tokens of a window: parts as (row, y, x, "
      "height, width).");
  m.def(
      "window_attention_sm80_large_plan",
      [](int64_t windows, int N, int table_rows, int heads, int D, int multiprocessors,
         int architecture, bool cosine, bool backward) {
        const auto p = vitkernels::window_attention::sm80_large::plan(
            windows, N, table_rows, heads, D, multiprocessors, architecture, cosine, backward);
        return py::dict("groups"_a = p.groups, "blocks"_a = p.blocks, "warps"_a = p.warps,
                        "fragments"_a = p.fragments, "shared_bytes"_a = p.shared_bytes);
      },
      py::arg("windows"), py::arg("N"), py::arg("table_rows"), py::arg("heads"), py::arg("D"),
      py::arg("multiprocessors"), py::arg("architecture"), py::arg("cosine"), py::arg("backward"),
      "Launch settings of window_attention's sm_80 kernels for 65 to 256 tokens.");
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
  m.def(
      "attention_sm90_long_plan",
      [](int64_t B, int H, int Nq, int Nk, int D, bool general, int multiprocessors) {
        namespace sm90 = vitkernels::attention::sm90_long;
        const auto p = sm90::forward_plan(B, H, Nq, Nk, D, general, multiprocessors);
        return py::dict("width"_a = p.width, "keys"_a = p.keys, "rows"_a = p.rows,
                        "tails"_a = p.tails, "items"_a = p.items, "tiles"_a = p.tiles,
                        "stages"_a = p.stages, "shared_bytes"_a = p.shared_bytes,
                        "blocks"_a = p.blocks);
      },
      py::arg("B"), py::arg("H"), py::arg("Nq"), py::arg("Nk"), py::arg("D"), py::arg("general"),
      py::arg("multiprocessors"),
      "Launch settings of attention's forward of many tokens on sm_90.");
  m.def(
      "attention_sm90_long_tail",
      [](int tails, int whole_items, int head, int item) -> std::optional<int> {
        namespace sm90 = vitkernels::attention::sm90_long;
        const int tail = sm90::tail_of(tails, whole_items, head, item);
        return tail == sm90::kNoTail ? std::nullopt : std::optional<int>(tail);
      },
      py::arg("tails"), py::arg("whole_items"), py::arg("head"), py::arg("item"),
      "Which tail of its head an item of attention's forward of many tokens on sm_90 has, or "
      "None.");
  m.def(
      "attention_sm90_long_backward_plan",
      [](int64_t B, int H, int Nq, int Nk, int D, bool by_key, int multiprocessors) {
        namespace sm90 = vitkernels::attention::sm90_long;
        const auto p = sm90::backward_plan(B, H, Nq, Nk, D, by_key, multiprocessors);
        const int width = sm90::long_width(D);
        return py::dict("width"_a = width, "columns"_a = sm90::backward_columns(width, by_key),
                        "items"_a = p.items, "tiles"_a = p.tiles, "stages"_a = p.stages,
                        "stats_rows"_a = p.stats_rows, "shared_bytes"_a = p.shared_bytes,
                        "blocks"_a = p.blocks);
      },
      py::arg("B"), py::arg("H"), py::arg("Nq"), py::arg("Nk"), py::arg("D"), py::arg("by_key"),
      py::arg("multiprocessors"),
      "Launch settings of attention's backward of many tokens on sm_90.");
  m.def(
      "attention_sm90_long_dbias_plan",
      [](int64_t matrices, int Nq, int Nk, int D, int multiprocessors) {
        namespace sm90 = vitkernels::attention::sm90_long;
        const auto p = sm90::bias_plan(matrices, Nq, Nk, D, multiprocessors);
        return py::dict("items"_a = p.items, "tiles"_a = p.tiles, "all"_a = p.all,
                        "stages"_a = p.stages, "stats_rows"_a = p.stats_rows,
                        "shared_bytes"_a = p.shared_bytes, "blocks"_a = p.blocks);
      },
      py::arg("matrices"), py::arg("Nq"), py::arg("Nk"), py::arg("D"), py::arg("multiprocessors"),
      "Launch settings of the gradient of attention's bias of many tokens on sm_90.");
}
