// Product keys on the CPU: the search of score vectors, and the whole lookup
// (LayerNorm, products, search, softmax), whose scores never leave the cache.

#include <cmath>
#include <vector>

#include "pallas_kernels/native/common.h"
#include "pallas_kernels/native/select.h"

namespace pallas_kernels {
namespace {

constexpr float kEpsilon = 1e-6f;
// One vector register, whatever its width is on this machine.
typedef float Vector __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;
// Scores of so many queries and columns are held in registers at a time.
constexpr int64_t kQueries = 4;
constexpr int64_t kColumns = 4 * kLanes;

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------------------
// The search of two score vectors.

class Search {
 public:
  Search(int64_t num_keys, int64_t top_k)
      : num_keys_(num_keys),
        top_k_(top_k),
        num_best_(std::min(num_keys, top_k)),
        row_keys_(num_best_),
        col_keys_(num_best_) {
    for (int64_t i = 0; i < num_best_; ++i) {
      for (int64_t j = 0; j < num_best_ && (i + 1) * (j + 1) <= top_k; ++j) {
        pairs_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(j)});
      }
    }
    sums_.resize(pairs_.size());
  }

  void Run(const float* row_scores, const float* col_scores, float* best,
           int32_t* slots) {
    Best(row_scores, row_keys_.data());
    Best(col_scores, col_keys_.data());
    for (size_t c = 0; c < pairs_.size(); ++c) {
      sums_[c] = KeyValue(row_keys_[pairs_[c].i]) +
                 KeyValue(col_keys_[pairs_[c].j]);
    }
    selector_.Select(sums_.data(), pairs_.size(), top_k_, true);
    for (int64_t a = 0; a < top_k_; ++a) {
      const int32_t c = KeyPlace(selector_.keys()[a]);
      const int64_t row = KeyPlace(row_keys_[pairs_[c].i]);
      const int64_t col = KeyPlace(col_keys_[pairs_[c].j]);
      best[a] = sums_[c];
      slots[a] = static_cast<int32_t>(row * num_keys_ + col);
    }
  }

 private:
  void Best(const float* scores, uint64_t* keys) {
    selector_.Select(scores, num_keys_, num_best_, true);
    std::copy(selector_.keys(), selector_.keys() + num_best_, keys);
  }

  struct Pair {
    int32_t i, j;
  };
  const int64_t num_keys_, top_k_, num_best_;
  Selector selector_;
  std::vector<uint64_t> row_keys_, col_keys_;
  std::vector<Pair> pairs_;
  std::vector<float> sums_;
};

ffi::Error TopK(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> row_scores,
                ffi::Buffer<ffi::F32> col_scores,
                ffi::ResultBuffer<ffi::F32> best,
                ffi::ResultBuffer<ffi::S32> slots) {
  const int64_t n = LastDim(row_scores), k = LastDim(*best);
  const float* rows = row_scores.typed_data();
  const float* cols = col_scores.typed_data();
  float* best_data = best->typed_data();
  int32_t* slot_data = slots->typed_data();
  ParallelFor(pool, NumRows(row_scores), 64, [&](int64_t begin, int64_t end) {
    Search search(n, k);
    for (int64_t r = begin; r < end; ++r) {
      search.Run(rows + r * n, cols + r * n, best_data + r * k,
                 slot_data + r * k);
    }
  });
  return ffi::Error::Success();
}

ffi::Error TopKGrad(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> slots,
                    ffi::Buffer<ffi::F32> grads,
                    ffi::ResultBuffer<ffi::F32> row_grads,
                    ffi::ResultBuffer<ffi::F32> col_grads) {
  const int64_t k = LastDim(slots), n = LastDim(*row_grads);
  const int32_t* slot_data = slots.typed_data();
  const float* grad_data = grads.typed_data();
  float* rows = row_grads->typed_data();
  float* cols = col_grads->typed_data();
  ParallelFor(pool, NumRows(slots), 64, [&](int64_t begin, int64_t end) {
    std::fill(rows + begin * n, rows + end * n, 0.0f);
    std::fill(cols + begin * n, cols + end * n, 0.0f);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t a = r * k; a < (r + 1) * k; ++a) {
        const int64_t slot = slot_data[a];
        // Slots come from the search; another's could lie anywhere.
        if (slot < 0 || slot >= n * n) continue;
        rows[r * n + slot / n] += grad_data[a];
        cols[r * n + slot % n] += grad_data[a];
      }
    }
  });
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------
// The lookup from queries and keys.

// Sizes of a lookup, and where a query, a key and a result lie.
struct Shape {
  Shape(const ffi::Buffer<ffi::F32>& keys, int64_t query_count, int64_t k)
      : heads(keys.dimensions()[1]),
        n(keys.dimensions()[2]),
        d(keys.dimensions()[3]),
        k(k),
        rows(heads * d ? query_count / (2 * heads * d) : 0),
        padded(RoundUp(n, kColumns)) {}

  int64_t Query(int64_t row, int64_t axis, int64_t head) const {
    return ((row * 2 + axis) * heads + head) * d;
  }
  int64_t Keys(int64_t axis, int64_t head) const {
    return (axis * heads + head) * n * d;
  }
  int64_t Result(int64_t row, int64_t head) const {
    return (row * heads + head) * k;
  }

  const int64_t heads, n, d, k, rows, padded;
};

// LayerNorm of one query; returns one over its standard deviation.
float Normalize(const float* x, const float* gain, int64_t d, float* normal,
                float* scaled) {
  float mean = 0.0f, square = 0.0f;
  for (int64_t i = 0; i < d; ++i) mean += x[i];
  mean /= d;
  for (int64_t i = 0; i < d; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(square / d + kEpsilon);
  for (int64_t i = 0; i < d; ++i) {
    normal[i] = (x[i] - mean) * inverse;
    scaled[i] = normal[i] * gain[i];
  }
  return inverse;
}

// Scores of four queries against all keys, which lie as [dim, padded].
void Products(const float* const queries[kQueries], const float* keys,
              int64_t d, int64_t padded, float* const scores[kQueries]) {
  for (int64_t first = 0; first < padded; first += kColumns) {
    Vector sums[kQueries][4] = {};
    for (int64_t i = 0; i < d; ++i) {
      const float* key = keys + i * padded + first;
      Vector columns[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        std::memcpy(&columns[c], key + c * kLanes, sizeof(Vector));
      }
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) sums[q][c] += queries[q][i] * columns[c];
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      std::memcpy(scores[q] + first, sums[q], sizeof(sums[q]));
    }
  }
}

// Keys as [axis, head, dim, padded], zeros behind the last one.
std::vector<float> Transpose(const float* keys, const Shape& shape) {
  std::vector<float> result(2 * shape.heads * shape.d * shape.padded);
  for (int64_t block = 0; block < 2 * shape.heads; ++block) {
    const float* from = keys + block * shape.n * shape.d;
    float* to = result.data() + block * shape.d * shape.padded;
    for (int64_t j = 0; j < shape.n; ++j) {
      for (int64_t i = 0; i < shape.d; ++i) {
        to[i * shape.padded + j] = from[j * shape.d + i];
      }
    }
  }
  return result;
}

void Softmax(float* x, int64_t k) {
  const float largest = x[0];  // They descend.
  float sum = 0.0f;
  for (int64_t a = 0; a < k; ++a) sum += x[a] = std::exp(x[a] - largest);
  for (int64_t a = 0; a < k; ++a) x[a] /= sum;
}

ffi::Error Lookup(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries,
                  ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> gain,
                  ffi::ResultBuffer<ffi::F32> weights,
                  ffi::ResultBuffer<ffi::S32> slots) {
  const Shape shape(keys, queries.element_count(), LastDim(*weights));
  const int64_t d = shape.d;
  const bool is_normal = gain.element_count() > 0;
  const std::vector<float> transposed = Transpose(keys.typed_data(), shape);
  const float* query_data = queries.typed_data();
  float* weight_data = weights->typed_data();
  int32_t* slot_data = slots->typed_data();
  ParallelFor(pool, shape.rows, 64, [&](int64_t begin, int64_t end) {
    Search search(shape.n, shape.k);
    std::vector<float> scores(2 * kQueries * shape.padded);
    std::vector<float> normal(d), scaled(kQueries * d);
    for (int64_t head = 0; head < shape.heads; ++head) {
      for (int64_t first = begin; first < end; first += kQueries) {
        const int64_t count = std::min(kQueries, end - first);
        for (int64_t axis = 0; axis < 2; ++axis) {
          const float* of_query[kQueries];
          float* to[kQueries];
          for (int64_t q = 0; q < kQueries; ++q) {
            // Behind the last query the last one again, which nobody reads.
            const int64_t row = first + std::min(q, count - 1);
            of_query[q] = query_data + shape.Query(row, axis, head);
            to[q] = scores.data() + (2 * q + axis) * shape.padded;
            if (is_normal) {
              Normalize(of_query[q], gain.typed_data() + axis * d, d,
                        normal.data(), scaled.data() + q * d);
              of_query[q] = scaled.data() + q * d;
            }
          }
          const int64_t block = axis * shape.heads + head;
          Products(of_query, transposed.data() + block * d * shape.padded, d,
                   shape.padded, to);
        }
        for (int64_t q = 0; q < count; ++q) {
          const float* row_scores = scores.data() + 2 * q * shape.padded;
          float* out = weight_data + shape.Result(first + q, head);
          search.Run(row_scores, row_scores + shape.padded, out,
                     slot_data + shape.Result(first + q, head));
          Softmax(out, shape.k);
        }
      }
    }
  });
  return ffi::Error::Success();
}

// Adds the gradient of one LayerNorm, given that of its result.
void NormalizeGrad(const float* grad, const float* normal, const float* gain,
                   float inverse, int64_t d, float* query_grad,
                   float* gain_grad) {
  float mean = 0.0f, inner = 0.0f;
  for (int64_t i = 0; i < d; ++i) {
    const float g = grad[i] * gain[i];
    mean += g;
    inner += g * normal[i];
    gain_grad[i] += grad[i] * normal[i];
  }
  mean /= d;
  inner /= d;
  for (int64_t i = 0; i < d; ++i) {
    query_grad[i] = inverse * (grad[i] * gain[i] - mean - normal[i] * inner);
  }
}

// A query meets the chosen keys only: k products of length d an axis in place
// of two matrix products with mostly zeros. Keys are shared by all queries, so
// each part of the rows sums its own gradients of them; parts are added in
// order, so that the result does not depend on the number of threads.
ffi::Error LookupGrad(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries,
                      ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> gain,
                      ffi::Buffer<ffi::F32> weights,
                      ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::F32> grads,
                      ffi::ResultBuffer<ffi::F32> query_grads,
                      ffi::ResultBuffer<ffi::F32> key_grads,
                      ffi::ResultBuffer<ffi::F32> gain_grads) {
  const Shape shape(keys, queries.element_count(), LastDim(weights));
  const int64_t d = shape.d, n = shape.n, k = shape.k;
  const bool is_normal = gain.element_count() > 0;
  const int64_t num_parts = std::min<int64_t>(16, shape.rows / 256 + 1);
  const int64_t part_rows = (shape.rows + num_parts - 1) / num_parts;
  const int64_t key_count = keys.element_count();
  std::vector<float> key_sums(num_parts * key_count);
  std::vector<float> gain_sums(num_parts * 2 * d);
  const float* query_data = queries.typed_data();
  const float* key_data = keys.typed_data();
  float* query_grad_data = query_grads->typed_data();
  ParallelFor(pool, num_parts, 1, [&](int64_t part, int64_t) {
    float* key_sum = key_sums.data() + part * key_count;
    std::vector<float> score_grads(k), normal(d), scaled(d), grad(d);
    const int64_t end = std::min(shape.rows, (part + 1) * part_rows);
    for (int64_t row = part * part_rows; row < end; ++row) {
      for (int64_t head = 0; head < shape.heads; ++head) {
        const int64_t result = shape.Result(row, head);
        const float* weight = weights.typed_data() + result;
        const float* weight_grad = grads.typed_data() + result;
        const int32_t* slot = slots.typed_data() + result;
        float inner = 0.0f;
        for (int64_t a = 0; a < k; ++a) inner += weight[a] * weight_grad[a];
        for (int64_t a = 0; a < k; ++a) {
          score_grads[a] = weight[a] * (weight_grad[a] - inner);
        }
        for (int64_t axis = 0; axis < 2; ++axis) {
          const float* query = query_data + shape.Query(row, axis, head);
          const float* axis_gain = gain.typed_data() + axis * d;
          float inverse = 1.0f;
          const float* entered = query;
          if (is_normal) {
            inverse =
                Normalize(query, axis_gain, d, normal.data(), scaled.data());
            entered = scaled.data();
          }
          const float* head_keys = key_data + shape.Keys(axis, head);
          float* head_sums = key_sum + shape.Keys(axis, head);
          std::fill(grad.begin(), grad.end(), 0.0f);
          for (int64_t a = 0; a < k; ++a) {
            const int64_t place = axis == 0 ? slot[a] / n : slot[a] % n;
            if (place < 0 || place >= n) continue;
            const float* key = head_keys + place * d;
            float* sum = head_sums + place * d;
            const float g = score_grads[a];
            for (int64_t i = 0; i < d; ++i) {
              grad[i] += g * key[i];
              sum[i] += g * entered[i];
            }
          }
          float* out = query_grad_data + shape.Query(row, axis, head);
          if (is_normal) {
            NormalizeGrad(grad.data(), normal.data(), axis_gain, inverse, d,
                          out, gain_sums.data() + (2 * part + axis) * d);
          } else {
            std::copy(grad.begin(), grad.end(), out);
          }
        }
      }
    }
  });
  const auto add_parts = [num_parts](const std::vector<float>& sums,
                                     int64_t count, float* to) {
    std::fill(to, to + count, 0.0f);
    for (int64_t part = 0; part < num_parts; ++part) {
      for (int64_t i = 0; i < count; ++i) to[i] += sums[part * count + i];
    }
  };
  add_parts(key_sums, key_count, key_grads->typed_data());
  if (is_normal) add_parts(gain_sums, 2 * d, gain_grads->typed_data());
  return ffi::Error::Success();
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_key_topk, TopK,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()
        .Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_key_topk_grad, TopKGrad,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<S32>().Arg<F32>().Ret<F32>()
        .Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_key_lookup, Lookup,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<F32>().Ret<S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_key_lookup_grad, LookupGrad,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<F32>().Arg<S32>().Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>());

}  // namespace pallas_kernels
