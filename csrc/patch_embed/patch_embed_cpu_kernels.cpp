// CPU patch_embed kernels of one instruction set (VK_ISA); patch_embed_cpu.cpp calls them through
// the table at the end.
#include "patch_embed/patch_embed_cpu_backward.h"
#include "patch_embed/patch_embed_cpu_forward.h"

namespace vitkernels {
namespace {

template <template <class> class Scratch>
int64_t scratch_bytes(const PatchEmbedArgs& a) {
  VK_SWITCH_UNIT(a, return Scratch<unit_t>(a, nullptr).bytes);
}

int64_t weight_units(const PatchEmbedArgs& a) {
  VK_SWITCH_UNIT(a, return packed_weight_units<unit_t>(a));
}

void pack_weight(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_UNIT(a, pack_weight_blocks<unit_t>(a, begin, end, scratch));
}

int64_t forward_blocks(const PatchEmbedArgs& a) { VK_SWITCH_UNIT(a, return row_blocks<unit_t>(a)); }

void forward(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_UNIT(a,
                 VK_SWITCH_PIXEL(a.images, forward_items<pixel_t, unit_t>(a, begin, end, scratch)));
}

int64_t dtokens_units(const PatchEmbedArgs& a) {
  VK_SWITCH_UNIT(a, return packed_dtokens_units<unit_t>(a));
}

void pack_dtokens(const PatchEmbedArgs& a, int64_t begin, int64_t end) {
  VK_SWITCH_FLOAT(a.dtype, pack_dtokens_blocks<scalar_t>(a, begin, end));
}

void dweight(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_UNIT(a,
                 VK_SWITCH_PIXEL(a.images, dweight_items<pixel_t, unit_t>(a, begin, end, scratch)));
}

int64_t lines_units(const PatchEmbedArgs& a) {
  VK_SWITCH_UNIT(a, return packed_lines_units<unit_t>(a));
}

void pack_lines(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_UNIT(a, pack_line_blocks<unit_t>(a, begin, end, scratch));
}

void dimages(const PatchEmbedArgs& a, int64_t begin, int64_t end, void* scratch) {
  VK_SWITCH_FLOAT(a.dtype, dimages_items<scalar_t>(a, begin, end, scratch));
}

}  // namespace

const PatchEmbedTable& VK_ISA_TABLE(patch_embed)() {
  static constexpr PatchEmbedTable table = {
      kBf16Pairs,
      weight_units,
      column_blocks,
      scratch_bytes<PackScratch>,
      pack_weight,
      forward_blocks,
      scratch_bytes<ForwardScratch>,
      forward,
      sum_tokens,
      store_dbias,
      dtokens_units,
      dtokens_blocks,
      pack_dtokens,
      weight_blocks,
      scratch_bytes<DweightScratch>,
      dweight,
      lines_units,
      line_blocks,
      scratch_bytes<LinesScratch>,
      pack_lines,
      image_blocks,
      scratch_bytes<DimagesScratch>,
      dimages,
  };
  return table;
}

}  // namespace vitkernels
