"""Tiny shapes of all methods, and other forms of some, for their tests."""

TASKS = ("click", "like", "play_time")
# Overrides that make a method tiny; a method that is not named takes none.
RANKMIXER = {"embed_dim": 4, "num_tokens": 2, "token_dim": 8, "num_layers": 1}
SEQUENCE = RANKMIXER | {"event_dim": 4, "num_heads": 2}
HYFORMER = {
  "embed_dim": 4,
  "num_tokens": 4,
  "token_dim": 8,
  "num_layers": 1,
  "num_heads": 2,
  "recent_len": 3,
}
# Any lists will do here; tests/models/promo_test.py has some of users.
TOWERS = {
  "user_features": ["tab", "age"],
  "item_features": ["tags", "price", "content"],
  "history": "history",
  "num_blocks": 1,
  "num_heads": 2,
}
BACKBONE = {"embed_dim": 4, "towers": TOWERS, "dropout_rate": 0.0}
COLD = BACKBONE | {"popularity": "tab", "cold_below": 1}
PROMO = BACKBONE | {
  "hidden_dim": 3,
  "positive_list": "tags",
  "negative_list": "tags",
  "popularity": "tab",
  "popular_from": 2,
}
TINY = {
  "dlrm_mlp": {"embed_dim": 4, "mlp_dims": [8]},
  "dcnv2": {
    "embed_dim": 4,
    "mlp_dims": [8],
    "low_rank": 3,
    "num_experts": 2,
    "expert_activation": "tanh",
    "memory_layers": [0],
    "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
  },
  "din": {"embed_dim": 4, "attention_dims": [6], "mlp_dims": [8]},
  "wukong": {
    "embed_dim": 4,
    "num_layers": 1,
    "num_fm": 3,
    "num_linear": 2,
    "fm_rank": 2,
    "fm_mlp_dims": [6],
    "dense_mlp_dims": [5],
    "mlp_dims": [8],
  },
  "promo": PROMO,
  "two_towers": BACKBONE,
  "dropoutnet": COLD | {"id_dropout_rate": 0.0},
  "cb2cf": COLD | {"hidden_dim": 3},
  "content_average": COLD,
  "metaemb": COLD,
  "plate": COLD,
  "ppr": BACKBONE | {"hidden_dim": 3},
  "rankmixer": RANKMIXER,
  "msn": RANKMIXER
  | {
    "memory_layers": [0],
    "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
  },
  "hyformer": HYFORMER,
  "longer": SEQUENCE
  | {"merge_len": 2, "inner_trans": True, "global_tokens": ["target", "cls"]},
  "transformer_rankmixer": SEQUENCE,
  "din_rankmixer": RANKMIXER | {"event_dim": 4, "attention_dims": [6]},
}
TINY["lemur"] = RANKMIXER | {
  "encoder": {
    "dim": 8,
    "num_heads": 2,
    "mlp_dim": 6,
    "query_layers": 1,
    "document_layers": 1,
  },
  "decoder_layers": 1,
  "memory_lengths": [3],
  "bank_dtype": "float32",
}
TINY["two_stage_content"] = TINY["lemur"]
TINY["mdl"] = RANKMIXER | {"num_heads": 2, "domain_dim": 4}
for _name in ("shared_bottom", "mmoe", "ple", "star", "hmoe", "pepnet"):
  TINY[_name] = RANKMIXER | {"head_dim": 6}
OUTCOMES = {"embed_dim": 4, "mlp_dims": [6], "head_dims": [5]}
TINY |= {
  "two_stage": OUTCOMES,
  "x_learner": OUTCOMES,
  "cfrnet": OUTCOMES,
  "drnet": OUTCOMES,
  "drp": OUTCOMES,
  "e3ir": OUTCOMES,
  # Without a warm-up the first stage has the whole loss.
  "dfcl": OUTCOMES | {"warmup_share": 0.0},
  "budget_allocation": OUTCOMES | {"warmup_share": 0.0},
}
# Other forms of a method: name -> (method, overrides on top of its TINY).
VARIANTS = {
  "promo_shared": (
    "promo",
    {
      "network": "shared",
      "use_relu": True,
      "pooling": "mean",
      "normalization": "mean",
      "prompt_tables": "backbone",
    },
  ),
  "promo_inputs": (
    "promo",
    {"network": "none", "prompt_from": "id_features", "fusion": "xavier"},
  ),
  "rankmixer_gated": ("rankmixer", {"ffn": "gated", "moe": {"gate_dim": 3}}),
  "rankmixer_smoe": ("rankmixer", {"ffn": "smoe"}),
  "rankmixer_relu_moe": ("rankmixer", {"ffn": "relu_moe"}),
  "msn_smoe": ("msn", {"ffn": "smoe"}),
  "msn_relu_moe": ("msn", {"ffn": "relu_moe"}),
  "hyformer_literal": (
    "hyformer",
    {
      "encoder": "swiglu",
      "merge_sequences": True,
      "paper_literal": True,
      "reinject_features": True,
    },
  ),
  "mdl_msn": (
    "mdl",
    {
      "body": "msn",
      "num_layers": 2,
      "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
      "balance": {"kind": "uncertainty"},
      "scenario_priors": [{"token": "1", "features": ["age", "tags"]}],
      "task_priors": [{"token": "all", "features": ["history", "content"]}],
    },
  ),
  "dlrm_mlp_memory": (
    "dlrm_mlp",
    {
      "memory_layers": [0],
      "memory": {"num_keys": 6, "key_dim": 4, "top_k": 3},
    },
  ),
}
VARIANTS |= {
  "two_stage_s": ("two_stage", {"learner": "s"}),
  "two_stage_monotone": ("two_stage", {"learner": "monotone"}),
  "budget_allocation_rule": (
    "budget_allocation",
    {"estimator": "finite_difference", "prices": [0.5], "alpha": 0.1},
  ),
}
