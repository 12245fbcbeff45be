"""From raw text to subword tokens.

All text columns of a data set share one vocabulary of subwords, so that a query
and a title share words. It is learned from the texts of the training part
alone, each distinct text counted once, and lies beside the prepared rows, in
each run and in each export as `tokenizer.json`.

The subwords are byte-level byte-pair merges (Sennrich et al., ACL 2016; the
`tokenizers` library) of text in lower case, compatibility characters folded
(NFKC). Our choice: bytes know every script, so there is no unknown token, and
the library numbers such merges in an order that does not depend on its hash
tables. Token 0 is padding; a text's tokens begin at 1.
"""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Int

from recjax.data.vocabulary import hash_values
from recjax.errors import UserError

FILE = "tokenizer.json"
_PADDING = "<pad>"
_NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
  """Learns the subwords of a corpus.

  Args:
    texts: The training part's distinct texts.
    vocab_size: Most tokens, padding included; above 256, since every byte is
      a token. A small corpus has fewer.

  Returns:
    A `tokenizers.Tokenizer`.

  Raises:
    UserError: If the library is not installed, or `vocab_size` is too small.

  Example:
    >>> tokenizer = train_tokenizer(["red red wine"], 262)
    >>> tokenizer.encode("Red").ids == tokenizer.encode("red").ids
    True
  """
  if vocab_size <= _NUM_BYTES:
    raise UserError(
      f"text_vocab_size must be above {_NUM_BYTES}, got {vocab_size}: every "
      "byte is a token"
    )
  library = _library()
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.normalizer = library.normalizers.Sequence(
    [library.normalizers.NFKC(), library.normalizers.Lowercase()]
  )
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=True
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_PADDING],
    initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  # A text that spells it is text.
  tokenizer.encode_special_tokens = True
  return tokenizer


def save_tokenizer(directory: epath.PathLike, tokenizer: Any) -> None:
  """Writes it as `tokenizer.json`."""
  path = epath.Path(directory) / FILE
  path.write_text(tokenizer.to_str(pretty=False))


def load_tokenizer(directory: epath.PathLike) -> Any:
  """What `save_tokenizer` wrote.

  Raises:
    UserError: If the library is not installed or the file is not there.
  """
  path = epath.Path(directory) / FILE
  if not path.exists():
    raise UserError(f"{path}: no such file; prepare the data again")
  tokenizer = _library().Tokenizer.from_str(path.read_text())
  tokenizer.encode_special_tokens = True
  return tokenizer


def copy_tokenizer(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies the file, if there is one, from one folder to another."""
  path = epath.Path(source) / FILE
  if path.exists():
    shutil.copyfile(path, os.path.join(target, FILE))


class TokenStore:
  """Tokenises each distinct text once, and stores its tokens once.

  Args:
    tokenizer: From `train_tokenizer`.
    writer: The `ColumnWriter` that takes the tokens.

  Example:
    >>> store = TokenStore(tokenizer, writer)           # doctest: +SKIP
    >>> starts, lengths = store.add(feature, pa.array(["red wine", None]))
  """

  def __init__(self, tokenizer: Any, writer: Any):
    self._tokenizer, self._writer = tokenizer, writer
    self._slices: dict[str, dict[int, tuple[int, int]]] = {}

  def add(
    self, feature: str, max_len: int, texts: pa.Array
  ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Start and length of each text's slice of the feature's values.

    Args:
      feature: A text feature.
      max_len: Tokens that are kept, the first ones.
      texts: One a row; null has no tokens.
    """
    slices = self._slices.setdefault(feature, {})
    encoded = texts.dictionary_encode()
    distinct = encoded.dictionary
    keys = hash_values(distinct).tolist()
    new = {key: i for i, key in enumerate(keys) if key not in slices}
    if new:
      tokens = [
        encoding.ids[:max_len]
        for encoding in self._tokenizer.encode_batch(
          distinct.take(pa.array(list(new.values()), pa.int64())).to_pylist()
        )
      ]
      lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
      flat = np.fromiter(
        (token for row in tokens for token in row), np.int32, lengths.sum()
      )
      first = self._writer.append_values(feature, flat)
      starts = first + np.cumsum(lengths) - lengths
      slices.update(
        zip(
          new, zip(starts.tolist(), lengths.tolist(), strict=True), strict=True
        )
      )
    # The last entry is what a null, index -1, finds.
    found = np.array([*(slices[key] for key in keys), (0, 0)], np.int64)
    rows = found[encoded.indices.fill_null(-1).to_numpy()]
    return rows[:, 0], rows[:, 1]


def _library() -> Any:
  try:
    import tokenizers
  except ImportError as error:
    raise UserError(
      "text columns need the tokenizers library; pip install 'recjax[text]'"
    ) from error
  return tokenizers
