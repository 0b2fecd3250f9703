// Values to codes with AVX2. Included by tier_avx2.cpp after portable.h, which does blocks that are not whole
// or hold what is not finite.

static inline __m256 load_8(const void* values, int32_t dtype, int64_t at) {
  if (dtype == GRAFT_F32) return _mm256_loadu_ps(static_cast<const float*>(values) + at);
  const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + at);
  return dtype == GRAFT_F16 ? _mm256_cvtph_ps(_mm_loadu_si128(halves))
                            : widen_8<GRAFT_BF16>(_mm_loadu_si128(halves));
}

static inline uint32_t largest_of(__m256i values) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
}

static inline float least_of(__m256 values) {
  __m128 four = _mm_min_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  four = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(four, _mm_shuffle_ps(four, four, 1)));
}

static inline float most_of(__m256 values) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// A whole block in float, and its limits; low and high only for formats that shift.
static inline Limits load_block(const GraftEncoding& e, int64_t at, float* values) {
  const __m256i kept = _mm256_set1_epi32(0x7fffffff);
  __m256i magnitude = _mm256_setzero_si256();
  __m256 low = load_8(e.values, e.dtype, at), high = low;
  for (int64_t i = 0; i < e.blocksize; i += 8) {
    const __m256 value = load_8(e.values, e.dtype, at + i);
    _mm256_storeu_ps(values + i, value);
    // As integers: an infinity or a NaN is larger than any number, and is not lost.
    magnitude = _mm256_max_epu32(magnitude, _mm256_and_si256(_mm256_castps_si256(value), kept));
    if (e.shift) low = _mm256_min_ps(low, value), high = _mm256_max_ps(high, value);
  }
  return {least_of(low), most_of(high), largest_of(magnitude)};
}

// The midpoints that each step of a binary search may compare with.
template <int kBits>
struct Search {
  __m256 tables[kBits];

  explicit Search(const Rounding& r) {
    for (int step = 0; step < kBits; step++) {
      float table[8] = {};
      const int width = 1 << (kBits - 1 - step);  // of the ranks that are still open, half
      for (int i = 0; i < (1 << step); i++) table[i] = r.midpoints[2 * width * i + width - 1];
      tables[step] = _mm256_loadu_ps(table);
    }
  }

  // How many midpoints each value exceeds; none for a NaN.
  __m256i ranks(__m256 values) const {
    __m256i rank = _mm256_setzero_si256();
    for (int step = 0; step < kBits; step++) {
      const __m256 bound = step ? _mm256_permutevar8x32_ps(tables[step], rank) : first();
      const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(values, bound, _CMP_GT_OQ));
      rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), above);
    }
    return rank;
  }

  __m256 first() const { return _mm256_permutevar8x32_ps(tables[0], _mm256_setzero_si256()); }
};

// 32 codes of a byte each become 4 * kBits bytes; the first code is in the highest bits.
template <int kBits>
static inline void pack_32(__m256i codes, uint8_t* bytes) {
  constexpr int kFactor = 1 << kBits;
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(int16_t(0x0100 | kFactor)));
  if (kBits == 4) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm256_castsi256_si128(packed));
    return;
  }
  alignas(32) uint64_t fours[4];  // two groups of four codes in each
  const __m256i factors = _mm256_set1_epi32(1 << 16 | kFactor * kFactor);
  _mm256_store_si256(reinterpret_cast<__m256i*>(fours), _mm256_madd_epi16(pairs, factors));
  for (const uint64_t four : fours) {
    const uint32_t eight = uint32_t(four) << (4 * kBits) | uint32_t(four >> 32);
    const uint32_t packed = __builtin_bswap32(eight << (32 - 8 * kBits));
    memcpy(bytes, &packed, kBits);
    bytes += kBits;
  }
}

template <int kBits>
static void encode_blocks(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  float values[kBuffer];
  const Search<kBits> search(r);
  const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r.order)));
  const __m256i natural = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t at = begin; at < end; at += e.blocksize) {
    const Limits limits = load_block(e, at, values);
    if (limits.magnitude >= 0x7f800000u) {
      encode(e, r, at, at + e.blocksize);
      continue;
    }
    const Scaling s = scaling_of(e, at / e.blocksize, limits, true);
    const __m256 shift = _mm256_set1_ps(s.shift), factor = _mm256_set1_ps(s.factor);
    uint8_t* bytes = e.codes + at * kBits / 8;
    for (int64_t i = 0; i < e.blocksize; i += 32, bytes += 4 * kBits) {
      __m256i ranks[4];
      for (int j = 0; j < 4; j++) {
        __m256 value = _mm256_loadu_ps(values + i + 8 * j);
        if (e.shift) value = _mm256_sub_ps(value, shift);
        ranks[j] = search.ranks(_mm256_mul_ps(value, factor));
      }
      const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(ranks[0], ranks[1]),
                                                 _mm256_packus_epi32(ranks[2], ranks[3]));
      const __m256i codes = _mm256_permutevar8x32_epi32(packed, natural);
      pack_32<kBits>(_mm256_shuffle_epi8(order, codes), bytes);
    }
  }
}

// ---- 8 bits ----

// Eight scaled values within [-1, 1]; a NaN becomes 0.
static inline __m256 within_one(__m256 scaled) {
  const __m256 number = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
  return _mm256_max_ps(_mm256_min_ps(number, _mm256_set1_ps(1.0f)), _mm256_set1_ps(-1.0f));
}

// Grid points of 8 values: the arithmetic of code_of_8.
static inline __m256i grid_points(__m256 within) {
  const __m256 point = _mm256_mul_ps(_mm256_add_ps(within, _mm256_set1_ps(1.0f)), _mm256_set1_ps(32767.5f));
  return _mm256_cvttps_epi32(_mm256_add_ps(point, _mm256_set1_ps(0.5f)));
}

// Ranks of 8 values: the arithmetic of code_of_8.
static inline __m256i nearest_ranks(const Rounding& r, __m256 within) {
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(within), 16);
  const __m256i found = _mm256_i32gather_epi32(reinterpret_cast<const int*>(r.lowest), upper, 1);
  __m256i rank = _mm256_and_si256(found, _mm256_set1_epi32(255));
  for (;;) {
    const __m256 above = _mm256_cmp_ps(within, _mm256_i32gather_ps(r.midpoints, rank, 4), _CMP_GT_OQ);
    if (!_mm256_movemask_ps(above)) return rank;
    rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above));
  }
}

static void encode_blocks_8(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  float values[kBuffer];
  alignas(32) int32_t places[8];
  for (int64_t at = begin; at < end; at += e.blocksize) {
    const Limits limits = load_block(e, at, values);
    if (limits.magnitude >= 0x7f800000u || (e.grid && !limits.magnitude)) {
      encode(e, r, at, at + e.blocksize);
      continue;
    }
    const Scaling s = scaling_of(e, at / e.blocksize, limits, true);
    const __m256 shift = _mm256_set1_ps(s.shift), factor = _mm256_set1_ps(s.factor);
    for (int64_t i = 0; i < e.blocksize; i += 8) {
      __m256 value = _mm256_loadu_ps(values + i);
      if (e.shift) value = _mm256_sub_ps(value, shift);
      const __m256 within = within_one(_mm256_mul_ps(value, factor));
      const __m256i found = e.grid ? grid_points(within) : nearest_ranks(r, within);
      _mm256_store_si256(reinterpret_cast<__m256i*>(places), found);
      const uint8_t* table = e.grid ? r.grid : r.order;
      for (int lane = 0; lane < 8; lane++) e.codes[at + i + lane] = table[places[lane]];
    }
  }
}

// The tier's encode: whole blocks here, the rest of the last one as on any machine.
static void encode_all(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / e.blocksize * e.blocksize;
  auto run = e.bits == 2   ? encode_blocks<2>
             : e.bits == 3 ? encode_blocks<3>
             : e.bits == 4 ? encode_blocks<4>
                           : encode_blocks_8;
  run(e, r, begin, whole);
  if (whole < end) encode(e, r, whole, end);
}
