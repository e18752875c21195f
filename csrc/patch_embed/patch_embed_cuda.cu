// The launcher of patch_embed's CUDA kernels: checks, views of the operands, the choice of the
// path, and registration. Kernels: patch_embed_simt.cu, _sm80.cu, _sm90.cu.
#include "patch_embed/patch_embed_cuda.h"

#include <tuple>

namespace vitkernels {
namespace {

using namespace patch_embed;

// What the pointers of Args need alive.
struct Owners {
  Tensor weight, bias, pos, prefix, mean, std, dtokens;
};

int size_as_int(const Tensor& t, int64_t dimension, const char* op, const char* name) {
  VK_CHECK(t.size(dimension) <= INT32_MAX, op, name, " dimension ", dimension,
           " must be below 2^31, got ", t.size(dimension));
  return static_cast<int>(t.size(dimension));
}

ImageView view_of(const Tensor& t, const char* op, const char* name) {
  const bool bytes = t.scalar_type() == ScalarType::Byte;
  return {const_cast<void*>(t.const_data_ptr()),
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          bytes ? DType::kF32 : dtype_of(t, op, name),
          bytes};
}

Parameter parameter(const Tensor& t, const char* op, const char* name, Tensor* owner) {
  VK_CHECK(Device::holds(t), op, name, " must be on the GPU");
  *owner = torch::stable::contiguous(t);
  return {const_cast<void*>(owner->const_data_ptr()), dtype_of(t, op, name)};
}

const float* statistic(const OptTensor& t, int64_t C, const char* op, const char* name,
                       Tensor* owner) {
  if (!t.has_value()) return nullptr;
  VK_CHECK(t->dim() == 1 && t->size(0) == C, op, name, " must have shape (", C, ",)");
  VK_CHECK(t->scalar_type() == ScalarType::Float, op, name, " must be float32");
  return static_cast<const float*>(parameter(*t, op, name, owner).data);
}

struct Inputs {
  const Tensor &images, &weight;
  const OptTensor &bias, &pos_embed, &prefix_tokens, &mean, &std;
};

void set_images(Args* a, const Inputs& in, Owners* owners, const char* op) {
  const Tensor &images = in.images, &weight = in.weight;
  VK_CHECK(images.dim() == 4, op, "images must have 4 dimensions (B, Cin, H, W), got ",
           images.dim());
  VK_CHECK(weight.dim() == 4, op, "weight must have 4 dimensions (D, Cin, ph, pw), got ",
           weight.dim());
  VK_CHECK(Device::holds(images), op, "images must be on the GPU");
  a->B = size_as_int(images, 0, op, "images"), a->C = size_as_int(images, 1, op, "images");
  a->D = size_as_int(weight, 0, op, "weight");
  a->patch_h = size_as_int(weight, 2, op, "weight");
  a->patch_w = size_as_int(weight, 3, op, "weight");
  VK_CHECK(weight.size(1) == a->C, op, "weight must have images' ", a->C, " channels, got ",
           weight.size(1));
  VK_CHECK(a->C >= 1 && a->D >= 1 && a->patch_h >= 1 && a->patch_w >= 1, op,
           "weight must not be empty");
  const int H = size_as_int(images, 2, op, "images"), W = size_as_int(images, 3, op, "images");
  VK_CHECK(H >= 1 && H % a->patch_h == 0 && W >= 1 && W % a->patch_w == 0, op,
           "images must have a height and width that are multiples of the patch");
  a->grid_w = W / a->patch_w;
  const int64_t N = static_cast<int64_t>(H / a->patch_h) * a->grid_w;
  // Rows and columns, and tiles of 128 beyond them, are counted in 32 bits.
  VK_CHECK(a->B * N < INT32_MAX - 256, op, "images must have fewer than 2^31 patches, got ",
           a->B * N);
  VK_CHECK(weight.numel() / a->D < INT32_MAX - 256, op,
           "weight must have fewer than 2^31 elements in a row, got ", weight.numel() / a->D);
  a->N = static_cast<int>(N);
  a->images = view_of(images, op, "images");
  a->weight = parameter(weight, op, "weight", &owners->weight);
  a->mean = statistic(in.mean, a->C, op, "mean", &owners->mean);
  a->std = statistic(in.std, a->C, op, "std", &owners->std);
}

void set_parameters(Args* a, const Inputs& in, Owners* owners, const char* op) {
  const int64_t D = a->D;
  const auto is_rows = [D](const Tensor& t) {
    return t.dim() == 3 && t.size(0) == 1 && t.size(2) == D;
  };
  if (in.bias.has_value()) {
    VK_CHECK(in.bias->dim() == 1 && in.bias->size(0) == D, op, "bias must have shape (", D, ",)");
    a->bias = parameter(*in.bias, op, "bias", &owners->bias);
  }
  if (in.prefix_tokens.has_value()) {
    VK_CHECK(is_rows(*in.prefix_tokens), op, "prefix_tokens must have shape (1, P, ", D, ")");
    a->P = size_as_int(*in.prefix_tokens, 1, op, "prefix_tokens");
    a->prefix = parameter(*in.prefix_tokens, op, "prefix_tokens", &owners->prefix);
  }
  if (!in.pos_embed.has_value()) return;
  const int64_t rows = is_rows(*in.pos_embed) ? in.pos_embed->size(1) : -1;
  VK_CHECK(rows == a->N || rows == a->P + a->N, op, "pos_embed must have shape (1, ", a->N, " or ",
           a->P + a->N, ", ", D, ")");
  a->pos = parameter(*in.pos_embed, op, "pos_embed", &owners->pos);
  a->first_position = static_cast<int>(rows) - a->N;
}

Args args_of(const Inputs& in, DType dtype, Owners* owners, const char* op) {
  Args args{};
  args.dtype = dtype;
  set_images(&args, in, owners, op);
  set_parameters(&args, in, owners, op);
  return args;
}

Tensor patch_embed_fwd(Tensor images, Tensor weight, OptTensor bias, OptTensor pos_embed,
                       OptTensor prefix_tokens, OptTensor mean, OptTensor std,
                       ScalarType out_dtype) {
  const char* op = "patch_embed_fwd";
  const Device device(images);
  Owners owners;
  Args args = args_of({images, weight, bias, pos_embed, prefix_tokens, mean, std},
                      dtype_of(out_dtype, op, "out_dtype"), &owners, op);
  Tensor tokens = empty_like_shape(images, {args.B, args.P + args.N, args.D}, out_dtype);
  args.tokens = tokens.mutable_data_ptr();
  if (args.B == 0) return tokens;
  switch (choose_cuda_path(op, device.architecture(), sm90_refuses_forward(args),
                           sm80_refuses_forward(args))) {
    case CudaPath::kSm90:
      forward_sm90(device, images, args);
      break;
    case CudaPath::kSm80:
      forward_sm80(device, images, args);
      break;
    default:
      forward_simt(device, args);
  }
  return tokens;
}

// Like the parameter in shape and dtype; zeros where there are no images to sum over.
OptTensor gradient(const Args& args, const OptTensor& like, bool wanted, const char* op,
                   const char* name, Parameter* to) {
  if (!wanted) return std::nullopt;
  VK_CHECK(like.has_value(), op, "output_mask asks for the gradient of ", name,
           ", which is absent");
  Tensor out = empty_like_shape(*like, shape_of(*like), like->scalar_type());
  if (args.B == 0) torch::stable::zero_(out);
  *to = {out.mutable_data_ptr(), dtype_of(*like, op, name)};
  return out;
}

void set_dtokens(Args* a, const Tensor& dtokens, Owners* owners, const char* op) {
  const std::vector<int64_t> shape = {a->B, a->P + a->N, a->D};
  VK_CHECK(shape_of(dtokens) == shape, op, "dtokens must have shape (", shape[0], ", ", shape[1],
           ", ", shape[2], ")");
  owners->dtokens =
      a->D == 1 || dtokens.stride(2) == 1 ? dtokens : torch::stable::contiguous(dtokens);
  a->dtokens = owners->dtokens.const_data_ptr();
  a->dtokens_batch = owners->dtokens.stride(0), a->dtokens_row = owners->dtokens.stride(1);
}

std::tuple<OptTensor, OptTensor, OptTensor, OptTensor, OptTensor> patch_embed_bwd(
    Tensor dtokens, Tensor images, Tensor weight, OptTensor bias, OptTensor pos_embed,
    OptTensor prefix_tokens, OptTensor mean, OptTensor std, std::vector<bool> output_mask) {
  const char* op = "patch_embed_bwd";
  VK_CHECK(output_mask.size() == 5, op, "output_mask must have 5 entries, got ",
           output_mask.size());
  VK_CHECK(dtokens.dim() == 3, op, "dtokens must have 3 dimensions (B, P + N, D), got ",
           dtokens.dim());
  VK_CHECK(Device::holds(dtokens), op, "dtokens must be on the GPU");
  const Device device(images);
  Owners owners;
  Args args = args_of({images, weight, bias, pos_embed, prefix_tokens, mean, std},
                      dtype_of(dtokens, op, "dtokens"), &owners, op);
  set_dtokens(&args, dtokens, &owners, op);
  VK_CHECK(!output_mask[0] || !args.images.bytes, op, "uint8 images have no gradient");

  OptTensor dimages;
  if (output_mask[0]) {
    dimages = empty_like_shape(images, shape_of(images), images.scalar_type());
    args.dimages = view_of(*dimages, op, "images");
  }
  const OptTensor dweight = gradient(args, weight, output_mask[1], op, "weight", &args.dweight);
  const OptTensor dbias = gradient(args, bias, output_mask[2], op, "bias", &args.dbias);
  const OptTensor dpos = gradient(args, pos_embed, output_mask[3], op, "pos_embed", &args.dpos);
  const OptTensor dprefix =
      gradient(args, prefix_tokens, output_mask[4], op, "prefix_tokens", &args.dprefix);
  if (args.B == 0) return {dimages, dweight, dbias, dpos, dprefix};

  const bool products = output_mask[0] || output_mask[1];
  const CudaPath path =
      products ? choose_cuda_path(op, device.architecture(), sm90_refuses_backward(args),
                                  sm80_refuses_backward(args))
               : CudaPath::kSimt;
  Tensor wide;
  float* wide_dbias = nullptr;
  if (path != CudaPath::kSimt && output_mask[1] && adds_rest(args)) {
    wide = empty_like_shape(dtokens, {args.D}, ScalarType::Float);
    wide_dbias = static_cast<float*>(wide.mutable_data_ptr());
  }
  if (output_mask[2] || output_mask[3] || output_mask[4] || wide_dbias != nullptr)
    sums_over_images(device, dtokens, args, wide_dbias);
  if (path == CudaPath::kSm90)
    products_sm90(device, dtokens, args, wide_dbias);
  else if (path == CudaPath::kSm80)
    products_sm80(device, dtokens, args, wide_dbias);
  else if (products)
    products_simt(device, dtokens, args);
  return {dimages, dweight, dbias, dpos, dprefix};
}

}  // namespace
}  // namespace vitkernels

VK_CUDA_LIBRARY_IMPL(m) {
  m.impl("patch_embed_fwd.cuda", TORCH_BOX(&vitkernels::patch_embed_fwd));
  m.impl("patch_embed_bwd.cuda", TORCH_BOX(&vitkernels::patch_embed_bwd));
}
