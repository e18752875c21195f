// Launchers of patch_embed on the CPU: cheap checks, views, channel arithmetic, fixed work items,
// registration. Kernels: patch_embed_cpu_kernels.cpp.
#include "patch_embed/patch_embed_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cpu_vec.h"
#include "common/scratch.h"
#include "common/stable.h"

namespace vitkernels {
namespace {

constexpr int64_t kTokenChunks = 32;  // parts of the tokens whose sums over the batch make dbias...
constexpr int64_t kChunkRows = 8;     // ...of at least so many tokens each

const PatchEmbedTable& kernels() { return VK_PICK_TABLE(patch_embed); }

void run_items(void (*kernel)(const PatchEmbedArgs&, int64_t, int64_t, void*),
               const PatchEmbedArgs& args, int64_t items, int64_t scratch_bytes) {
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, thread_scratch(scratch_bytes));
  });
}

// What the pointers of PatchEmbedArgs need alive.
struct Owners {
  Tensor images, weight, pos, prefix, dtokens;
  std::vector<ChannelArgs> channels;
  std::vector<GroupArgs> groups;
  std::vector<float> bias, zeros;
};

// Planar (unit stride along W) or interleaved (unit stride along C) images as they lie; others are
// copied.
ImageView image_view(const Tensor& images, const char* op, Owners* owners) {
  const bool planar = images.size(3) == 1 || images.stride(3) == 1,
             interleaved = images.size(1) == 1 || images.stride(1) == 1;
  owners->images = planar || interleaved ? images : torch::stable::contiguous(images);
  const Tensor& t = owners->images;
  const bool bytes = t.scalar_type() == ScalarType::Byte;
  return {t.const_data_ptr(),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          planar || !interleaved ? 1 : t.stride(3),
          bytes ? DType::kF32 : dtype_of(t, op, "images"),
          bytes};
}

const float* statistic(const OptTensor& t, int64_t C, const char* op, const char* name) {
  if (!t.has_value()) return nullptr;
  VK_CHECK(t->dim() == 1 && t->size(0) == C, op, name, " must have shape (", C, ",)");
  VK_CHECK(t->scalar_type() == ScalarType::Float, op, name, " must be float32");
  VK_CHECK(C == 1 || t->stride(0) == 1, op, name, " must be contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

// Centres and scales of the channels, and the groups of neighbours with one scale.
void set_channels(PatchEmbedArgs* args, const OptTensor& mean, const OptTensor& std, const char* op,
                  Owners* owners) {
  const float* means = statistic(mean, args->C, op, "mean");
  const float* stds = statistic(std, args->C, op, "std");
  const bool pairs = kernels().bf16_pairs && args->dtype == DType::kBF16;
  const double unit = args->images.bytes ? 255.0 : 1.0;  // pixel values of 1.0
  const int64_t elements = args->patch_h * args->patch_w;
  int64_t end = 0;
  for (int64_t c = 0; c < args->C; ++c) {
    const double zero = unit * (means == nullptr ? 0.0 : means[c]),
                 scale = 1.0 / (unit * (stds == nullptr ? 1.0 : stds[c]));
    const bool exact =
        pairs && std::isfinite(zero) && (args->images.bytes || args->images.dtype == DType::kBF16);
    const double integer = args->images.bytes ? std::clamp(std::nearbyint(zero), 0.0, 255.0) : 0.0;
    const double center = exact ? integer : zero;
    ChannelArgs channel = {static_cast<float>(center), 1.0f, static_cast<float>(scale), 0.0f, 0};
    if (exact) channel.residual = static_cast<float>((center - zero) * scale);
    if (!pairs) std::swap(channel.factor, channel.scale);
    const bool same = c > 0 && owners->groups.back().scale == channel.scale;
    if (!same) {
      end = pairs ? (end + 1) / 2 * 2 : end;
      owners->groups.push_back({end, end, channel.scale});
    }
    channel.offset = end;
    end += elements;
    owners->groups.back().end = pairs ? (end + 1) / 2 * 2 : end;
    owners->channels.push_back(channel);
    args->residual = args->residual || channel.residual != 0.0f;
    const ChannelArgs& first = owners->channels[0];
    args->alike = (c == 0 || args->alike) && channel.center == first.center &&
                  channel.factor == first.factor && channel.scale == first.scale &&
                  channel.residual == first.residual;
  }
  args->channels = owners->channels.data();
  args->groups = owners->groups.data();
  args->group_count = static_cast<int64_t>(owners->groups.size());
  args->operand_row = owners->groups.back().end;
}

// images, weight and sizes; dtype is that of the products.
void set_images(PatchEmbedArgs* args, const Tensor& images, const Tensor& weight,
                const OptTensor& mean, const OptTensor& std, DType dtype, const char* op,
                Owners* owners) {
  VK_CHECK(images.dim() == 4, op, "images must have 4 dimensions (B, Cin, H, W), got ",
           images.dim());
  VK_CHECK(weight.dim() == 4, op, "weight must have 4 dimensions (D, Cin, ph, pw), got ",
           weight.dim());
  args->B = images.size(0), args->C = images.size(1), args->D = weight.size(0);
  args->patch_h = weight.size(2), args->patch_w = weight.size(3), args->width = images.size(3);
  VK_CHECK(weight.size(1) == args->C, op, "weight must have images' ", args->C, " channels, got ",
           weight.size(1));
  VK_CHECK(args->C >= 1 && args->D >= 1 && args->patch_h >= 1 && args->patch_w >= 1, op,
           "weight must not be empty");
  VK_CHECK(images.size(2) >= 1 && images.size(2) % args->patch_h == 0 && args->width >= 1 &&
               args->width % args->patch_w == 0,
           op, "images must have a height and width that are multiples of the patch");
  args->grid_h = images.size(2) / args->patch_h, args->grid_w = args->width / args->patch_w;
  args->dtype = dtype;
  args->images = image_view(images, op, owners);
  const bool pixels_in_line = args->images.row == args->width * args->images.column;
  if (args->patch_h == 1 && args->patch_w == 1 && pixels_in_line)  // one long line instead of many
    args->grid_w = args->width = args->grid_h * args->grid_w, args->grid_h = 1;
  owners->weight = torch::stable::contiguous(weight);
  args->weight = owners->weight.const_data_ptr();
  args->weight_dtype = dtype_of(weight, op, "weight");
  set_channels(args, mean, std, op, owners);
}

// (1, rows, D) as rows of unit stride.
RowsView parameter_rows(const Tensor& t, const char* op, const char* name, Tensor* owner) {
  *owner = t.size(2) == 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
  return {const_cast<void*>(owner->const_data_ptr()), 0, owner->stride(1), dtype_of(t, op, name)};
}

RowsView from_row(RowsView view, int64_t row) {
  if (view.data != nullptr)
    view.data = static_cast<char*>(view.data) + row * view.row * size_of(view.dtype);
  return view;
}

// Checks the shapes of the parameters beside the weight, and sets the number of prefix tokens.
// Returns whether the position embedding has rows for them.
bool set_parameters(PatchEmbedArgs* args, const OptTensor& bias, const OptTensor& pos_embed,
                    const OptTensor& prefix_tokens, const char* op) {
  const int64_t D = args->D, N = args->grid_h * args->grid_w;
  const auto is_rows = [D](const Tensor& t) {
    return t.dim() == 3 && t.size(0) == 1 && t.size(2) == D;
  };
  if (bias.has_value())
    VK_CHECK(bias->dim() == 1 && bias->size(0) == D, op, "bias must have shape (", D, ",)");
  if (prefix_tokens.has_value()) {
    VK_CHECK(is_rows(*prefix_tokens), op, "prefix_tokens must have shape (1, P, ", D, ")");
    args->P = prefix_tokens->size(1);
  }
  if (!pos_embed.has_value()) return false;
  const int64_t rows = is_rows(*pos_embed) ? pos_embed->size(1) : -1;
  VK_CHECK(rows == N || rows == args->P + N, op, "pos_embed must have shape (1, ", N, " or ",
           args->P + N, ", ", D, ")");
  return rows == args->P + N;
}

// Memory of `units` of 4 bytes that the kernels fill themselves.
Tensor scratch_tensor(const Tensor& like, int64_t units) {
  return empty_like_shape(like, {units}, ScalarType::Float);
}

Tensor patch_embed_fwd(Tensor images, Tensor weight, OptTensor bias, OptTensor pos_embed,
                       OptTensor prefix_tokens, OptTensor mean, OptTensor std,
                       ScalarType out_dtype) {
  const char* op = "patch_embed_fwd";
  PatchEmbedArgs args{};
  Owners owners;
  const DType dtype = dtype_of(out_dtype, op, "out_dtype");
  set_images(&args, images, weight, mean, std, dtype, op, &owners);
  const bool with_prefix = set_parameters(&args, bias, pos_embed, prefix_tokens, op);
  const int64_t D = args.D, N = args.grid_h * args.grid_w;

  owners.zeros.assign(static_cast<size_t>(D), 0.0f);
  args.pos = args.prefix_pos = {owners.zeros.data(), 0, 0, DType::kF32};
  if (pos_embed.has_value()) {
    const RowsView pos = parameter_rows(*pos_embed, op, "pos_embed", &owners.pos);
    if (with_prefix) args.prefix_pos = pos;
    args.pos = from_row(pos, with_prefix ? args.P : 0);
  }
  if (prefix_tokens.has_value())
    args.prefix = parameter_rows(*prefix_tokens, op, "prefix_tokens", &owners.prefix);
  owners.bias.assign(static_cast<size_t>(D), 0.0f);
  if (bias.has_value()) {
    VK_SWITCH_FLOAT(dtype_of(*bias, op, "bias"), {
      const scalar_t* p = static_cast<const scalar_t*>(bias->const_data_ptr());
      for (int64_t d = 0; d < D; ++d) owners.bias[d] = to_float(p[d * bias->stride(0)]);
    });
  }
  args.bias = owners.bias.data();

  Tensor tokens = empty_like_shape(images, {args.B, args.P + N, D}, out_dtype);
  args.tokens = {tokens.mutable_data_ptr(), (args.P + N) * D, D, dtype};
  if (args.B == 0) return tokens;
  const PatchEmbedTable& k = kernels();
  Tensor packed = scratch_tensor(images, k.packed_weight_units(args));
  args.packed_weight = packed.mutable_data_ptr();
  run_items(k.pack_weight, args, k.column_blocks(args), k.pack_scratch(args));
  run_items(k.forward, args, k.row_blocks(args), k.forward_scratch(args));
  return tokens;
}

// The gradient of a parameter, like it in shape and dtype; rows of D elements.
OptTensor gradient_rows(const Tensor& like, const OptTensor& parameter, bool wanted, int64_t D,
                        const char* op, const char* name, RowsView* view) {
  if (!wanted) return std::nullopt;
  VK_CHECK(parameter.has_value(), op, "output_mask asks for the gradient of ", name,
           ", which is absent");
  Tensor gradient = empty_like_shape(like, shape_of(*parameter), parameter->scalar_type());
  *view = {gradient.mutable_data_ptr(), 0, D, dtype_of(*parameter, op, name)};
  return gradient;
}

void set_dtokens(PatchEmbedArgs* args, const Tensor& dtokens, const char* op, Owners* owners) {
  const std::vector<int64_t> shape = {args->B, args->P + args->grid_h * args->grid_w, args->D};
  VK_CHECK(shape_of(dtokens) == shape, op, "dtokens must have shape (", shape[0], ", ", shape[1],
           ", ", shape[2], ")");
  owners->dtokens =
      args->D == 1 || dtokens.stride(2) == 1 ? dtokens : torch::stable::contiguous(dtokens);
  args->dtokens = {const_cast<void*>(owners->dtokens.const_data_ptr()), owners->dtokens.stride(0),
                   owners->dtokens.stride(1), args->dtype};
}

void run_sums(PatchEmbedArgs* args, const Tensor& like, Tensor* sums) {
  const int64_t tokens = args->P + args->grid_h * args->grid_w;
  args->token_chunks = std::clamp<int64_t>(tokens / kChunkRows, 1, kTokenChunks);
  *sums = scratch_tensor(like, (args->token_chunks + 1) * args->D);
  args->dbias_sum = static_cast<float*>(sums->mutable_data_ptr());
  args->token_sums = args->dbias_sum + args->D;
  run_items(kernels().sum_tokens, *args, args->token_chunks,
            args->D * static_cast<int64_t>(sizeof(float)));
  kernels().store_dbias(*args);
}

void run_dweight(PatchEmbedArgs* args, const Tensor& like) {
  const PatchEmbedTable& k = kernels();
  Tensor packed = scratch_tensor(like, k.packed_dtokens_units(*args));
  args->packed_dtokens = packed.mutable_data_ptr();
  torch::stable::parallel_for(0, k.dtokens_blocks(*args), 1, [&](int64_t begin, int64_t end) {
    k.pack_dtokens(*args, begin, end);
  });
  run_items(k.dweight, *args, k.weight_blocks(*args), k.dweight_scratch(*args));
}

void run_dimages(PatchEmbedArgs* args, const Tensor& like) {
  const PatchEmbedTable& k = kernels();
  Tensor packed = scratch_tensor(like, k.packed_lines_units(*args));
  args->packed_weight = packed.mutable_data_ptr();
  run_items(k.pack_lines, *args, k.line_blocks(*args), k.lines_scratch(*args));
  run_items(k.dimages, *args, k.image_blocks(*args), k.dimages_scratch(*args));
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> patch_embed_bwd(
    Tensor dtokens, Tensor images, Tensor weight, OptTensor bias, OptTensor pos_embed,
    OptTensor prefix_tokens, OptTensor mean, OptTensor std, std::vector<bool> output_mask) {
  const char* op = "patch_embed_bwd";
  VK_CHECK(output_mask.size() == 5, op, "output_mask must have 5 entries, got ",
           output_mask.size());
  VK_CHECK(dtokens.dim() == 3, op, "dtokens must have 3 dimensions (B, P + N, D), got ",
           dtokens.dim());
  PatchEmbedArgs args{};
  Owners owners;
  set_images(&args, images, weight, mean, std, dtype_of(dtokens, op, "dtokens"), op, &owners);
  const bool with_prefix = set_parameters(&args, bias, pos_embed, prefix_tokens, op);
  set_dtokens(&args, dtokens, op, &owners);
  VK_CHECK(!output_mask[0] || !args.images.bytes, op, "uint8 images have no gradient");

  const int64_t D = args.D;
  const OptTensor dbias = gradient_rows(dtokens, bias, output_mask[2], D, op, "bias", &args.dbias);
  const OptTensor dpos =
      gradient_rows(dtokens, pos_embed, output_mask[3], D, op, "pos_embed", &args.dpos);
  args.dpos_first = with_prefix ? 0 : args.P;
  const OptTensor dprefix =
      gradient_rows(dtokens, prefix_tokens, output_mask[4], D, op, "prefix_tokens", &args.dprefix);
  Tensor sums;
  if (output_mask[2] || output_mask[3] || output_mask[4] || (output_mask[1] && args.residual))
    run_sums(&args, dtokens, &sums);
  const OptTensor dweight =
      gradient_rows(dtokens, weight, output_mask[1], D, op, "weight", &args.dweight);
  if (output_mask[1]) run_dweight(&args, dtokens);
  OptTensor dimages;
  if (output_mask[0]) {
    dimages = empty_like_shape(images, shape_of(images), images.scalar_type());
    args.dimages = dimages->mutable_data_ptr();
    if (args.B > 0) run_dimages(&args, dtokens);
  }
  return {dimages, dweight, dbias, dpos, dprefix};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vitkernels::patch_embed_fwd));
  m.impl("patch_embed_fwd.cpu", TORCH_BOX(&vitkernels::patch_embed_fwd));
  m.impl("patch_embed_bwd", TORCH_BOX(&vitkernels::patch_embed_bwd));
  m.impl("patch_embed_bwd.cpu", TORCH_BOX(&vitkernels::patch_embed_bwd));
}
