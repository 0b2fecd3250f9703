// What the tiers (one per instruction set) share: the arguments of the kernels and the table of a tier.
//
// A weight is flat, cut into blocks of `blocksize` elements, the last of which may be short. An element is
// codebook[code] * scale (+ shift), each step rounded to float, then rounded once to the dtype of the output.
// Codes are a bit string, the first code in the highest bits of the first byte.

#pragma once

#include <stdint.h>

#define GRAFT_API extern "C" __attribute__((visibility("default")))

extern "C" {

// The wide ones are floats that hold what bfloat16 and float16 can: the weight of a product in float that shall
// be the weight of one in halves.
enum GraftDtype { GRAFT_F32 = 0, GRAFT_BF16 = 1, GRAFT_F16 = 2, GRAFT_BF16_WIDE = 3, GRAFT_F16_WIDE = 4 };

// One number for each block: floats, or with double quantization 8-bit codes of them.
struct GraftPerBlock {
  const void* values;   // float (B,) or uint8 (B,); null where a format has none
  const float* map;     // (256,) what the codes stand for, or null
  const float* scale;   // (ceil(B / 256),)
  const float* offset;  // (1,)
};

struct GraftWeight {
  const uint8_t* codes;
  GraftPerBlock scales;
  GraftPerBlock shifts;
  const float* codebook;  // (2^bits,)
  int64_t num_elements;
  int32_t bits;  // 2, 3, 4 or 8
  int32_t blocksize;
};

struct GraftEncoding {
  const void* values;
  float* scale;
  float* shift;  // null for formats without
  uint8_t* codes;
  const float* codebook;
  int64_t num_elements;
  int32_t dtype;
  int32_t bits;
  int32_t blocksize;
  int32_t grid;  // 8 bits: round to the grid of 65536 points first
};

struct GraftProduct {
  GraftWeight weight;  // (out_features, in_features)
  const void* x;       // (rows, in_features)
  const void* bias;    // (out_features,) in x's dtype, or null
  void* y;             // (rows, out_features) in x's dtype
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  int32_t dtype;  // of x
};

}  // extern "C"

namespace graft {

// A codebook prepared for rounding; made once per codebook.
struct Rounding {
  float codebook[256];
  float midpoints[256];   // between the sorted entries, then infinities
  uint8_t order[256];     // the code of each sorted entry
  bool ordered;           // the code is the place
  bool linear;            // 8 bits: k/127, see decode
  bool moderate;          // entries are zero or far from what floats cannot hold, see Numbers
  int32_t bits;
  uint8_t grid[65536];    // 8 bits: the code of each grid point
  uint8_t lowest[65536];  // 8 bits: midpoints below all floats that share these upper 16 bits
  uint8_t beyond[4];      // read with the last of them, four at once
};

struct Tier {
  const char* name;
  // Elements [begin, end) of a weight; begin starts a block. `past_cache`: out is aligned to 64 bytes and will not
  // be read soon, so that it may be written around the cache.
  void (*decode)(const GraftWeight&, const Rounding&, int64_t begin, int64_t end, void* out, int32_t dtype,
                 bool past_cache);
  // Blocks of the elements [begin, end); begin starts a block and a byte.
  void (*encode)(const GraftEncoding&, const Rounding&, int64_t begin, int64_t end);
  // Columns [begin, end) of the product; x_wide holds x in the form that `widen` made.
  void (*product)(const GraftProduct&, const Rounding&, int64_t begin, int64_t end, const void* x_wide);
  // Bytes of x_wide, 0 where x is used as it is; and how it is filled.
  int64_t (*wide_bytes)(const GraftProduct&);
  void (*widen)(const GraftProduct&, void* x_wide);
};

const Rounding& rounding_of(const float* codebook, int32_t bits);
void parallel(int64_t count, int32_t num_threads, void (*body)(void*, int64_t), void* context);

extern const Tier baseline_tier;
// Those for x86; main.cpp is compiled with GRAFT_AVX2 and GRAFT_AVX512 where they are part of the library.
extern const Tier avx2_tier;
extern const Tier avx512_tier;

}  // namespace graft
