"""Imports go one way, from concepts to commands."""

import ast
import pathlib

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[1]

# A module may import from its own group and from those before it.
GROUPS = (
  (
    "recjax.errors",
    "recjax.schema",
    "recjax.stage",
    "recjax.trial",
    "recjax.stage",
    "recjax.config",
    "recjax.batch",
    "recjax.host_memory",
  ),
  (
    "recjax.data",
    "recjax.sparse",
    "recjax.layers",
    "recjax.losses",
    "recjax.allocation",
    "recjax.allocation_inputs",
    "recjax.allocation_repair",
  ),
  ("recjax.models", "recjax.baselines"),
  (
    "recjax.metrics",
    "recjax.statistics",
    "recjax.method",
    "recjax.flops",
    "recjax.parallel",
    "recjax.optimizer",
    "recjax.train_state",
    "recjax.checkpoint",
    "recjax.writer",
  ),
  (
    "recjax.evaluate",
    "recjax.monitor",
    "recjax.speed",
    "recjax.restore",
    "recjax.run_files",
    "recjax.task_gradients",
    "recjax.train",
  ),
  (
    "recjax.cells",
    "recjax.figures",
    "recjax.comparison",
    "recjax.control",
    "recjax.resampling",
    "recjax.published",
    "recjax.report",
    "recjax.sweep",
    "recjax.tuning",
    "recjax.workers",
    "recjax.export",
    "recjax.plan",
    "recjax.progressive",
    "recjax.export_golden",
    "recjax.raw_rows",
    "recjax.scorer",
    "recjax.serve",
    "recjax.ranking",
  ),
  ("experiments",),
)


def group_of(module: str) -> int | None:
  for level, names in enumerate(GROUPS):
    for name in names:
      if module == name or module.startswith(name + "."):
        return level
  return None


def imports_of(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class ArchitectureTest(absltest.TestCase):
  def test_every_module_has_a_group(self):
    for path in (ROOT / "recjax").rglob("*.py"):
      if module_name(path) != "recjax":
        self.assertIsNotNone(group_of(module_name(path)), path)

  def test_imports_go_one_way(self):
    wrong = []
    for package in ("recjax", "experiments", "pallas_kernels"):
      for path in (ROOT / package).rglob("*.py"):
        level = group_of(module_name(path))
        for target in imports_of(path):
          other = group_of(target)
          if package == "pallas_kernels" and other is not None:
            wrong.append(f"{module_name(path)} imports {target}")
          elif level is not None and other is not None and other > level:
            wrong.append(f"{module_name(path)} imports {target}")
    self.assertEqual(wrong, [])

  def test_the_product_does_not_import_the_tests(self):
    for package in ("recjax", "experiments"):
      for path in (ROOT / package).rglob("*.py"):
        for target in imports_of(path):
          self.assertNotEqual(target.split(".")[0], "tests", path)


if __name__ == "__main__":
  absltest.main()
