// The reads of a table, grouped by the row that they read.

#ifndef PALLAS_KERNELS_NATIVE_SEGMENTS_H_
#define PALLAS_KERNELS_NATIVE_SEGMENTS_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "pallas_kernels/native/common.h"

namespace pallas_kernels {

// Row `rows[i]` is read by `reads[begins[i]]` to `reads[begins[i + 1] - 1]`;
// rows ascend, and the reads of a row stand in the order of the ids.
struct Segments {
  std::vector<int32_t> rows;
  std::vector<int64_t> begins;
  std::vector<uint32_t> reads;
};

// Groups `ids`, dropping those outside of [0, num_rows). A radix sort of as
// many digits as rows have: its time does not depend on what a table holds.
inline Segments GroupByRow(const int32_t* ids, int64_t num_reads,
                           int64_t num_rows) {
  constexpr int kMaxDigitBits = 11;
  int row_bits = 0;
  while (((num_rows - 1) >> row_bits) > 0) ++row_bits;
  const int num_digits = (row_bits + kMaxDigitBits - 1) / kMaxDigitBits;
  // Digits of one size have fewer places to write to than a full and a small.
  const int digit_bits = num_digits ? (row_bits - 1) / num_digits + 1 : 0;
  const uint32_t num_values = 1u << digit_bits;

  // Row in the upper half and place in the lower. Not filled with zeros, as a
  // vector would be: a large batch would pay for the memory twice.
  std::unique_ptr<uint64_t[]> reads(new uint64_t[num_reads]);
  std::unique_ptr<uint64_t[]> sorted(new uint64_t[num_reads]);
  std::vector<uint32_t> starts(num_digits * num_values);
  int64_t size = 0;
  for (int64_t i = 0; i < num_reads; ++i) {
    if (ids[i] < 0 || ids[i] >= num_rows) continue;
    const uint32_t row = static_cast<uint32_t>(ids[i]);
    reads[size++] = static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(i);
    for (int d = 0; d < num_digits; ++d) {
      const uint32_t value = (row >> (d * digit_bits)) & (num_values - 1);
      ++starts[d * num_values + value];
    }
  }
  for (int d = 0; d < num_digits; ++d) {
    uint32_t* start = starts.data() + d * num_values;
    uint32_t sum = 0;
    for (uint32_t i = 0; i < num_values; ++i) {
      sum += std::exchange(start[i], sum);
    }
    const int shift = 32 + d * digit_bits;
    for (int64_t i = 0; i < size; ++i) {
      sorted[start[(reads[i] >> shift) & (num_values - 1)]++] = reads[i];
    }
    reads.swap(sorted);
  }

  int64_t num_segments = 0;
  for (int64_t i = 0; i < size; ++i) {
    num_segments += i == 0 || (reads[i] >> 32) != (reads[i - 1] >> 32);
  }
  Segments segments;
  segments.rows.reserve(num_segments);
  segments.begins.reserve(num_segments + 1);
  segments.reads.resize(size);
  for (int64_t i = 0; i < size; ++i) {
    const int32_t row = static_cast<int32_t>(reads[i] >> 32);
    if (i == 0 || row != segments.rows.back()) {
      segments.rows.push_back(row);
      segments.begins.push_back(i);
    }
    segments.reads[i] = static_cast<uint32_t>(reads[i]);
  }
  segments.begins.push_back(size);
  return segments;
}

// Calls fn(first, last) for runs of whole segments with about `grain` reads.
template <typename Fn>
void ParallelForSegments(ffi::ThreadPool& pool, const Segments& segments,
                         int64_t grain, const Fn& fn) {
  std::vector<int64_t> firsts{0};
  const int64_t num_segments = segments.rows.size();
  for (int64_t i = 1; i < num_segments; ++i) {
    if (segments.begins[i] - segments.begins[firsts.back()] >= grain) {
      firsts.push_back(i);
    }
  }
  firsts.push_back(num_segments);
  if (num_segments == 0) return;
  ParallelFor(pool, firsts.size() - 1, 1, [&](int64_t begin, int64_t end) {
    fn(firsts[begin], firsts[end]);
  });
}

}  // namespace pallas_kernels

#endif  // PALLAS_KERNELS_NATIVE_SEGMENTS_H_
