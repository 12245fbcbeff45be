r"""Sizes of the papers' models beside what their tables say.

    python -m experiments.paper_sizes [--compile=v5e:4x4]

Counts parameters and operations of each `paper` recipe; with `--compile` the
whole training step (forward, backward, both optimisers, tables) is lowered and
compiled by the real TPU compiler for that many chips, tables shared by 4 of
them, and the memory of a chip and the collectives are printed. No TPU is
needed, but its compiler is: `pip install 'recjax[tpu]'`.

The papers count no embeddings; nor is the embedding table counted here. Their
FLOPs are of a batch of 512 (RankMixer) and 2,048 (MSN, HyFormer). HyFormer's
are called those of training there; twice the parameters in its tables, all of
which an example uses, leave room for the forward pass alone.
"""

import collections
import dataclasses
import functools
import importlib
import json
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments import door
from recjax import method as method_lib
from recjax import optimizer as optimizer_lib
from recjax import parallel, run_files, train_state
from recjax.data.pipeline import open_dataset
from recjax.errors import UserError
from recjax.method import Method, empty_batch
from recjax.schema import Feature, Label, Roles, Schema

_COMPILE = flags.DEFINE_string(
  "compile", "", "TPU topology such as v5e:2x4 or v5p:2x2x1; empty for none."
)

BATCH_SIZE = 2048  # Examples a step.
MODEL_AXIS = 4
# Without these the compiler looks for chips for some seconds and complains.
_NO_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Paper:
  """What a paper's table says of one model.

  Attributes:
    recipe: File under `experiments/configs/`.
    overrides: Of its `paper` size.
    active: Dense parameters that an example uses, in millions.
    total: All of them, memories and experts included.
    flops: Forward operations of a batch, in units of 10^9.
    batch_size: Examples of that batch.
    schema: What its data holds; None for the data of the recipe.
  """

  recipe: str
  overrides: dict[str, Any]
  active: float
  total: float
  flops: float
  batch_size: int
  schema: Schema | None = None


def search_schema(seq_len: int = 1000) -> Schema:
  """The sequences that HyFormer's paper describes, in a made-up search log.

  A long one of searches and clicks, and the 50 items of two kinds that suit
  the query best; each event has an id and two sides. How many other features
  there are is not stated.
  """
  ids = ("user_id", "item_id", "author_id", "action", "query", "hour")
  sides = (("author", "author_id"), ("action", "action"))
  sequences = (("history", seq_len), ("searched", 50), ("fed", 50))
  return Schema(
    features=(
      *(Feature(name, "sparse") for name in ids),
      *(
        Feature(
          name,
          "sequence",
          vocabulary="item_id",
          max_len=length,
          time=f"{name}_time",
          side={f"{name}_{side}": owner for side, owner in sides},
        )
        for name, length in sequences
      ),
    ),
    labels=(Label("click"),),
    roles=Roles(user="user_id", item="item_id", time="time", query="query"),
    vocab_sizes=dict.fromkeys(ids, 1_000_000) | {"action": 10, "hour": 25},
  )


MODELS = {
  "RankMixer-100M": Paper("rankmixer", {}, 107, 107, 233, 512),
  "RankMixer-1B": Paper(
    "rankmixer", {"num_tokens": 32, "token_dim": 1536}, 1100, 1100, 2100, 512
  ),
  "MSN": Paper("msn", {}, 122, 252, 556, 2048),
  "BaseArch": Paper("longer", {}, 386, 386, 3500, 2048, search_schema()),
  "Transformer-RM": Paper(
    "transformer_rankmixer", {}, 388, 388, 6600, 2048, search_schema()
  ),
  "HyFormer": Paper("hyformer", {}, 418, 418, 3900, 2048, search_schema()),
}


def main(argv) -> None:
  """Prints the table and, last, the same as JSON."""
  del argv
  mesh = make_tpu_mesh(_COMPILE.value) if _COMPILE.value else None
  print(
    f"{'':<16}{'active (paper)':>18}{'total (paper)':>18}"
    f"{'GFLOPs of a batch (paper)':>30}"
  )
  lines = {}
  for name, paper in MODELS.items():
    config = recipe_config(paper)
    schema = paper.schema or open_dataset(config["data"]).schema
    method = method_lib.load(paper.recipe, config["model"], schema)
    line = lines[name] = count(method, paper)
    print(
      f"{name:<16}{line['active'] / 1e6:>9.0f}M ({paper.active:>4.0f}M)"
      f"{line['total'] / 1e6:>9.0f}M ({paper.total:>4.0f}M)"
      f"{line['flops'] / 1e9:>12.0f} ({paper.flops:.0f} of {paper.batch_size})"
    )
    if mesh is not None:
      start = time.monotonic()
      line |= describe(compile_step(method, mesh, BATCH_SIZE))
      secs = time.monotonic() - start
      kind = mesh.devices.flat[0].device_kind
      print(
        f"  compiled for {mesh.size} x {kind} in {secs:.0f} s: "
        f"{line['state_bytes'] / 2**30:.2f} GiB of state "
        f"and {line['temp_bytes'] / 2**30:.2f} GiB of temporaries a chip; "
        + ", ".join(f"{n} {k}" for k, n in line["collectives"].items())
      )
  print(json.dumps(lines))


def recipe_config(paper: Paper) -> dict[str, Any]:
  """The `paper` size of a recipe, with what the paper's row changes."""
  recipe = importlib.import_module(f"experiments.configs.{paper.recipe}")
  config = recipe.get_config("paper").to_dict()
  config["model"] |= paper.overrides
  return config


def count(method: Method, paper: Paper) -> dict[str, float]:
  """Parameters without embeddings, and operations of the paper's batch."""
  params = run_files.count_params(method)
  batch = empty_batch(method.schema, method.config.tasks)
  ids = jax.eval_shape(method.ids, batch)
  embedding = {name: method.tables[name] for name in ids}
  read = sum(ids[name].size * t.dim for name, t in embedding.items())
  stored = sum(t.num_rows * t.dim for t in embedding.values())
  return {
    "active": params["active"] - read,
    "total": params["dense"] + params["sparse"] - stored,
    "flops": run_files.count_flops(method) * paper.batch_size,
  }


def make_tpu_mesh(topology: str) -> Mesh:
  """A mesh of TPU chips that need not be here."""
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except Exception as error:  # The plugin raises what it likes.
    raise UserError(
      f"--compile={topology}: no compiler for it "
      f"({' '.join(str(error).split())[:200]}); install the tpu extra and name "
      "a topology such as v5e:2x4"
    ) from error
  model = math.gcd(len(devices), MODEL_AXIS)
  return Mesh(
    np.array(devices).reshape(-1, model),
    (parallel.DATA, parallel.MODEL),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def compile_step(method: Method, mesh: Mesh, batch_size: int) -> Any:
  """The whole training step, lowered and compiled for `mesh`."""
  train_step, state, batch = step_and_shapes(method, batch_size)
  placement = parallel.MeshPlacement(mesh)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  step = placement.compile_step(train_step, state)
  return step.lower(
    jax.tree.map(place, state, placement.shardings(state)),
    jax.tree.map(lambda x: place(x, placement.batch_sharding), batch),
  ).compile()


def step_and_shapes(method: Method, batch_size: int) -> tuple[Any, Any, Any]:
  """`step(state, batch)`, and the shapes of both."""
  config = train_state.StepConfig(
    method, method.stages[0], optimizer_lib.Config(), num_steps=1000
  )
  state = jax.eval_shape(
    functools.partial(train_state.init_state, config=config), jax.random.key(0)
  )
  batch = jax.eval_shape(
    lambda: empty_batch(method.schema, method.config.tasks, batch_size)
  )
  return functools.partial(train_state.train_step, config=config), state, batch


def describe(compiled: Any) -> dict[str, Any]:
  """Bytes of one chip, and how often chips talk to each other."""
  memory = compiled.memory_analysis()
  found = collections.Counter(kind for kind, _ in collectives(compiled))
  return {
    "state_bytes": memory.argument_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "collectives": dict(found),
  }


def collectives(compiled: Any) -> list[tuple[str, int]]:
  """Kind and size of the result, in elements, of each collective."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  found = []
  for line in compiled.as_text().splitlines():
    match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
    if match:
      shapes = re.findall(r"\[([\d,]*)\]", match[1])
      sizes = [math.prod(map(int, s.split(","))) if s else 1 for s in shapes]
      found.append((match[2], max(sizes)))
  return found


if __name__ == "__main__":
  door.run(main)
