// The tier that every machine can run: SSE2 on x86, NEON on ARM, plain C elsewhere.

#include <string.h>
#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "graft.h"

namespace graft {
namespace {

#include "scalar.h"

static inline float half_to_float(uint16_t half) { return from_f16(half); }

static inline Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }

template <class Out>
static inline void gather(const uint8_t* codes, int64_t count, const Out* table, Out* out) {
  for (int64_t i = 0; i < count; i++) out[i] = table[codes[i]];
}

#if defined(__ARM_NEON) && defined(__aarch64__)
// The bytes of 16 entries, apart: one table instruction looks 16 codes up.
static inline void gather(const uint8_t* codes, int64_t count, const uint16_t* table, uint16_t* out) {
  const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(table));
  int64_t done = 0;
  for (; done + 16 <= count; done += 16) {
    const uint8x16_t places = vld1q_u8(codes + done);
    const uint8x16x2_t found = {{vqtbl1q_u8(bytes.val[0], places), vqtbl1q_u8(bytes.val[1], places)}};
    vst2q_u8(reinterpret_cast<uint8_t*>(out + done), found);
  }
  for (; done < count; done++) out[done] = table[codes[done]];
}

static inline void gather(const uint8_t* codes, int64_t count, const float* table, float* out) {
  const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
  int64_t done = 0;
  for (; done + 16 <= count; done += 16) {
    const uint8x16_t places = vld1q_u8(codes + done);
    const uint8x16x4_t found = {{vqtbl1q_u8(bytes.val[0], places), vqtbl1q_u8(bytes.val[1], places),
                                 vqtbl1q_u8(bytes.val[2], places), vqtbl1q_u8(bytes.val[3], places)}};
    vst4q_u8(reinterpret_cast<uint8_t*>(out + done), found);
  }
  for (; done < count; done++) out[done] = table[codes[done]];
}
#endif

#include "portable.h"

}  // namespace

#if defined(__ARM_NEON) && defined(__aarch64__)
#define GRAFT_BASELINE "neon"
#else
#define GRAFT_BASELINE "scalar"
#endif

extern const Tier baseline_tier = {GRAFT_BASELINE, decode, encode, product, wide_bytes, widen, nullptr, nullptr};

}  // namespace graft
