// The attention that Python calls: what the threads share, and how the work is cut into pieces.

#include <string.h>

#include <atomic>

#include "graft.h"

namespace graft {
namespace {

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where in the memory that is given each part lies.
struct Layout {
  int64_t tiles, padded, masks, bits, kinds, packed, parts, shared, thread;

  Layout(const GraftAttention& a, const AttentionTier& tier, bool backward, int32_t num_threads) {
    tiles = (a.length + kTile - 1) / kTile;
    padded = tiles * kTile;
    masks = !a.mask ? 0 : a.mask_batch ? a.batch : 1;
    bits = rounded(masks * padded * tiles * 8);
    kinds = rounded(masks * tiles * tiles);
    packed = backward ? 0 : rounded(a.batch * a.key_heads * padded * a.head_dim * 2);
    // Key heads for several heads are the unit of work, unless they are too few to keep the threads busy.
    const bool split = backward && a.heads > a.key_heads && a.batch * a.key_heads < 2 * num_threads;
    parts = split ? rounded(2 * a.batch * a.heads * padded * a.head_dim * int64_t(sizeof(float))) : 0;
    shared = bits + kinds + 2 * packed + parts;
    thread = rounded(backward ? tier.backward_bytes(a) : tier.forward_bytes(a));
  }
};

// Truth values are bytes of 0 and 1.
uint64_t bits_of(const uint8_t* truths, int64_t count) {
  uint64_t bits = 0, eight;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    memcpy(&eight, truths + i, 8);
    bits |= (eight * 0x0102040810204080ull >> 56) << i;  // byte k's bit arrives at bit 56 + k
  }
  for (; i < count; i++) bits |= uint64_t(truths[i]) << i;
  return bits;
}

// Rows of bits to columns, 64 by 64: halves of the square change places, then quarters of it, and so on.
void turn_bits(uint64_t* rows) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int width = 32; width; width >>= 1, mask ^= mask << width) {
    for (int row = 0; row < 64; row = ((row | width) + 1) & ~width) {
      const uint64_t swapped = ((rows[row] >> width) ^ rows[row | width]) & mask;
      rows[row] ^= swapped << width;
      rows[row | width] ^= swapped;
    }
  }
}

TileKind kind_of(const uint64_t* rows) {
  uint64_t any = 0, all = ~0ull;
  for (int row = 0; row < 64; row++) any |= rows[row], all &= rows[row];
  return !any ? kEmpty : all == ~0ull ? kFull : kPartial;
}

// The mask of a tile of queries, as bits.
void read_mask(const GraftAttention& a, const Layout& layout, bool backward, int64_t task, uint64_t* bits, uint8_t* kinds) {
  const int64_t batch = task / layout.tiles, outer = task % layout.tiles, tiles = layout.tiles;
  const uint8_t* mask = a.mask + batch * a.mask_batch;
  uint64_t* of_batch = bits + batch * layout.padded * tiles;
  for (int64_t inner = 0; inner < tiles; inner++) {
    const int64_t begin = inner * kTile, count = a.length - begin < kTile ? a.length - begin : kTile;
    uint64_t rows[kTile];
    for (int64_t r = 0; r < kTile; r++) {
      const int64_t row = outer * kTile + r;
      rows[r] = row < a.length ? bits_of(mask + row * a.mask_row + begin, count) : 0;
    }
    if (backward) turn_bits(rows);
    const int64_t above = backward ? inner : outer, beside = backward ? outer : inner;
    for (int64_t r = 0; r < kTile; r++) of_batch[(above * kTile + r) * tiles + beside] = rows[r];
    kinds[(batch * tiles + above) * tiles + beside] = kind_of(rows);
  }
}

template <class Run>
void over_tasks(int64_t count, int32_t num_threads, Run run) {
  struct Context {
    Run* run;
    std::atomic<int64_t> next{0};
    int64_t count;
  } context{&run, {0}, count};
  auto worker = [](void* argument, int64_t slot) {
    auto* c = static_cast<Context*>(argument);
    for (int64_t task; (task = c->next.fetch_add(1)) < c->count;) (*c->run)(task, slot);
  };
  parallel(num_threads, num_threads, worker, &context);
}

void run(const GraftAttention& a, const AttentionTier& tier, bool backward, char* memory, int32_t num_threads) {
  const Layout layout(a, tier, backward, num_threads);
  auto* bits = reinterpret_cast<uint64_t*>(memory);
  auto* kinds = reinterpret_cast<uint8_t*>(memory + layout.bits);
  char* packed = memory + layout.bits + layout.kinds;
  AttentionShared shared{layout.tiles,
                         a.mask ? bits : nullptr,
                         a.mask ? kinds : nullptr,
                         layout.masks > 1 ? layout.padded * layout.tiles : 0,
                         layout.masks > 1 ? layout.tiles * layout.tiles : 0,
                         reinterpret_cast<uint32_t*>(packed),
                         reinterpret_cast<uint32_t*>(packed + layout.packed),
                         layout.parts ? reinterpret_cast<float*>(packed) : nullptr};
  over_tasks(layout.masks * layout.tiles, num_threads,
             [&](int64_t task, int64_t) { read_mask(a, layout, backward, task, bits, kinds); });
  char* threads = memory + layout.shared;
  const int64_t groups = a.batch * a.key_heads;
  if (backward) {
    over_tasks(layout.parts ? a.batch * a.heads : groups, num_threads,
               [&](int64_t task, int64_t slot) { tier.backward(a, shared, task, threads + slot * layout.thread); });
    if (layout.parts) over_tasks(groups, num_threads, [&](int64_t task, int64_t) { tier.join(a, shared, task); });
    return;
  }
  over_tasks(groups, num_threads, [&](int64_t task, int64_t) { tier.pack(a, shared, task); });
  over_tasks(a.batch * a.heads * layout.tiles, num_threads,
             [&](int64_t task, int64_t slot) { tier.forward(a, shared, task, threads + slot * layout.thread); });
}

}  // namespace
}  // namespace graft

// Bytes that a call needs, aligned to 64; 0 where the instruction set has no attention.
GRAFT_API int64_t graft_attention_bytes(const GraftAttention* attention, int32_t backward, int32_t num_threads) {
  const graft::AttentionTier* tier = graft::current_tier().attention;
  if (!tier) return 0;
  const graft::Layout layout(*attention, *tier, backward, num_threads);
  return layout.shared + num_threads * layout.thread;
}

GRAFT_API void graft_attention(const GraftAttention* attention, int32_t backward, void* memory, int32_t num_threads) {
  graft::run(*attention, *graft::current_tier().attention, backward, static_cast<char*>(memory), num_threads);
}
