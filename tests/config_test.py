"""A mistake in a config block is one line that names the key."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl.testing import absltest, parameterized

from recjax import config
from recjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  count: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
  path: str
  dims: tuple[int, ...] = (1,)
  is_on: bool = False
  inner: Inner = Inner()
  limit: float | None = 1.0
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(**values):
  return config.build(Outer, values, "config.outer")


class ConfigTest(parameterized.TestCase):
  def test_builds_nested_values_and_keeps_defaults(self):
    actual = build(
      path="x", dims=[2, 3], inner={"count": 4, "rate": 1}, limit=2,
      extra={"a": [1]},
    )  # fmt: skip
    expected = Outer("x", (2, 3), False, Inner(1.0, 4), 2.0, {"a": [1]})
    self.assertEqual(actual, expected)
    self.assertIsInstance(actual.inner.rate, float)
    self.assertIsInstance(actual.limit, float)
    self.assertEqual(build(path="x"), Outer("x"))
    self.assertIsNone(build(path="x", limit=None).limit)

  @parameterized.named_parameters(
    ("unknown", {"pth": "x"}, "config.outer.pth.*did you mean 'path'"),
    ("far", {"qqq": 1}, "config.outer.qqq; known: path, dims"),
    ("nested", {"inner": {"rte": 1}}, "config.outer.inner.rte.*'rate'"),
    ("missing", {}, "config.outer.path is missing"),
    ("str_for_int", {"dims": ["a"]}, "config.outer.dims must be .*int.*'a'"),
    ("str_for_list", {"dims": "12"}, "config.outer.dims must be a list"),
    ("int_for_list", {"dims": 3}, "config.outer.dims must be a list.*3"),
    ("float_for_int", {"inner": {"count": 1.5}}, "inner.count .*int.*1.5"),
    ("bool_for_int", {"inner": {"count": True}}, "inner.count .*int.*True"),
    ("bool_for_float", {"inner": {"rate": True}}, "inner.rate .*float"),
    ("str_for_float", {"limit": "1"}, "outer.limit .*float.*'1'"),
    ("none", {"inner": {"rate": None}}, "inner.rate .*float.*None"),
    ("int_for_bool", {"is_on": 1}, "is_on .*bool.*1"),
    ("int_for_str", {"path": 1}, "path .*str.*1"),
    ("value_for_block", {"inner": 3}, "outer.inner must be a block.*3"),
    ("list_for_mapping", {"extra": [1]}, "outer.extra must be .*Mapping"),
  )
  def test_a_mistake_is_a_user_error(self, values, message):
    if "path" in message and not values:
      self.assertRaisesRegex(UserError, message, build)
      return
    with self.assertRaisesRegex(UserError, message) as caught:
      build(**{"path": "x", **values})
    self.assertNotIn("\n", str(caught.exception))

  def test_checks_of_the_dataclass_still_run(self):
    @dataclasses.dataclass
    class Checked:
      value: int = 0

      def __post_init__(self):
        raise UserError(f"value {self.value} is bad")

    with self.assertRaisesRegex(UserError, "value 7 is bad"):
      config.build(Checked, {"value": 7}, "config")


if __name__ == "__main__":
  absltest.main()
