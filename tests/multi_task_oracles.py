"""RankMixer's trunk and MDL's domain tokens, in float64 NumPy and loops."""

import numpy as np

from tests import oracles, toy


def dense(params, x):
  """`x W + b`, where there is a b."""
  return x @ params["kernel"] + params.get("bias", 0.0)


def norm(params, x, eps=1e-6):
  """Layer norm with the parameters of a module."""
  return oracles.layer_norm(
    x, params.get("scale", 1.0), params.get("bias", 0.0), eps
  )


def prepare(method, params, tables, batch):
  """Parameters in float64, and the rows of every table by feature."""
  params, tables = oracles.to_float64((params, tables))
  rows = {
    name: oracles.feature_rows(table, tables[name], batch)
    for name, table in method.tables.items()
    if not table.in_model
  }
  return params, tables, rows


def inputs(rows, batch, params=None):
  """All features side by side."""
  return oracles.concat_features(toy.SCHEMA, batch, rows, params)


def trunk(config, params, rows, batch, tokens=None):
  """The mean token of a RankMixer."""
  x = tokens
  if x is None:
    x = oracles.feature_tokens(
      params["tokens"], inputs(rows, batch), config.num_tokens
    )
  for i in range(config.num_layers):
    block = params[f"block_{i}"]
    s = norm(block["mix_norm"], oracles.token_mixing(x) + x)
    y = oracles.per_token_network(block["ffn"], s, config.ffn, config.moe)
    x = norm(block["ffn_norm"], y + s)
  return x.mean(0)


def towers(params, x):
  """`[tasks, batch]` logits of towers, one task after the other."""
  logits = []
  for t in range(len(x)):
    hidden = x[t]
    if "hidden" in params:
      own = params["hidden"]
      hidden = oracles.gelu(hidden @ own["kernel"][t] + own["bias"][t, 0])
    own = params["logit"]
    logits.append((hidden @ own["kernel"][t] + own["bias"][t, 0])[:, 0])
  return np.stack(logits)


def ffn(params, index, x):
  """`W2 GELU(W1 x + b1) + b2` of one set of weights."""
  up, down = params["up"], params["down"]
  hidden = oracles.gelu(x @ up["kernel"][index] + up["bias"][index, 0])
  return hidden @ down["kernel"][index] + down["bias"][index, 0]


def attention(params, index, x, features, num_heads):
  """One token of one example over `[features, dim]`, as the paper writes it."""
  query = x
  if "query_norm" in params:
    query = norm(params["query_norm"], x)
  query = query @ params["query"][index]
  keys = features @ params["key"][index]
  values = features @ params["value"][index]
  width = len(x) // num_heads
  read = []
  for h in range(num_heads):
    part = slice(h * width, (h + 1) * width)
    scores = keys[:, part] @ query[part] / np.sqrt(width)
    read.append(oracles.softmax(scores) @ values[:, part])
  read = np.concatenate(read)
  if "output" not in params:
    return read
  if isinstance(params["output"], dict):
    return read @ params["output"]["kernel"]
  return read @ params["output"][index]


class Mdl:
  """MDL by its equations, one example, token and scenario at a time."""

  def __init__(self, method, params, tables, batch):
    self.config, self.method, self.batch = method.config, method, batch
    self.params, self.tables, self.rows = prepare(method, params, tables, batch)

  def logits(self):
    """Task -> logits."""
    config = self.config
    x = oracles.feature_tokens(
      self.params["tokens"],
      inputs(self.rows["embedding"], self.batch),
      config.num_tokens,
    )
    tokens = [self._initial(b) for b in range(self.batch.size)]
    if config.mode == "input_concat":
      context = np.stack([self._context(token) for token in tokens])
      own = self.params["context"]
      x = x + np.stack(
        [context @ own["kernel"][t] + own["bias"][t, 0] for t in range(len(x))]
      )
    for i in range(config.num_layers):
      x = self._interact(i, x)
      if i in config.reading_layers:
        last = i == config.reading_layers[-1]
        tokens = [
          self._read(i, token, x[:, b], last) for b, token in enumerate(tokens)
        ]
    return self._predict(x.mean(0), tokens)

  def _initial(self, b):
    """{"specific": (scenario, s) or None, "everywhere": s, "tasks": [t]}."""
    config, params = self.config, self.params["initial"]
    names = config.important_features or ("user_id", "item_id")
    order = [f.name for f in toy.SCHEMA.features if f.name in names]
    extra = np.concatenate(
      [self.rows["domain_embedding"][name][b] for name in order]
    )
    scenario = int(self.batch.scenario[b])

    def start(family, index, priors, token):
      spec = self._priors(b, priors, token)
      return np.maximum(
        ffn(params[family], index, np.concatenate([extra, spec])), 0
      )

    tokens = {"specific": None, "everywhere": None, "tasks": []}
    if config.scenario_tokens and scenario:
      own = start(
        "specific", scenario - 1, config.scenario_priors, str(scenario)
      )
      tokens["specific"] = (scenario - 1, own)
    if config.scenario_tokens and config.global_token:
      tokens["everywhere"] = start(
        "everywhere", 0, config.scenario_priors, "global"
      )
    if config.task_tokens:
      tokens["tasks"] = [
        start("tasks", t, config.task_priors, task)
        for t, task in enumerate(config.tasks)
      ]
    tokens["fused"] = self._fuse(tokens)
    return tokens

  def _priors(self, b, priors, token):
    names = list(dict.fromkeys(n for p in priors for n in p.features))
    parts = [np.zeros(0)]
    for name in names:
      value = self._value(b, name)
      own = [p for p in priors if name in p.features]
      if not any(p.token in ("all", token) for p in own):
        value = np.zeros_like(value)
      parts.append(value)
    return np.concatenate(parts)

  def _value(self, b, name):
    feature = toy.SCHEMA.feature(name)
    if feature.kind == "dense":
      order = [f.name for f in toy.SCHEMA.dense_features]
      return np.asarray(self.batch.dense[b, order.index(name)], float)[None]
    if feature.kind == "vector":
      return np.asarray(self.batch.vectors[name][b], float)
    value = self.rows["embedding"][name][b]
    if feature.is_list:
      valid = value[np.asarray(self.batch.id_mask[name][b])]
      value = valid.mean(0) if len(valid) else np.zeros(value.shape[-1])
    return value

  def _fuse(self, tokens):
    parts = [tokens["specific"] and tokens["specific"][1], tokens["everywhere"]]
    parts = [part for part in parts if part is not None]
    if parts:
      return np.mean(parts, axis=0)
    return np.zeros(self.config.token_dim)

  def _context(self, token):
    parts = [token["fused"]] if self.config.scenario_tokens else []
    return np.concatenate([*parts, *token["tasks"]])

  def _interact(self, i, x):
    config, params = self.config, self.params
    s = norm(params[f"mix_norm_{i}"], oracles.token_mixing(x) + x)
    gated = s
    if config.body == "msn" and i in config.memory_layers:
      value, _ = oracles.memory(
        params[f"memory_{i}"],
        self.tables[f"memory_{i}/values"],
        s,
        config.memory,
      )
      gated = oracles.gate(s, value, config.gate)
    y = oracles.per_token_network(
      params[f"ffn_{i}"], gated, config.ffn, config.moe
    )
    if not config.ffn_residual:
      return y
    return norm(params[f"ffn_norm_{i}"], y + s)

  def _read(self, i, tokens, features, last):
    config, params = self.config, self.params[f"domain_{i}"]
    plain = features
    if config.pre_norm and not config.ffn_residual:
      features = oracles.layer_norm(features, 1.0)

    def read(family, index, x):
      own = params[f"{family}_attention"]
      return x + attention(own, index, x, features, config.num_heads)

    def transform(family, index, x):
      return x + ffn(params[f"{family}_ffn"], index, x)

    new = dict(tokens)
    if config.scenario_attention:
      if tokens["specific"] is not None:
        index, x = tokens["specific"]
        new["specific"] = (index, read("specific", index, x))
      if tokens["everywhere"] is not None:
        new["everywhere"] = read("everywhere", 0, tokens["everywhere"])
    new["fused"] = self._fuse(new)
    if config.task_attention == "rankmixer":
      new["tasks"] = self._mix(params, tokens["tasks"], plain)
    else:
      new["tasks"] = [
        read("tasks", t, x) for t, x in enumerate(tokens["tasks"])
      ]
    new["tasks"] = [
      transform("tasks", t, x + new["fused"])
      for t, x in enumerate(new["tasks"])
    ]
    if not last:
      if new["specific"] is not None:
        index, x = new["specific"]
        new["specific"] = (index, transform("specific", index, x))
      if new["everywhere"] is not None:
        new["everywhere"] = transform("everywhere", 0, new["everywhere"])
    return new

  def _mix(self, params, tasks, features):
    both = np.concatenate([features, tasks])
    num, dim = len(both), both.shape[-1]
    width = -(-dim // num)
    both = np.pad(both, ((0, 0), (0, width * num - dim)))
    own = params["tasks_mixing"]["project"]
    mixed = []
    for t, task in enumerate(tasks):
      head = len(features) + t
      row = np.concatenate(
        [token[head * width : (head + 1) * width] for token in both]
      )
      mixed.append(task + row @ own["kernel"][t] + own["bias"][t, 0])
    return mixed

  def _predict(self, pooled, tokens):
    config, params = self.config, self.params
    fused = np.stack([token["fused"] for token in tokens])
    num_tasks = len(config.tasks)
    x = np.stack([pooled] * num_tasks)
    if config.task_tokens:
      tasks = np.stack([token["tasks"] for token in tokens], axis=1)
    if config.mode == "final_tower":
      x = np.concatenate([x, tasks + fused], axis=-1)
    elif config.mode == "film":
      own = params["film"]
      for t in range(num_tasks):
        film = (tasks[t] + fused) @ own["kernel"][t] + own["bias"][t, 0]
        scale, shift = np.split(film, 2, axis=-1)
        x[t] = x[t] * (1 + scale) + shift
    elif config.mode != "input_concat":
      x = tasks if config.task_tokens else x + fused
    if config.final_norm:
      x = norm(params["final_norm"], x)
    return dict(zip(config.tasks, towers(params["heads"], x), strict=True))
