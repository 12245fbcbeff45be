"""A trained run as a folder that scores raw rows without recjax.

```
manifest.json           what follows, and how raw columns become arrays
model.bin               the program, serialised by `jax.export`: batch size
                        free, for CPU, CUDA and TPU
params.safetensors      dense parameters (their average where the run has one)
tables.safetensors      row-sparse tables as stored
vocabulary.safetensors  sorted 64-bit keys of ids, and their rows
tokenizer.json          the subwords, where columns hold text
golden.json             raw rows of the test part and their scores
score.py                loads all this; needs JAX, NumPy and flatbuffers,
                        and tokenizers for columns of text
README.md               how to use it
```

The program takes weights and arrays of a batch, in the order of `arguments` in
the manifest, and returns a logit (or the `symlog` of a real label) a task.
Where a method offers `fold(params, config)`, what is constant in serving is
folded into its parameters first.

The safetensors files are written here and not by the library: the data of
every table begins at a multiple of 64 bytes, so that JAX on a CPU uses it where
it is mapped, and no second copy is held in memory.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax import export as jax_export
from jaxtyping import Array

import pallas_kernels
from recjax import export_golden, raw_rows, restore
from recjax import optimizer as optimizer_lib
from recjax import scorer as scorer_lib
from recjax.batch import Batch
from recjax.data import text as text_lib
from recjax.data.columns import Columns
from recjax.data.vocabulary import hash_values, load_values
from recjax.errors import UserError
from recjax.method import Method
from recjax.schema import Feature, Schema
from recjax.writer import write_json

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "tpu")
_ALIGNMENT = 64
_IMPORT = "from recjax.raw_rows import Encoder, InputError\n"
_DTYPES = {"float32": "F32", "uint16": "U16", "int32": "I32", "uint64": "U64"}


def export_run(workdir: str, output: str) -> pathlib.Path:
  """Exports the best checkpoint of a finished run.

  The export is loaded again and must give the model's scores of raw rows before
  it appears under its name.

  Args:
    workdir: Folder of the run.
    output: Folder to write; it must not exist.

  Returns:
    The folder.

  Raises:
    UserError: If the run is not finished, its data has changed, or `output`
      exists.

  Example:
    >>> export_run("runs/msn", "exports/msn")           # doctest: +SKIP
    PosixPath('exports/msn')
  """
  target = pathlib.Path(output).expanduser()
  if target.exists():
    raise UserError(f"{target}: exists; give another --output")
  run = restore.open_run(workdir, one_device=True)
  if run.method.is_trial:
    raise UserError(
      f"{workdir}: is a run of {run.method.name}, whose predictions serve an "
      "allocation; write a plan with experiments.allocate"
    )
  golden = export_golden.golden_rows(run)
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
  )
  try:
    scratch.chmod(0o755)
    _write(scratch, run, golden)
    scratch.rename(target)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return target


def make_artefact(
  method: Method, params: Any, tables: Mapping[str, Array]
) -> tuple[jax_export.Exported, dict[str, Array]]:
  """The program of a method's predictions, and the weights it takes.

  Args:
    method: What to export.
    params: Linen parameters, or their average.
    tables: Tables as stored.

  Returns:
    A program `(weights, arrays) -> {task: prediction}` with a free batch size,
    and its weights: `params/<path>` and `tables/<name>`. The arrays of a batch
    are those of `scorer.Scorer.encode`.

  Example:
    >>> program, weights = make_artefact(                # doctest: +SKIP
    ...     method, state.eval_params, state.tables)
    >>> program.call(weights, arrays)["click"]
    Array([-0.3, 1.2], dtype=float32)
  """
  if hasattr(method.module, "fold"):
    params, config = method.module.fold(params, method.config)
    method = dataclasses.replace(method, config=config)
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  paths = [f"params/{optimizer_lib.path_name(path)}" for path, _ in leaves]
  weights = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
  weights |= {f"tables/{name}": table for name, table in tables.items()}

  def predict(weights, arrays):
    batch = batch_of(arrays, method)
    tables = {name: weights[f"tables/{name}"] for name in method.tables}
    return method.apply(
      jax.tree.unflatten(structure, [weights[path] for path in paths]),
      tables,
      method.read(tables, batch),
      batch,
      train=False,
    )[0]

  shapes = jax.eval_shape(lambda: weights)
  # No kernels: they are bound to a machine.
  with pallas_kernels.use("xla"):
    program = jax_export.export(jax.jit(predict), platforms=PLATFORMS)(
      shapes, _array_shapes(method.schema)
    )
  return program, weights


def describe_data(
  columns: Columns,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """How raw columns become arrays, as `scorer.Encoder` takes it.

  Args:
    columns: The prepared data.

  Returns:
    The manifest's `features`, `vocabularies` and `dense`; and the sorted keys
    and the rows of each vocabulary.

  Raises:
    UserError: If the data set keeps no vocabularies.
  """
  entries, tensors = {}, {}
  schema = columns.schema
  for name in sorted({feature.vocab for feature in schema.id_features}):
    values = load_values(columns.directory, name)
    rows = 1 + np.arange(len(values), dtype=np.int32)
    missing = pc.is_null(values).to_numpy(zero_copy_only=False)
    entries[name] = {
      "type": "integer" if pa.types.is_integer(values.type) else "string",
      "buckets": schema.feature(name).buckets,
      "num_rows": schema.vocab_sizes[name],
      "missing_row": int(rows[missing].max(initial=0)),
    }
    if schema.feature(name).buckets is None:
      keys = hash_values(values.drop_null())
      order = np.argsort(keys)
      tensors[f"{name}/keys"] = keys[order]
      tensors[f"{name}/rows"] = rows[~missing][order]
  description = {
    "features": [_describe(feature, schema) for feature in schema.features],
    "vocabularies": entries,
    "dense": {"mean": columns.dense_mean, "std": columns.dense_std},
  }
  if any(feature.time is not None for feature in schema.sequences):
    description["time"] = schema.roles.time
  return description, tensors


def write_tensors(
  path: str | os.PathLike, tensors: Mapping[str, Array | np.ndarray]
) -> None:
  """Writes a safetensors file, one tensor in memory at a time.

  The tensors' bytes begin at a multiple of 64; so does each of a table, whose
  padded rows fill multiples of 64 bytes.
  """
  header, end = {}, 0
  for name, tensor in tensors.items():
    begin, end = end, end + tensor.size * tensor.dtype.itemsize
    header[name] = {
      "dtype": _DTYPES[tensor.dtype.name],
      "shape": list(tensor.shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-(8 + len(text)) % _ALIGNMENT)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors.values():
      file.write(np.ascontiguousarray(jax.device_get(tensor)).data)


def _write(folder: pathlib.Path, run: restore.Run, golden: dict[str, Any]):
  """Writes all files and checks that they reproduce the golden scores."""
  program, weights = make_artefact(
    run.method, run.state.eval_params, run.state.tables
  )
  (folder / "model.bin").write_bytes(program.serialize())
  for kind in ("params", "tables"):
    write_tensors(
      folder / f"{kind}.safetensors",
      {
        name.removeprefix(f"{kind}/"): array
        for name, array in weights.items()
        if name.startswith(f"{kind}/")
      },
    )
  description, tensors = describe_data(run.columns)
  write_tensors(folder / "vocabulary.safetensors", tensors)
  text_lib.copy_tokenizer(run.columns.directory, folder)
  write_json(
    folder / "manifest.json", _manifest(run, program, weights, description)
  )
  (folder / "score.py").write_text(_score_py(), encoding="utf-8")
  (folder / "README.md").write_text(_readme(run), encoding="utf-8")
  has_search = any(t.in_model for t in run.method.tables.values())
  least = export_golden.AGREEING if has_search else 1.0
  golden = export_golden.agreeing(golden, scorer_lib.Scorer(folder), least)
  write_json(folder / "golden.json", golden)


def _score_py() -> str:
  """`scorer` with the text of `raw_rows` in place of its import."""
  scorer, rows = (
    pathlib.Path(module.__file__).read_text(encoding="utf-8")
    for module in (scorer_lib, raw_rows)
  )
  before, after = scorer.split(_IMPORT)
  return before + rows + after


def _manifest(
  run: restore.Run,
  program: jax_export.Exported,
  weights: Mapping[str, Array],
  description: dict[str, Any],
) -> dict[str, Any]:
  """How raw columns become the program's arguments, in their order."""
  schema = run.columns.schema
  leaves = jax.tree_util.tree_leaves_with_path(
    jax.tree.unflatten(program.in_tree, program.in_avals)
  )
  arguments = [
    {
      "name": path[-1].key,
      "dtype": leaf.dtype.name,
      "shape": [n if isinstance(n, int) else str(n) for n in leaf.shape],
      # The module itself has no parameter for an argument that it never reads.
      "in_module": position in program.module_kept_var_idx,
    }
    for position, (path, leaf) in enumerate(leaves)
  ]
  return {
    "format": FORMAT,
    "model": run.result["model"],
    "dataset": run.result["dataset"],
    "seed": run.result["seed"],
    "step": run.step,
    "jax": jax.__version__,
    "platforms": program.platforms,
    "calling_convention_version": program.calling_convention_version,
    "tasks": {task: schema.label(task).kind for task in run.method.tasks},
    "units": {v.name: v.unit for v in schema.labels if v.unit is not None},
    **description,
    "num_weights": len(weights),
    "num_arguments": len(arguments),
    "arguments": arguments,
  }


def _describe(feature: Feature, schema: Schema) -> dict[str, Any]:
  """What `scorer` must know of a raw column."""
  entry = {"name": feature.name, "kind": feature.kind}
  if feature.is_id:
    entry["vocabulary"] = feature.vocab
  if feature.is_list:
    entry["max_len"] = feature.max_len
  if feature.kind == "vector":
    entry["dim"] = feature.dim
  if feature.separator is not None:
    entry["separator"] = feature.separator
  if feature.time is not None:
    entry["time"] = feature.time
  if feature.side:
    entry["sides"] = [
      {"name": side.name, "vocabulary": side.vocab}
      for side in schema.sides(feature)
    ]
  return entry


def _array_shapes(schema: Schema) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a batch, of any size."""
  (size,) = jax_export.symbolic_shape("batch")
  shapes = {
    "dense": ((size, len(schema.dense_features)), jnp.float32),
    "example_mask": ((size,), jnp.bool_),
  }
  for feature in schema.id_features:
    shape = (size, feature.max_len) if feature.is_list else (size,)
    shapes[f"ids/{feature.name}"] = (shape, jnp.int32)
    if feature.is_list:
      shapes[f"id_mask/{feature.name}"] = (shape, jnp.bool_)
  for feature in schema.sequences:
    if feature.time is not None:
      shape = (size, feature.max_len)
      shapes[f"event_age/{feature.name}"] = (shape, jnp.float32)
  for feature in schema.text_features:
    shape = (size, feature.max_len)
    shapes[f"tokens/{feature.name}"] = (shape, jnp.int32)
    shapes[f"token_mask/{feature.name}"] = (shape, jnp.bool_)
  for feature in schema.vector_features:
    shapes[f"vectors/{feature.name}"] = ((size, feature.dim), jnp.float32)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, (shape, dtype) in shapes.items()
  }


def batch_of(arrays: Mapping[str, Array], method: Method) -> Batch:
  """The arrays as models know them; there are no labels."""
  kinds = "ids id_mask vectors event_age tokens token_mask".split()
  parts = {kind: {} for kind in kinds}
  for name, array in arrays.items():
    kind, _, feature = name.partition("/")
    if kind in parts:
      parts[kind][feature] = array
  schema, mask = method.schema, arrays["example_mask"]
  zeros = jnp.zeros_like(mask, jnp.float32)
  return Batch(
    dense=arrays["dense"],
    **parts,
    labels=dict.fromkeys(method.tasks, zeros),
    label_mask=dict.fromkeys(method.tasks, jnp.zeros_like(mask)),
    scenario=(
      jnp.zeros_like(mask, jnp.int32)
      if schema.roles.scenario is None
      else parts["ids"][schema.roles.scenario]
    ),
    groups={},
    example_mask=mask,
    real_labels=frozenset(
      label.name for label in schema.labels if label.kind == "real"
    ),
  )


def _readme(run: restore.Run) -> str:
  """What stands beside the export."""
  schema = run.columns.schema
  kinds = {
    f.name: f.kind + (" (set)" if f.multi else "") for f in schema.features
  }
  for f in schema.sequences:
    kinds |= {side: f"side of `{f.name}`" for side in f.side or {}}
    if f.time is not None:
      kinds |= {f.time: f"times of `{f.name}`"}
      kinds |= {schema.roles.time: "the row's own time"}
  rows = "\n".join(f"| `{name}` | {kind} |" for name, kind in kinds.items())
  dataset, tasks = run.result["dataset"], ", ".join(run.method.tasks)
  source = (
    "They are the columns of the table, with its raw values."
    if dataset == "table"
    else f"Ids are raw ones. What recjax.data.{dataset} computes from a log "
    "(rates, counts, histories, buckets) is the task of your feature store."
  )
  libraries = "numpy flatbuffers"
  if schema.text_features:
    libraries += " tokenizers"
  return f"""# {run.result["model"]} on {dataset}, step {run.step}

```
pip install 'jax>={jax.__version__}' {libraries}
python score.py --check
python score.py --input=rows.jsonl
```

`score.py` says how raw values are read, and is a module as well:
`score.Scorer(folder).score(columns)` scores {tasks}.
`--check` must repeat the scores that were stored at export; they were computed
on a CPU in float32, and an accelerator that multiplies with fewer bits needs a
larger `--tolerance`.

JAX reads `model.bin` for at least six months after it was written, by its
compatibility promise: export again from the run's checkpoint when you update.
The weights are plain safetensors files, whatever becomes of it.

Every row needs these columns. {source}

| column | kind |
| --- | --- |
{rows}
"""
