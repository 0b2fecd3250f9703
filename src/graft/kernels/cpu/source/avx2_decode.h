// Codes to values with AVX2, 32 at a time. Included by tier_avx2.cpp after portable.h, which does what is not
// whole blocks.
//
// Codes become bytes in their natural order; a block's 16 values, rounded to halves, lie in two tables of 16
// bytes, their lower and their upper ones, so that one shuffle looks 32 codes up.

// ---- codes ----

// Where 16 codes of 2 or 3 bits lie in a string of bytes: windows of two bytes, shifted to the top of their lane.
template <int kBits>
struct Windows {
  __m256i bytes[2], factors[2];

  Windows() {
    for (int half = 0; half < 2; half++) {
      alignas(32) uint8_t places[32];
      alignas(32) uint16_t shifts[16];
      for (int lane = 0; lane < 16; lane++) {
        // Codes 0..7 and 16..23, then 8..15 and 24..31: packing the two halves puts all in order.
        const int code = (lane < 8 ? lane : lane + 8) + 8 * half, bit = code * kBits;
        places[2 * lane] = uint8_t(bit / 8 + 1), places[2 * lane + 1] = uint8_t(bit / 8);
        shifts[lane] = uint16_t(1u << bit % 8);
      }
      bytes[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
      factors[half] = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
    }
  }

  __m256i codes(const uint8_t* packed) const {
    uint64_t low;
    uint32_t high = 0;
    memcpy(&low, packed, 8);
    if (kBits == 3) memcpy(&high, packed + 8, 4);
    const __m256i held = _mm256_broadcastsi128_si256(_mm_set_epi64x(int64_t(high), int64_t(low)));
    const __m256i first = _mm256_mullo_epi16(_mm256_shuffle_epi8(held, bytes[0]), factors[0]);
    const __m256i second = _mm256_mullo_epi16(_mm256_shuffle_epi8(held, bytes[1]), factors[1]);
    return _mm256_packus_epi16(_mm256_srli_epi16(first, 16 - kBits), _mm256_srli_epi16(second, 16 - kBits));
  }
};

template <>
struct Windows<4> {
  __m256i codes(const uint8_t* packed) const {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m256i apart = _mm256_or_si256(_mm256_slli_epi16(pairs, 8), _mm256_srli_epi16(pairs, 4));
    return _mm256_and_si256(apart, _mm256_set1_epi8(15));
  }
};

// ---- the values of a block ----

// The codebook as two vectors whose lanes, taken in turn, are the entries: 0 2 4 6, 8 10 12 14 and 1 3 5 7, 9 ...
struct Codebook {
  __m256 first, second;

  explicit Codebook(const GraftWeight& w) {
    float even[8], odd[8];
    const int mask = (1 << w.bits) - 1;
    for (int i = 0; i < 8; i++) even[i] = w.codebook[2 * i & mask], odd[i] = w.codebook[(2 * i + 1) & mask];
    first = _mm256_loadu_ps(even), second = _mm256_loadu_ps(odd);
  }
};

struct Scaled {
  __m256 first, second;
};

// `shift` is null where a format has none.
static inline Scaled values_of(const Codebook& codebook, float scale, const float* shift) {
  const __m256 factor = _mm256_set1_ps(scale);
  const Scaled values = {_mm256_mul_ps(codebook.first, factor), _mm256_mul_ps(codebook.second, factor)};
  if (!shift) return values;
  const __m256 moved = _mm256_set1_ps(*shift);
  return {_mm256_add_ps(values.first, moved), _mm256_add_ps(values.second, moved)};
}

static inline Scaled values_of(const Codebook& codebook, const GraftWeight& w, int64_t block) {
  const float shift = w.shifts.values ? number_of(w.shifts, block) : 0.0f;
  return values_of(codebook, number_of(w.scales, block), w.shifts.values ? &shift : nullptr);
}

// The numbers of `count` consecutive blocks: the arithmetic of number_of.
static inline void numbers_of(const GraftPerBlock& n, int64_t first, int64_t count, float* out) {
  int64_t done = 0;
  while (n.map && count - done >= 8) {
    const int64_t at = first + done, edge = (at / 256 + 1) * 256 - first, stop = edge < count ? edge : count;
    const __m256 scale = _mm256_set1_ps(n.scale[at / 256]), offset = _mm256_set1_ps(n.offset[0]);
    for (; done + 8 <= stop; done += 8) {
      const uint8_t* codes = static_cast<const uint8_t*>(n.values) + first + done;
      float coded[8];  // by plain loads, which cost less than a gathering one
      for (int i = 0; i < 8; i++) coded[i] = n.map[codes[i]];
      _mm256_storeu_ps(out + done, _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(coded), scale), offset));
    }
    for (; done < stop; done++) out[done] = number_of(n, first + done);
  }
  for (; done < count; done++) out[done] = number_of(n, first + done);
}

// To nearest, ties to even, in the upper halves of the lanes.
static inline __m256i round_bf16_finite(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

// The same; NaN stays NaN.
static inline __m256i round_bf16(__m256 values) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(round_bf16_finite(values), _mm256_set1_epi32(0x7fc00000), nan);
}

// Eight halves of kDtype.
template <int32_t kDtype>
static inline __m128i round_8(__m256 values) {
  if (kDtype == GRAFT_F16) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i wide = _mm256_srli_epi32(round_bf16(values), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

// The bytes of the 16 values of a block as halves, in both lanes.
struct HalfTable {
  __m256i low, high;
};

// The lower bytes of the 16 values as halves in one lane, the upper ones in the other. kFinite: none is a NaN.
template <int32_t kDtype, bool kFinite = false>
static inline __m256i half_bytes(const Scaled& values) {
  __m256i halves;  // in their order
  if (kDtype == GRAFT_BF16) {
    const __m256i even = kFinite ? round_bf16_finite(values.first) : round_bf16(values.first);
    const __m256i odd = kFinite ? round_bf16_finite(values.second) : round_bf16(values.second);
    halves = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  } else {
    const __m128i even = round_8<kDtype>(values.first), odd = round_8<kDtype>(values.second);
    halves = _mm256_setr_m128i(_mm_unpacklo_epi16(even, odd), _mm_unpackhi_epi16(even, odd));
  }
  const __m256i apart = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(halves, apart), 0xd8);
}

template <int32_t kDtype>
static inline HalfTable half_table(const Scaled& values) {
  const __m256i bytes = half_bytes<kDtype>(values);
  return {_mm256_permute2x128_si256(bytes, bytes, 0x00), _mm256_permute2x128_si256(bytes, bytes, 0x11)};
}

struct Halves {
  __m256i first, second;  // 16 and 16
};

static inline Halves look_up_32(const HalfTable& table, __m256i codes) {
  const __m256i places = _mm256_permute4x64_epi64(codes, 0xd8);
  const __m256i low = _mm256_shuffle_epi8(table.low, places), high = _mm256_shuffle_epi8(table.high, places);
  return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}

template <int32_t kDtype>
static inline __m256 widen_8(__m128i halves) {
  if (kDtype == GRAFT_F16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// ---- whole blocks of 2 to 4 bits ----

// What an element of the result is: halves, floats, or floats that hold what halves would.
struct AsHalves {
  using Element = uint16_t;
  static constexpr bool kThroughHalves = true;
};
struct AsFloats {
  using Element = float;
  static constexpr bool kThroughHalves = false;
};
struct AsWide {
  using Element = float;
  static constexpr bool kThroughHalves = true;
};

template <bool kPastCache>
static inline void put(void* out, __m256i values) {
  if (kPastCache) _mm256_stream_si256(static_cast<__m256i*>(out), values);
  else _mm256_storeu_si256(static_cast<__m256i*>(out), values);
}

template <bool kPastCache>
static inline void put(float* out, __m256 values) { put<kPastCache>(out, _mm256_castps_si256(values)); }

template <bool kPastCache, int32_t kDtype>
static inline void put_halves(const Halves& halves, uint16_t* out, AsHalves) {
  put<kPastCache>(out, halves.first);
  put<kPastCache>(out + 16, halves.second);
}

template <bool kPastCache, int32_t kDtype>
static inline void put_halves(const Halves& halves, float* out, AsWide) {
  put<kPastCache>(out, widen_8<kDtype>(_mm256_castsi256_si128(halves.first)));
  put<kPastCache>(out + 8, widen_8<kDtype>(_mm256_extracti128_si256(halves.first, 1)));
  put<kPastCache>(out + 16, widen_8<kDtype>(_mm256_castsi256_si128(halves.second)));
  put<kPastCache>(out + 24, widen_8<kDtype>(_mm256_extracti128_si256(halves.second, 1)));
}

// `count` elements, a multiple of 32, of one block from `at` on.
template <int kBits, int32_t kDtype, class As, bool kPastCache = false>
static inline void decode_in_block(const Windows<kBits>& windows, const Codebook& codebook, const GraftWeight& w,
                                   int64_t at, int64_t count, typename As::Element* out) {
  const Scaled values = values_of(codebook, w, at / w.blocksize);
  const uint8_t* codes = w.codes + at * kBits / 8;
  if constexpr (As::kThroughHalves) {
    const HalfTable table = half_table<kDtype>(values);
    for (int64_t i = 0; i < count; i += 32, codes += 4 * kBits)
      put_halves<kPastCache, kDtype>(look_up_32(table, windows.codes(codes)), out + i, As());
  } else {
    // Entries 0 1 2 3, 8 9 10 11 and 4 5 6 7, 12 13 14 15; then halves by their lanes.
    const __m256 low_pairs = _mm256_unpacklo_ps(values.first, values.second);
    const __m256 high_pairs = _mm256_unpackhi_ps(values.first, values.second);
    const __m256 lower = _mm256_permute2f128_ps(low_pairs, high_pairs, 0x20);
    const __m256 upper = _mm256_permute2f128_ps(low_pairs, high_pairs, 0x31);
    for (int64_t i = 0; i < count; i += 32, codes += 4 * kBits) {
      alignas(32) uint8_t places[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(places), windows.codes(codes));
      for (int j = 0; j < 32; j += 8) {
        const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places + j)));
        const __m256 low = _mm256_permutevar8x32_ps(lower, eight);
        if (kBits < 4) {
          put<kPastCache>(out + i + j, low);
          continue;
        }
        const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28));
        put<kPastCache>(out + i + j, _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(upper, eight), fourth_bit));
      }
    }
  }
}

template <int kBits, int32_t kDtype, class As, bool kPastCache>
static void decode_blocks(const GraftWeight& w, int64_t begin, int64_t end, typename As::Element* out) {
  const Windows<kBits> windows;
  const Codebook codebook(w);
  for (int64_t at = begin; at < end; at += w.blocksize)
    decode_in_block<kBits, kDtype, As, kPastCache>(windows, codebook, w, at, w.blocksize, out + at);
  if (kPastCache) _mm_sfence();
}

// ---- 8 bits ----

// The entries of 8 codes; k/127 is computed, other codebooks are looked up.
static inline __m256 entries_of_8(const Rounding& r, const uint8_t* codes) {
  const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  if (!r.linear) return _mm256_i32gather_ps(r.codebook, places, 4);
  const __m256i offset = _mm256_sub_epi32(places, _mm256_set1_epi32(128));
  const __m256i whole = _mm256_add_epi32(offset, _mm256_srli_epi32(offset, 31));
  // step / 127 correctly rounded: the product with the reciprocal, and what it leaves.
  const __m256 step = _mm256_cvtepi32_ps(whole), reciprocal = _mm256_set1_ps(1.0f / 127.0f);
  const __m256 quotient = _mm256_mul_ps(step, reciprocal);
  const __m256 rest = _mm256_fnmadd_ps(quotient, _mm256_set1_ps(127.0f), step);
  return _mm256_fmadd_ps(rest, reciprocal, quotient);
}

template <int32_t kDtype, class As>
static inline void decode_in_block_8(const GraftWeight& w, const Rounding& r, int64_t at, int64_t count,
                                     typename As::Element* out) {
  const __m256 scale = _mm256_set1_ps(number_of(w.scales, at / w.blocksize));
  const bool shifted = w.shifts.values;
  const __m256 shift = _mm256_set1_ps(shifted ? number_of(w.shifts, at / w.blocksize) : 0.0f);
  for (int64_t i = 0; i < count; i += 8) {
    __m256 values = _mm256_mul_ps(entries_of_8(r, w.codes + at + i), scale);
    if (shifted) values = _mm256_add_ps(values, shift);
    if constexpr (!As::kThroughHalves)
      _mm256_storeu_ps(out + i, values);
    else if constexpr (sizeof(*out) == 4)
      _mm256_storeu_ps(out + i, widen_8<kDtype>(round_8<kDtype>(values)));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), round_8<kDtype>(values));
  }
}

// ---- any bits ----

template <int32_t kDtype, class As>
static void decode_to(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end,
                      typename As::Element* out, bool past_cache) {
  if (w.bits == 8) {
    for (int64_t at = begin; at < end; at += w.blocksize) decode_in_block_8<kDtype, As>(w, r, at, w.blocksize, out + at);
    return;
  }
  auto run = w.bits == 2   ? past_cache ? decode_blocks<2, kDtype, As, true> : decode_blocks<2, kDtype, As, false>
             : w.bits == 3 ? past_cache ? decode_blocks<3, kDtype, As, true> : decode_blocks<3, kDtype, As, false>
             : past_cache  ? decode_blocks<4, kDtype, As, true>
                           : decode_blocks<4, kDtype, As, false>;
  run(w, begin, end, out);
}

// The tier's decode: whole blocks here, the rest of the last one as on any machine.
static void decode_all(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, void* out, int32_t dtype,
                       bool past_cache) {
  const int64_t whole = begin + (end - begin) / w.blocksize * w.blocksize;
  auto* halves = static_cast<uint16_t*>(out);
  auto* floats = static_cast<float*>(out);
  if (dtype == GRAFT_F32) decode_to<GRAFT_F32, AsFloats>(w, r, begin, whole, floats, past_cache);
  if (dtype == GRAFT_BF16) decode_to<GRAFT_BF16, AsHalves>(w, r, begin, whole, halves, past_cache);
  if (dtype == GRAFT_F16) decode_to<GRAFT_F16, AsHalves>(w, r, begin, whole, halves, past_cache);
  if (dtype == GRAFT_BF16_WIDE) decode_to<GRAFT_BF16, AsWide>(w, r, begin, whole, floats, past_cache);
  if (dtype == GRAFT_F16_WIDE) decode_to<GRAFT_F16, AsWide>(w, r, begin, whole, floats, past_cache);
  if (whole < end) decode(w, r, whole, end, out, dtype, past_cache);
}
