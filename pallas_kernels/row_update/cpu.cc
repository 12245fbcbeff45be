// row_update on the CPU.
//
// The reads are grouped by row. A touched row then belongs to one thread, which
// sums its gradients in the order of the ids and takes the optimiser's step in
// place: no gradient of a read is ever written down, and nothing depends on how
// many threads there are.

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "pallas_kernels/native/common.h"
#include "pallas_kernels/native/segments.h"

namespace pallas_kernels {
namespace {

// Elements a part, so that starting one costs little against it.
constexpr int64_t kGrain = 1 << 16;
// Rows, and gradients of reads, that are asked for before they are needed.
constexpr int64_t kAhead = 8;
constexpr int64_t kLineBytes = 64;

// Sums are held in registers only if they are written as vectors; of an array
// the compiler makes memory, at ten times the time. Loops without a sum become
// vectors by themselves.
constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec Load(const float* x) {
  Vec result;
  std::memcpy(&result, x, sizeof(result));
  return result;
}

// `mu_scale` and `nu_scale` undo the bias of moments that began at zero.
struct Rule {
  float learning_rate, eps, weight_decay, clip_norm;
  float b1, b1_rest, mu_scale, b2, b2_rest, nu_scale;
};

// Read r has the gradient weight(r) * grad(r).
struct Reads {
  const float* grads;
  const float* weights;  // Null: all are 1.
  uint32_t bag_size;
  int64_t dim;

  float weight(uint32_t r) const { return weights ? weights[r] : 1.0f; }
  const float* grad(uint32_t r) const {
    return grads + static_cast<int64_t>(r / bag_size) * dim;
  }
};

// The table, or an array of the optimiser: so many bytes a row.
struct Rows {
  char* data;
  int64_t bytes;

  char* at(int64_t row) const { return data + row * bytes; }
};

// The optimisers' steps: from the gradient of a row and the rows of its state
// (`x[1]`, `x[2]`) to the row itself, `x[0]`. See optimizers.py.

float SumOfSquares(const float* x, int64_t n) {
  Vec sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec part = Load(x + i);
    sums += part * part;
  }
  float sum = 0;
  for (; i < n; ++i) sum += x[i] * x[i];
  for (int64_t j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}

template <typename T>
void Sgd(const Rule& rule, const float* __restrict grad, int64_t dim,
         char* const* x) {
  T* __restrict row = reinterpret_cast<T*>(x[0]);
  for (int64_t i = 0; i < dim; ++i) {
    Store(ToFloat(row[i]) - rule.learning_rate * grad[i], &row[i]);
  }
}

template <typename T>
void RowwiseAdagrad(const Rule& rule, const float* __restrict grad, int64_t dim,
                    char* const* x) {
  T* __restrict row = reinterpret_cast<T*>(x[0]);
  float* sum = reinterpret_cast<float*>(x[1]);
  *sum += SumOfSquares(grad, dim) / dim;
  const float rate = rule.learning_rate / (std::sqrt(*sum) + rule.eps);
  for (int64_t i = 0; i < dim; ++i) {
    Store(ToFloat(row[i]) - rate * grad[i], &row[i]);
  }
}

template <typename T>
void Adagrad(const Rule& rule, const float* __restrict grad, int64_t dim,
             char* const* x) {
  T* __restrict row = reinterpret_cast<T*>(x[0]);
  float* __restrict sum = reinterpret_cast<float*>(x[1]);
  for (int64_t i = 0; i < dim; ++i) {
    sum[i] += grad[i] * grad[i];
    const float root = std::sqrt(sum[i]);
    const float delta = rule.learning_rate * grad[i] / (root + rule.eps);
    Store(ToFloat(row[i]) - delta, &row[i]);
  }
}

template <typename T>
void LazyAdam(const Rule& rule, const float* __restrict grad, int64_t dim,
              char* const* x) {
  T* __restrict row = reinterpret_cast<T*>(x[0]);
  float* __restrict mu = reinterpret_cast<float*>(x[1]);
  float* __restrict nu = reinterpret_cast<float*>(x[2]);
  for (int64_t i = 0; i < dim; ++i) {
    mu[i] = rule.b1 * mu[i] + rule.b1_rest * grad[i];
    nu[i] = rule.b2 * nu[i] + rule.b2_rest * (grad[i] * grad[i]);
    const float root = std::sqrt(nu[i] * rule.nu_scale);
    const float delta =
        rule.learning_rate * (mu[i] * rule.mu_scale) / (root + rule.eps);
    Store(ToFloat(row[i]) - delta, &row[i]);
  }
}

using Step = void (*)(const Rule&, const float*, int64_t, char* const*);

template <typename T>
Step FindStep(std::string_view optimizer) {
  if (optimizer == "sgd") return Sgd<T>;
  if (optimizer == "rowwise_adagrad") return RowwiseAdagrad<T>;
  if (optimizer == "adagrad") return Adagrad<T>;
  if (optimizer == "lazy_adam") return LazyAdam<T>;
  return nullptr;
}

// sum[begin, begin + kVecs * kLanes) over the reads [first, last).
template <int64_t kVecs>
void SumTile(const Reads& reads, const uint32_t* first, const uint32_t* last,
             int64_t begin, float* sum) {
  Vec tile[kVecs] = {};
  for (const uint32_t* r = first; r < last; ++r) {
    const float weight = reads.weight(*r);
    const float* grad = reads.grad(*r) + begin;
    for (int64_t i = 0; i < kVecs; ++i) {
      tile[i] += weight * Load(grad + i * kLanes);
    }
  }
  std::memcpy(sum + begin, tile, sizeof(tile));
}

void SumReads(const Reads& reads, const uint32_t* first, const uint32_t* last,
              float* sum) {
  int64_t begin = 0;
  for (; begin + 4 * kLanes <= reads.dim; begin += 4 * kLanes) {
    SumTile<4>(reads, first, last, begin, sum);
  }
  for (; begin + kLanes <= reads.dim; begin += kLanes) {
    SumTile<1>(reads, first, last, begin, sum);
  }
  if (begin == reads.dim) return;
  std::fill(sum + begin, sum + reads.dim, 0.0f);
  for (const uint32_t* r = first; r < last; ++r) {
    const float weight = reads.weight(*r);
    const float* grad = reads.grad(*r);
    for (int64_t i = begin; i < reads.dim; ++i) sum[i] += weight * grad[i];
  }
}

// Adds the decay to a row's gradient, then clips it.
template <typename T>
void DecayAndClip(const Rule& rule, const char* data, int64_t dim,
                  float* __restrict grad) {
  const T* __restrict row = reinterpret_cast<const T*>(data);
  if (rule.weight_decay != 0) {
    for (int64_t i = 0; i < dim; ++i) {
      grad[i] += rule.weight_decay * ToFloat(row[i]);
    }
  }
  if (std::isinf(rule.clip_norm)) return;
  const float norm = std::sqrt(SumOfSquares(grad, dim));
  const float scale = rule.clip_norm / (norm + 1e-12f);
  if (scale >= 1) return;  // It is not for a NaN, which must not be lost.
  for (int64_t i = 0; i < dim; ++i) grad[i] *= scale;
}

// The processor finds what follows the first lines by itself.
template <int kIsWrite>
void Prefetch(const void* data, int64_t num_bytes) {
  num_bytes = std::min(num_bytes, 16 * kLineBytes);
  for (int64_t i = 0; i < num_bytes; i += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(data) + i, kIsWrite);
  }
}

void PrefetchSegment(const Segments& segments, const Reads& reads,
                     const std::vector<Rows>& arrays, int64_t segment) {
  for (const Rows& array : arrays) {
    Prefetch<1>(array.at(segments.rows[segment]), array.bytes);
  }
  const uint32_t read = segments.reads[segments.begins[segment]];
  Prefetch<0>(reads.grad(read), reads.dim * sizeof(float));
}

// Updates the rows of segments [first, last).
template <typename T>
void Update(const Segments& segments, const Reads& reads, const Rule& rule,
            Step step, const std::vector<Rows>& arrays, int64_t first,
            int64_t last) {
  const int64_t dim = reads.dim;
  const uint32_t* read = segments.reads.data();
  std::vector<float> grad(dim);
  std::vector<char*> rows(arrays.size());
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) {
      PrefetchSegment(segments, reads, arrays, i + kAhead);
    }
    for (size_t j = 0; j < rows.size(); ++j) {
      rows[j] = arrays[j].at(segments.rows[i]);
    }
    SumReads(reads, read + segments.begins[i], read + segments.begins[i + 1],
             grad.data());
    DecayAndClip<T>(rule, rows[0], dim, grad.data());
    step(rule, grad.data(), dim, rows.data());
  }
}

// `updated` and `results` are the table and the optimiser's arrays.
ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids,
               ffi::Buffer<ffi::F32> grads, ffi::Buffer<ffi::F32> weights,
               ffi::BufferR0<ffi::F32> learning_rate,
               ffi::BufferR0<ffi::S32> step_count, ffi::RemainingArgs updated,
               ffi::RemainingRets results, std::string_view optimizer,
               int64_t num_rows, float eps, double b1, double b2,
               float weight_decay, float clip_norm) {
  std::vector<Rows> arrays;
  for (size_t i = 0; i < updated.size(); ++i) {
    const auto from = updated.get<ffi::AnyBuffer>(i);
    auto to = results.get<ffi::AnyBuffer>(i);
    if (from.has_error() || to.has_error() ||
        from->untyped_data() != (*to)->untyped_data()) {
      return ffi::Error::Internal("row_update: a result is not its argument");
    }
    arrays.push_back({static_cast<char*>(from->untyped_data()),
                      static_cast<int64_t>(from->size_bytes()) /
                          from->dimensions().front()});
  }
  const auto table = updated.get<ffi::AnyBuffer>(0);
  const bool is_float = table->element_type() == ffi::F32;
  const Step step = is_float ? FindStep<float>(optimizer)
                             : FindStep<BFloat16>(optimizer);
  if (step == nullptr) {
    return ffi::Error::InvalidArgument("row_update: unknown optimizer");
  }
  const double count = step_count.typed_data()[0];
  const Rule rule{
      learning_rate.typed_data()[0],
      eps,
      weight_decay,
      clip_norm,
      static_cast<float>(b1),
      static_cast<float>(1 - b1),
      static_cast<float>(1 / (1 - std::pow(b1, count))),
      static_cast<float>(b2),
      static_cast<float>(1 - b2),
      static_cast<float>(1 / (1 - std::pow(b2, count))),
  };
  const bool is_bag = weights.element_count() > 0;
  const Reads reads{grads.typed_data(),
                    is_bag ? weights.typed_data() : nullptr,
                    is_bag ? static_cast<uint32_t>(LastDim(ids)) : 1,
                    LastDim(grads)};
  const Segments segments =
      GroupByRow(ids.typed_data(), ids.element_count(), num_rows);
  const auto update = is_float ? Update<float> : Update<BFloat16>;
  ParallelForSegments(pool, segments, kGrain / reads.dim,
                      [&](int64_t first, int64_t last) {
                        update(segments, reads, rule, step, arrays, first,
                               last);
                      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    row_update, pallas_kernels::Run,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::BufferR0<xla::ffi::F32>>()
        .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()
        .RemainingArgs()
        .RemainingRets()
        .Attr<std::string_view>("optimizer")
        .Attr<int64_t>("num_rows")
        .Attr<float>("eps")
        .Attr<double>("b1")
        .Attr<double>("b2")
        .Attr<float>("weight_decay")
        .Attr<float>("clip_norm"));
