// A tier for any machine, in the vector types of GCC and Clang, which become whatever the instruction set has.
// Included by tier_baseline.cpp and tier_avx2.cpp, each in a namespace of its own.

constexpr int kLanes = 8;
constexpr int kBuffer = 4096;  // the largest blocksize

static inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline Floats splat(float value) { return Floats{} + value; }

static inline void widen_to(const void* values, int32_t dtype, int64_t begin, int64_t count, float* out) {
  if (dtype == GRAFT_F32) {
    memcpy(out, static_cast<const float*>(values) + begin, count * sizeof(float));
  } else if (dtype == GRAFT_BF16) {
    const uint16_t* halves = static_cast<const uint16_t*>(values) + begin;
    for (int64_t i = 0; i < count; i++) out[i] = from_bf16(halves[i]);
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(values) + begin;
    for (int64_t i = 0; i < count; i++) out[i] = half_to_float(halves[i]);
  }
}

// ---- decode ----

template <class Out, class Convert>
static void look_up(const GraftWeight& w, int64_t begin, int64_t end, Out* out, Convert convert) {
  uint8_t codes[kBuffer];
  for (int64_t at = begin; at < end; at += w.blocksize) {
    const int64_t count = end - at < w.blocksize ? end - at : w.blocksize, block = at / w.blocksize;
    float values[16];
    Out table[16];
    values_of_block(w, block, values);
    for (int i = 0; i < 16; i++) table[i] = convert(values[i]);
    unpack_codes(w.codes + at * w.bits / 8, w.bits, count, codes);
    gather(codes, count, table, out + at);
  }
}

template <class Out, class Convert>
static void look_up_8(const GraftWeight& w, int64_t begin, int64_t end, Out* out, Convert convert) {
  for (int64_t at = begin; at < end; at += w.blocksize) {
    const int64_t stop = end - at < w.blocksize ? end : at + w.blocksize;
    const float scale = number_of(w.scales, at / w.blocksize);
    const float shift = w.shifts.values ? number_of(w.shifts, at / w.blocksize) : 0.0f;
    if (w.shifts.values) {
      for (int64_t i = at; i < stop; i++) out[i] = convert(w.codebook[w.codes[i]] * scale + shift);
    } else {
      for (int64_t i = at; i < stop; i++) out[i] = convert(w.codebook[w.codes[i]] * scale);
    }
  }
}

template <class Out, class Convert>
static void decode_as(const GraftWeight& w, int64_t begin, int64_t end, void* out, Convert convert) {
  auto run = w.bits == 8 ? look_up_8<Out, Convert> : look_up<Out, Convert>;
  run(w, begin, end, static_cast<Out*>(out), convert);
}

static void decode(const GraftWeight& w, const Rounding&, int64_t begin, int64_t end, void* out, int32_t dtype,
                   bool) {
  if (dtype == GRAFT_F32) decode_as<float>(w, begin, end, out, [](float value) { return value; });
  if (dtype == GRAFT_BF16) decode_as<uint16_t>(w, begin, end, out, to_bf16);
  if (dtype == GRAFT_F16) decode_as<uint16_t>(w, begin, end, out, to_f16);
  if (dtype == GRAFT_BF16_WIDE)
    decode_as<float>(w, begin, end, out, [](float value) { return from_bf16(to_bf16(value)); });
  if (dtype == GRAFT_F16_WIDE)
    decode_as<float>(w, begin, end, out, [](float value) { return from_f16(to_f16(value)); });
}

// ---- encode ----

static Limits limits_of(const float* values, int64_t count) {
  Limits limits = {values[0], values[0], 0};
  for (int64_t i = 0; i < count; i++) {
    uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
    limits.magnitude = magnitude > limits.magnitude ? magnitude : limits.magnitude;
  }
  for (int64_t i = 0; i < count; i++) {
    limits.low = values[i] < limits.low ? values[i] : limits.low;
    limits.high = values[i] > limits.high ? values[i] : limits.high;
  }
  return limits;
}

// Places among the midpoints: how many of them a value exceeds.
static void rank_all(const Rounding& r, const float* scaled, int64_t count, uint8_t* codes) {
  const int num_midpoints = (1 << r.bits) - 1;
  for (int64_t at = 0; at < count; at += kLanes) {
    Floats value = load(scaled + at);
    Ints rank = {};
    for (int m = 0; m < num_midpoints; m++) rank -= value > splat(r.midpoints[m]);
    for (int lane = 0; lane < kLanes; lane++) codes[at + lane] = r.order[rank[lane]];
  }
}

static void encode(const GraftEncoding& e, const Rounding& r, int64_t begin, int64_t end) {
  float values[kBuffer + kLanes] = {};
  uint8_t codes[kBuffer + kLanes];
  for (int64_t at = begin; at < end; at += e.blocksize) {
    const int64_t count = end - at < e.blocksize ? end - at : e.blocksize, block = at / e.blocksize;
    widen_to(e.values, e.dtype, at, count, values);
    const Scaling s = scaling_of(e, block, limits_of(values, count), count == e.blocksize);
    if (e.shift) {
      for (int64_t i = 0; i < count; i++) values[i] = values[i] - s.shift;
    }
    const bool multiply = e.grid || count == e.blocksize;
    for (int64_t i = 0; i < count; i++) values[i] = multiply ? values[i] * s.factor : values[i] / s.divisor;
    if (e.bits == 8) {
      for (int64_t i = 0; i < count; i++) codes[i] = code_of_8(r, e.grid, values[i]);
      if (e.grid && e.scale[block] == 0.0f) memset(codes, 0, size_t(count));
    } else {
      for (int64_t i = count; i % kLanes; i++) values[i] = 0.0f;
      rank_all(r, values, count, codes);
    }
    pack_codes(codes, e.bits, count, e.codes + at * e.bits / 8, code_of_zero(r));
  }
}

// ---- product ----

// x in float; in_features is a multiple of kLanes.
static int64_t wide_bytes(const GraftProduct& p) { return p.rows * p.in_features * int64_t(sizeof(float)); }

static void widen(const GraftProduct& p, void* x_wide) {
  widen_to(p.x, p.dtype, 0, p.rows * p.in_features, static_cast<float*>(x_wide));
}

static inline float rounded_to(int32_t dtype, float value) {
  return dtype == GRAFT_BF16 ? from_bf16(to_bf16(value)) : dtype == GRAFT_F16 ? from_f16(to_f16(value)) : value;
}

// The values of `count` elements of one row, rounded as a dense weight of x's dtype would be.
static void decode_row(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t count, float* out) {
  const GraftWeight& w = p.weight;
  uint8_t codes[kBuffer];
  for (int64_t done = 0; done < count;) {
    const int64_t at = begin + done, block = at / w.blocksize, left = (block + 1) * w.blocksize - at;
    const int64_t n = left < count - done ? left : count - done;
    if (w.bits == 8) {
      const float scale = number_of(w.scales, block);
      for (int64_t i = 0; i < n; i++) out[done + i] = r.codebook[w.codes[at + i]] * scale;
      for (int64_t i = 0; i < n; i++) out[done + i] = rounded_to(p.dtype, out[done + i]);
    } else {
      float values[16];
      values_of_block(w, block, values);
      for (int i = 0; i < 16; i++) values[i] = rounded_to(p.dtype, values[i]);
      unpack_codes(w.codes + at * w.bits / 8, w.bits, n, codes);
      gather(codes, n, values, out + done);
    }
    done += n;
  }
}

// Sums of products of two rows of W with up to four rows of x.
template <int kRows>
static void multiply(const float* weights, int64_t stride, const float* x, int64_t x_stride, int64_t count, float* sums) {
  Floats totals[2][kRows] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    const Floats first = load(weights + k), second = load(weights + stride + k);
    for (int row = 0; row < kRows; row++) {
      const Floats value = load(x + row * x_stride + k);
      totals[0][row] = multiply_add(first, value, totals[0][row]);
      totals[1][row] = multiply_add(second, value, totals[1][row]);
    }
  }
  for (int column = 0; column < 2; column++)
    for (int row = 0; row < kRows; row++)
      for (int lane = 0; lane < kLanes; lane++) sums[column * 4 + row] += totals[column][row][lane];
}

static void store(const GraftProduct& p, int64_t row, int64_t column, float sum) {
  const int64_t at = row * p.out_features + column;
  if (p.bias) sum += load_float(p.bias, p.dtype, column);
  if (p.dtype == GRAFT_F32) static_cast<float*>(p.y)[at] = sum;
  else static_cast<uint16_t*>(p.y)[at] = p.dtype == GRAFT_BF16 ? to_bf16(sum) : to_f16(sum);
}

static void product(const GraftProduct& p, const Rounding& r, int64_t begin, int64_t end, const void* x_wide) {
  constexpr int64_t kDepth = 2048;
  float weights[2 * kDepth];
  const float* x = static_cast<const float*>(x_wide);
  for (int64_t column = begin; column < end; column += 2) {
    const int num_columns = end - column < 2 ? 1 : 2;
    float sums[64][8] = {};  // rows in fours
    for (int64_t k = 0; k < p.in_features; k += kDepth) {
      const int64_t depth = p.in_features - k < kDepth ? p.in_features - k : kDepth;
      for (int c = 0; c < num_columns; c++)
        decode_row(p, r, (column + c) * p.in_features + k, depth, weights + c * kDepth);
      for (int64_t row = 0; row < p.rows; row += 4) {
        const float* rows = x + row * p.in_features + k;
        const int64_t left = p.rows - row;
        auto run = left == 1 ? multiply<1> : left == 2 ? multiply<2> : left == 3 ? multiply<3> : multiply<4>;
        run(weights, kDepth, rows, p.in_features, depth, sums[row / 4]);
      }
    }
    for (int64_t row = 0; row < p.rows; row++)
      for (int c = 0; c < num_columns; c++) store(p, row, column + c, sums[row / 4][c * 4 + row % 4]);
  }
}
