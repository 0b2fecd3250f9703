// The tier for x86 since 2013: AVX2, FMA, F16C, BMI2.

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "graft.h"

namespace graft {
namespace {

#include "scalar.h"

static inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }

static inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }

// The low and the high bytes of 16 entries, apart: one shuffle looks 32 codes up.
static inline void gather(const uint8_t* codes, int64_t count, const uint16_t* table, uint16_t* out) {
  alignas(16) uint8_t low[16], high[16];
  for (int i = 0; i < 16; i++) low[i] = uint8_t(table[i]), high[i] = uint8_t(table[i] >> 8);
  const __m256i lows = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
  const __m256i highs = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  int64_t done = 0;
  for (; done + 32 <= count; done += 32) {
    // 64-bit quarters 0 2 1 3: unpacking within halves then gives the natural order.
    const __m256i places =
        _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + done)), 0xd8);
    const __m256i l = _mm256_shuffle_epi8(lows, places), h = _mm256_shuffle_epi8(highs, places);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done), _mm256_unpacklo_epi8(l, h));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done + 16), _mm256_unpackhi_epi8(l, h));
  }
  for (; done < count; done++) out[done] = table[codes[done]];
}

static inline void gather(const uint8_t* codes, int64_t count, const float* table, float* out) {
  const __m256 lower = _mm256_loadu_ps(table), upper = _mm256_loadu_ps(table + 8);
  int64_t done = 0;
  for (; done + 8 <= count; done += 8) {
    const __m256i places = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + done)));
    const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));  // the fourth bit as a sign
    const __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, places),
                                          _mm256_permutevar8x32_ps(upper, places), which);
    _mm256_storeu_ps(out + done, found);
  }
  for (; done < count; done++) out[done] = table[codes[done]];
}

#include "portable.h"

#include "avx2_decode.h"
#include "avx2_encode.h"
#include "avx2_product.h"

constexpr int kWide = 8;

template <class Lanes>
static inline Lanes fused(Lanes a, Lanes b, Lanes c) {
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#include "elementwise.h"

}  // namespace

extern const Tier avx2_tier = {"avx2", decode_all, encode_all, multiply_all, wide_bytes, widen_product, &elementwise, nullptr};

}  // namespace graft
