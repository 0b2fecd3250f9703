// Attention of bfloat16 with sums in float (FlashAttention-2, arXiv:2307.08691), on vdpbf16ps.
//
// The instruction multiplies pairs: a pair of the left operand, broadcast, with sixteen pairs of the right one.
// So every product here is (rows, pairs) by (pairs, columns): the right operand has the two numbers that meet
// in a sum beside each other, and the left one may have any strides. Two packings make right operands of rows:
// `turned`, the 32-bit words of the rows transposed, to sum over the head's dimension, and `woven`, each two
// rows as one of pairs, to sum over tokens.
// Included by tier_avx512.cpp.

// C (+)= A B for kRows rows and kVectors vectors of columns.
template <int kRows, int kVectors>
static inline void multiply_part(int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b,
                                 int64_t b_pair, float* c, int64_t c_row, bool add) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++)
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_row + 16 * v) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++) {
    __m512i right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) right[v] = _mm512_loadu_si512(b + p * b_pair + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const __m512i left = _mm512_set1_epi32(int32_t(a[r * a_row + p * a_pair]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)left, (__m512bh)right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) _mm512_storeu_ps(c + r * c_row + 16 * v, sums[r][v]);
}

// The same for a tile of rows and any multiple of 16 columns.
static inline void multiply(int64_t columns, int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_pair,
                            const uint32_t* b, int64_t b_pair, float* c, int64_t c_row, bool add) {
  constexpr int kRows = 4;
  for (int64_t column = 0; column < columns; column += 64) {
    const int64_t vectors = (columns - column) / 16;
    auto part = vectors >= 4   ? multiply_part<kRows, 4>
                : vectors == 3 ? multiply_part<kRows, 3>
                : vectors == 2 ? multiply_part<kRows, 2>
                               : multiply_part<kRows, 1>;
    for (int64_t row = 0; row < kTile; row += kRows)
      part(pairs, a + row * a_row, a_row, a_pair, b + column, b_pair, c + row * c_row + column, c_row, add);
  }
}

// 2^x for x up to about 0; what is less than the least normal number becomes it, NaN stays NaN.
static inline __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // the second one where either is NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);  // within a half: Taylor's terms are ln(2)^n / n!
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  constexpr float kTerms[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (float term : kTerms) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
}

static inline __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

static inline __mmask16 lanes_of(uint64_t bits, int vector) { return __mmask16(bits >> (16 * vector)); }

// ---- packing ----

// Rows of one head, zeros after them up to whole tiles: (tiles * kTile, head_dim).
static inline void copy_rows(const GraftHeads& from, int64_t batch, int64_t head, int64_t begin, int64_t count,
                             int64_t length, int64_t head_dim, uint16_t* out) {
  const uint16_t* data = static_cast<const uint16_t*>(from.data) + batch * from.batch + head * from.head;
  for (int64_t row = 0; row < count; row++) {
    if (begin + row < length) {
      memcpy(out + row * head_dim, data + (begin + row) * from.row, size_t(head_dim) * 2);
    } else {
      memset(out + row * head_dim, 0, size_t(head_dim) * 2);
    }
  }
}

static inline void transpose_16(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Each r[4 g + c] has, in its quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; c++) {
    const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee), high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
    _mm512_storeu_si512(to + (c + 0) * to_row, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (c + 4) * to_row, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (c + 8) * to_row, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (c + 12) * to_row, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// (rows, head_dim) halves to (head_dim / 2, rows) words.
static inline void turn(const uint16_t* rows, int64_t count, int64_t head_dim, uint32_t* out) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(rows);
  const int64_t width = head_dim / 2;
  for (int64_t row = 0; row < count; row += 16) {
    int64_t word = 0;
    for (; word + 16 <= width; word += 16) transpose_16(words + row * width + word, width, out + word * count + row, count);
    for (; word < width; word++)
      for (int64_t r = 0; r < 16; r++) out[word * count + row + r] = words[(row + r) * width + word];
  }
}

// (rows, head_dim) halves to (rows / 2, head_dim) pairs.
static inline void weave(const uint16_t* rows, int64_t count, int64_t head_dim, uint32_t* out) {
  for (int64_t row = 0; row < count; row += 2) {
    const uint16_t *first = rows + row * head_dim, *second = first + head_dim;
    for (int64_t column = 0; column < head_dim; column += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + column)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + column)));
      _mm512_storeu_si512(out + row / 2 * head_dim + column, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// Float rows times a factor, as halves.
static inline void write_rows(const float* rows, int64_t begin, int64_t count, int64_t head_dim, float factor,
                              const GraftHeads& to, int64_t batch, int64_t head) {
  uint16_t* data = static_cast<uint16_t*>(to.data) + batch * to.batch + head * to.head;
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t row = 0; row < count; row++) {
    for (int64_t column = 0; column < head_dim; column += 16) {
      const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(rows + row * head_dim + column), f);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(data + (begin + row) * to.row + column), to_bf16(values));
    }
  }
}

// ---- which pairs of a query and a key count ----

struct Tiles {
  const AttentionShared& shared;
  int64_t batch;
  bool by_query;  // rows are queries, columns keys; else the other way round

  TileKind kind(int64_t outer, int64_t inner) const {
    if (shared.kinds) return TileKind(shared.kinds[batch * shared.kinds_batch + outer * shared.tiles + inner]);
    if (outer == inner) return kPartial;
    return (outer > inner) == by_query ? kFull : kEmpty;
  }

  uint64_t bits(int64_t row, int64_t inner) const {
    if (shared.bits) return shared.bits[batch * shared.bits_batch + row * shared.tiles + inner];
    const int64_t ahead = row - inner * kTile;  // columns before the row's own
    if (by_query) return ahead >= 63 ? ~0ull : ahead < 0 ? 0 : (2ull << ahead) - 1;
    return ahead <= 0 ? ~0ull : ahead >= 64 ? 0 : ~0ull << ahead;
  }
};

// ---- forward ----

static int64_t forward_bytes(const GraftAttention& a) {
  return kTile * (a.head_dim * 6 + kChunk * 6 + 2 * int64_t(sizeof(float)));
}

static void pack(const GraftAttention& a, const AttentionShared& shared, int64_t task) {
  const int64_t padded = shared.tiles * kTile, batch = task / a.key_heads, head = task % a.key_heads;
  const int64_t size = padded * a.head_dim / 2;
  uint16_t rows[kTile * 256];
  for (int64_t begin = 0; begin < padded; begin += kTile) {
    // A tile's keys lie together: (tiles, head_dim / 2, kTile).
    copy_rows(a.key, batch, head, begin, kTile, a.length, a.head_dim, rows);
    turn(rows, kTile, a.head_dim, shared.keys + task * size + begin * a.head_dim / 2);
    copy_rows(a.value, batch, head, begin, kTile, a.length, a.head_dim, rows);
    weave(rows, kTile, a.head_dim, shared.values + task * size + begin * a.head_dim / 2);
  }
}

// One row's scores (count tiles of them) to its weights; returns by how much what was summed before shrinks.
static inline float soften(const float* scores, const uint64_t* bits, int64_t count, float scale, float& top, float& sum,
                           uint16_t* out) {
  const __m512 least = _mm512_set1_ps(-INFINITY);
  __m512 most = least;
  for (int64_t tile = 0; tile < count; tile++)
    for (int v = 0; v < 4; v++) {
      const __m512 some = _mm512_loadu_ps(scores + tile * kTile + 16 * v);
      most = _mm512_max_ps(most, _mm512_mask_mov_ps(least, lanes_of(bits[tile], v), some));
    }
  const float before = top, found = _mm512_reduce_max_ps(most) * scale;
  if (found > top) top = found;
  const float from = top == -INFINITY ? 0.0f : top;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(from);
  __m512 total = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < count; tile++)
    for (int v = 0; v < 4; v++) {
      const __m512 some = _mm512_loadu_ps(scores + tile * kTile + 16 * v);
      const __m512 weight =
          _mm512_maskz_mov_ps(lanes_of(bits[tile], v), exp2_of(_mm512_fmsub_ps(some, factor, shift)));
      total = _mm512_add_ps(total, weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + tile * kTile + 16 * v), to_bf16(weight));
    }
  const float shrink = before == -INFINITY ? 0.0f : exp2f(before - from);
  sum = sum * shrink + _mm512_reduce_add_ps(total);
  return shrink;
}

static void forward(const GraftAttention& a, const AttentionShared& shared, int64_t task, char* scratch) {
  const int64_t tile = shared.tiles - 1 - task % shared.tiles;  // the longest first
  const int64_t head = task / shared.tiles % a.heads, batch = task / shared.tiles / a.heads;
  const int64_t dim = a.head_dim, begin = tile * kTile, left = a.length - begin, rows = left < kTile ? left : kTile;
  const int64_t group = batch * a.key_heads + head / (a.heads / a.key_heads), tile_words = kTile * dim / 2;
  const uint32_t* keys = shared.keys + group * shared.tiles * tile_words;
  const uint32_t* values = shared.values + group * shared.tiles * tile_words;
  const Tiles tiles{shared, batch, true};
  const float scale = a.scale * 1.44269504f;  // of powers of two
  float* scores = reinterpret_cast<float*>(scratch);
  float* output = scores + kTile * kChunk;
  float *top = output + kTile * dim, *sum = top + kTile;
  uint16_t* weights = reinterpret_cast<uint16_t*>(sum + kTile);
  uint16_t* query = weights + kTile * kChunk;
  copy_rows(a.query, batch, head, begin, kTile, a.length, dim, query);
  for (int64_t row = 0; row < kTile; row++) top[row] = -INFINITY, sum[row] = 0;
  memset(output, 0, size_t(kTile * dim) * sizeof(float));
  for (int64_t inner = 0; inner < shared.tiles;) {
    int64_t found[kChunk / kTile], count = 0;
    bool whole[kChunk / kTile];
    for (; inner < shared.tiles && count < kChunk / kTile; inner++) {
      const TileKind kind = tiles.kind(tile, inner);
      if (kind != kEmpty) whole[count] = kind == kFull, found[count++] = inner;
    }
    for (int64_t at = 0; at < count; at++)
      multiply(kTile, dim / 2, reinterpret_cast<uint32_t*>(query), dim / 2, 1, keys + found[at] * tile_words, kTile,
               scores + at * kTile, kChunk, false);
    for (int64_t row = 0; row < kTile && count; row++) {
      uint64_t bits[kChunk / kTile];
      for (int64_t at = 0; at < count; at++) bits[at] = whole[at] ? ~0ull : tiles.bits(begin + row, found[at]);
      const float shrink =
          soften(scores + row * kChunk, bits, count, scale, top[row], sum[row], weights + row * kChunk);
      if (shrink == 1.0f) continue;
      for (int64_t column = 0; column < dim; column += 16) {
        float* place = output + row * dim + column;
        _mm512_storeu_ps(place, _mm512_mul_ps(_mm512_loadu_ps(place), _mm512_set1_ps(shrink)));
      }
    }
    for (int64_t at = 0; at < count; at++)
      multiply(dim, kTile / 2, reinterpret_cast<uint32_t*>(weights + at * kTile), kChunk / 2, 1,
               values + found[at] * tile_words, dim, output, dim, true);
  }
  for (int64_t row = 0; row < rows; row++) {
    const float factor = sum[row] == 0 ? 0 : 1 / sum[row];  // a query that may look at nothing gets zeros
    write_rows(output + row * dim, begin + row, 1, dim, factor, a.output, batch, head);
    a.sums[(batch * a.heads + head) * a.length + begin + row] =
        sum[row] != 0 ? (top[row] + log2f(sum[row])) * 0.693147181f : 0;
  }
}

// ---- backward ----

// The memory of a thread: all of one head, and of the key head that it shares with others.
struct BackwardSpace {
  uint16_t *key, *value;                                            // rows
  uint32_t *woven_key, *turned_query, *woven_query, *turned_grad, *woven_grad;
  float *grad_query, *grad_key, *grad_value, *sums, *deltas;
  float *scores, *slopes;                                           // of a tile, keys by queries
  uint16_t *weights, *changes;
  uint32_t* woven_changes;
  uint16_t* rows;

  BackwardSpace(char* scratch, int64_t padded, int64_t dim) {
    auto take = [&](auto*& place, int64_t count) {
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(scratch);
      scratch += (count * int64_t(sizeof(*place)) + 63) / 64 * 64;
    };
    take(key, padded * dim), take(value, padded * dim), take(rows, padded * dim);
    take(woven_key, padded * dim / 2), take(turned_query, padded * dim / 2), take(woven_query, padded * dim / 2);
    take(turned_grad, padded * dim / 2), take(woven_grad, padded * dim / 2);
    take(grad_query, padded * dim), take(grad_key, padded * dim), take(grad_value, padded * dim);
    take(sums, padded), take(deltas, padded), take(scores, kTile * kTile), take(slopes, kTile * kTile);
    take(weights, kTile * kTile), take(changes, kTile * kTile), take(woven_changes, kTile * kTile / 2);
    end = scratch;
  }

  char* end;
};

static int64_t backward_bytes(const GraftAttention& a) {
  const int64_t padded = (a.length + kTile - 1) / kTile * kTile;
  return int64_t(reinterpret_cast<uintptr_t>(BackwardSpace(nullptr, padded, a.head_dim).end));
}

// Scores and slopes of a tile (keys by queries) to weights P and changes P * (slope - delta), as halves.
static inline void weigh(BackwardSpace& s, const Tiles& tiles, TileKind kind, int64_t key_tile, int64_t query_tile,
                         float scale) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < kTile; row += 2) {
    const int64_t key = key_tile * kTile + row;
    const uint64_t bits[2] = {kind == kFull ? ~0ull : tiles.bits(key, query_tile),
                              kind == kFull ? ~0ull : tiles.bits(key + 1, query_tile)};
    for (int v = 0; v < 4; v++) {
      const __m512 sums = _mm512_loadu_ps(s.sums + query_tile * kTile + 16 * v);
      const __m512 delta = _mm512_loadu_ps(s.deltas + query_tile * kTile + 16 * v);
      __m256i change[2];
      for (int i = 0; i < 2; i++) {
        const int64_t at = (row + i) * kTile + 16 * v;
        const __m512 raw = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(s.scores + at), factor, sums));
        const __m512 weight = _mm512_maskz_mov_ps(lanes_of(bits[i], v), raw);
        change[i] = to_bf16(_mm512_mul_ps(weight, _mm512_sub_ps(_mm512_loadu_ps(s.slopes + at), delta)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.weights + at), to_bf16(weight));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.changes + at), change[i]);
      }
      const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(change[0]),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(change[1]), 16));
      _mm512_storeu_si512(s.woven_changes + row / 2 * kTile + 16 * v, pair);
    }
  }
}

// What the backward pass of one head begins with: its packings, and the products of output and gradient.
static inline void open_head(const GraftAttention& a, BackwardSpace& s, int64_t padded, int64_t batch, int64_t head) {
  const int64_t dim = a.head_dim;
  copy_rows(a.output, batch, head, 0, padded, a.length, dim, s.rows);
  uint16_t* grads = reinterpret_cast<uint16_t*>(s.woven_query);  // not filled yet
  copy_rows(a.grad_output, batch, head, 0, padded, a.length, dim, grads);
  for (int64_t row = 0; row < padded; row++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t column = 0; column < dim; column += 16) {
      auto floats = [](const uint16_t* from) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      };
      sum = _mm512_fmadd_ps(floats(s.rows + row * dim + column), floats(grads + row * dim + column), sum);
    }
    s.deltas[row] = _mm512_reduce_add_ps(sum);
    s.sums[row] = row < a.length ? a.sums[(batch * a.heads + head) * a.length + row] * 1.44269504f : 0;
  }
  turn(grads, padded, dim, s.turned_grad);
  weave(grads, padded, dim, s.woven_grad);
  copy_rows(a.query, batch, head, 0, padded, a.length, dim, s.rows);
  turn(s.rows, padded, dim, s.turned_query);
  weave(s.rows, padded, dim, s.woven_query);
  memset(s.grad_query, 0, size_t(padded * dim) * sizeof(float));
}

static void backward(const GraftAttention& a, const AttentionShared& shared, int64_t task, char* scratch) {
  const int64_t repeats = a.heads / a.key_heads, count = shared.parts ? 1 : repeats, first = task * count % a.heads;
  const int64_t batch = task * count / a.heads, key_head = first / repeats;
  const int64_t dim = a.head_dim, padded = shared.tiles * kTile, tile_words = kTile * dim / 2;
  BackwardSpace s(scratch, padded, dim);
  if (shared.parts) {
    s.grad_key = shared.parts + task * padded * dim;
    s.grad_value = s.grad_key + a.batch * a.heads * padded * dim;
  }
  const Tiles tiles{shared, batch, false};
  copy_rows(a.key, batch, key_head, 0, padded, a.length, dim, s.key);
  copy_rows(a.value, batch, key_head, 0, padded, a.length, dim, s.value);
  weave(s.key, padded, dim, s.woven_key);
  memset(s.grad_key, 0, size_t(padded * dim) * sizeof(float));
  memset(s.grad_value, 0, size_t(padded * dim) * sizeof(float));
  const uint32_t *keys = reinterpret_cast<uint32_t*>(s.key), *values = reinterpret_cast<uint32_t*>(s.value);
  for (int64_t head = first; head < first + count; head++) {
    open_head(a, s, padded, batch, head);
    for (int64_t outer = 0; outer < shared.tiles; outer++) {
      for (int64_t inner = 0; inner < shared.tiles; inner++) {
        const TileKind kind = tiles.kind(outer, inner);
        if (kind == kEmpty) continue;
        multiply(kTile, dim / 2, keys + outer * tile_words, dim / 2, 1, s.turned_query + inner * kTile, padded, s.scores,
                 kTile, false);
        multiply(kTile, dim / 2, values + outer * tile_words, dim / 2, 1, s.turned_grad + inner * kTile, padded, s.slopes,
                 kTile, false);
        weigh(s, tiles, kind, outer, inner, a.scale * 1.44269504f);
        multiply(dim, kTile / 2, reinterpret_cast<uint32_t*>(s.weights), kTile / 2, 1, s.woven_grad + inner * tile_words,
                 dim, s.grad_value + outer * kTile * dim, dim, true);
        multiply(dim, kTile / 2, reinterpret_cast<uint32_t*>(s.changes), kTile / 2, 1, s.woven_query + inner * tile_words,
                 dim, s.grad_key + outer * kTile * dim, dim, true);
        multiply(dim, kTile / 2, s.woven_changes, 1, kTile, s.woven_key + outer * tile_words, dim,
                 s.grad_query + inner * kTile * dim, dim, true);
      }
    }
    write_rows(s.grad_query, 0, a.length, dim, a.scale, a.grad_query, batch, head);
  }
  if (shared.parts) return;
  write_rows(s.grad_key, 0, a.length, dim, a.scale, a.grad_key, batch, key_head);
  write_rows(s.grad_value, 0, a.length, dim, 1.0f, a.grad_value, batch, key_head);
}

static void join(const GraftAttention& a, const AttentionShared& shared, int64_t task) {
  const int64_t batch = task / a.key_heads, key_head = task % a.key_heads, repeats = a.heads / a.key_heads;
  const int64_t size = shared.tiles * kTile * a.head_dim, whole = a.batch * a.heads * size;
  float* keys = shared.parts + (batch * a.heads + key_head * repeats) * size;
  float* sums[] = {keys, keys + whole};
  for (float* sum : sums)
    for (int64_t other = 1; other < repeats; other++)
      for (int64_t i = 0; i < size; i++) sum[i] += sum[other * size + i];
  write_rows(keys, 0, a.length, a.head_dim, a.scale, a.grad_key, batch, key_head);
  write_rows(keys + whole, 0, a.length, a.head_dim, 1.0f, a.grad_value, batch, key_head);
}

static const AttentionTier attention = {forward_bytes, backward_bytes, pack, forward, backward, join};
