// Norm, gate and loss as Python calls them: rows or numbers in pieces, over the threads.

#include "graft.h"

namespace graft {
namespace {

constexpr int64_t kPiece = 1 << 15;  // numbers

template <class Run>
void in_pieces(int64_t count, int64_t size, int32_t num_threads, Run run) {
  struct Context {
    Run* run;
    int64_t count, size;
  } context{&run, count, size < 1 ? 1 : size};
  auto body = [](void* argument, int64_t piece) {
    auto* c = static_cast<Context*>(argument);
    const int64_t begin = piece * c->size, end = begin + c->size;
    (*c->run)(begin, end < c->count ? end : c->count);
  };
  parallel((count + context.size - 1) / context.size, num_threads, body, &context);
}

}  // namespace
}  // namespace graft

GRAFT_API int32_t graft_has_elementwise() { return graft::current_tier().elementwise != nullptr; }

GRAFT_API void graft_rms_norm(const GraftNorm* norm, int32_t num_threads) {
  auto run = graft::current_tier().elementwise->norm;
  graft::in_pieces(norm->rows, graft::kPiece / (norm->width + 1), num_threads,
                   [&](int64_t begin, int64_t end) { run(*norm, begin, end); });
}

GRAFT_API void graft_silu_product(const GraftGate* gate, int32_t num_threads) {
  auto run = graft::current_tier().elementwise->gate;
  graft::in_pieces(gate->count, graft::kPiece, num_threads,
                   [&](int64_t begin, int64_t end) { run(*gate, begin, end); });
}

GRAFT_API void graft_cross_entropy(const GraftLoss* loss, int32_t num_threads) {
  auto run = graft::current_tier().elementwise->loss;
  graft::in_pieces(loss->rows, graft::kPiece / (loss->width + 1), num_threads,
                   [&](int64_t begin, int64_t end) { run(*loss, begin, end); });
}
