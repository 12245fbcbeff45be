import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized

from recjax.data.vocabulary import (
  Buckets,
  Vocabulary,
  VocabularyBuilder,
  hash_values,
  mix,
)

HASH_OF_A = 15295030668532515345
BUCKETS_OF_INTS = [488, 753, 0, 76]


class VocabularyTest(parameterized.TestCase):
  @parameterized.parameters(pa.int64(), pa.large_string())
  def test_order_does_not_depend_on_arrival(self, value_type):
    rng = np.random.default_rng(0)
    values = pa.array(rng.integers(-(2**60), 2**60, 200_000)).cast(value_type)
    tables = []
    for size in (7_000, 90_000):
      builder = VocabularyBuilder(value_type)
      for start in range(0, len(values), size):
        builder.add(values.slice(start, size))
      tables.append(builder.finish())
    first, second = (t.lookup(values) for t in tables)
    np.testing.assert_array_equal(first, second)
    self.assertEqual(tables[0].size, len(set(values.to_pylist())) + 1)
    expected = np.argsort(np.argsort(np.array(values.to_pylist()))) + 1
    np.testing.assert_array_equal(first, expected)

  def test_hashes_are_those_of_every_other_run(self):
    strings = pa.array(["", "a", "b", "ab", "ba", "aa", "\0", "日本"])
    hashes = hash_values(strings).tolist()
    self.assertLen(set(hashes), 8)
    # Renew only together with the store's format: prepared data depend on it.
    self.assertEqual(hashes[1], HASH_OF_A)
    np.testing.assert_array_equal(
      hash_values(strings.slice(2, 3)), hash_values(strings)[2:5]
    )
    self.assertEqual(
      Buckets(1000).lookup(pa.array([7, -7, None, 2**62])).tolist(),
      BUCKETS_OF_INTS,
    )

  def test_mix_is_splitmix64(self):
    # The first two outputs of the published generator at seed 0.
    gamma = 0x9E3779B97F4A7C15
    np.testing.assert_array_equal(
      mix(np.array([0, gamma], np.uint64)),
      np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], np.uint64),
    )

  def test_long_strings_and_chunks(self):
    strings = ["x" * i for i in range(800)]
    self.assertLen(set(hash_values(pa.array(strings)).tolist()), 800)
    np.testing.assert_array_equal(
      hash_values(pa.array(strings))[790:],
      hash_values(pa.array(strings[790:])),
    )

  def test_buckets_fill_evenly(self):
    for values in (range(100_000), map(str, range(100_000))):
      rows = Buckets(100).lookup(pa.array(list(values)))
      counts = np.bincount(rows, minlength=101)
      self.assertEqual(counts[0], 0)
      # 99 degrees of freedom; 170 is beyond the 0.9999 quantile.
      self.assertLess(((counts[1:] - 1000) ** 2 / 1000).sum(), 170)

  def test_empty_vocabulary(self):
    vocabulary = Vocabulary(pa.array([], pa.int64()), has_null=False)
    self.assertEqual(vocabulary.size, 1)
    self.assertEqual(vocabulary.lookup(pa.array([1, None])).tolist(), [0, 0])


if __name__ == "__main__":
  absltest.main()
