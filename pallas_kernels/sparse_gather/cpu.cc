// sparse_gather on the CPU: weighted sums of rows that lie anywhere.
//
// A table is far larger than the caches, so the time goes into fetching rows.
// All loops therefore ask for the rows of later reads while they work on one,
// and hold what they sum in registers, a block of columns at a time.

#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "pallas_kernels/native/common.h"
#include "pallas_kernels/native/segments.h"

namespace pallas_kernels {
namespace {

// Numbers read by a part, so that starting one costs little against it.
constexpr int64_t kGrain = 1 << 18;
// How many reads ahead a row is asked for.
constexpr int64_t kAhead = 16;
// Reads of one row that are summed by one thread.
constexpr int64_t kLongSegment = 1 << 13;
// Vectors in a block: as many as leave registers for the rest.
#ifdef __AVX512F__
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif

template <int L>
struct Types {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  typedef uint16_t Half __attribute__((vector_size(2 * L)));
};
template <int L>
using Float = typename Types<L>::Float;
template <int L>
using Int = typename Types<L>::Int;

template <typename To, typename From>
To Bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int L>
Float<L> Load(const float* from) {
  Float<L> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <int L>
Float<L> Load(const BFloat16* from) {
  typename Types<L>::Half half;
  std::memcpy(&half, from, sizeof(half));
  return Bits<Float<L>>(__builtin_convertvector(half, Int<L>) << 16);
}

template <int L>
void Save(const Float<L>& x, float* to) {
  std::memcpy(to, &x, sizeof(x));
}

template <int L>
float Sum(const Float<L>& x) {
  if constexpr (L == 1) {
    return x[0];
  } else {
    Float<L / 2> halves[2];
    std::memcpy(halves, &x, sizeof(x));
    return Sum<L / 2>(halves[0] + halves[1]);
  }
}

// -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x: no cancellation
// anywhere. Within 2e-7 of the true value, relatively.
template <int L>
Float<L> Tanh(const Float<L>& x) {
  const Int<L> sign = Bits<Int<L>>(x) & INT32_MIN;
  Float<L> size = Bits<Float<L>>(Bits<Int<L>>(x) ^ sign);
  // tanh(10) is 1 in float32. The comparison is false for NaN, which stays.
  size = size > 10.0f ? Float<L>{} + 10.0f : size;
  const Float<L> y = -2.0f * size;
  // y = n log 2 + r with |r| <= log(2) / 2; adding 1.5 * 2^23 rounds.
  const Float<L> shifted = y * 1.44269504f + 12582912.0f;
  const Float<L> n = shifted - 12582912.0f;
  Float<L> r = y - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  // (exp(r) - 1 - r) / r^2, fitted to 1.4e-8 of expm1(r).
  Float<L> p = r * 1.38982246e-3f + 8.36604089e-3f;
  p = p * r + 4.16668542e-2f;
  p = p * r + 1.66665494e-1f;
  p = p * r + 0.5f;
  const Float<L> expm1_r = r + r * r * p;
  const Int<L> exponent = (Bits<Int<L>>(shifted) - 0x4b400000 + 127) << 23;
  const Float<L> scale = Bits<Float<L>>(exponent);
  const Float<L> e = scale * expm1_r + (scale - 1.0f);
  const Int<L> result = Bits<Int<L>>(-e / (e + 2.0f));
  return Bits<Float<L>>((result & INT32_MAX) | sign);
}

// Columns of N vectors of L: one after the other, but the last one ends where
// the row does, over columns that it shares with the one before.
struct Block {
  int64_t first, last;
  // First column of the next block; 0 after the last.
  int64_t next;

  template <int L, int N>
  int64_t Column(int v) const {
    return v < N - 1 ? first + v * L : last;
  }

  // All bits of the lanes of the last vector that are no other's.
  template <int L, int N>
  Int<L> Own() const {
    Int<L> lane;
    for (int i = 0; i < L; ++i) lane[i] = i;
    return lane >= static_cast<int32_t>(first + (N - 1) * L - last);
  }
};

template <int L, int N, typename Fn>
void CallBlock(int num, const Block& block, const Fn& fn) {
  if constexpr (N > 1) {
    if (num < N) return CallBlock<L, N - 1>(num, block, fn);
  }
  fn(std::integral_constant<int, L>(), std::integral_constant<int, N>(), block);
}

template <int L, int kMax, typename Fn>
void ForBlocksOf(int64_t dim, const Fn& fn) {
  const int64_t num_vectors = (dim + L - 1) / L;
  for (int64_t v = 0; v < num_vectors; v += kMax) {
    const int64_t num = std::min<int64_t>(kMax, num_vectors - v);
    const bool is_last = v + num == num_vectors;
    const Block block = {v * L, is_last ? dim - L : (v + num - 1) * L,
                         is_last ? 0 : (v + num) * L};
    CallBlock<L, kMax>(num, block, fn);
  }
}

// Calls fn(L, N, block) for blocks that cover `dim` columns.
template <typename Fn>
void ForBlocks(int64_t dim, const Fn& fn) {
  if (dim >= 16) {
    ForBlocksOf<16, kBlock>(dim, fn);
  } else if (dim >= 8) {
    ForBlocksOf<8, 2>(dim, fn);
  } else if (dim >= 4) {
    ForBlocksOf<4, 2>(dim, fn);
  } else {
    ForBlocksOf<1, 3>(dim, fn);
  }
}

// What ids read from a table: a row of zeros where they are out of range.
template <typename T>
struct Lookups {
  const T* table;
  const T* zeros;
  const int32_t* ids;
  const float* weights;
  uint32_t num_rows;
  int64_t dim;

  const T* Row(int64_t read) const {
    // A negative id is a very large one.
    const uint32_t id = ids[read];
    return id < num_rows ? table + id * dim : zeros;
  }
  float Weight(int64_t read) const { return weights[read]; }
};

// What the rows of a table get back: the output's gradients, by read.
struct Returns {
  const float* output_grad;
  const uint32_t* reads;
  const float* weights;
  uint32_t k;
  int64_t dim;

  const float* Row(int64_t i) const {
    return output_grad + static_cast<int64_t>(reads[i] / k) * dim;
  }
  float Weight(int64_t i) const { return weights[reads[i]]; }
};

// Some rows of a set, one after the other; beyond `limit` there are none.
struct Span {
  int64_t begin, end, limit;
};

// Asks for the memory of the vector v of a block, once a cache line.
template <int L, typename T>
void Prefetch(const T* block, int v) {
  if (v * L * sizeof(T) % 64 == 0) __builtin_prefetch(block + v * L);
}

// Calls fn(i, row, soon) for the rows of a span, of which it wants one block;
// `soon` is the block that is wanted some calls later.
template <typename Rows, typename Fn>
void ForRows(const Rows& rows, const Span& span, const Block& block,
             const Fn& fn) {
  // After these come the same rows in the next block, or the next span.
  const int64_t back = block.next ? span.end - span.begin : 0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    int64_t ahead = i + kAhead, column = block.first;
    if (ahead >= span.end) {
      ahead -= back;
      column = block.next;
    }
    fn(i, rows.Row(i), rows.Row(std::min(ahead, span.limit - 1)) + column);
  }
}

// Calls write(L, column, vector) for the vectors of the weighted sum.
template <typename Rows, typename Fn>
void WeightedSum(const Rows& rows, const Span& span, const Fn& write) {
  ForBlocks(rows.dim, [&](auto lanes, auto num, const Block& block) {
    constexpr int L = lanes, N = num;
    Float<L> sums[N] = {};
    ForRows(rows, span, block, [&](int64_t i, const auto* row, auto* soon) {
      const float weight = rows.Weight(i);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        Prefetch<L>(soon, v);
        sums[v] += weight * Load<L>(row + block.Column<L, N>(v));
      }
    });
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      write(lanes, block.Column<L, N>(v), sums[v]);
    }
  });
}

// products[i] = <x, row i>.
template <typename Rows>
void InnerProducts(const Rows& rows, const Span& span, const float* x,
                   float* products) {
  std::fill(products + span.begin, products + span.end, 0.0f);
  ForBlocks(rows.dim, [&](auto lanes, auto num, const Block& block) {
    constexpr int L = lanes, N = num;
    const Int<L> own = block.Own<L, N>();
    const auto load = [&](int v, const auto* from) {
      const Float<L> all = Load<L>(from + block.Column<L, N>(v));
      // Both sides: what another vector counts may be infinite.
      return v < N - 1 ? all : Bits<Float<L>>(Bits<Int<L>>(all) & own);
    };
    Float<L> xs[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) xs[v] = load(v, x);
    ForRows(rows, span, block, [&](int64_t i, const auto* row, auto* soon) {
      Float<L> sum = {};
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        Prefetch<L>(soon, v);
        sum += xs[v] * load(v, row);
      }
      products[i] += Sum<L>(sum);
    });
  });
}

struct Shape {
  int64_t num_rows, dim, num_outputs, k;
};

template <typename Table, typename Ids>
Shape ShapeOf(const Table& table, const Ids& indices) {
  return {NumRows(table), LastDim(table), NumRows(indices), LastDim(indices)};
}

// Calls fn(output, lookups, span of its reads) in parallel.
template <typename T, typename Fn>
void ForOutputs(ffi::ThreadPool& pool, const ffi::AnyBuffer& table,
                const ffi::Buffer<ffi::S32>& indices, const float* weights,
                const Fn& fn) {
  const Shape shape = ShapeOf(table, indices);
  const std::vector<T> zeros(shape.dim, T{});
  const uint32_t num_rows = std::min(shape.num_rows, int64_t{1} << 31);
  const Lookups<T> lookups = {static_cast<const T*>(table.untyped_data()),
                              zeros.data(), indices.typed_data(), weights,
                              num_rows, shape.dim};
  const int64_t k = shape.k;
  const int64_t grain = kGrain / std::max<int64_t>(1, k * shape.dim);
  ParallelFor(pool, shape.num_outputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      fn(i, lookups, Span{i * k, (i + 1) * k, shape.num_outputs * k});
    }
  });
}

// Calls fn(an instance of the table's number type).
template <typename Fn>
ffi::Error ForTypeOf(const ffi::AnyBuffer& table, const Fn& fn) {
  switch (table.element_type()) {
    case ffi::F32:
      fn(float());
      return ffi::Error::Success();
    case ffi::BF16:
    case ffi::U16:
      fn(BFloat16());
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("table: float32, bfloat16 or uint16");
  }
}

// With a gate: its product with the tanh of the sum, and that where it is
// wanted; else the sum.
ffi::Error RunSums(ffi::ThreadPool& pool, const ffi::AnyBuffer& table,
                   const ffi::Buffer<ffi::S32>& indices, const float* weights,
                   const float* gate, float* out, float* tanhs) {
  const int64_t dim = LastDim(table);
  return ForTypeOf(table, [&](auto type) {
    ForOutputs<decltype(type)>(
        pool, table, indices, weights,
        [&](int64_t i, const auto& lookups, const Span& reads) {
          WeightedSum(lookups, reads,
                      [&](auto lanes, int64_t column, const auto& sum) {
                        constexpr int L = lanes;
                        const int64_t place = i * dim + column;
                        if (gate == nullptr) return Save<L>(sum, out + place);
                        const Float<L> tanh = Tanh<L>(sum);
                        Save<L>(Load<L>(gate + place) * tanh, out + place);
                        if (tanhs != nullptr) Save<L>(tanh, tanhs + place);
                      });
        });
  });
}

ffi::Error Gather(ffi::ThreadPool pool, ffi::AnyBuffer table,
                  ffi::Buffer<ffi::S32> indices, ffi::Buffer<ffi::F32> weights,
                  ffi::ResultBuffer<ffi::F32> output) {
  return RunSums(pool, table, indices, weights.typed_data(), nullptr,
                 output->typed_data(), nullptr);
}

ffi::Error GatherGated(ffi::ThreadPool pool, ffi::AnyBuffer table,
                       ffi::Buffer<ffi::S32> indices,
                       ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::F32> gate,
                       ffi::ResultBuffer<ffi::F32> output,
                       ffi::RemainingRets saved) {
  float* tanhs = nullptr;
  if (saved.size() > 0) {
    auto second = saved.get<ffi::Buffer<ffi::F32>>(0);
    if (second.has_error()) return second.error();
    tanhs = second.value()->typed_data();
  }
  return RunSums(pool, table, indices, weights.typed_data(), gate.typed_data(),
                 output->typed_data(), tanhs);
}

// The second result is the gradient that came in, in its own memory.
ffi::Error WeightsGrad(ffi::ThreadPool pool, ffi::AnyBuffer table,
                       ffi::Buffer<ffi::S32> indices,
                       ffi::Buffer<ffi::F32> output_grad,
                       ffi::ResultBuffer<ffi::F32> weights_grad,
                       ffi::ResultBuffer<ffi::F32>) {
  const int64_t dim = LastDim(table);
  const float* grads = output_grad.typed_data();
  float* out = weights_grad->typed_data();
  return ForTypeOf(table, [&](auto type) {
    ForOutputs<decltype(type)>(
        pool, table, indices, nullptr,
        [&](int64_t i, const auto& lookups, const Span& reads) {
          InnerProducts(lookups, reads, grads + i * dim, out);
        });
  });
}

// Sums of the reads of each row. Those of a row that very many reads have in
// common are summed in parts of a fixed length, by all threads.
void SumSegments(ffi::ThreadPool& pool, const Segments& segments,
                 const Returns& returns, float* out) {
  const int64_t dim = returns.dim;
  const int64_t num_reads = segments.reads.size();
  const auto sum_into = [dim](const Returns& rows, const Span& span,
                              float* to) {
    WeightedSum(rows, span, [&](auto lanes, int64_t column, const auto& sum) {
      Save<lanes>(sum, to + column);
    });
  };
  const auto span_of = [&](int64_t i) {
    return Span{segments.begins[i], segments.begins[i + 1], num_reads};
  };
  const int64_t grain = kGrain / std::max<int64_t>(1, dim);
  ParallelForSegments(pool, segments, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Span span = span_of(i);
      if (span.end - span.begin <= kLongSegment) {
        sum_into(returns, span, out + i * dim);
      }
    }
  });
  std::vector<float> parts, ones;
  std::vector<uint32_t> order;
  for (int64_t i = 0; i < static_cast<int64_t>(segments.rows.size()); ++i) {
    const Span span = span_of(i);
    const int64_t length = span.end - span.begin;
    if (length <= kLongSegment) continue;
    const int64_t num_parts = (length + kLongSegment - 1) / kLongSegment;
    parts.resize(num_parts * dim);
    ParallelFor(pool, length, kLongSegment, [&](int64_t begin, int64_t end) {
      sum_into(returns, Span{span.begin + begin, span.begin + end, num_reads},
               parts.data() + begin / kLongSegment * dim);
    });
    ones.assign(num_parts, 1.0f);
    order.resize(num_parts);
    std::iota(order.begin(), order.end(), 0);
    sum_into(Returns{parts.data(), order.data(), ones.data(), 1, dim},
             Span{0, num_parts, num_parts}, out + i * dim);
  }
}

ffi::Error RowGrads(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> indices,
                    ffi::Buffer<ffi::F32> weights,
                    ffi::Buffer<ffi::F32> output_grad,
                    ffi::ResultBuffer<ffi::S32> ids,
                    ffi::ResultBuffer<ffi::F32> grads, int64_t num_rows) {
  const int64_t dim = LastDim(output_grad);
  const int64_t capacity = LastDim(*ids);
  const Segments segments = GroupByRow(
      indices.typed_data(), static_cast<int64_t>(indices.element_count()),
      num_rows);
  const int64_t used = segments.rows.size();
  int32_t* rows = ids->typed_data();
  std::copy(segments.rows.begin(), segments.rows.end(), rows);
  std::fill(rows + used, rows + capacity, static_cast<int32_t>(num_rows));
  float* out = grads->typed_data();
  const Returns returns = {output_grad.typed_data(), segments.reads.data(),
                           weights.typed_data(),
                           static_cast<uint32_t>(LastDim(indices)), dim};
  SumSegments(pool, segments, returns, out);
  ParallelFor(pool, (capacity - used) * dim, kGrain,
              [&](int64_t begin, int64_t end) {
                std::fill(out + used * dim + begin, out + used * dim + end,
                          0.0f);
              });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_gather, pallas_kernels::Gather,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_gather_gated, pallas_kernels::GatherGated,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_gather_weights_grad, pallas_kernels::WeightsGrad,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_gather_row_grads, pallas_kernels::RowGrads,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
        .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
        .Attr<int64_t>("num_rows"));
