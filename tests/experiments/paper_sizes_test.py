from absl.testing import absltest, parameterized

from experiments import paper_sizes
from recjax import method as method_lib
from tests import command_case, toy


class PaperSizesTest(command_case.CommandTestCase):
  @parameterized.parameters("RankMixer-100M", "MSN")
  def test_counts_what_the_formulas_say(self, name):
    paper = paper_sizes.MODELS[name]
    tokens, dim, ratio = (16, 768, 17 / 6) if name[0] == "R" else (16, 1024, 2)
    method = self.method(paper)
    found = paper_sizes.count(method, paper)
    # 2 k L T D ** 2 of the per-token networks; queries, keys and reads of MSN.
    active = 2 * ratio * 2 * tokens * dim**2
    memory = 0
    if name == "MSN":
      active += 2 * tokens * (dim * 128 + 32 * dim)
      memory = 2 * 256**2 * dim
    self.assertBetween(found["active"], active, 1.02 * active)
    reads = 2 * tokens * 32 * dim if memory else 0
    self.assertEqual(found["total"] - found["active"], memory - reads)
    flops = 2 * (active - reads) * paper.batch_size
    self.assertBetween(found["flops"], flops, 1.08 * flops)

  def test_is_near_what_the_papers_state(self):
    for name in sorted(set(paper_sizes.MODELS) - {"RankMixer-1B"}):
      paper = paper_sizes.MODELS[name]
      found = paper_sizes.count(self.method(paper), paper)
      units = {"active": 1e6, "total": 1e6}
      if paper.schema:  # The width of the others' inputs is not known.
        units["flops"] = 1e9
      for key, unit in units.items():
        ratio = found[key] / unit / getattr(paper, key)
        self.assertBetween(ratio, 0.8, 1.25, f"{name} {key}")

  def method(self, paper):
    config = paper_sizes.recipe_config(paper)
    return method_lib.load(
      paper.recipe, config["model"], paper.schema or toy.SCHEMA
    )

  def test_collectives_are_found_with_their_sizes(self):
    class Compiled:
      def as_text(self):
        return """
          %a = f32[8,128]{1,0:T(8,128)} all-gather(f32[2,128] %x)
          %b = (f32[], f32[4,3]{1,0}) all-reduce-start(f32[] %y, f32[4,3] %z)
          %c = f32[99]{0} add(f32[99] %all-gather, f32[99] %q)
        """

    self.assertEqual(
      paper_sizes.collectives(Compiled()),
      [("all-gather", 1024), ("all-reduce", 12)],
    )

  def test_unknown_topologies_are_a_mistake(self):
    outcome = self.run_command("experiments.paper_sizes", "--compile=v99:1x1")
    self.assertEqual(outcome.code, 2)
    # The compiler, where it is installed, has notes of its own before.
    *_, last = outcome.stderr.splitlines()
    self.assertRegex(last, "^error: --compile=v99:1x1: no compiler.* v5e:2x4")


if __name__ == "__main__":
  absltest.main()
