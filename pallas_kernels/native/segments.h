// The reads of a table, grouped by the row that they read.

#ifndef PALLAS_KERNELS_NATIVE_SEGMENTS_H_
#define PALLAS_KERNELS_NATIVE_SEGMENTS_H_

#include <array>
#include <cstdint>
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
  constexpr int kDigitBits = 11;
  constexpr uint32_t kDigits = 1u << kDigitBits;
  struct Read {
    uint32_t row, place;
  };
  std::vector<Read> reads, sorted;
  reads.reserve(num_reads);
  for (int64_t i = 0; i < num_reads; ++i) {
    if (ids[i] >= 0 && ids[i] < num_rows) {
      reads.push_back(
          {static_cast<uint32_t>(ids[i]), static_cast<uint32_t>(i)});
    }
  }
  sorted.resize(reads.size());
  for (int shift = 0; shift < 32 && ((num_rows - 1) >> shift) > 0;
       shift += kDigitBits) {
    std::array<uint32_t, kDigits> starts{};
    for (const Read& read : reads) {
      ++starts[(read.row >> shift) & (kDigits - 1)];
    }
    uint32_t start = 0;
    for (uint32_t& count : starts) start += std::exchange(count, start);
    for (const Read& read : reads) {
      sorted[starts[(read.row >> shift) & (kDigits - 1)]++] = read;
    }
    reads.swap(sorted);
  }
  Segments segments;
  segments.reads.reserve(reads.size());
  for (const Read& read : reads) {
    const int32_t row = static_cast<int32_t>(read.row);
    if (segments.rows.empty() || segments.rows.back() != row) {
      segments.rows.push_back(row);
      segments.begins.push_back(segments.reads.size());
    }
    segments.reads.push_back(read.place);
  }
  segments.begins.push_back(segments.reads.size());
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
