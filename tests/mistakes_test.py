"""Every mistake of a user ends in one line that helps, and nothing is lost."""

import json
import os
import shutil

import command_case
import numpy as np
import pyarrow as pa
from absl.testing import absltest, parameterized
from command_case import rows, schema

MSN = "msn.py:tiny"
DENSE = {"kind": "dense"}


def named(**cases):
  return parameterized.named_parameters(
    *((name, *case) for name, case in cases.items())
  )


class ConfigTest(command_case.CommandTestCase):
  @named(
    key=("--config.sed=1", "unknown key config.sed; did you mean 'seed'"),
    block=("--config.modle.tasks=1", "config.modle; did you mean 'model'"),
    nested=(
      "--config.optimizer.sparse.learning_rat=1",
      "config.optimizer.sparse.learning_rat; did you mean 'learning_rate'",
    ),
    key_of_a_value=("--config.seed.x=1", "config.seed is the value 0"),
    value_of_a_block=("--config.model=3", "config.model is a block"),
    int_type=("--config.seed=abc", "config.seed .*type int.* 0, got 'abc'"),
    float_for_int=("--config.train.batch_size=1.5", "batch_size .*int.*'1.5'"),
    new_key_type=(
      "--config.train.keep_checkpoints=two",
      "train.keep_checkpoints must be of type int, got 'two'",
    ),
    tuple_type=("--config.model.tasks=(1,)", "model.tasks .*type str, got 1"),
    bad_tuple=("--config.model.tasks=(click,like", "model.tasks .*tuple"),
    no_tasks=("--config.model.tasks=()", "model.tasks"),
    twice=('--config.model.tasks=("click","click")', "model.tasks.*'click'"),
    model=("--config.model_name=rankmixr", "'rankmixr'.*mean 'rankmixer'"),
    path_as_model=("--config.model_name=a.b", "unknown model 'a.b'.*known:"),
    task=('--config.model.tasks=("clik",)', "label 'clik'.*mean 'click'"),
    monitor=(
      "--config.train.monitor=valid/click/acu",
      "monitor 'valid/click/acu' is not measured; did you mean '.*/auc'",
    ),
    monitor_of_test=(
      "--config.train.monitor=test/click/auc",
      "monitor 'test/click/auc'.*did you mean 'valid/click/auc'",
    ),
    adapter=("--config.data.name=tabel", "'tabel'.*did you mean 'table'"),
    no_adapter=("--config.data.name=", "data.name"),
    data_option=("--config.data.pth=x", "data.pth.*did you mean 'path'"),
    seed=("--config.seed=-1", "config.seed .*from 0 to 4294967295, got -1"),
    huge_seed=("--config.seed=99999999999999999999", "config.seed"),
    tokens=("--config.model.token_dim=18", r"token_dim \(18\).*multiple.*4"),
    no_tokens=("--config.model.num_tokens=0", "model.num_tokens .* 1"),
    embed_dim=("--config.model.embed_dim=0", "model.embed_dim .* 1"),
    dropout=("--config.model.dropout_rate=1.5", "model.dropout_rate"),
    dtype=("--config.model.dtype=float31", "model.dtype.*'float31'"),
    optimizer=("--config.optimizer.name=adam", "'adam'.*'adamw'"),
    schedule=("--config.optimizer.schedule=cos", "schedule 'cos'.*'cosine'"),
    sparse=("--config.optimizer.sparse.name=adam", "'adam'.*'lazy_adam'"),
    rate=("--config.optimizer.learning_rate=0", "optimizer.learning_rate"),
    rate_nan=("--config.optimizer.learning_rate=nan", "learning_rate.*nan"),
    rate_inf=("--config.optimizer.learning_rate=inf", "learning_rate.*inf"),
    sparse_rate=(
      "--config.optimizer.sparse.learning_rate=-0.1",
      "optimizer.sparse.learning_rate must .*-0.1",
    ),
    ema=("--config.optimizer.ema_decay=1", r"ema_decay .*\[0, 1\), got 1.0"),
    warmup=("--config.optimizer.warmup_steps=-1", "optimizer.warmup_steps"),
    decay=("--config.optimizer.weight_decay=-1", "optimizer.weight_decay"),
    clip=("--config.optimizer.clip_norm=0.0", "optimizer.clip_norm"),
    rules=('--config.optimizer.scale_rules=("a(=1",)', "'a.=1' is not .*regex"),
    rule_factor=(
      '--config.optimizer.scale_rules=("heads",)',
      "'heads' is not of the form regex=factor",
    ),
    mode=("--config.parallel.mode=mash", "mode .*'mesh' or 'pmap'.*'mash'"),
    devices=("--config.parallel.data=64", "needs 64 devices, 8 are there"),
    batch=(
      ["--config.parallel.data=3", "--config.train.batch_size=16"],
      r"train.batch_size \(16\) must be a multiple of the 3",
    ),
    batch_size=("--config.train.batch_size=0", "batch_size must be at least 1"),
    steps=("--config.train.num_train_steps=-1", "train.num_train_steps"),
    non_finite=("--config.train.non_finite=go", "'stop' or 'skip', got 'go'"),
  )
  def test_rankmixer(self, options, message):
    options = [options] if isinstance(options, str) else options
    outcome = self.train(*self.write_table(), *options)
    self.assert_mistake(outcome, message, num_notes=2)
    self.assert_no_workdir()

  @named(
    top_k=("--config.model.memory.top_k=17", r"top_k \(17\).*num_keys \(16\)"),
    layers=("--config.model.memory_layers=(0,2)", r"memory_layers.*0 \.\.\. 1"),
    gate=("--config.model.gate=tan", "gate must be one of tanh.*'tan'"),
    scope=("--config.model.memory.query_scope=x", "memory.query_scope.*'x'"),
    memory_key=("--config.model.memory.topk=1", "topk; did you mean 'top_k'"),
    side=("--config.model.memory.theta_side=up", "theta_side .*right, left"),
  )
  def test_msn(self, option, message):
    outcome = self.train(*self.write_table(), option, recipe=MSN)
    self.assert_mistake(outcome, message, num_notes=2)
    self.assert_no_workdir()

  @named(
    size=("experiments/configs/msn.py:bse", None, "'bse'.*mean 'base'"),
    missing=("nix.py", None, "nix.py: no such file; give a recipe"),
    folder=("recjax", None, "recjax: no such file"),
    no_value=("", None, "--config: .*give a recipe"),
    not_python=("{}/a.txt", b"\x00\x01", "a.txt: a recipe is a Python file"),
    syntax=("{}/a.py", b"x = 1\ny = (", "a.py, line 2: SyntaxError"),
    binary=("{}/a.py", b"\xff\xfe\x00", "a.py.*Error"),
    no_function=("{}/a.py", b"x = 1", "a.py: defines no get_config"),
    no_size=("{}/a.py:x", b"def get_config(): pass", "line|TypeError.*get_con"),
    returns_none=("{}/a.py", b"def get_config(): pass", "must return .*None"),
    raises=(
      "{}/a.py",
      b"def get_config():\n  return 1 / 0",
      "a.py, line 2: ZeroDivisionError: division by zero; correct the recipe",
    ),
    many_lines=(
      "{}/a.py",
      b"def get_config():\n  raise ValueError('this\\n  is long')",
      "a.py, line 2: ValueError: this is long; correct",
    ),
    import_=("{}/a.py", b"import nothing_like", "line 1: ModuleNotFound"),
  )
  def test_recipe(self, path, content, message):
    if content is not None:
      name = path.removeprefix("{}/").partition(":")[0]
      (self.directory / name).write_bytes(content)
    outcome = self.run_command(
      "experiments.run",
      f"--config={path.format(self.directory)}",
      f"--workdir={self.workdir}",
      "--config.seed=1",
    )
    self.assert_mistake(outcome, message)
    self.assert_no_workdir()

  @named(
    nothing=([], "--config and --workdir are needed, for example"),
    no_workdir=(["--config=experiments/configs/msn.py"], "--workdir are need"),
    flag=(["--wrkdir=x"], "flag 'wrkdir'.*workdir"),
    argument=(["x"], "unexpected argument 'x'; options look like"),
    no_recipe=(["--config.seed=1"], "--config.seed .*--config is missing"),
    order=(
      ["--config.seed=1", "--config=experiments/configs/msn.py"],
      "config.seed",
    ),
  )  # fmt: skip
  def test_flags(self, options, message):
    self.assert_mistake(self.run_command("experiments.run", *options), message)

  @named(
    size=("demo", ["--size=bse"], "'bse'.*mean 'base'"),
    seed=("demo", ["--seed=-1"], "seed=-1"),
    demo_argument=("demo", ["x"], "unexpected argument 'x'"),
    no_runs=("report", ["--output={}/out"], "--runs|no run"),
    no_output=("report", ["--runs={}"], "--output is missing"),
    missing_run=("report", ["--runs={}/x", "--output={}/out"], "{}/x"),
  )
  def test_other_commands(self, name, options, message):
    options = [option.format(self.directory) for option in options]
    if name == "demo":
      options.append(f"--workdir={self.workdir}")
    outcome = self.run_command(f"experiments.{name}", *options)
    self.assert_mistake(outcome, message.format(self.directory))
    self.assertEmpty(list(self.directory.iterdir()))


class SchemaTest(command_case.CommandTestCase):
  @named(
    not_json=(b"{", "schema.json: not valid JSON"),
    not_text=(b"\xff\xfe", "schema.json: not valid JSON"),
    not_object=(b"[1]", "schema.json: must hold a JSON object"),
    key=({"feature": {}}, "unknown key 'feature'; did you mean 'features'"),
    no_features=({"features": {}, "labels": {}}, '"features" must be'),
    no_labels=({**schema(), "labels": {}}, '"labels" must be'),
    kind=(schema(user={"kind": "sprse"}), "'user'.*'sprse'.*mean 'sparse'"),
    kind_type=(schema(user={"kind": ["sparse"]}), "feature 'user'.*kind"),
    no_kind=(schema(user={"buckets": 3}), '\'user\': "kind" is missing'),
    not_entry=(schema(user="sparse"), "feature 'user'.*object.*'sparse'"),
    option=(schema(user={"kind": "sparse", "bucket": 1}), "mean 'buckets'"),
    type=(schema(user={"kind": "sparse", "buckets": "9"}), "buckets .*type.*9"),
    no_dim=(schema(content={"kind": "vector"}), '\'content\'.* needs "dim"'),
    no_max_len=(schema(history={"kind": "sequence"}), 'needs "max_len"'),
    label_is_feature=(schema(click=DENSE), "'click' is a feature and a label"),
    label_kind=({**schema(), "labels": {"click": "bin"}}, "'click'.*binary"),
    label_entry=({**schema(), "labels": {"click": 3}}, "label 'click'.*3"),
    shared=(
      schema(
        history={"kind": "sequence", "max_len": 4, "vocabulary": "itm"}
      ),
      "'history' shares .*'itm', which is no sparse.*mean 'item'",
    ),
    shares=(
      {**schema(), "split": {"by": "random", "valid": 0.6, "test": 0.5}},
      r"valid \(0.6\) and test \(0.5\) must",
    ),
    rule=({**schema(), "split": {"by": "rndom"}}, "'rndom'.*mean 'random'"),
    no_column=({**schema(), "split": {"by": "time"}}, 'needs "column"'),
    seed=(
      {**schema(), "split": {"by": "random", "seed": 2**70}},
      "split: seed",
    ),
    role=({**schema(), "roles": {"usr": "user"}}, "'usr'; did you mean 'user'"),
    role_column=({**schema(), "roles": {"user": "usr"}}, "'usr'.*mean 'user'"),
    scenario=(
      {**schema(), "roles": {"scenario": "scene"}}, "schema.json.*'scene'",
    ),
    sizes=({**schema(), "vocab_sizes": 3}, "vocab_sizes"),
    text=(
      schema(title={"kind": "text"}),
      "'title': a text needs .max_len.",
    ),
    time=(
      schema(history={"kind": "sequence", "max_len": 4, "time": "t"}),
      "'history': \"time\" needs the time of the example itself; name its",
    ),
    no_ids=(
      schema(user=None, item=None, history=None, genres=None)
      | {"roles": {}},
      "no sparse or sequence feature",
    ),
  )  # fmt: skip
  def test_schema(self, content, message):
    outcome = self.train(*self.write_table(schema=content))
    self.assert_mistake(outcome, message, num_notes=2)
    self.assert_no_workdir()

  def test_missing_schema(self):
    options = self.write_table()
    (self.directory / "schema.json").unlink()
    outcome = self.train(*options)
    self.assert_mistake(outcome, "schema.json: cannot be read .*No such file")
    outcome = self.train(*options[:2], *self.cache_options())
    self.assert_mistake(outcome, "data.schema: data set 'table' needs this")
    outcome = self.train(*self.table_options(options[1][19:], self.directory))
    self.assert_mistake(outcome, f"{self.directory}.*schema file")
    self.assert_no_workdir()


class TableTest(command_case.CommandTestCase):
  @named(
    empty_file=(b"", "log.parquet: cannot be read as Parquet"),
    not_parquet=(b"user,item\n1,2\n", "cannot be read as Parquet"),
    column=(rows(price=None), "no column 'price'"),
    close_column=(
      {"prices" if k == "price" else k: v for k, v in rows().items()},
      "no column 'price'; did you mean 'prices'",
    ),
    string=(rows(price=["x"] * 120), "'price': has type string, not numbers"),
    nan=(rows(price=[1.0, np.nan] * 60), "'price', row 2: nan in a dense"),
    label=(rows(click=[0, 1, 2] * 40), "'click', row 3: 2 in a label"),
    no_positive=(rows(click=[0] * 120), "'click': no positive"),
    part=(rows(part=["train"] * 120), "leaves no valid rows"),
    part_name=(rows(part=["trn"] * 120), "'part', row 1: 'trn' is no part"),
    no_rows=(pa.table(rows()).slice(0, 0), "the table has no rows"),
    vector=(
      rows(content=[[1.0, 2.0]] * 119 + [[1.0]]),
      "'content', row 120: 1 numbers, but \"dim\" is 2",
    ),
    float_id=(rows(user=[0.5] * 120), "'user', row 1: 0.5 is not a 64-bit"),
    date_id=(
      rows(user=np.zeros(120, "datetime64[D]")),
      "'user': has type date32.*integers or strings",
    ),
    list_id=(rows(user=[[1]] * 120), "'user'.*\"multi\": true"),
    list_label=(rows(click=[[1]] * 120), "'click': has type list"),
    list_group=(rows(page=[[1]] * 120), "'page'"),
  )
  def test_table(self, columns, message):
    content = command_case.SCHEMA
    if not isinstance(columns, bytes | pa.Table) and "page" in columns:
      content = {**content, "roles": {"query": "page"}}
    outcome = self.train(*self.write_table(columns, content))
    self.assert_mistake(outcome, message, num_notes=1)
    self.assert_no_workdir()

  def test_missing_table(self):
    self.write_table()
    schema_path = self.directory / "schema.json"
    for path, message in (
      (self.directory / "nix.parquet", "nix.parquet: no such file"),
      (schema_path, "must be a .parquet or .csv file"),
    ):
      outcome = self.train(*self.table_options(path, schema_path))
      self.assert_mistake(outcome, message)
      self.assert_no_workdir()
    outcome = self.train("--config.data.name=table", *self.cache_options())
    self.assert_mistake(outcome, "data.path: data set 'table' needs this")

  def test_a_home_folder_in_a_path(self):
    options = self.write_table()
    options = [o.replace(str(self.directory), "~") for o in options]
    outcome = self.train(
      *options, setup=f"os.environ['HOME'] = {str(self.directory)!r}"
    )
    self.assertEqual(outcome.code, 0, outcome.stderr)

  def test_a_disk_too_small(self):
    outcome = self.train(
      *self.write_table(),
      setup="""
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 7, 3)
""",
    )
    self.assert_mistake(
      outcome, "needs about .* bytes, but only 3 are free; free some or set"
    )
    self.assert_no_workdir()

  def test_a_cache_that_cannot_be(self):
    (self.directory / "file").write_text("x")
    outcome = self.train(
      *self.write_table(), f"--config.data.cache_dir={self.directory}/file/x"
    )
    self.assert_mistake(outcome, "file/x: cannot write the cache.*cache_dir")
    self.assert_no_workdir()


class KuaiRandTest(command_case.CommandTestCase):
  def run_root(self, *options):
    return self.train(
      f"--config.data.root={self.directory / 'data'}",
      *self.cache_options(),
      *options,
    )

  def test_root(self):
    self.assert_mistake(self.run_root(), "data.root: .*data is no folder")
    folder = self.directory / "data"
    folder.mkdir()
    self.assert_mistake(self.run_root(), "no KuaiRand log.*correct data.root")
    log = folder / "log_standard_4_08_to_4_21_pure.csv"
    log.write_text("")
    self.assert_mistake(self.run_root(), "no file user_features_pure.csv")
    for name in ("user_features_pure", "video_features_basic_pure"):
      (folder / f"{name}.csv").write_text("user_id\n1\n")
    self.assert_mistake(
      self.run_root(), "log_.*pure.csv: the file is empty", num_notes=1
    )
    log.write_text("user_id,video_id\n1,2\n")
    self.assert_mistake(
      self.run_root(), "log_.*: column 'date' is missing", num_notes=1
    )
    columns = (
      "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,"
      "is_comment,is_forward,is_hate,long_view,is_profile_enter,play_time_ms,"
      "duration_ms,tab\n"
    )
    log.write_text(columns)
    self.assert_mistake(self.run_root(), "log_.*: holds no rows", num_notes=1)
    log.write_text(columns + "1,2,20220499,100,1,0,0,0,0,0,0,0,0,1,1,1\n")
    self.assert_mistake(
      self.run_root(), "column date, row 1: 20220499 must be", num_notes=1
    )
    self.assert_no_workdir()

  @named(
    variant=("--config.data.variant=2k", "unknown variant '2k'; known: pure"),
    type=("--config.data.variant=3", "data.variant: must be str, got 3"),
    max_len=("--config.data.max_len=0", "data.max_len must be at least 1"),
    table=("--config.data.path=x", "data.path: unknown option of .*'kuairand'"),
  )
  def test_options(self, option, message):
    self.assert_mistake(self.run_root(option), message)
    self.assert_no_workdir()


class WorkdirTest(command_case.CommandTestCase):
  def test_a_run_that_is_there_is_kept(self):
    options = self.write_table()
    outcome = self.train(*options)
    self.assertEqual(outcome.code, 0, outcome.stderr)
    before = self.snapshot()
    other = f"{self.workdir}: holds a run with another config.*seed.*workdir"
    for extra, message in (
      (["--config.seed=5"], other),
      (["--config.model.tasks=x"], "another config"),
      (["--config.train.batch_siz=1"], "batch_siz"),
    ):
      self.assert_mistake(self.train(*options, *extra), message, num_notes=1)
      self.assertEqual(self.snapshot(), before)
    # Incomplete from here on: the same command goes on with what is there.
    (self.workdir / "result.json").unlink()
    kept = {path: before[path] for path in before if "/checkpoints/" in path}
    metrics = self.workdir / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text("{broken\n" + text)
    before = self.snapshot()
    self.assert_mistake(
      self.train(*options), "metrics.jsonl, line 1: .*repair", num_notes=2
    )
    self.assertEqual(self.snapshot(), before)
    metrics.write_text(text)
    outcome = self.train(*options)
    self.assertEqual(outcome.code, 0, outcome.stderr)
    after = self.snapshot()
    self.assertEqual({path: after[path] for path in kept}, kept)

  @named(
    config=("config.json", "{", "config.json.*damaged.*another --workdir"),
    config_list=("config.json", "[]", "config.json.*another --workdir"),
    result=("result.json", "{", "result.json.*damaged.*delete it"),
    result_list=("result.json", "{}", "result.json.*damaged.*delete it"),
  )
  def test_a_broken_file_of_a_run(self, name, text, message):
    self.workdir.mkdir()
    (self.workdir / name).write_text(text)
    options = self.write_table()
    before = self.snapshot()
    self.assert_mistake(self.train(*options), message, num_notes=3)
    after = self.snapshot()
    self.assertEqual({path: after[path] for path in before}, before)

  @named(
    cut=(lambda path: os.truncate(path, path.stat().st_size // 2),),
    emptied=(lambda path: path.write_bytes(b""),),
    garbled=(lambda path: path.write_bytes(os.urandom(path.stat().st_size)),),
    deleted=(lambda path: path.unlink(),),
  )
  def test_a_broken_checkpoint(self, spoil):
    options = self.write_table()
    outcome = self.train(*options)
    self.assertEqual(outcome.code, 0, outcome.stderr)
    (self.workdir / "result.json").unlink()
    folder = self.workdir / "checkpoints"
    last = max((p for p in folder.iterdir()), key=lambda p: int(p.name))
    whole = self.directory / "whole"
    shutil.copytree(last, whole)
    kinds = ("*/d/*", "*/manifest.ocdbt", "*/_METADATA", "metadata",
             "_CHECKPOINT_METADATA")  # fmt: skip
    seen = 0
    for kind in kinds:
      for path in [p for p in last.rglob("*") if p.match(kind)][:1]:
        spoil(path)
        before = self.snapshot()
        outcome = self.train(*options)
        if outcome.code == 0:
          # Not every file is needed.
          (self.workdir / "result.json").unlink()
        else:
          seen += 1
          self.assert_mistake(
            outcome, f"checkpoints/{last.name}.*delete", num_notes=4
          )
          self.assertEqual(self.snapshot(), before)
        shutil.rmtree(last)
        shutil.copytree(whole, last)
    self.assertGreater(seen, 1)

  def test_a_file_in_the_place_of_the_workdir(self):
    options = self.write_table()
    for workdir in (self.directory / "file", self.directory / "file" / "run"):
      (self.directory / "file").write_text("mine")
      self.workdir = workdir
      outcome = self.train(*options)
      self.assert_mistake(outcome, f"{workdir}: .*--workdir", num_notes=2)
      self.assertEqual((self.directory / "file").read_text(), "mine")

  def test_config_of_a_run_names_its_table(self):
    options = self.write_table()
    self.assertEqual(self.train(*options).code, 0)
    config = json.loads((self.workdir / "config.json").read_text())
    self.assertEqual(sorted(config["data"]),
                     ["cache_dir", "name", "path", "schema"])  # fmt: skip


if __name__ == "__main__":
  absltest.main()
