// Exact selection of the largest of a row, and their order.

#ifndef PALLAS_KERNELS_NATIVE_SELECT_H_
#define PALLAS_KERNELS_NATIVE_SELECT_H_

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "pallas_kernels/native/common.h"

namespace pallas_kernels {

// An integer whose order is the total order of floats:
// -NaN < -inf < ... < -0 < +0 < ... < inf < NaN.
inline int32_t OrderedBits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float FromOrderedBits(int32_t bits) {
  bits ^= (bits >> 31) & 0x7fffffff;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Value and place in one number: larger values first, then lower places.
inline uint64_t MakeKey(int32_t ordered, uint32_t place) {
  const uint32_t value = static_cast<uint32_t>(ordered) ^ 0x80000000u;
  return (static_cast<uint64_t>(value) << 32) | (0xffffffffu - place);
}

inline int32_t KeyPlace(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

inline float KeyValue(uint64_t key) {
  const uint32_t value = static_cast<uint32_t>(key >> 32) ^ 0x80000000u;
  return FromOrderedBits(static_cast<int32_t>(value));
}

// Buffers of one thread.
class Selector {
 public:
  // The k largest of x[0, n), into `keys()[0, k)`; descending if `is_sorted`.
  //
  // Three short passes in place of a sort. (1) The row is dealt out to groups
  // and each group's maximum taken; the k-th largest maximum is a bound that
  // at least k elements reach. (2) The few that reach it are collected. (3)
  // Each of them is put where the number of larger ones says. The bound plays
  // the part of the first digits in a radix selection, at one read of the row.
  template <typename T>
  void Select(const T* x, int64_t n, int64_t k, bool is_sorted) {
    int64_t num_groups = 64;
    while (num_groups < 2 * k) num_groups *= 2;
    Reserve(n, k, std::max(num_groups, kShort));
    int32_t bound = std::numeric_limits<int32_t>::min();
    // A short row is its own groups, and the bound is the k-th largest.
    if (k < n && n <= kShort) num_groups = n;
    if (num_groups == n || 2 * num_groups <= n) {
      GroupMaxima(x, n, num_groups);
      bound = KthLargest(groups_.data(), num_groups, k);
    }
    Collect(x, n, bound);
    Order(k, is_sorted);
  }

  // The same of what `candidates()` holds.
  void SelectCandidates(int64_t num, int64_t k, bool is_sorted) {
    num_candidates_ = num;
    Order(k, is_sorted);
  }

  void Reserve(int64_t n, int64_t k, int64_t num_groups) {
    // Whole vectors are written, so there is room behind the last one.
    if (static_cast<int64_t>(candidates_.size()) < n + 16) {
      candidates_.resize(n + 16);
    }
    if (static_cast<int64_t>(keys_.size()) < k) keys_.resize(k);
    if (static_cast<int64_t>(groups_.size()) < num_groups) {
      groups_.resize(num_groups);
    }
  }

  const uint64_t* keys() const { return keys_.data(); }
  uint64_t* candidates() { return candidates_.data(); }

 private:
  template <typename T>
  void GroupMaxima(const T* x, int64_t n, int64_t num_groups) {
    int32_t* groups = groups_.data();
    for (int64_t j = 0; j < num_groups; ++j) {
      groups[j] = OrderedBits(ToFloat(x[j]));
    }
    int64_t i = num_groups;
    for (; i + num_groups <= n; i += num_groups) {
      for (int64_t j = 0; j < num_groups; ++j) {
        groups[j] = std::max(groups[j], OrderedBits(ToFloat(x[i + j])));
      }
    }
    for (int64_t j = 0; i + j < n; ++j) {
      groups[j] = std::max(groups[j], OrderedBits(ToFloat(x[i + j])));
    }
  }

  // A value that at least k of the n reach: the k-th largest, or less early
  // if exactly k reach less. Built from the highest bit down.
  static int32_t KthLargest(const int32_t* x, int64_t n, int64_t k) {
    uint32_t bound = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
      const int32_t tried = static_cast<int32_t>((bound | bit) ^ 0x80000000u);
      int32_t count = 0;
      for (int64_t i = 0; i < n; ++i) count += x[i] >= tried;
      if (count >= k) bound |= bit;
      if (count == k) break;
    }
    return static_cast<int32_t>(bound ^ 0x80000000u);
  }

  template <typename T>
  void Collect(const T* x, int64_t n, int32_t bound) {
    uint64_t* out = candidates_.data();
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i vector_bound = _mm512_set1_epi32(bound);
    const __m512i low = _mm512_set1_epi32(0x7fffffff);
    for (; i + 16 <= n; i += 16) {
      __m512i bits = LoadBits(x + i);
      bits = _mm512_xor_si512(
          bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), low));
      __mmask16 mask = _mm512_cmpge_epi32_mask(bits, vector_bound);
      if (!mask) continue;
      alignas(64) int32_t ordered[16];
      _mm512_store_si512(ordered, bits);
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int j = __builtin_ctz(rest);
        out[count++] = MakeKey(ordered[j], static_cast<uint32_t>(i + j));
      }
    }
#endif
    for (; i < n; ++i) {
      const int32_t ordered = OrderedBits(ToFloat(x[i]));
      out[count] = MakeKey(ordered, static_cast<uint32_t>(i));
      count += ordered >= bound;
    }
    num_candidates_ = count;
  }

#if defined(__AVX512F__)
  static __m512i LoadBits(const float* x) { return _mm512_loadu_si512(x); }

  static __m512i LoadBits(const BFloat16* x) {
    const __m256i half =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
#endif

  // Keys are all different, so that the number of larger ones is a place.
  void Order(int64_t k, bool is_sorted) {
    uint64_t* candidates = candidates_.data();
    const int64_t n = num_candidates_;
    if (n <= kCountingLimit && is_sorted) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = candidates[i];
        int64_t place = 0;
        for (int64_t j = 0; j < n; ++j) place += candidates[j] > key;
        if (place < k) keys_[place] = key;
      }
      return;
    }
    if (k < n) {
      std::nth_element(candidates, candidates + k, candidates + n,
                       std::greater<uint64_t>());
    }
    if (is_sorted) {
      std::sort(candidates, candidates + k, std::greater<uint64_t>());
    }
    std::copy(candidates, candidates + k, keys_.data());
  }

  // Up to so many columns all are searched for the bound.
  static constexpr int64_t kShort = 128;

  // Above it, counting takes longer than to sort.
  static constexpr int64_t kCountingLimit = 160;

  int64_t num_candidates_ = 0;
  std::vector<int32_t> groups_;
  std::vector<uint64_t> candidates_, keys_;
};

}  // namespace pallas_kernels

#endif  // PALLAS_KERNELS_NATIVE_SELECT_H_
