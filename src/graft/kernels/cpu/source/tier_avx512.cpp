// The tier for x86 with AVX-512 VBMI and BF16 (Zen 4, Sapphire Rapids and later).
//
// 32 codes of 2, 3 or 4 bits become values in three instructions: bytes are brought to the 16-bit lanes that
// need them, each lane shifts its code down, and the lanes look up a table of 32 halves in one register. The
// table repeats with the period of the codes, so that what is left above a code in its lane does no harm.

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include <type_traits>

#include "graft.h"

namespace graft {
namespace {

#include "scalar.h"

constexpr int kBuffer = 4096;  // the largest blocksize

// ---- the numbers of blocks ----

constexpr int64_t kRun = 2048;  // blocks at a time: all of a piece of 65536 elements

// Scales and shifts of consecutive blocks. `tame`: bfloat16 values made of them are no subnormals.
struct Numbers {
  float scales[kRun], shifts[kRun];
  bool shifted, tame;
};

static inline bool tame_of(const float* numbers, int64_t count) {
  __mmask16 wild = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
    const __m512 magnitude = _mm512_abs_ps(_mm512_maskz_loadu_ps(some, numbers + i));
    const __mmask16 middling = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(1e-20f), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(1e30f), _CMP_LE_OQ);
    wild |= __mmask16(~(middling | _mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_EQ_OQ)));
  }
  return !wild;
}

static inline void numbers_of(const GraftPerBlock& n, int64_t first, int64_t count, float* out) {
  if (!n.map) {
    memcpy(out, static_cast<const float*>(n.values) + first, size_t(count) * sizeof(float));
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(n.values);
  const __m512 offset = _mm512_set1_ps(n.offset[0]);
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done, edge = (at / 256 + 1) * 256 - first, stop = edge < count ? edge : count;
    const __m512 scale = _mm512_set1_ps(n.scale[at / 256]);
    for (; done < stop; done += 16) {
      const __mmask16 some = stop - done < 16 ? __mmask16((1u << (stop - done)) - 1) : __mmask16(0xffff);
      const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + first + done));
      const __m512 product = _mm512_mul_ps(_mm512_i32gather_ps(places, n.map, 4), scale);
      _mm512_mask_storeu_ps(out + done, some, _mm512_add_ps(product, offset));
    }
    done = stop;
  }
}

static inline void fill_numbers(const GraftWeight& w, const Rounding& r, int64_t first, int64_t count, Numbers& numbers) {
  numbers_of(w.scales, first, count, numbers.scales);
  numbers.tame = r.moderate && tame_of(numbers.scales, count);
  numbers.shifted = w.shifts.values != nullptr;
  if (!numbers.shifted) return;
  numbers_of(w.shifts, first, count, numbers.shifts);
  numbers.tame = numbers.tame && tame_of(numbers.shifts, count);
}

// ---- codes to values ----

// Where the codes of the lanes lie in a string of bytes. Lane i starts at bit i * bits.
template <int kBits>
struct Places {
  __m512i bytes16, shifts16;  // for 32 lanes of 16 bits
  __m512i bytes32, shifts32;  // for 16 lanes of 32 bits

  Places() {
    alignas(64) uint8_t bytes16_[64], bytes32_[64] = {};
    alignas(64) uint16_t shifts16_[32];
    alignas(64) uint32_t shifts32_[16];
    for (int lane = 0; lane < 32; lane++) {
      const int bit = lane * kBits, shift = 16 - bit % 8 - kBits;
      bytes16_[2 * lane] = uint8_t(bit / 8 + 1);  // big-endian windows of two bytes
      bytes16_[2 * lane + 1] = uint8_t(bit / 8);
      shifts16_[lane] = uint16_t(shift);
      if (lane >= 16) continue;
      bytes32_[4 * lane] = uint8_t(bit / 8 + 1);
      bytes32_[4 * lane + 1] = uint8_t(bit / 8);
      shifts32_[lane] = uint32_t(shift);
    }
    bytes16 = _mm512_load_si512(bytes16_), shifts16 = _mm512_load_si512(shifts16_);
    bytes32 = _mm512_load_si512(bytes32_), shifts32 = _mm512_load_si512(shifts32_);
  }

  static constexpr int kBytes16 = 4 * kBits, kBytes32 = 2 * kBits;  // of the codes of all lanes

  __m512i halves(const uint8_t* codes, __m512i table, __mmask16 bytes = __mmask16((1u << kBytes16) - 1)) const {
    const __m128i held = kBits == 4 && bytes == 0xffff ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))
                                                       : _mm_maskz_loadu_epi8(bytes, codes);
    const __m512i windows = _mm512_permutexvar_epi8(bytes16, _mm512_zextsi128_si512(held));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(windows, shifts16), table);
  }

  __m512 floats(const uint8_t* codes, __m512 table, __mmask16 bytes = __mmask16((1u << kBytes32) - 1)) const {
    const __m128i held = kBits == 4 && bytes == 0xff ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))
                                                     : _mm_maskz_loadu_epi8(bytes, codes);
    const __m512i windows = _mm512_permutexvar_epi8(bytes32, _mm512_zextsi128_si512(held));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(windows, shifts32), table);
  }
};

// To nearest, ties to even, subnormals kept (vcvtneps2bf16 would flush them); NaN stays NaN.
static inline __m256i round_bf16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i upper = _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0);
  return _mm512_cvtepi32_epi16(upper);
}

static inline __m256i round_half(__m512 values, int32_t dtype) {
  return dtype == GRAFT_BF16 ? round_bf16(values)
                             : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// The codebook in 16 lanes, repeated where it is shorter.
static inline __m512 codebook_of(const GraftWeight& w) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_and_si512(lanes, _mm512_set1_epi32((1 << w.bits) - 1));
  const __mmask16 entries = w.bits < 4 ? __mmask16((1u << (1 << w.bits)) - 1) : __mmask16(0xffff);
  return _mm512_permutexvar_ps(places, _mm512_maskz_loadu_ps(entries, w.codebook));
}

static inline __mmask16 bytes_of(int64_t num_codes, int bits) {
  return __mmask16((1u << ((num_codes * bits + 7) / 8)) - 1);
}

// What is known of the numbers of all blocks of a run, so that loops over blocks do not ask for each.
template <bool kShifted, bool kTame>
struct Kind {
  static __m512 table(__m512 codebook, const Numbers& numbers, int64_t i) {
    const __m512 scaled = _mm512_mul_ps(codebook, _mm512_set1_ps(numbers.scales[i]));
    return kShifted ? _mm512_add_ps(scaled, _mm512_set1_ps(numbers.shifts[i])) : scaled;
  }

  // 32 halves: the 16 entries twice.
  template <int32_t kDtype>
  static __m512i half_table(__m512 codebook, const Numbers& numbers, int64_t i) {
    const __m512 entries = table(codebook, numbers, i);
    if (kDtype == GRAFT_BF16 && kTame) return (__m512i)_mm512_cvtne2ps_pbh(entries, entries);
    return _mm512_broadcast_i64x4(round_half(entries, kDtype));
  }
};

template <class Run>
static inline void by_kind(const Numbers& numbers, Run run) {
  if (numbers.shifted) return numbers.tame ? run(Kind<true, true>()) : run(Kind<true, false>());
  return numbers.tame ? run(Kind<false, true>()) : run(Kind<false, false>());
}

// Each block, or part of one, of the elements [begin, end): its place after `first`, its start and its length.
template <class Each>
static inline void over_blocks(int64_t blocksize, int64_t first, int64_t begin, int64_t end, Each each) {
  int64_t i = begin / blocksize - first, at = begin;
  const int64_t edge = (first + i + 1) * blocksize;
  if (edge - at < blocksize) {
    const int64_t last = edge < end ? edge : end;
    each(i++, at, last - at);
    at = last;
  }
  for (; at + blocksize <= end; at += blocksize) each(i++, at, blocksize);
  if (at < end) each(i, at, end - at);
}

template <bool kPastCache>
static inline void put(void* out, __m512i values) {
  if (kPastCache) _mm512_stream_si512(static_cast<__m512i*>(out), values);
  else _mm512_storeu_si512(out, values);
}

template <bool kPastCache, int kBits>
static inline void decode_block(const Places<kBits>& places, __m512i table, const uint8_t* codes, int64_t count,
                                uint16_t* out) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32, codes += Places<kBits>::kBytes16)
    put<kPastCache>(out + i, places.halves(codes, table));
  if (i == count) return;
  const __m512i values = places.halves(codes, table, bytes_of(count - i, kBits));
  _mm512_mask_storeu_epi16(out + i, __mmask32((1u << (count - i)) - 1), values);
}

template <bool kPastCache, int kBits>
static inline void decode_block(const Places<kBits>& places, __m512 table, const uint8_t* codes, int64_t count,
                                float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16, codes += Places<kBits>::kBytes32)
    put<kPastCache>(out + i, _mm512_castps_si512(places.floats(codes, table)));
  if (i == count) return;
  const __m512 values = places.floats(codes, table, bytes_of(count - i, kBits));
  _mm512_mask_storeu_ps(out + i, __mmask16((1u << (count - i)) - 1), values);
}

// Rows of W are too short for the processor to see a stream in each: what comes next is asked for by hand. Past
// the end of the codes this does nothing.
static inline void prefetch(const uint8_t* codes, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(codes + i), _MM_HINT_T0);
}

// Elements [begin, end) to out, in float or in the halves of kDtype. `first` is the block of the first number.
// Codes `ahead` bytes further on are asked for.
template <int32_t kDtype, bool kPastCache, int kBits, class Kind, class Element>
static inline void decode_with(Kind kind, const Numbers& numbers, int64_t first, const Places<kBits>& places,
                               __m512 codebook, const GraftWeight& w, int64_t begin, int64_t end, Element* out,
                               int64_t ahead = 0) {
  over_blocks(w.blocksize, first, begin, end, [&](int64_t i, int64_t at, int64_t count) {
    const uint8_t* codes = w.codes + at * kBits / 8;
    if (ahead) prefetch(codes + ahead, count * kBits / 8);
    if constexpr (kDtype == GRAFT_F32)
      decode_block<kPastCache>(places, kind.table(codebook, numbers, i), codes, count, out + (at - begin));
    else
      decode_block<kPastCache>(places, kind.template half_table<kDtype>(codebook, numbers, i), codes, count,
                               out + (at - begin));
  });
}

template <int32_t kDtype, int kBits, class Element>
static void decode_run(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, Element* out, bool past_cache) {
  const Places<kBits> places;
  const __m512 codebook = codebook_of(w);
  const int64_t first = begin / w.blocksize;
  Numbers numbers;
  fill_numbers(w, r, first, (end + w.blocksize - 1) / w.blocksize - first, numbers);
  by_kind(numbers, [&](auto kind) {
    auto run = past_cache ? decode_with<kDtype, true, kBits, decltype(kind), Element>
                          : decode_with<kDtype, false, kBits, decltype(kind), Element>;
    run(kind, numbers, first, places, codebook, w, begin, end, out + begin, 0);
  });
  if (past_cache) _mm_sfence();
}

template <int kBits>
static void decode_low_bits(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, void* out,
                            int32_t dtype, bool past_cache) {
  if (dtype == GRAFT_F32) decode_run<GRAFT_F32, kBits>(w, r, begin, end, static_cast<float*>(out), past_cache);
  if (dtype == GRAFT_BF16) decode_run<GRAFT_BF16, kBits>(w, r, begin, end, static_cast<uint16_t*>(out), past_cache);
  if (dtype == GRAFT_F16) decode_run<GRAFT_F16, kBits>(w, r, begin, end, static_cast<uint16_t*>(out), past_cache);
}

// The entries of 16 codes of 8 bits; k/127 is computed, other codebooks are looked up.
static inline __m512 entries_of_8(const Rounding& r, const uint8_t* codes, __mmask16 some) {
  const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes));
  if (!r.linear) return _mm512_i32gather_ps(places, r.codebook, 4);
  const __mmask16 negative = _mm512_cmplt_epi32_mask(places, _mm512_set1_epi32(128));
  const __m512i offset = _mm512_sub_epi32(places, _mm512_set1_epi32(128));
  const __m512i whole = _mm512_mask_add_epi32(offset, negative, offset, _mm512_set1_epi32(1));
  // step / 127 correctly rounded: the product with the reciprocal, and what it leaves.
  const __m512 step = _mm512_cvtepi32_ps(whole), reciprocal = _mm512_set1_ps(1.0f / 127.0f);
  const __m512 quotient = _mm512_mul_ps(step, reciprocal);
  const __m512 rest = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(127.0f), step);
  return _mm512_fmadd_ps(rest, reciprocal, quotient);
}

static inline __m512 values_of_8(const GraftWeight& w, const Rounding& r, const uint8_t* codes, __mmask16 some,
                                 __m512 scale, __m512 shift) {
  const __m512 scaled = _mm512_mul_ps(entries_of_8(r, codes, some), scale);
  return w.shifts.values ? _mm512_add_ps(scaled, shift) : scaled;
}

// The same for 8 bits.
template <int32_t kDtype, class Element>
static void decode_run_8(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, Element* out) {
  over_blocks(w.blocksize, 0, begin, end, [&](int64_t block, int64_t at, int64_t count) {
    const __m512 scale = _mm512_set1_ps(number_of(w.scales, block));
    const __m512 shift = _mm512_set1_ps(w.shifts.values ? number_of(w.shifts, block) : 0.0f);
    const float magnitude = fabsf(_mm512_cvtss_f32(scale));
    const bool tame = r.linear && !w.shifts.values && magnitude > 1e-20f && magnitude < 1e30f;
    Element* to = out + (at - begin);
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 some = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
      const __m512 values = values_of_8(w, r, w.codes + at + i, some, scale, shift);
      if constexpr (kDtype == GRAFT_F32) {
        _mm512_mask_storeu_ps(to + i, some, values);
      } else {
        const bool fast = kDtype == GRAFT_BF16 && tame;
        _mm256_mask_storeu_epi16(to + i, some, fast ? (__m256i)_mm512_cvtneps_pbh(values) : round_half(values, kDtype));
      }
    }
  });
}

static void decode_8(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, void* out, int32_t dtype) {
  if (dtype == GRAFT_F32) decode_run_8<GRAFT_F32>(w, r, begin, end, static_cast<float*>(out) + begin);
  if (dtype == GRAFT_BF16) decode_run_8<GRAFT_BF16>(w, r, begin, end, static_cast<uint16_t*>(out) + begin);
  if (dtype == GRAFT_F16) decode_run_8<GRAFT_F16>(w, r, begin, end, static_cast<uint16_t*>(out) + begin);
}

static void decode_halves_or_floats(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, void* out,
                                    int32_t dtype, bool past_cache) {
  if (w.bits == 2) decode_low_bits<2>(w, r, begin, end, out, dtype, past_cache);
  if (w.bits == 3) decode_low_bits<3>(w, r, begin, end, out, dtype, past_cache);
  if (w.bits == 4) decode_low_bits<4>(w, r, begin, end, out, dtype, past_cache);
  if (w.bits == 8) decode_8(w, r, begin, end, out, dtype);
}

static void decode(const GraftWeight& w, const Rounding& r, int64_t begin, int64_t end, void* out, int32_t dtype,
                   bool past_cache) {
  if (dtype != GRAFT_BF16_WIDE && dtype != GRAFT_F16_WIDE)
    return decode_halves_or_floats(w, r, begin, end, out, dtype, past_cache);
  // Whole blocks at a time: every blocksize divides the buffer.
  uint16_t halves[kBuffer];
  float* floats = static_cast<float*>(out);
  const int32_t narrow = dtype == GRAFT_BF16_WIDE ? GRAFT_BF16 : GRAFT_F16;
  for (int64_t at = begin; at < end; at += kBuffer) {
    const int64_t stop = end - at < kBuffer ? end : at + kBuffer;
    decode_halves_or_floats(w, r, at, stop, halves - at, narrow, false);
    for (int64_t i = at; i < stop; i++) floats[i] = load_float(halves, narrow, i - at);
  }
}

// ---- values to codes ----

static inline __m512 load_16(const void* values, int32_t dtype, int64_t at, __mmask16 some) {
  if (dtype == GRAFT_F32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(values) + at);
  const __m256i loaded = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(values) + at);
  if (dtype == GRAFT_F16) return _mm512_cvtph_ps(loaded);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
}

// Values of a block in float, padded with zeros to whole vectors, and their limits.
static inline Limits load_block(const GraftEncoding& e, int64_t at, int64_t count, float* values) {
  __m512i magnitude = _mm512_setzero_si512();
  __m512 low = _mm512_set1_ps(load_float(e.values, e.dtype, at)), high = low;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
    const __m512 value = load_16(e.values, e.dtype, at + i, some);
    _mm512_storeu_ps(values + i, value);
    // As integers: an infinity or a NaN is larger than any number, and is not lost.
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
    magnitude = _mm512_max_epu32(magnitude, bits);
    if (e.shift) {
      low = _mm512_mask_min_ps(low, some, low, value);
      high = _mm512_mask_max_ps(high, some, high, value);
    }
  }
  return {_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), _mm512_reduce_max_epu32(magnitude)};
}

// How many midpoints each value exceeds: a binary search among 15, in registers.
static inline __m512i ranks_of(__m512 values, __m512 midpoints) {
  const __m512 middle = _mm512_permutexvar_ps(_mm512_set1_epi32(7), midpoints);
  __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(values, middle, _CMP_GT_OQ), 8);
  for (int step = 4; step; step /= 2) {
    const __m512i place = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(values, _mm512_permutexvar_ps(place, midpoints), _CMP_GT_OQ);
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
  }
  return rank;
}

// Eight codes become kBits bytes.
template <int kBits>
static inline void pack(const uint8_t* codes, int64_t count, uint8_t* bytes, uint8_t filler) {
  int64_t done = 0;
  if (kBits == 4) {
    for (; done + 64 <= count; done += 64, bytes += 32) {
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + done), _mm512_set1_epi16(0x0110));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm512_cvtepi16_epi8(pairs));
    }
  }
  constexpr uint64_t kKept = 0x0101010101010101u * ((1u << kBits) - 1);
  for (; done + 8 <= count; done += 8, bytes += kBits) {
    uint64_t eight;
    memcpy(&eight, codes + done, 8);
    const uint64_t packed = __builtin_bswap64(_pext_u64(__builtin_bswap64(eight), kKept) << (64 - 8 * kBits));
    memcpy(bytes, &packed, kBits);
  }
  if (done < count) pack_codes(codes + done, kBits, count - done, bytes, filler);
}

template <int kBits>
static void encode_low_bits(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  float values[kBuffer];
  uint8_t codes[kBuffer + 16];
  const __m512 midpoints = _mm512_loadu_ps(r.midpoints);
  const uint8_t zero = code_of_zero(r);
  const __m512i order = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r.order)));
  for (int64_t at = begin; at < end; at += e.blocksize) {
    const int64_t count = end - at < e.blocksize ? end - at : e.blocksize;
    const bool full = count == e.blocksize;
    const Scaling s = scaling_of(e, at / e.blocksize, load_block(e, at, count, values), full);
    const __m512 shift = _mm512_set1_ps(s.shift), factor = _mm512_set1_ps(s.factor);
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 moved = e.shift ? _mm512_sub_ps(_mm512_loadu_ps(values + i), shift) : _mm512_loadu_ps(values + i);
      const __m512 scaled = full ? _mm512_mul_ps(moved, factor) : _mm512_div_ps(moved, _mm512_set1_ps(s.divisor));
      __m512i rank = ranks_of(scaled, midpoints);
      if (!r.ordered) rank = _mm512_permutexvar_epi32(rank, order);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(rank));
    }
    pack<kBits>(codes, count, e.codes + at * kBits / 8, zero);
  }
}

// Grid points of 16 scaled values: the arithmetic of code_of_8.
static inline __m512i grid_points(__m512 scaled) {
  const __mmask16 number = _mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q);
  const __m512 finite = _mm512_maskz_mov_ps(number, scaled);
  const __m512 within = _mm512_max_ps(_mm512_min_ps(finite, _mm512_set1_ps(1.0f)), _mm512_set1_ps(-1.0f));
  const __m512 point = _mm512_mul_ps(_mm512_add_ps(within, _mm512_set1_ps(1.0f)), _mm512_set1_ps(32767.5f));
  return _mm512_cvttps_epi32(_mm512_add_ps(point, _mm512_set1_ps(0.5f)));
}

// Codes of 16 scaled values: the arithmetic of code_of_8. Floats that share their upper 16 bits mostly have one
// midpoint among them at most.
static inline __m128i nearest_codes_8(const Rounding& r, __m512 scaled) {
  const __mmask16 number = _mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q);
  const __m512 finite = _mm512_maskz_mov_ps(number, scaled);
  const __m512 within = _mm512_max_ps(_mm512_min_ps(finite, _mm512_set1_ps(1.0f)), _mm512_set1_ps(-1.0f));
  const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(within), 16), byte = _mm512_set1_epi32(255);
  __m512i rank = _mm512_and_si512(_mm512_i32gather_epi32(upper, r.lowest, 1), byte);
  for (;;) {
    const __m512 bound = _mm512_i32gather_ps(rank, r.midpoints, 4);
    const __mmask16 above = _mm512_cmp_ps_mask(within, bound, _CMP_GT_OQ);
    if (!above) break;
    rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
  }
  if (!r.ordered) rank = _mm512_and_si512(_mm512_i32gather_epi32(rank, r.order, 1), byte);
  return _mm512_cvtepi32_epi8(rank);
}

static void encode_8_nearest(const GraftEncoding& e, const Rounding& r, const Scaling& s, const float* values,
                             int64_t count, uint8_t* codes) {
  const bool full = count == e.blocksize;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = count - i < 16 ? __mmask16((1 << (count - i)) - 1) : __mmask16(0xffff);
    __m512 moved = _mm512_maskz_loadu_ps(lanes, values + i);
    if (e.shift) moved = _mm512_sub_ps(moved, _mm512_set1_ps(s.shift));
    const __m512 scaled =
        full ? _mm512_mul_ps(moved, _mm512_set1_ps(s.factor)) : _mm512_div_ps(moved, _mm512_set1_ps(s.divisor));
    _mm_mask_storeu_epi8(codes + i, lanes, nearest_codes_8(r, scaled));
  }
}

static void encode_8(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  float values[kBuffer];
  alignas(64) int32_t points[16];
  for (int64_t at = begin; at < end; at += e.blocksize) {
    const int64_t count = end - at < e.blocksize ? end - at : e.blocksize, block = at / e.blocksize;
    const Scaling s = scaling_of(e, block, load_block(e, at, count, values), count == e.blocksize);
    uint8_t* codes = e.codes + at;
    if (!e.grid) {
      encode_8_nearest(e, r, s, values, count, codes);
      continue;
    }
    if (e.scale[block] == 0.0f) {
      memset(codes, 0, size_t(count));
      continue;
    }
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(s.factor));
      _mm512_store_si512(points, grid_points(scaled));
      const int lanes = count - i < 16 ? int(count - i) : 16;
      for (int lane = 0; lane < lanes; lane++) codes[i + lane] = r.grid[points[lane]];
    }
  }
}

static void encode(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  if (e.bits == 2) encode_low_bits<2>(e, r, begin, end);
  if (e.bits == 3) encode_low_bits<3>(e, r, begin, end);
  if (e.bits == 4) encode_low_bits<4>(e, r, begin, end);
  if (e.bits == 8) encode_8(e, r, begin, end);
}

// ---- the product with few rows ----
//
// Four rows of W are decoded, kDepth columns at a time, to the first-level cache and multiplied with up to six
// rows of x at a time: their sums fill the registers, and each loaded vector is used four or six times. A single
// row of x is multiplied as the codes are decoded.

constexpr int64_t kDepth = 1024;
constexpr int64_t kStride = kDepth + 32;
constexpr int kColumns = 4;
constexpr int64_t kMaxRows = 32;

// Four bits in whole blocks of at least 64: a byte's two codes go to two vectors, one of even and one of odd
// elements, without being put in order. x is put into that order instead, once for all rows of W.
static bool splits(const GraftProduct& p) {
  const GraftWeight& w = p.weight;
  return p.dtype == GRAFT_BF16 && w.bits == 4 && w.blocksize >= 64 && p.in_features % w.blocksize == 0;
}

static int64_t wide_bytes(const GraftProduct& p) {
  return splits(p) ? p.rows * p.in_features * int64_t(sizeof(uint16_t)) : 0;
}

static void widen(const GraftProduct& p, void* x_wide) {
  alignas(64) uint16_t even[32], odd[32];
  for (int i = 0; i < 32; i++) even[i] = uint16_t(2 * i), odd[i] = uint16_t(2 * i + 1);
  const __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
  uint16_t* out = static_cast<uint16_t*>(x_wide);
  for (int64_t i = 0; i < p.rows * p.in_features; i += 64) {
    const __m512i low = _mm512_loadu_si512(x + i), high = _mm512_loadu_si512(x + i + 32);
    _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(low, evens, high));
    _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(low, odds, high));
  }
}

struct Split {
  __m512i even, odd;
};

// 64 codes of four bits.
static inline Split split_halves(const uint8_t* codes, __m512i table) {
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table), _mm512_permutexvar_epi16(pairs, table)};
}

// The two dtypes of x: how a vector of it is loaded and multiplied.
struct Bf16 {
  using Element = uint16_t;
  static constexpr int32_t kDtype = GRAFT_BF16;
  static constexpr int kLanes = 32;
  static inline __m512 multiply_add(__m512 sum, const uint16_t* a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)b);
  }
};

struct F32 {
  using Element = float;
  static constexpr int32_t kDtype = GRAFT_F32;
  static constexpr int kLanes = 16;
  static inline __m512 multiply_add(__m512 sum, const float* a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

// Adds to the sums of kRows rows of x with kColumns rows of W.
template <class Dtype, int kRows>
static inline void multiply(const typename Dtype::Element* weights, const typename Dtype::Element* x,
                            int64_t x_stride, int64_t count, __m512 (*sums)[kMaxRows]) {
  __m512 held[kColumns][kRows];
  for (int c = 0; c < kColumns; c++)
    for (int row = 0; row < kRows; row++) held[c][row] = sums[c][row];
  for (int64_t k = 0; k < count; k += Dtype::kLanes) {
    __m512i weight[kColumns];
    for (int c = 0; c < kColumns; c++) weight[c] = _mm512_loadu_si512(weights + c * kStride + k);
    for (int row = 0; row < kRows; row++)
      for (int c = 0; c < kColumns; c++)
        held[c][row] = Dtype::multiply_add(held[c][row], x + row * x_stride + k, weight[c]);
  }
  for (int c = 0; c < kColumns; c++)
    for (int row = 0; row < kRows; row++) sums[c][row] = held[c][row];
}

static void store(const GraftProduct& p, int64_t row, int64_t column, __m512 sums) {
  const int64_t at = row * p.out_features + column;
  float sum = _mm512_reduce_add_ps(sums);
  if (p.bias) sum += load_float(p.bias, p.dtype, column);
  if (p.dtype == GRAFT_F32) static_cast<float*>(p.y)[at] = sum;
  else static_cast<uint16_t*>(p.y)[at] = to_bf16(sum);
}

template <class Dtype, int kRows>
static inline int64_t multiply_tiles(const GraftProduct& p, const typename Dtype::Element* weights,
                                     const typename Dtype::Element* x, int64_t depth, int64_t row,
                                     __m512 (*sums)[kMaxRows]) {
  for (; row + kRows <= p.rows; row += kRows)
    multiply<Dtype, kRows>(weights, x + row * p.in_features, p.in_features, depth,
                           reinterpret_cast<__m512(*)[kMaxRows]>(&sums[0][row]));
  return row;
}

template <class Dtype>
static inline void multiply_all(const GraftProduct& p, const typename Dtype::Element* weights,
                                const typename Dtype::Element* x, int64_t depth, __m512 (*sums)[kMaxRows]) {
  int64_t row = multiply_tiles<Dtype, 6>(p, weights, x, depth, 0, sums);
  row = multiply_tiles<Dtype, 4>(p, weights, x, depth, row, sums);
  row = multiply_tiles<Dtype, 2>(p, weights, x, depth, row, sums);
  multiply_tiles<Dtype, 1>(p, weights, x, depth, row, sums);
}

// Blocks of four bits from `at` on, in the order of split_halves.
template <class Kind>
static inline void decode_split(Kind kind, const Numbers& numbers, int64_t first, __m512 codebook,
                                const GraftWeight& w, int64_t begin, int64_t end, uint16_t* out, int64_t ahead) {
  over_blocks(w.blocksize, first, begin, end, [&](int64_t i, int64_t at, int64_t count) {
    const uint8_t* codes = w.codes + at / 2;
    const __m512i table = kind.template half_table<GRAFT_BF16>(codebook, numbers, i);
    prefetch(codes + ahead, count / 2);
    for (int64_t j = 0; j < count; j += 64) {
      const Split values = split_halves(codes + j / 2, table);
      _mm512_storeu_si512(out + (at - begin) + j, values.even);
      _mm512_storeu_si512(out + (at - begin) + j + 32, values.odd);
    }
  });
}

template <class Dtype, int kBits, bool kSplit>
static void product_as(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x_given) {
  const auto* x = static_cast<const typename Dtype::Element*>(x_given);
  const GraftWeight& w = p.weight;
  alignas(64) typename Dtype::Element weights[kColumns * kStride] = {};
  const Places<kBits> places;
  const __m512 codebook = codebook_of(w);
  const int64_t ahead = kColumns * p.in_features * kBits / 8;
  Numbers numbers;
  for (int64_t column = begin; column < end; column += kColumns) {
    const int num_columns = end - column < kColumns ? int(end - column) : kColumns;
    const int64_t first = column * p.in_features / w.blocksize, past = (column + num_columns) * p.in_features;
    if constexpr (kBits < 8) fill_numbers(w, r, first, (past + w.blocksize - 1) / w.blocksize - first, numbers);
    __m512 sums[kColumns][kMaxRows] = {};
    for (int64_t k = 0; k < p.in_features; k += kDepth) {
      const int64_t depth = p.in_features - k < kDepth ? p.in_features - k : kDepth;
      for (int c = 0; c < num_columns; c++) {
        const int64_t start = (column + c) * p.in_features + k;
        auto* to = weights + c * kStride;
        if constexpr (kBits == 8)
          decode_run_8<Dtype::kDtype>(w, r, start, start + depth, to);
        else
          by_kind(numbers, [&](auto kind) {
            if constexpr (kSplit)
              decode_split(kind, numbers, first, codebook, w, start, start + depth, to, ahead);
            else
              decode_with<Dtype::kDtype, false>(kind, numbers, first, places, codebook, w, start, start + depth, to,
                                                ahead);
          });
      }
      multiply_all<Dtype>(p, weights, x + k, depth, sums);
    }
    for (int64_t row = 0; row < p.rows; row++)
      for (int c = 0; c < num_columns; c++) store(p, row, column + c, sums[c][row]);
  }
}

// The products of kColumns rows of W, which lie one after the other from `start`, and one row of x in bfloat16:
// the values go from the table to the sums without being stored.
template <int kColumns, bool kSplit, int kBits, class Kind>
static inline void dot(Kind kind, const Places<kBits>& places, __m512 codebook, const GraftProduct& p,
                       const uint16_t* x, const Numbers& numbers, int64_t first, int64_t column) {
  const GraftWeight& w = p.weight;
  const int64_t start = column * p.in_features, row_bytes = p.in_features * kBits / 8;
  const int64_t row_blocks = p.in_features / w.blocksize;  // one row of W: any; more: whole blocks
  __m512 even[kColumns], odd[kColumns];
  for (int c = 0; c < kColumns; c++) even[c] = odd[c] = _mm512_setzero_ps();
  over_blocks(w.blocksize, first, start, start + p.in_features, [&](int64_t i, int64_t at, int64_t count) {
    __m512i tables[kColumns];
    for (int c = 0; c < kColumns; c++)
      tables[c] = kind.template half_table<GRAFT_BF16>(codebook, numbers, i + c * row_blocks);
    const uint8_t* codes = w.codes + at * kBits / 8;
    const uint16_t* values = x + (at - start);
    for (int c = 0; c < kColumns; c++) prefetch(codes + (c + 2 * kColumns) * row_bytes, count * kBits / 8);
    if constexpr (kSplit) {
      for (int64_t j = 0; j < count; j += 64, codes += 32) {
        for (int c = 0; c < kColumns; c++) {
          const Split decoded = split_halves(codes + c * row_bytes, tables[c]);
          even[c] = Bf16::multiply_add(even[c], values + j, decoded.even);
          odd[c] = Bf16::multiply_add(odd[c], values + j + 32, decoded.odd);
        }
      }
      return;
    }
    for (int64_t j = 0; j < count; j += 32, codes += 4 * kBits) {
      const bool other = j & 32;
      for (int c = 0; c < kColumns; c++) {
        const __m512i decoded = places.halves(codes + c * row_bytes, tables[c]);
        (other ? odd : even)[c] = Bf16::multiply_add((other ? odd : even)[c], values + j, decoded);
      }
    }
  });
  for (int c = 0; c < kColumns; c++)
    store(p, 0, column + c, _mm512_add_ps(even[c], odd[c]));
}

template <int kBits, bool kSplit>
static void product_of_row(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x_given) {
  const GraftWeight& w = p.weight;
  const uint16_t* x = static_cast<const uint16_t*>(x_given);
  const Places<kBits> places;
  const __m512 codebook = codebook_of(w);
  const bool aligned = p.in_features % w.blocksize == 0;
  const int64_t together = (kRun - 2) * w.blocksize / p.in_features;  // columns; see MAX_FUSED_BLOCKS
  Numbers numbers;
  for (int64_t column = begin; column < end;) {
    const int64_t edge = end - column < together ? end : column + together;
    const int64_t first = column * p.in_features / w.blocksize;
    fill_numbers(w, r, first, (edge * p.in_features + w.blocksize - 1) / w.blocksize - first, numbers);
    by_kind(numbers, [&](auto kind) {
      for (; aligned && column + kColumns <= edge; column += kColumns)
        dot<kColumns, kSplit>(kind, places, codebook, p, x, numbers, first, column);
      for (; column < edge; column++) dot<1, kSplit>(kind, places, codebook, p, x, numbers, first, column);
    });
  }
}

template <int kBits, bool kSplit = false>
static void product_of_bits(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x) {
  if (p.dtype == GRAFT_F32) return product_as<F32, kBits, false>(p, r, begin, end, x);
  if constexpr (kBits < 8) {
    if (p.rows == 1) return product_of_row<kBits, kSplit>(p, r, begin, end, x);
  }
  product_as<Bf16, kBits, kSplit>(p, r, begin, end, x);
}

static void product(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x_wide) {
  if (x_wide) return product_of_bits<4, true>(p, r, begin, end, x_wide);
  if (p.weight.bits == 2) product_of_bits<2>(p, r, begin, end, p.x);
  if (p.weight.bits == 3) product_of_bits<3>(p, r, begin, end, p.x);
  if (p.weight.bits == 4) product_of_bits<4>(p, r, begin, end, p.x);
  if (p.weight.bits == 8) product_of_bits<8>(p, r, begin, end, p.x);
}

#include "avx512_attention.h"

constexpr int kWide = 16;

template <class Lanes>
static inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#include "elementwise.h"

}  // namespace

extern const Tier avx512_tier = {"avx512", decode, encode, product, wide_bytes, widen, &elementwise, &attention};

}  // namespace graft
