// What a model does to bfloat16 between its products, each in one pass over memory: norm, gate, loss.
//
// Results are rounded where torch's own operations round, so that they differ by the order of sums alone and by
// an exponential that is exact to a few units in the last place of a float.
// Included by each tier, in a namespace of its own, after it has said how many lanes it works with (kWide) and
// what its fused(a, b, c) is, a * b + c.

typedef float Lanes __attribute__((vector_size(4 * kWide)));
typedef int32_t LaneInts __attribute__((vector_size(4 * kWide)));
typedef uint32_t LaneWords __attribute__((vector_size(4 * kWide)));
typedef uint16_t LaneHalves __attribute__((vector_size(2 * kWide)));

static inline Lanes every(float value) { return Lanes{} + value; }

static inline Lanes widened(const uint16_t* from) {
  LaneHalves halves;
  memcpy(&halves, from, sizeof halves);
  return (Lanes)(__builtin_convertvector(halves, LaneWords) << 16);
}

// To nearest, ties to even, as a float; NaN stays NaN.
static inline Lanes rounded(Lanes values) {
  const LaneWords bits = (LaneWords)values;
  const LaneWords up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const LaneWords nan = (LaneWords)(values != values);
  return (Lanes)((up & ~nan) | (0x7fc00000u & nan));
}

static inline void narrowed(Lanes rounded_values, uint16_t* to) {
  const LaneHalves halves = __builtin_convertvector((LaneWords)rounded_values >> 16, LaneHalves);
  memcpy(to, &halves, sizeof halves);
}

// e^x, e^-87 for what is less, infinity beyond e^88; NaN stays NaN.
static inline Lanes exp_of(Lanes given) {
  Lanes x = given < -87.0f ? every(-87.0f) : given;
  x = x > 88.0f ? every(88.0f) : x;
  const Lanes magic = every(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Lanes whole = fused(x, every(1.44269504f), magic) - magic;
  const Lanes rest = fused(whole, every(-1.42860677e-6f), fused(whole, every(-0.693145752f), x));  // ln 2 in two parts
  Lanes sum = every(1.3888889e-3f);  // Taylor's 1 / n!, n from 6 down
  constexpr float kTerms[] = {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f};
  for (float term : kTerms) sum = fused(sum, rest, every(term));
  const LaneInts power = (__builtin_convertvector(whole, LaneInts) + 127) << 23;
  return given > 88.0f ? every(INFINITY) : sum * (Lanes)power;
}

static inline float lanes_sum(Lanes values) {
  float sum = 0;
  for (int lane = 0; lane < kWide; lane++) sum += values[lane];
  return sum;
}

// Calls run(place) for each kWide of `count` numbers; the last ones are worked on in copies that are filled up.
template <int kInputs, int kOutputs, class Run>
static inline void by_lanes(int64_t count, const uint16_t* const (&from)[kInputs], uint16_t* const (&to)[kOutputs], Run run) {
  int64_t at = 0;
  for (; at + kWide <= count; at += kWide) {
    Lanes in[kInputs], out[kOutputs];
    for (int i = 0; i < kInputs; i++) in[i] = widened(from[i] + at);
    run(in, out);
    for (int i = 0; i < kOutputs; i++) narrowed(out[i], to[i] + at);
  }
  if (at == count) return;
  uint16_t held[kWide] = {};
  Lanes in[kInputs], out[kOutputs];
  for (int i = 0; i < kInputs; i++) {
    memcpy(held, from[i] + at, size_t(count - at) * 2);
    in[i] = widened(held);
  }
  run(in, out);
  for (int i = 0; i < kOutputs; i++) {
    narrowed(out[i], held);
    memcpy(to[i] + at, held, size_t(count - at) * 2);
  }
}

// ---- RMSNorm (arXiv:1910.07467) ----

// Four sums at a time: one would wait for each addition.
template <class Value>
static inline float total_of(int64_t width, Value value) {
  Lanes sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * kWide <= width; at += 4 * kWide)
    for (int i = 0; i < 4; i++) sums[i] += value(at + i * kWide);
  for (; at < width; at += kWide) sums[0] += value(at);
  return lanes_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static void norm_rows(const GraftNorm& n, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const uint16_t*>(n.weight);
  for (int64_t row = begin; row < end; row++) {
    const auto* x = static_cast<const uint16_t*>(n.x) + row * n.width;
    const auto* grad = static_cast<const uint16_t*>(n.grad) + row * n.width;
    auto* out = static_cast<uint16_t*>(n.out) + row * n.width;
    const float squares = total_of(n.width, [&](int64_t at) {
      const Lanes value = widened(x + at);
      return value * value;
    });
    const Lanes factor = every(1.0f / sqrtf(squares / float(n.width) + n.eps));
    if (!n.grad) {
      by_lanes<2, 1>(n.width, {x, weight}, {out}, [&](const Lanes* in, Lanes* result) {
        result[0] = rounded(rounded(in[0] * factor) * in[1]);
      });
      continue;
    }
    // With h = x * factor and u = grad * weight: dx = factor * (u - h * mean(u h)).
    const float along = total_of(n.width, [&](int64_t at) {
      return rounded(widened(grad + at) * widened(weight + at)) * (widened(x + at) * factor);
    });
    const Lanes mean = every(along / float(n.width));
    by_lanes<3, 1>(n.width, {x, weight, grad}, {out}, [&](const Lanes* in, Lanes* result) {
      result[0] = rounded(factor * (rounded(in[2] * in[1]) - (in[0] * factor) * mean));
    });
  }
}

// ---- silu(gate) * up ----

static void gate_part(const GraftGate& g, int64_t begin, int64_t end) {
  auto at = [&](const void* place) { return static_cast<const uint16_t*>(place) + begin; };
  auto to = [&](void* place) { return static_cast<uint16_t*>(place) + begin; };
  if (!g.grad) {
    by_lanes<2, 1>(end - begin, {at(g.gate), at(g.up)}, {to(g.out)}, [](const Lanes* in, Lanes* result) {
      result[0] = rounded(rounded(in[0] / (1.0f + exp_of(-in[0]))) * in[1]);
    });
    return;
  }
  by_lanes<3, 2>(end - begin, {at(g.gate), at(g.up), at(g.grad)}, {to(g.out), to(g.out_up)},
                  [](const Lanes* in, Lanes* result) {
                    const Lanes share = 1.0f / (1.0f + exp_of(-in[0]));
                    const Lanes slope = share * (1.0f + in[0] * (1.0f - share));
                    result[0] = rounded(rounded(in[2] * in[1]) * slope);
                    result[1] = rounded(in[2] * rounded(in[0] * share));
                  });
}

// ---- cross-entropy of rows of logits, and its derivative ----

static void loss_rows(const GraftLoss& l, int64_t begin, int64_t end) {
  const int64_t whole = l.width / kWide * kWide;
  for (int64_t row = begin; row < end; row++) {
    const auto* logits = static_cast<const uint16_t*>(l.logits) + row * l.width;
    const int64_t target = l.targets[row];
    Lanes tops = every(-INFINITY);
    for (int64_t at = 0; at < whole; at += kWide) {
      const Lanes value = widened(logits + at);
      tops = value > tops ? value : tops;
    }
    float top = tops[0];
    for (int lane = 1; lane < kWide; lane++) top = tops[lane] > top ? tops[lane] : top;
    for (int64_t at = whole; at < l.width; at++) top = from_bf16(logits[at]) > top ? from_bf16(logits[at]) : top;
    float rest = 0;
    for (int64_t at = whole; at < l.width; at++) rest += exp_of(every(from_bf16(logits[at]) - top))[0];
    const float total = rest + total_of(whole, [&](int64_t at) { return exp_of(widened(logits + at) - top); });
    l.losses[row] = logf(total) + top - from_bf16(logits[target]);
    if (!l.slope) continue;
    auto* slope = static_cast<uint16_t*>(l.slope) + row * l.width;
    const Lanes share = every(1.0f / total);
    by_lanes<1, 1>(l.width, {logits}, {slope}, [&](const Lanes* in, Lanes* result) {
      result[0] = rounded(exp_of(in[0] - top) * share);
    });
    slope[target] = to_bf16(exp_of(every(from_bf16(logits[target]) - top))[0] / total - 1.0f);
  }
}

static const ElementwiseTier elementwise = {norm_rows, gate_part, loss_rows};
