"""RankMixer and MSN of the KuaiRand recipes in PyTorch: what recjax is beside.

Written for speed on a CPU, with what was fastest there:

* Tokens first, one `baddbmm` a per-token layer.
* Lists of ids are ragged, without padding, and read by one `embedding_bag`.
* Tables take no part in autograd. A row's gradient is the sum of what its reads
  got, one `embedding_bag` over the reads sorted by row: 6 times as fast as
  sparse gradients (`sparse=True`) with `coalesce`. Then row-wise Adagrad moves
  the rows that were read.
* AdamW in its fused form.

Parameters have Flax's names and shapes, so that `Training` can copy them from a
`TrainState`. Covered is what the recipes use: one task, dense per-token
networks, a linear head, sparse features before lists; a memory of one head with
shared values, LayerNorm and Theta from the right, and a tanh gate.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util
from torch import nn

from experiments.peers.torch_msn import ProductKeyMemory
from recjax import optimizer as optimizer_lib
from recjax.batch import Batch
from recjax.layers.features import concat_width
from recjax.method import Method
from recjax.models import msn
from recjax.train_state import StepConfig, TrainState

EPS = 1e-6  # Of a LayerNorm, as in Flax.


class Training:
  """One model, its optimisers and its tables.

  Attributes:
    model: The network.
    tables: Name as in recjax -> the table.
  """

  def __init__(self, config: StepConfig, state: TrainState, *, compiled: bool):
    """Copies all weights from `state`, which must be fresh.

    Args:
      config: What a step of recjax is made of.
      state: Initial parameters and tables.
      compiled: Whether forward and backward pass go through `torch.compile`.
    """
    method, optimizer = config.method, config.optimizer
    self._config, self._count = optimizer, 0
    self.model = Ranker(method)
    self._names = flax_names(self.model, method)
    params = traverse_util.flatten_dict(state.params, sep="/")
    with torch.no_grad():
      for name, parameter in self.model.named_parameters():
        parameter.copy_(_to_torch(params[self._names[name]]))
    self.tables = {
      name: Table(values, eps=optimizer.sparse.eps)
      for name, values in state.tables.items()
    }
    self._params = list(self.model.parameters())
    self._averages = [p.detach().clone() for p in self._params]
    self._optimizer = torch.optim.AdamW(
      [
        {"params": [p for p in self._params if p.ndim > 1]},
        {
          "params": [p for p in self._params if p.ndim == 1],
          "weight_decay": 0.0,
        },
      ],
      weight_decay=optimizer.weight_decay,
      fused=True,
    )
    steps = np.arange(config.num_steps)
    factor = optimizer_lib.factor(optimizer, config.num_steps)
    self._factors = np.asarray(jax.vmap(factor)(steps)).tolist()
    self._scales = {name: config.table_scale(name) for name in self.tables}
    self._loss = (
      torch.compile(self._forward, fullgraph=True, dynamic=False)
      if compiled
      else self._forward
    )

  def step(self, batch: "TorchBatch") -> float:
    """Forward, backward and update; returns the loss."""
    embedding = self.tables["embedding"]
    pooled = embedding.pool(batch).requires_grad_()
    masks = self.model.draw_masks(batch.size)
    taps = self.model.zero_taps(batch.size)
    loss, reads = self._loss(batch, pooled, taps, masks)
    loss.backward()

    factor = self._factors[self._count]
    self._count += 1
    for group in self._optimizer.param_groups:
      group["lr"] = factor * self._config.learning_rate
    if self._config.clip_norm is not None:
      nn.utils.clip_grad_norm_(self._params, self._config.clip_norm)
    self._optimizer.step()
    self._optimizer.zero_grad()
    self._average()

    rate = factor * self._config.sparse.learning_rate
    embedding.update(
      batch.read_ids,
      batch.read_sources,
      batch.read_weights,
      pooled.grad.view(-1, embedding.dim),
      self._scales["embedding"] * rate,
    )
    for (name, slots, weights), tap in zip(reads, taps, strict=True):
      sources = torch.arange(slots.shape[0], dtype=torch.int32)
      self.tables[name].update(
        slots.flatten(),
        sources[:, None].expand(slots.shape).flatten(),
        weights.detach().flatten(),
        tap.grad.view(-1, self.tables[name].dim),
        self._scales[name] * rate,
      )
    return loss.item()

  @torch.no_grad()
  def predict(self, batch: "TorchBatch"):
    """Logits without dropout, and the slots that each memory read."""
    pooled = self.tables["embedding"].pool(batch)
    taps = self.model.zero_taps(batch.size)
    logits, reads = self.model(pooled, batch.dense, self._values(), taps)
    return logits.numpy(), {name: slots.numpy() for name, slots, _ in reads}

  def params(self) -> dict[str, np.ndarray]:
    """Dense parameters by Flax's names."""
    return {
      self._names[name]: parameter.detach().numpy()
      for name, parameter in self.model.named_parameters()
    }

  def _values(self) -> dict[str, torch.Tensor]:
    return {name: table.values for name, table in self.tables.items()}

  def _forward(self, batch, pooled, taps, masks):
    values = self._values()
    logits, reads = self.model(pooled, batch.dense, values, taps, masks)
    loss = F.binary_cross_entropy_with_logits(
      logits, batch.labels, weight=batch.weights, reduction="sum"
    )
    return loss, reads

  @torch.no_grad()
  def _average(self):
    if not self._config.ema_decay:
      return
    count = self._count - 1
    decay = min(self._config.ema_decay, (1 + count) / (10 + count))
    torch._foreach_lerp_(self._averages, self._params, 1 - decay)


class Table:
  """Rows outside autograd, moved by row-wise Adagrad."""

  def __init__(self, values: jax.Array, *, eps: float):
    self.values = _to_torch(values)
    self.sums = torch.zeros(values.shape[0])
    self.dim = values.shape[1]
    self._eps = eps

  @torch.no_grad()
  def pool(self, batch: "TorchBatch") -> torch.Tensor:
    """All id features of an example side by side, lists as their mean."""
    singles = F.embedding(batch.single_ids, self.values)
    bags = F.embedding_bag(
      batch.list_ids, self.values, batch.list_offsets, mode="mean"
    )
    return torch.cat([singles.flatten(1), bags.view(batch.size, -1)], dim=1)

  @torch.no_grad()
  def update(
    self,
    ids: torch.Tensor,
    sources: torch.Tensor,
    weights: torch.Tensor,
    grads: torch.Tensor,
    rate: float,
  ) -> None:
    """Moves every row that was read.

    Args:
      ids: Row of each read.
      sources: Row of `grads` that each read went into.
      weights: With which weight.
      grads: Gradients of what was read.
      rate: Learning rate.
    """
    ids, order = torch.sort(ids)
    rows, counts = torch.unique_consecutive(ids, return_counts=True)
    grads = F.embedding_bag(
      sources.index_select(0, order),
      grads,
      (counts.cumsum(0) - counts).to(sources.dtype),
      mode="sum",
      per_sample_weights=weights.index_select(0, order),
    )
    sums = self.sums.index_select(0, rows) + grads.square().mean(dim=1)
    self.sums[rows] = sums
    grads *= (rate / (sums.sqrt() + self._eps))[:, None]
    self.values[rows] = self.values.index_select(0, rows) - grads


class Ranker(nn.Module):
  """Tokens -> blocks, some gated by a memory -> mean -> one logit."""

  def __init__(self, method: Method):
    super().__init__()
    config = method.config
    self.num_tokens = config.num_tokens
    width = concat_width(method.schema, config.embed_dim)
    self.token_width = -(-width // config.num_tokens)
    self.padding = self.token_width * config.num_tokens - width
    self.tokens = nn.ModuleDict(
      {
        "project": PerTokenDense(
          config.num_tokens, self.token_width, config.token_dim
        )
      }
    )
    layers = getattr(config, "memory_layers", ())
    self.blocks = nn.ModuleList(
      Block(config, memory_name=f"memory_{i}/values" if i in layers else None)
      for i in range(config.num_layers)
    )
    (task,) = config.tasks
    self.heads = nn.ModuleDict({task: Dense(config.token_dim, 1)})

  def forward(
    self,
    pooled: torch.Tensor,
    dense: torch.Tensor,
    values: dict[str, torch.Tensor],
    taps: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor] = (),
  ):
    """Logits, and (table, slots, weights) of each memory's reads."""
    inputs = F.pad(torch.cat([pooled, dense], dim=1), (0, self.padding))
    x = inputs.view(-1, self.num_tokens, self.token_width).transpose(0, 1)
    x = self.tokens["project"](x)
    reads, taps, masks = [], iter(taps), iter(masks)
    for block in self.blocks:
      x = block(x, values, taps, next(masks, None), reads)
    (head,) = self.heads.values()
    return head(x.mean(dim=0))[:, 0], reads

  def zero_taps(self, batch_size: int) -> list[torch.Tensor]:
    """Zeros to take the gradient of each memory's output at."""
    shape = (self.num_tokens, batch_size, self.blocks[0].token_dim)
    return [
      torch.zeros(shape, requires_grad=True)
      for block in self.blocks
      if block.memory_name
    ]

  def draw_masks(self, batch_size: int) -> list[torch.Tensor]:
    """What dropout multiplies in each block.

    `dropout` takes twice as long to draw them, and `torch.compile` thrice.
    """
    return [
      torch.rand(self.num_tokens, batch_size, block.inner_dim)
      .ge_(block.dropout_rate)
      .div_(1 - block.dropout_rate)
      for block in self.blocks
    ]


class Block(nn.Module):
  """`S = LN(TokenMixing(X) + X)`, then `LN(PFFN(gated S) + S)`."""

  def __init__(self, config, *, memory_name: str | None):
    super().__init__()
    tokens, dim = config.num_tokens, config.token_dim
    inner = int(config.mlp_ratio * dim)
    self.token_dim, self.inner_dim = dim, inner
    self.memory_name = memory_name
    self.dropout_rate = config.dropout_rate
    self.mix_norm, self.ffn_norm = LayerNorm(dim), LayerNorm(dim)
    self.ffn = nn.ModuleDict(
      {
        "up": PerTokenDense(tokens, dim, inner),
        "down": PerTokenDense(tokens, inner, dim),
      }
    )
    if memory_name:
      query = PerTokenDense(tokens, dim, 2 * config.memory.key_dim)
      self.memory = ProductKeyMemory(config.memory, query)

  def forward(self, x, values, taps, mask, reads):
    """The block's output; appends to `reads`."""
    s = gated = self.mix_norm(token_mixing(x) + x)
    if self.memory_name:
      name = self.memory_name
      value, slots, weights = self.memory(s, values[name])
      reads.append((name, slots, weights))
      gated = s * torch.tanh(value + next(taps))
    hidden = F.gelu(self.ffn["up"](gated), approximate="tanh")
    if mask is not None:
      hidden = hidden * mask
    return self.ffn_norm(self.ffn["down"](hidden) + s)


class PerTokenDense(nn.Module):
  """`y_t = x_t W_t + b_t`, tokens first."""

  def __init__(self, num_tokens: int, dim: int, features: int):
    super().__init__()
    self.kernel = nn.Parameter(torch.zeros(num_tokens, dim, features))
    self.bias = nn.Parameter(torch.zeros(num_tokens, 1, features))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`x` is `[tokens, batch, dim]`."""
    return torch.baddbmm(self.bias, x, self.kernel)


class Dense(nn.Module):
  """`y = x W + b`."""

  def __init__(self, dim: int, features: int):
    super().__init__()
    self.kernel = nn.Parameter(torch.zeros(dim, features))
    self.bias = nn.Parameter(torch.zeros(features))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`x` is `[batch, dim]`."""
    return torch.addmm(self.bias, x, self.kernel)


class LayerNorm(nn.Module):
  """Over the last axis, with gain and bias."""

  def __init__(self, dim: int):
    super().__init__()
    self.scale = nn.Parameter(torch.ones(dim))
    self.bias = nn.Parameter(torch.zeros(dim))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`x` has any number of leading axes."""
    return F.layer_norm(x, self.scale.shape, self.scale, self.bias, EPS)


def token_mixing(x: torch.Tensor) -> torch.Tensor:
  """Swaps token and head axes of `[tokens, batch, dim]`."""
  tokens, batch, dim = x.shape
  heads = x.reshape(tokens, batch, tokens, dim // tokens)
  return heads.permute(2, 1, 0, 3).reshape(tokens, batch, dim)


def flax_names(model: Ranker, method: Method) -> dict[str, str]:
  """Name of a parameter here -> its path in recjax."""
  pattern, path = r"blocks/(\d+)", r"block_\1"
  if isinstance(method.config, msn.Config):
    pattern, path = r"blocks/(\d+)/(\w+)", r"\2_\1"
  return {
    name: re.sub(pattern, path, name.replace(".", "/"))
    for name, _ in model.named_parameters()
  }


@dataclasses.dataclass(frozen=True)
class TorchBatch:
  """A batch as a PyTorch pipeline would hand it over: lists are ragged.

  Attributes:
    dense: `[batch, num_dense]`.
    single_ids: Rows of the sparse features, `[batch, singles]`.
    list_ids: Rows of all lists behind each other, without padding.
    list_offsets: Where each list begins: example by example, feature by
      feature.
    read_ids: Row of every read, those of lists last.
    read_sources: Which vector, counted over examples and features, each read
      went into.
    read_weights: With which weight: 1, or 1 over the length of a list.
    labels: 0 or 1.
    weights: What the loss of each example counts; they sum to 1.
  """

  dense: torch.Tensor
  single_ids: torch.Tensor
  list_ids: torch.Tensor
  list_offsets: torch.Tensor
  read_ids: torch.Tensor
  read_sources: torch.Tensor
  read_weights: torch.Tensor
  labels: torch.Tensor
  weights: torch.Tensor

  @property
  def size(self) -> int:
    """Number of examples."""
    return self.dense.shape[0]


def convert(batch: Batch, method: Method) -> TorchBatch:
  """The same examples for PyTorch."""
  batch = jax.device_get(batch)
  features = method.schema.id_features
  first_row = method.tables["embedding"].first_row
  singles = [f.name for f in features if not f.is_list]
  lists = [f.name for f in features if f.is_list]
  single_ids = np.stack([batch.ids[n] + first_row[n] for n in singles], axis=1)
  ids = np.concatenate([batch.ids[n] + first_row[n] for n in lists], axis=1)
  mask = np.concatenate([batch.id_mask[n] for n in lists], axis=1)
  lengths = np.stack([batch.id_mask[n].sum(axis=1) for n in lists], axis=1)
  vectors = np.arange(batch.size * len(features)).reshape(batch.size, -1)
  single_vectors, list_vectors = np.split(vectors, [len(singles)], axis=1)
  counts = lengths.ravel()
  (task,) = method.config.tasks
  counted = batch.label_mask[task] & batch.example_mask
  arrays = TorchBatch(
    dense=batch.dense,
    single_ids=single_ids,
    list_ids=ids[mask],
    list_offsets=np.cumsum(counts) - counts,
    read_ids=np.concatenate([single_ids.ravel(), ids[mask]]),
    read_sources=np.concatenate(
      [single_vectors.ravel(), np.repeat(list_vectors.ravel(), counts)]
    ),
    read_weights=np.concatenate(
      [np.ones(single_ids.size), np.repeat(1 / np.maximum(counts, 1), counts)]
    ),
    labels=np.where(counted, batch.labels[task], 0),
    weights=counted / max(counted.sum(), 1),
  )
  return TorchBatch(
    **{
      field.name: _to_torch(getattr(arrays, field.name))
      for field in dataclasses.fields(arrays)
    }
  )


def _to_torch(x) -> torch.Tensor:
  """A copy, in 32 bits."""
  x = np.array(x)
  is_real = np.issubdtype(x.dtype, np.floating)
  return torch.from_numpy(x.astype(np.float32 if is_real else np.int32))
