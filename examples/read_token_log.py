"""The token log of a run: how far trainer and engine are apart, by mismatched layers of the token.

python examples/read_token_log.py RUN
"""

import sys

from moe_upgrpo.store import read_tokens

tokens = read_tokens(sys.argv[1], columns=["logp_old", "logp_rollout", "layers_mismatched"])
table = tokens.to_pandas()
table["gap"] = (table.logp_old - table.logp_rollout).abs()
for layers, of_layers in table.groupby("layers_mismatched"):
    print(f"{layers} layers: {len(of_layers)} tokens, mean |gap| {of_layers.gap.mean():.2e}")
