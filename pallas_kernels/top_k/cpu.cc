// top_k on the CPU: see select.h for how a row is searched.

#include "pallas_kernels/native/common.h"
#include "pallas_kernels/native/select.h"

namespace pallas_kernels {
namespace {

// Elements a part, so that starting one costs little against it.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
void TopK(ffi::ThreadPool& pool, const void* data, int64_t num_rows, int64_t n,
          int64_t k, bool is_sorted, void* values, int32_t* indices) {
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(values);
  const int64_t grain = n ? kGrain / n : num_rows;
  ParallelFor(pool, num_rows, grain, [&](int64_t begin, int64_t end) {
    Selector selector;
    for (int64_t row = begin; row < end; ++row) {
      selector.Select(x + row * n, n, k, is_sorted);
      for (int64_t j = 0; j < k; ++j) {
        const int32_t place = KeyPlace(selector.keys()[j]);
        out[row * k + j] = x[row * n + place];
        indices[row * k + j] = place;
      }
    }
  });
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x,
               ffi::Result<ffi::AnyBuffer> values,
               ffi::ResultBuffer<ffi::S32> indices, bool is_sorted) {
  const auto run = x.element_type() == ffi::BF16 ? TopK<BFloat16> : TopK<float>;
  run(pool, x.untyped_data(), NumRows(x), LastDim(x), LastDim(*indices),
      is_sorted, values->untyped_data(), indices->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace pallas_kernels

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    top_k, pallas_kernels::Run,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
        .Attr<bool>("is_sorted"));
