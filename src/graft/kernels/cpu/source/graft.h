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

// A tensor (batch, heads, length, head_dim) of bfloat16, dense in its last dimension; strides in elements.
struct GraftHeads {
  void* data;
  int64_t batch, head, row;
};

struct GraftAttention {
  GraftHeads query, key, value, output;
  GraftHeads grad_output, grad_query, grad_key, grad_value;  // backward only
  float* sums;                                               // (batch, heads, length) log of sum of exp
  const uint8_t* mask;  // (batch, length, length) truth values, dense in the last; null: causal
  int64_t mask_batch, mask_row;
  int64_t batch, heads, key_heads, length, head_dim;
  float scale;
};

// Of bfloat16; grad is null for the forward pass.
struct GraftNorm {
  const void *x, *weight, *grad;  // (rows, width), (width,), (rows, width)
  void* out;                      // (rows, width)
  int64_t rows, width;
  float eps;
};

struct GraftGate {
  const void *gate, *up, *grad;
  void *out, *out_up;  // backward: the gradients of gate and of up
  int64_t count;
};

struct GraftLoss {
  const void* logits;      // (rows, width)
  const int64_t* targets;  // (rows,)
  float* losses;
  void* slope;  // (rows, width), or null
  int64_t rows, width;
};

// Of byte-pair encoding, see words.cpp.
struct GraftVocabulary {
  const uint8_t* kinds;       // (0x110000,) of characters
  const int32_t* controls;    // (num_controls,) ids of the characters that are control tokens
  const int32_t* widths;      // (num_controls,) characters of the text that each stands for
  const int32_t* bytes;       // (256,) ids of single bytes
  const int32_t* characters;  // (num_characters, 2) characters and their ids, which come before their bytes
  const int32_t* merges;      // (num_merges, 3) left, right and result; the first learned first
  const uint8_t* wholes;      // words that are tokens without a look at the merges, one after the other
  const int64_t* whole_ends;  // (num_wholes,)
  const int32_t* whole_ids;   // (num_wholes,)
  int64_t num_controls, num_characters, num_merges, num_wholes;
  int32_t first_control, pattern, digits_alone;
  int32_t mark, marks;  // id of what is put before sections, and before which
};

// Texts to read, as UTF-8 one after the other, and what they become.
struct GraftTexts {
  const uint8_t* text;
  const int64_t* ends;  // (count,) bytes
  int64_t count;
  int32_t* ids;      // (capacity,)
  int32_t* starts;   // (capacity,) where in its text each token begins, in characters
  int64_t capacity;
  int64_t* id_ends;  // (count,)
  uint8_t* done;     // (count,) 0 where a text is not for this to read
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

// Attention in tiles of kTile queries by kTile keys; lengths are padded with zeros to whole tiles.
constexpr int64_t kTile = 64;
constexpr int64_t kChunk = 8 * kTile;  // keys whose scores are in memory at once, for a tile of queries

enum TileKind : uint8_t { kEmpty = 0, kPartial = 1, kFull = 2 };

// What the threads of one call share. Tiles are (outer, inner): queries by keys, backward keys by queries.
struct AttentionShared {
  int64_t tiles;           // in the padded length
  const uint64_t* bits;    // (batch, outer rows, tiles of the inner): which of a tile's columns count; or null
  const uint8_t* kinds;    // (batch, tiles, tiles)
  int64_t bits_batch, kinds_batch;
  uint32_t* keys;          // forward: (batch, key heads) of packed keys and values
  uint32_t* values;
  float* parts;            // backward: gradients of keys, then of values, by (batch, heads); null: summed at once
};

struct AttentionTier {
  int64_t (*forward_bytes)(const GraftAttention&);   // of one thread
  int64_t (*backward_bytes)(const GraftAttention&);
  void (*pack)(const GraftAttention&, const AttentionShared&, int64_t task);             // of batch * key heads
  void (*forward)(const GraftAttention&, const AttentionShared&, int64_t task, char*);   // batch * heads * tiles
  // Of batch * key heads, or of batch * heads where there are parts, which `join` then sums for batch * key heads.
  void (*backward)(const GraftAttention&, const AttentionShared&, int64_t task, char*);
  void (*join)(const GraftAttention&, const AttentionShared&, int64_t task);
};

struct ElementwiseTier {
  void (*norm)(const GraftNorm&, int64_t begin, int64_t end);  // rows
  void (*gate)(const GraftGate&, int64_t begin, int64_t end);  // numbers
  void (*loss)(const GraftLoss&, int64_t begin, int64_t end);  // rows
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
  const ElementwiseTier* elementwise;  // null where torch's own is faster
  const AttentionTier* attention;      // null where there is none
};

const Tier& current_tier();

const Rounding& rounding_of(const float* codebook, int32_t bits);
void parallel(int64_t count, int32_t num_threads, void (*body)(void*, int64_t), void* context);

extern const Tier baseline_tier;
// Those for x86; main.cpp is compiled with GRAFT_AVX2 and GRAFT_AVX512 where they are part of the library.
extern const Tier avx2_tier;
extern const Tier avx512_tier;

}  // namespace graft
