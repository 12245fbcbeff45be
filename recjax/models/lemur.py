"""LEMUR: text encoders trained by the ranker, histories read from a bank.

Source: LEMUR, arXiv 2511.10962. Transformers make a vector of the query's and
one of the document's tokens; both are inputs of a RankMixer and are trained by
its loss, with a contrastive loss beside it. Histories are not encoded: their
vectors come from a memory bank by document id, into which every document that
a step encodes is written.

| paper | code |
| --- | --- |
| q_i, d_i, CLS outputs, 2 and 4 layers | `query_encoder`, `document_encoder` |
| SQDC, mask A by query id, temperature T | `session_contrast`, `scale` |
| memory bank, written before it is read | `memory_bank`, `layers/memory_bank` |
| decoder: a_j = softmax(Q_l d_j), Q_l+1 = FFN | `HistoryDecoder` |
| similarities and their ranked version | `similarities` |
| p % forward, q % backward | `forward_rate`, `backward_rate` |

The rows of the paper's ablation are words of the config:

| row | words |
| --- | --- |
| no gradient of the ranker in the encoders | `ranker_gradient=False` |
| no short, no long sequence | `memory_lengths=(1000,)`, `=(50,)` |
| no similarities | `similarities=False` |
| no SQDC, without its mask | `contrast.weight=0`, `.session_mask=False` |
| plus content-to-id contrast (CIC) | `contrast.id_weight` |
| no bank | `bank=False` |
| two-stage | `baselines/two_stage_content.py` |

A document is what `roles.item` names, its text the text features that are no
query's, its history every sequence of its vocabulary. Without a typed query the
query is the text of the user's last items, which the data set must give as a
text feature; without that, `query_features=()` and `contrast.weight=0`.

Not stated there, our choice, and the words that change it: SQDC is the mean
over positives, of the first task; its weight; T multiplies the cosine; widths,
heads and depth of the decoder; the attention is not scaled (`scale_attention`)
and vectors are not normalised (`normalize_vectors`); vectors read from the bank
are constants, fresh ones too; a missing document is a vector of zeros and a bit
that says so, masked out of attention, of similarity 0; missing similarities
rank as -1. A document without a stored vector is always first to be encoded,
and encoded ones with gradients are drawn at random; anchors of SQDC are the
examples whose document has a gradient. Both encoders share token embeddings,
which are dense parameters: a step touches most subwords. Evaluation reads the
bank where it holds the candidate and encodes the others (`serve_bank`), never
writes, and joins nothing, so no example sees another. The paper's LONGER branch
for ordinary features is not here: sequences of ids enter by their mean.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax import config as config_lib
from recjax import losses
from recjax.baselines import rankmixer
from recjax.batch import Batch
from recjax.errors import UserError
from recjax.layers import memory_bank
from recjax.layers.content_history import HistoryDecoder, similarities
from recjax.layers.contrastive import (
  ContrastConfig,
  cosine,
  info_nce,
  normalize,
  session_contrast,
)
from recjax.layers.features import FeatureTokens
from recjax.layers.text_encoder import EncoderConfig, TextEncoder
from recjax.schema import TOKENS, Schema, suggest
from recjax.sparse.table import Table, from_storage, to_storage
from recjax.sparse.update import Writes

DTYPES = ("float32", "bfloat16")
BANK, STEP, SEEN = "memory_bank", "memory_bank_step", "memory_bank_seen"


@dataclasses.dataclass(frozen=True)
class Config(rankmixer.Config):
  """RankMixer's fields, and the content.

  Attributes:
    query_features: Text features of the query.
    document_features: Text features of the document; empty for all others.
    encoder: Shape of both encoders; their width is that of the bank.
    bank: Whether there is a memory bank, and with it histories of content.
    bank_dtype: Type that the bank is stored in.
    memory_lengths: Of every history so many last events are a sequence of its
      own.
    decoder_layers: Layers of a sequence's decoder.
    scale_attention: Divides its scores by the root of the width.
    normalize_vectors: Scales document vectors to length 1.
    similarities: Whether the ranker sees the similarities to the history.
    ranker_gradient: Whether the ranker's loss trains the encoders.
    contrast: The contrastive losses: SQDC and CIC.
    forward_rate: Share of the examples whose documents are encoded a step.
    backward_rate: Share whose documents are encoded with gradients.
    popular_count: Appearances from which on a document is popular.
    popular_rate: Chance of a popular, stored document to be encoded again.
    serve_bank: Evaluation takes candidates from the bank where it can.
  """

  query_features: tuple[str, ...] = ("query",)
  document_features: tuple[str, ...] = ()
  encoder: EncoderConfig = EncoderConfig()
  bank: bool = True
  bank_dtype: str = "bfloat16"
  memory_lengths: tuple[int, ...] = (50, 1000)
  decoder_layers: int = 2
  scale_attention: bool = False
  normalize_vectors: bool = False
  similarities: bool = True
  ranker_gradient: bool = True
  contrast: ContrastConfig = ContrastConfig()
  forward_rate: float = 1.0
  backward_rate: float = 1.0
  popular_count: int = 1000
  popular_rate: float = 1.0
  serve_bank: bool = True

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_network(self, memory_lengths=1, decoder_layers=1)
    _check(self)


class Model(nn.Module):
  """Query, document and histories as content, beside the other features."""

  config: Config
  schema: Schema

  def setup(self):
    config = self.config
    shape = (self.schema.vocab_sizes[TOKENS], config.encoder.dim)
    self.token_embedding = self.param(
      "token_embedding", nn.initializers.normal(0.02), shape
    )
    shape, dtype = config.encoder, jnp.dtype(config.dtype)
    self.document_encoder = TextEncoder(shape, shape.document_layers, dtype)
    if config.query_features:
      self.query_encoder = TextEncoder(shape, shape.query_layers, dtype)

  def __call__(
    self, batch: Batch, rows: dict[str, dict[str, Array]], *, train: bool
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    return self.decode(self.encode_user(batch, rows), batch, rows, train=train)

  def encode_user(
    self, batch: Batch, rows: dict[str, dict[str, Array]]
  ) -> dict[str, Any]:
    """The query's vector, and (ids, vectors, is_filled) of each history."""
    config, encoded = self.config, {"histories": {}}
    if config.query_features:
      encoded["query"] = self._encode(
        self.query_encoder, batch, config.query_features
      )
    for name, (feature, length) in histories(config, self.schema).items():
      mask, steps = batch.id_mask[feature], rows[STEP][feature][..., 0]
      ids, vectors, steps = (
        memory_bank.latest(part, mask, length)[0]
        for part in (batch.ids[feature], rows[BANK][feature], steps)
      )
      encoded["histories"][name] = (ids, vectors, steps > 0)
    return encoded

  @nn.compact
  def decode(
    self,
    encoded: dict[str, Any],
    batch: Batch,
    rows: dict[str, dict[str, Array]],
    *,
    train: bool,
  ) -> tuple[dict[str, Float[Array, " batch"]], dict[str, Any]]:
    """Predictions; `encoded` is of each example, or of one user for all."""
    config = self.config
    dtype = jnp.dtype(config.dtype)
    document = self._documents(batch, rows, train)
    content = {"document": document["vector"]}
    if config.query_features:
      shape = document["vector"].shape
      content["query"] = jnp.broadcast_to(encoded["query"], shape)
    aux = {"content": content, "documents": document}
    if not config.ranker_gradient:
      content = jax.lax.stop_gradient(content)
    extra = [*content.values(), document["is_missing"][:, None]]
    asked = self._asked(batch, rows, extra)
    coverage = {}
    for name, (ids, vectors, is_filled) in encoded["histories"].items():
      if train:
        vectors, is_fresh = memory_bank.join(
          vectors, ids, document["stored"], document["stored_ids"]
        )
        is_filled |= is_fresh
      decoder = HistoryDecoder(
        config.decoder_layers,
        config.encoder.mlp_dim,
        config.scale_attention,
        dtype,
        name=f"decode_{name}",
      )
      extra.append(decoder(asked, vectors, is_filled))
      if config.similarities:
        extra += similarities(content["document"], vectors, is_filled)
      coverage[name] = (ids, is_filled)
    x = FeatureTokens(
      self.schema,
      config.num_tokens,
      config.token_dim,
      config.numeric_dim,
      dtype,
      name="tokens",
    )(batch, rows["embedding"], extra)
    predictions, ranked = rankmixer.mix_and_predict(
      config, x, batch.example_mask, train=train
    )
    ids = batch.ids[self.schema.roles.item]
    document["is_same"] = (ids[:, None] == ids[None]) & (ids[:, None] > 0)
    if config.contrast.id_weight:
      aux["id_vector"] = nn.Dense(config.encoder.dim, name="id_projection")(
        rows["embedding"][self.schema.roles.item]
      )
    aux |= ranked
    aux["counters"]["bank"] = self._counters(batch, document, coverage)
    if train and config.bank:
      aux["writes"] = document["writes"]
    return predictions, aux

  def _asked(self, batch, rows, extra):
    """What is known of an example but for its lists: what queries are of."""
    single = [f for f in self.schema.id_features if not f.is_list]
    parts = [rows["embedding"][f.name] for f in single]
    parts += [batch.vectors[f.name] for f in self.schema.vector_features]
    return jnp.concatenate([*parts, batch.dense, *extra], axis=-1)

  def _documents(self, batch, rows, train):
    """The vector of each example's document, and what is to be stored."""
    config, ids = self.config, batch.ids[self.schema.roles.item]
    names = document_features(config, self.schema)
    found = {
      "is_missing": jnp.zeros(batch.size),
      "is_trained": batch.example_mask,
    }
    if not config.bank:
      fresh = self._encode(self.document_encoder, batch, names)
      return found | {"vector": fresh}
    old = rows[BANK][self.schema.roles.item]
    is_filled = rows[STEP][self.schema.roles.item][:, 0] > 0
    if not train:
      fresh = self._encode(self.document_encoder, batch, names)
      is_stored = is_filled & config.serve_bank
      return found | {
        "vector": jnp.where(is_stored[:, None], old, fresh),
        "agreement": cosine(old, fresh),
        "is_filled": is_filled,
      }
    num_slots = _share(config.forward_rate, batch.size)
    num_trained = min(_share(config.backward_rate, batch.size), num_slots)
    chosen, writes = self._choose(batch, rows, is_filled, num_slots)
    # Passes of their own: the compiler leaves out the way back of the second.
    parts = chosen.examples[:num_trained], chosen.examples[num_trained:]
    trained, fixed = (
      self._encode(self.document_encoder, batch, names, part)
      if len(part)
      else jnp.zeros((0, config.encoder.dim))
      for part in parts
    )
    fresh = jnp.concatenate([trained, jax.lax.stop_gradient(fixed)])
    is_encoded = chosen.slot >= 0
    # Cotangents of slots are summed over the examples of a document.
    of_example = fresh[jnp.maximum(chosen.slot, 0)]
    bank = tables(config, self.schema)[BANK]
    # As it will be read.
    stored = from_storage(to_storage(jax.lax.stop_gradient(fresh), bank), bank)
    stored_ids = jnp.where(chosen.is_used, ids[chosen.examples], 0)
    writes[BANK] = Writes(jnp.where(stored_ids > 0, stored_ids, -1), stored)
    return {
      "vector": jnp.where(is_encoded[:, None], of_example, old),
      "is_missing": (~is_encoded & ~is_filled).astype(jnp.float32),
      "is_trained": is_encoded & (chosen.slot < num_trained),
      "stored": stored,
      "stored_ids": stored_ids,
      "writes": writes,
      "is_filled": is_filled,
    }

  def _choose(self, batch, rows, is_filled, num_slots):
    """Which documents are encoded, and what is counted of their appearances."""
    config, ids = self.config, batch.ids[self.schema.roles.item]
    is_resting, writes, rng = None, {}, None
    if num_slots < batch.size or config.popular_rate < 1:
      rng = self.make_rng("dropout")
    if config.popular_rate < 1:
      seen = rows[SEEN][self.schema.roles.item]
      is_popular = seen[:, 0] >= config.popular_count
      draw = memory_bank.uniform_by_id(rng, ids, 2)
      is_resting = is_popular & (draw >= config.popular_rate)
      at, count = memory_bank.appearances(ids, batch.example_mask)
      writes[SEEN] = Writes(at, seen + count[:, None])
    chosen = memory_bank.choose(
      ids, batch.example_mask, is_filled, num_slots, rng, is_resting
    )
    return chosen, writes

  def _encode(self, encoder, batch, names, some=slice(None)):
    vectors = encoder(
      self.token_embedding,
      [batch.tokens[name][some] for name in names],
      [batch.token_mask[name][some] for name in names],
    )
    if self.config.normalize_vectors:
      vectors = normalize(vectors)
    return vectors

  def _counters(self, batch, document, coverage):
    """Sums for `diagnostics`."""
    if not self.config.bank:
      return {}
    count = lambda mask: jnp.sum(mask.astype(jnp.float32))  # noqa: E731
    valid = batch.example_mask
    is_filled = document["is_filled"] & valid
    sums = {"candidates": jnp.stack([count(is_filled), count(valid)])}
    if "agreement" in document:
      agreement = jnp.where(is_filled, document["agreement"], 0.0)
      sums["agreement"] = jnp.stack([jnp.sum(agreement), count(is_filled)])
    for name, (ids, is_filled) in coverage.items():
      known = (ids > 0) & valid[:, None]
      sums[name] = jnp.stack([count(is_filled & known), count(known)])
    return sums


def tables(config: Config, schema: Schema) -> dict[str, Table]:
  """The embedding table, the bank, and what is known of its rows."""
  _check_schema(config, schema)
  declared = rankmixer.tables(config, schema)
  if not config.bank:
    return declared
  item = schema.feature(schema.roles.item)
  read = {item.name: 0} | dict.fromkeys(_sequences(schema), 0)
  bank = Table(
    schema.vocab_sizes[item.vocab],
    config.encoder.dim,
    first_row=read,
    init_scale=0.0,
    trained=False,
    dtype=config.bank_dtype,
  )
  count = dataclasses.replace(bank, dim=1, dtype="float32")
  declared |= {BANK: bank, STEP: dataclasses.replace(count, stamps=BANK)}
  if config.popular_rate < 1:
    declared[SEEN] = dataclasses.replace(count, first_row={item.name: 0})
  return declared


def loss_fn(
  predictions: dict[str, Array],
  aux: dict[str, Any],
  batch: Batch,
  config: Config,
) -> losses.Terms:
  """RankMixer's terms, and `sqdc` and `cic` where they have a weight."""
  terms = rankmixer.loss_fn(predictions, aux, batch, config)
  contrast, task, valid = config.contrast, config.tasks[0], batch.example_mask
  document, content = aux["documents"], aux["content"]
  if contrast.weight:
    is_positive = jnp.where(batch.label_mask[task], batch.labels[task], 0.0) > 0
    total, count = session_contrast(
      content["query"],
      content["document"],
      is_positive=is_positive & valid,
      is_trained=document["is_trained"],
      is_present=valid & (document["is_missing"] == 0),
      is_same=document["is_same"],
      session_id=batch.groups["query"] if contrast.session_mask else None,
      config=contrast,
    )
    terms["sqdc"] = contrast.weight * total, count
  if contrast.id_weight:
    total, count = info_nce(
      content["document"],
      aux["id_vector"],
      valid & document["is_trained"],
      valid[None] & ~document["is_same"],
      contrast.scale,
    )
    terms["cic"] = contrast.id_weight * total, count
  return terms


def diagnostics(counters: dict[str, Any]) -> dict[str, float]:
  """Health of the bank, and how experts are used.

  `bank/<name>_coverage`: share of candidates, and of a history's events, whose
  vector is stored; `bank/agreement`: cosine of a candidate's stored vector and
  what its encoder gives now.
  """
  counters = dict(counters)
  values = {}
  for name, (total, count) in counters.pop("bank").items():
    suffix = "" if name == "agreement" else "_coverage"
    if count:
      values[f"bank/{name}{suffix}"] = float(total / count)
  return values | rankmixer.diagnostics(counters)


idle_params = rankmixer.idle_params


def document_features(config: Config, schema: Schema) -> tuple[str, ...]:
  """Names of the document's text features."""
  return config.document_features or tuple(
    f.name for f in schema.text_features if f.name not in config.query_features
  )


def histories(config: Config, schema: Schema) -> dict[str, tuple[str, int]]:
  """Sequence of content -> its feature and length.

  A length above what the feature keeps is that; equal ones are one sequence.
  """
  if not config.bank:
    return {}
  found = {}
  for name in _sequences(schema):
    for length in config.memory_lengths:
      length = min(length, schema.feature(name).max_len)
      found[f"{name}_{length}"] = (name, length)
  return found


def _sequences(schema: Schema) -> list[str]:
  vocab = schema.feature(schema.roles.item).vocab
  return [
    f.name
    for f in schema.id_features
    if f.kind == "sequence" and f.vocab == vocab
  ]


def _share(rate: float, size: int) -> int:
  return max(rate > 0, round(rate * size))


def _check(config: Config):
  if config.bank_dtype not in DTYPES:
    raise UserError(
      f"unknown model.bank_dtype {config.bank_dtype!r}"
      + suggest(config.bank_dtype, DTYPES)
    )
  rates = (config.forward_rate, config.backward_rate)
  if not 0 <= rates[1] <= rates[0] <= 1 or rates[0] == 0:
    raise UserError(
      "model.backward_rate must be at most model.forward_rate, and both in "
      f"[0, 1], got {rates[1]} and {rates[0]}"
    )
  if not config.bank and (rates != (1, 1) or config.popular_rate != 1):
    raise UserError(
      "model.bank=False has no stored vectors: forward_rate, backward_rate and "
      "popular_rate must be 1"
    )
  if config.contrast.weight and not config.query_features:
    raise UserError(
      "model.contrast.weight needs the text of a query; name its features in "
      "model.query_features, or set the weight to 0"
    )


def _check_schema(config: Config, schema: Schema):
  texts = {f.name for f in schema.text_features}
  for key in ("query_features", "document_features"):
    for name in getattr(config, key):
      if name not in texts:
        raise UserError(
          f"model.{key}: {name!r} is no text feature" + suggest(name, texts)
        )
  if not document_features(config, schema):
    raise UserError("lemur needs a text feature of the document; add one")
  items = {f.name for f in schema.id_features if not f.is_list}
  if schema.roles.item not in items:
    raise UserError(
      f"lemur needs the document's id: roles.item is {schema.roles.item!r}"
      + suggest(str(schema.roles.item), items)
    )
  label, contrast = schema.label(config.tasks[0]), config.contrast
  if contrast.weight and label.kind != "binary":
    raise UserError(
      f"model.tasks: the first task, {label.name!r}, says which documents are "
      "positives of the contrast, so it must be binary; reorder the tasks or "
      "set model.contrast.weight to 0"
    )
  if contrast.weight and contrast.session_mask and schema.roles.query is None:
    raise UserError(
      "model.contrast.session_mask needs roles.query, which tells sessions "
      "apart; add it to the schema, or set session_mask to False"
    )
