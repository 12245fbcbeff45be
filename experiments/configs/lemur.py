"""LEMUR (arXiv 2511.10962), text trained by the ranker, on MovieLens titles.

    python -m experiments.run --config=experiments/configs/lemur.py:base \\
        --workdir=runs/lemur

Sizes: `tiny` (seconds), `base` (bundled data: title and genres of a film; the
query is the titles that the user last rated well), `paper` (encoders of 2 and 4
layers and width 128, batches of 2048, histories of 50 and 1000 events, a fifth
of the documents encoded a step; lower it with a table of your own).

The encoders learn at a tenth of the ranker's rate; our choice.
"""

from experiments.configs import common


def get_config(size: str = "base"):
  config = common.kuairand("lemur", size)
  config.data = dict(name="movielens", text=True)
  config.model = dict(
    tasks=("positive",),
    embed_dim=16,
    num_tokens=8,
    token_dim=64,
    num_layers=2,
    mlp_ratio=2.0,
    head_dim=0,
    numeric_dim=0,
    dropout_rate=0.2,
    embed_init_scale=0.01,
    dtype="float32",
    query_features=("query",),
    document_features=(),
    encoder=dict(
      dim=32, num_heads=2, mlp_dim=128, query_layers=1, document_layers=2
    ),
    bank=True,
    bank_dtype="bfloat16",
    memory_lengths=(10, 50),
    decoder_layers=2,
    scale_attention=False,
    normalize_vectors=True,
    similarities=True,
    ranker_gradient=True,
    contrast=dict(
      weight=0.1,
      scale=50.0,
      negatives="batch",
      session_mask=True,
      mask_same_document=False,
      id_weight=0.0,
    ),
    forward_rate=1.0,
    backward_rate=1.0,
    popular_count=1000,
    popular_rate=1.0,
    serve_bank=True,
  )
  encoders = "(token_embedding|document_encoder|query_encoder).*"
  config.optimizer.scale_rules = (f"{encoders}=0.1",)
  if size == "tiny":
    config.model.update(num_tokens=4, token_dim=16, num_layers=1)
    config.model.encoder.update(dim=8, mlp_dim=16, document_layers=1)
  if size == "paper":
    config.train.update(batch_size=2048)
    config.data.update(max_len=1000)
    config.model.update(
      embed_dim=64,
      num_tokens=16,
      token_dim=768,
      mlp_ratio=4.0,
      dropout_rate=0.0,
      dtype="bfloat16",
      memory_lengths=(50, 1000),
      normalize_vectors=False,
      forward_rate=0.2,
      backward_rate=0.2,
    )
    config.model.encoder.update(
      dim=128, num_heads=4, mlp_dim=512, query_layers=2, document_layers=4
    )
  return config
