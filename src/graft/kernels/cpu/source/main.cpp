// The functions that Python calls: which tier runs, and how the work is cut into pieces.

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <vector>

#include "graft.h"

namespace graft {
namespace {

constexpr int64_t kPieceElements = 1 << 16;  // of a weight: 128 KB in bfloat16
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kCacheBytes = 16 << 20;  // results of this size leave the cache before they are read

std::vector<const Tier*> usable_tiers() {
  std::vector<const Tier*> tiers;
#if defined(GRAFT_AVX2) || defined(GRAFT_AVX512)
  __builtin_cpu_init();
#endif
#ifdef GRAFT_AVX512
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512bf16"))
    tiers.push_back(&avx512_tier);
#endif
#ifdef GRAFT_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    tiers.push_back(&avx2_tier);
#endif
  tiers.push_back(&baseline_tier);
  return tiers;
}

const std::vector<const Tier*>& tiers() {
  static const std::vector<const Tier*> usable = usable_tiers();
  return usable;
}

std::atomic<const Tier*> chosen{nullptr};

const Tier& tier() { return current_tier(); }

// Fresh memory costs more than the decoding: 512 page faults become one.
void advise_huge(void* out, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  uintptr_t begin = (uintptr_t(out) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (uintptr_t(out) + uintptr_t(num_bytes)) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out, (void)num_bytes;
#endif
}

// Pieces of whole blocks that start at whole bytes: 4096, the largest blocksize, divides the piece.
template <class Run>
void over_elements(int64_t begin, int64_t end, int32_t num_threads, Run run) {
  struct Context {
    Run* run;
    int64_t begin, end;
  } context{&run, begin, end};
  auto body = [](void* argument, int64_t piece) {
    auto* c = static_cast<Context*>(argument);
    const int64_t from = c->begin + piece * kPieceElements, to = from + kPieceElements;
    (*c->run)(from, to < c->end ? to : c->end);
  };
  parallel((end - begin + kPieceElements - 1) / kPieceElements, num_threads, body, &context);
}

}  // namespace

const Tier& current_tier() {
  const Tier* forced = chosen.load();
  return forced ? *forced : *tiers().front();
}

}  // namespace graft

using graft::Rounding;
using graft::Tier;

GRAFT_API int32_t graft_version() { return 6; }

GRAFT_API const char* graft_tier() { return graft::tier().name; }

// For tests: run on this tier from now on, or on the best for null. Returns 0 where this machine lacks it.
GRAFT_API int32_t graft_force_tier(const char* name) {
  if (!name) return graft::chosen = nullptr, 1;
  for (const Tier* tier : graft::tiers()) {
    if (!strcmp(tier->name, name)) return graft::chosen = tier, 1;
  }
  return 0;
}

// Elements [begin, end) of a weight to out; begin starts a block and a byte. `past_cache`: out is not read soon.
GRAFT_API void graft_decode(const GraftWeight* weight, int64_t begin, int64_t end, void* out, int32_t dtype,
                            int32_t past_cache, int32_t num_threads) {
  const Tier& tier = graft::tier();
  const Rounding& rounding = graft::rounding_of(weight->codebook, weight->bits);
  const int64_t element_bytes = dtype == GRAFT_BF16 || dtype == GRAFT_F16 ? 2 : 4, num_bytes = (end - begin) * element_bytes;
  if (num_bytes >= 2 * graft::kHugePage) graft::advise_huge(out, num_bytes);
  const bool around = past_cache && num_bytes >= graft::kCacheBytes && uintptr_t(out) % 64 == 0;
  void* origin = static_cast<char*>(out) - begin * element_bytes;  // where element 0 would be
  graft::over_elements(begin, end, num_threads, [&](int64_t from, int64_t to) {
    tier.decode(*weight, rounding, from, to, origin, dtype, around);
  });
}

GRAFT_API void graft_encode(const GraftEncoding* encoding, int32_t num_threads) {
  const Tier& tier = graft::tier();
  const Rounding& rounding = graft::rounding_of(encoding->codebook, encoding->bits);
  graft::over_elements(0, encoding->num_elements, num_threads,
                       [&](int64_t from, int64_t to) { tier.encode(*encoding, rounding, from, to); });
}

// Returns 0 where memory is out.
GRAFT_API int32_t graft_product(const GraftProduct* product, int32_t num_threads) {
  const Tier& tier = graft::tier();
  const Rounding& rounding = graft::rounding_of(product->weight.codebook, product->weight.bits);
  int64_t wide_bytes = tier.wide_bytes(*product);
  void* wide = nullptr;
  if (wide_bytes && posix_memalign(&wide, 64, size_t(wide_bytes))) return 0;
  if (wide) tier.widen(*product, wide);
  struct Context {
    const Tier* tier;
    const GraftProduct* product;
    const Rounding* rounding;
    const void* wide;
    int64_t columns;
  } context{&tier, product, &rounding, wide, 0};
  // Several pieces for each thread, of whole groups of 8 columns.
  int64_t pieces = int64_t(num_threads) * 4;
  context.columns = ((product->out_features + pieces - 1) / pieces + 7) / 8 * 8;
  auto body = [](void* argument, int64_t piece) {
    auto* c = static_cast<Context*>(argument);
    int64_t begin = piece * c->columns, end = begin + c->columns;
    if (end > c->product->out_features) end = c->product->out_features;
    c->tier->product(*c->product, *c->rounding, begin, end, c->wide);
  };
  graft::parallel((product->out_features + context.columns - 1) / context.columns, num_threads, body, &context);
  free(wide);
  return 1;
}
