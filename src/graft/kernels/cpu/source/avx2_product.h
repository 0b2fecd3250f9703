// The product with few rows of x, with AVX2. Included by tier_avx2.cpp after avx2_decode.h.
//
// Four rows of W are decoded, kDepth columns at a time, to the first-level cache and multiplied with up to three
// rows of x at a time: their sums fill the registers. A single row of x is multiplied as the codes are decoded.

constexpr int64_t kDepth = 1024;
constexpr int64_t kStride = kDepth + 16;
constexpr int kColumns = 4;
constexpr int64_t kMaxRows = 64;

// A single row of x in bfloat16 and four bits: a byte's two codes go to two vectors, one of even and one of odd
// elements, without being put in order. x is put into that order instead, once for all rows of W.
static bool splits(const GraftProduct& p) {
  const GraftWeight& w = p.weight;
  const int64_t whole = w.blocksize < 64 ? 64 : w.blocksize;
  return p.rows == 1 && p.dtype == GRAFT_BF16 && w.bits == 4 && p.in_features % whole == 0;
}

// Which of 64 elements is at a place of x as `dot` reads it.
static inline int element_at(int place) {
  const int vector = place / 8, lane = place % 8;  // even: low a, a, low b, b; then odd
  const bool odd = vector >= 4, upper = vector & 2, second = vector & 1;
  const int byte = lane / 4 * 16 + upper * 8 + lane % 4 * 2 + second;
  return 2 * byte + odd;
}

static void widen_product(const GraftProduct& p, void* x_wide) {
  widen(p, x_wide);
  if (!splits(p)) return;
  int order[64];
  for (int place = 0; place < 64; place++) order[place] = element_at(place);
  float* x = static_cast<float*>(x_wide);
  for (int64_t i = 0; i < p.in_features; i += 64) {
    float moved[64];
    for (int place = 0; place < 64; place++) moved[place] = x[i + order[place]];
    memcpy(x + i, moved, sizeof moved);
  }
}

static inline float sum_of(__m256 lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// Adds the products of 16 values in bfloat16, the even ones with x[0..7] and the odd ones with x[8..15].
static inline void add_16(__m256i halves, const float* x, __m256& even, __m256& odd) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)), _mm256_loadu_ps(x), even);
  odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(halves, upper)), _mm256_loadu_ps(x + 8), odd);
}

// 32 codes, one a byte, with the 32 elements of x that are theirs.
static inline void add_32(const HalfTable& table, __m256i codes, const float* x, __m256* sums) {
  const __m256i low = _mm256_shuffle_epi8(table.low, codes), high = _mm256_shuffle_epi8(table.high, codes);
  add_16(_mm256_unpacklo_epi8(low, high), x, sums[0], sums[1]);
  add_16(_mm256_unpackhi_epi8(low, high), x + 16, sums[2], sums[3]);
}

// The tables of consecutive blocks, made before they are used: one table is a chain of a dozen instructions that
// wait for each other, many are not.
constexpr int64_t kTables = 64;

struct Tables {
  alignas(32) uint8_t bytes[kTables][32];

  void fill(const Codebook& codebook, const GraftWeight& w, int64_t first, int64_t count) {
    float scales[kTables], shifts[kTables];
    numbers_of(w.scales, first, count, scales);
    if (w.shifts.values) numbers_of(w.shifts, first, count, shifts);
    bool finite = !w.shifts.values;
    for (int64_t i = 0; i < count; i++) finite &= scales[i] - scales[i] == 0.0f;
    if (finite) fill_with<true>(codebook, scales, nullptr, count);
    else fill_with<false>(codebook, scales, w.shifts.values ? shifts : nullptr, count);
  }

  template <bool kFinite>
  void fill_with(const Codebook& codebook, const float* scales, const float* shifts, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const Scaled values = values_of(codebook, scales[i], shifts ? shifts + i : nullptr);
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[i]), half_bytes<GRAFT_BF16, kFinite>(values));
    }
  }

  __m256i lane(int64_t i, int half) const {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i] + 16 * half)));
  }

  HalfTable one(int64_t i) const { return {lane(i, 0), lane(i, 1)}; }

  // Of two blocks of 32 elements, one in each lane.
  HalfTable two(int64_t i) const {
    return {_mm256_blend_epi32(lane(i, 0), lane(i + 1, 0), 0xf0), _mm256_blend_epi32(lane(i, 1), lane(i + 1, 1), 0xf0)};
  }
};

// 64 codes with the 64 elements of x that are theirs.
static inline void add_64(const HalfTable& table, const uint8_t* codes, const float* x, __m256* sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  add_32(table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble), x, sums);
  add_32(table, _mm256_and_si256(pairs, nibble), x + 32, sums + 4);
}

static float dot(const Codebook& codebook, Tables& tables, const GraftProduct& p, int64_t column, const float* x) {
  const GraftWeight& w = p.weight;
  const int64_t num_blocks = p.in_features / w.blocksize, first = column * num_blocks;
  const uint8_t* codes = w.codes + column * p.in_features / 2;
  __m256 sums[8] = {};
  for (int64_t block = 0; block < num_blocks; block += kTables) {
    const int64_t count = num_blocks - block < kTables ? num_blocks - block : kTables;
    tables.fill(codebook, w, first + block, count);
    if (w.blocksize == 32)
      for (int64_t i = 0; i < count; i += 2, codes += 32, x += 64) add_64(tables.two(i), codes, x, sums);
    else if (w.blocksize == 64)
      for (int64_t i = 0; i < count; i++, codes += 32, x += 64) add_64(tables.one(i), codes, x, sums);
    else
      for (int64_t i = 0; i < count; i++) {
        const HalfTable table = tables.one(i);
        for (int64_t j = 0; j < w.blocksize; j += 64, codes += 32, x += 64) add_64(table, codes, x, sums);
      }
  }
  for (int i = 0; i < 4; i++) sums[i] = _mm256_add_ps(sums[i], sums[i + 4]);
  return sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

// Elements of one row of W as floats, rounded as a dense weight of x's dtype would be.
template <int kBits, int32_t kDtype, class As>
static inline void decode_stretch(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t count, float* out) {
  const GraftWeight& w = p.weight;
  const Windows<kBits == 8 ? 4 : kBits> windows;
  const Codebook codebook(w);
  for (int64_t done = 0; done < count;) {
    const int64_t at = begin + done, left = (at / w.blocksize + 1) * w.blocksize - at;
    const int64_t n = left < count - done ? left : count - done;
    if constexpr (kBits == 8) decode_in_block_8<kDtype, As>(w, r, at, n, out + done);
    else decode_in_block<kBits, kDtype, As>(windows, codebook, w, at, n, out + done);
    done += n;
  }
}

// Adds to the sums of kRows rows of x with kColumns rows of W.
template <int kRows>
static inline void multiply_tile(const float* weights, const float* x, int64_t x_stride, int64_t count,
                                 __m256 (*sums)[kMaxRows]) {
  __m256 held[kColumns][kRows];
  for (int c = 0; c < kColumns; c++)
    for (int row = 0; row < kRows; row++) held[c][row] = sums[c][row];
  for (int64_t k = 0; k < count; k += kLanes) {
    __m256 values[kRows];
    for (int row = 0; row < kRows; row++) values[row] = _mm256_loadu_ps(x + row * x_stride + k);
    for (int c = 0; c < kColumns; c++) {
      const __m256 weight = _mm256_loadu_ps(weights + c * kStride + k);
      for (int row = 0; row < kRows; row++) held[c][row] = _mm256_fmadd_ps(weight, values[row], held[c][row]);
    }
  }
  for (int c = 0; c < kColumns; c++)
    for (int row = 0; row < kRows; row++) sums[c][row] = held[c][row];
}

template <int kBits, int32_t kDtype, class As>
static void product_of(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const float* x) {
  alignas(32) float weights[kColumns * kStride] = {};
  for (int64_t column = begin; column < end; column += kColumns) {
    const int num_columns = end - column < kColumns ? int(end - column) : kColumns;
    __m256 sums[kColumns][kMaxRows];
    for (auto& of_column : sums)
      for (int64_t row = 0; row < p.rows; row++) of_column[row] = _mm256_setzero_ps();
    for (int64_t k = 0; k < p.in_features; k += kDepth) {
      const int64_t depth = p.in_features - k < kDepth ? p.in_features - k : kDepth;
      for (int c = 0; c < num_columns; c++)
        decode_stretch<kBits, kDtype, As>(p, r, (column + c) * p.in_features + k, depth, weights + c * kStride);
      int64_t row = 0;
      for (; row + 3 <= p.rows; row += 3)
        multiply_tile<3>(weights, x + row * p.in_features + k, p.in_features, depth,
                         reinterpret_cast<__m256(*)[kMaxRows]>(&sums[0][row]));
      for (; row < p.rows; row++)
        multiply_tile<1>(weights, x + row * p.in_features + k, p.in_features, depth,
                         reinterpret_cast<__m256(*)[kMaxRows]>(&sums[0][row]));
    }
    for (int64_t row = 0; row < p.rows; row++)
      for (int c = 0; c < num_columns; c++) store(p, row, column + c, sum_of(sums[c][row]));
  }
}

template <int kBits>
static void product_of_bits(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const float* x) {
  if (p.dtype == GRAFT_F32) return product_of<kBits, GRAFT_F32, AsFloats>(p, r, begin, end, x);
  if (p.dtype == GRAFT_BF16) return product_of<kBits, GRAFT_BF16, AsWide>(p, r, begin, end, x);
  product_of<kBits, GRAFT_F16, AsWide>(p, r, begin, end, x);
}

// The tier's product.
static void multiply_all(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x_wide) {
  const float* x = static_cast<const float*>(x_wide);
  if (splits(p)) {
    const Codebook codebook(p.weight);
    Tables tables;
    for (int64_t column = begin; column < end; column++) store(p, 0, column, dot(codebook, tables, p, column, x));
    return;
  }
  auto run = p.weight.bits == 2   ? product_of_bits<2>
             : p.weight.bits == 3 ? product_of_bits<3>
             : p.weight.bits == 4 ? product_of_bits<4>
                                  : product_of_bits<8>;
  run(p, r, begin, end, x);
}
