"""Two dumps of expert ids, of an engine and of a trainer: how often their routers differ, by layer.

python examples/compare_dumps.py ROLLOUT.npy TRAIN.npy NUM_EXPERTS
"""

import sys
from pathlib import Path

from moe_upgrpo.routing import compare_routes
from moe_upgrpo.tools.route_dumps import read_routes

rollout, train = (read_routes(Path(file)) for file in sys.argv[1:3])  # [tokens, layers, top-k]
found = compare_routes(rollout, train, num_experts=int(sys.argv[3]))
print(f"routers that differ: {float(found.router_mismatch_rate):.2%}")
print(f"tokens with any: {float(found.token_any_rate):.2%}")
for layer, rate in enumerate((found.overlap < rollout.shape[2]).float().mean(0).tolist()):
    print(f"MoE layer {layer}: {rate:.2%}")
