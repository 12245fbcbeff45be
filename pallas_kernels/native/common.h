// What the C++ kernels share: number types, and loops over XLA's threads.

#ifndef PALLAS_KERNELS_NATIVE_COMMON_H_
#define PALLAS_KERNELS_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace pallas_kernels {

namespace ffi = xla::ffi;

// bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void Store(float x, float* to) { *to = x; }

// Rounds to the nearest, ties to even; a NaN stays one.
inline void Store(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

// Calls fn(begin, end) for parts of [0, size) of at most `grain`, on XLA's
// threads and the calling one, and returns when all is done. The parts do not
// depend on the number of threads.
//
// The caller takes parts like any other thread and waits only for parts that
// somebody has begun, so that it cannot wait for a thread that waits for it.
template <typename Fn>
void ParallelFor(ffi::ThreadPool& pool, int64_t size, int64_t grain,
                 const Fn& fn) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t num_parts = (size + grain - 1) / grain;
  const int64_t num_helpers =
      std::min<int64_t>(pool.num_threads(), num_parts) - 1;
  if (num_helpers < 1) {
    for (int64_t i = 0; i < num_parts; ++i) {
      fn(i * grain, std::min(size, (i + 1) * grain));
    }
    return;
  }
  // A helper may start after all is done and the caller gone: what it looks
  // at first must be its own.
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  const Fn* body = &fn;
  auto work = [state, body, size, grain, num_parts] {
    int64_t i;
    while ((i = state->next.fetch_add(1)) < num_parts) {
      (*body)(i * grain, std::min(size, (i + 1) * grain));
      if (state->num_done.fetch_add(1) + 1 == num_parts) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  // A copy each, which the pool owns.
  for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock,
                       [&] { return state->num_done.load() == num_parts; });
}

// Rows and columns of an array seen as a matrix of its last axis.
template <typename Buffer>
int64_t LastDim(const Buffer& x) {
  return x.dimensions().back();
}

template <typename Buffer>
int64_t NumRows(const Buffer& x) {
  const auto dims = x.dimensions();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
  return rows;
}

}  // namespace pallas_kernels

#endif  // PALLAS_KERNELS_NATIVE_COMMON_H_
