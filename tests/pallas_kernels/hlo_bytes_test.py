"""Bytes that a program moves, counted from its text."""

import jax
import jax.numpy as jnp
from absl.testing import absltest

from pallas_kernels.aot import hlo

GATHER = """
HloModule test

%taken (p0: f32[1000,64], p1: s32[8,1]) -> f32[8,64] {
  %p0 = f32[1000,64]{1,0} parameter(0)
  %p1 = s32[8,1]{1,0} parameter(1)
  %b = f32[1000,64]{1,0} bitcast(%p0)
  ROOT %g = f32[8,64]{1,0} gather(%b, %p1), offset_dims={1}
}

%body (state: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %state = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,64]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,64]{1,0} negate(%x)
  ROOT %next = (s32[], f32[8,64]{1,0}) tuple(%i, %y)
}

ENTRY %main (table: f32[1000,64], ids: s32[8,1]) -> f32[8,64] {
  %table = f32[1000,64]{1,0} parameter(0)
  %ids = s32[8,1]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %rows = f32[8,64]{1,0} fusion(%table, %ids), kind=kLoop, calls=%taken
  %start = (s32[], f32[8,64]{1,0}) tuple(%zero, %rows)
  %end = (s32[], f32[8,64]{1,0}) while(%start), condition=%c, body=%body, TRIPS
  ROOT %out = f32[8,64]{1,0} get-tuple-element(%end), index=1
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
SCATTER = """
HloModule test

%put (p0: f32[1000,64], p1: s32[8,1], p2: bf16[8,64]) -> f32[1000,64] {
  %p0 = f32[1000,64]{1,0} parameter(0)
  %p1 = s32[8,1]{1,0} parameter(1)
  %p2 = bf16[8,64]{1,0} parameter(2)
  %c = f32[8,64]{1,0} convert(%p2)
  ROOT %s = f32[1000,64]{1,0} scatter(%p0, %p1, %c), to_apply=%add
}

ENTRY %main (t: f32[1000,64], i: s32[8,1], u: bf16[8,64]) -> f32[1000,64] {
  %t = f32[1000,64]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %u = bf16[8,64]{1,0} parameter(2)
  ROOT %f = f32[1000,64]{1,0} fusion(%t, %i, %u), kind=kInput, calls=%put
}
"""


class MovedBytesTest(absltest.TestCase):
  def test_of_what_is_gathered_the_rows_count_and_a_loop_its_steps(self):
    rows = 4 * 8 * 64
    gathered = rows + 4 * 8 + rows
    self.assertEqual(hlo.moved_bytes(GATHER), gathered + 5 * 2 * rows)

  def test_what_is_scattered_to_stays_where_it_is(self):
    updates = 4 * 8 * 64
    want = 2 * updates + 4 * 8 + updates // 2
    self.assertEqual(hlo.moved_bytes(SCATTER), want)

  def test_reads_what_a_compiler_writes(self):
    x = jnp.ones((50, 20))
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
    self.assertEqual(hlo.moved_bytes(compiled.as_text()), 2 * 4 * 50 * 20)


if __name__ == "__main__":
  absltest.main()
