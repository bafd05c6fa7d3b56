"""How far two right fp32 computations of a log-prob may lie apart."""

from math import sqrt

UNIT_ROUNDOFF = 2.0**-24  # of fp32, rounding to nearest


def log_prob_tolerance(config, *, length: int, temperature: float = 1.0) -> float:
    """The largest difference of log-probs that the rounding of fp32 explains, in nats.

    For random models of `config` (of transformers) and sequences of `length` tokens:
    u · √(Σ n) · size of logits · 2 / temperature.

    - A sum of n products is wrong by a relative u·√n, u the unit roundoff: n roundings of random
      sign (Higham and Mary 2019; all of one sign would give u·n). The order of the terms, and so
      kernel and CPU, is left open: kernels that add in lanes err less.
    - Errors of the sums that follow one another in a token's path add up as independent ones do:
      √ of the sum of the squares. Behind a normalisation a relative error stays what it is.
    - Logits are a normalised state times a random head: normal, with standard deviation
      initializer_range·√hidden. Four of these is the size of the largest.
    - 2 = √2·√2: a log-prob is a difference (the token's logit less those of its rivals), and both
      sides err.
    - The temperature divides logits with their errors.

    Rounding stays below a half of it, and what it must catch lies above ten times of it:
    tests/rollout/test_tolerance.py.
    """
    head = config.num_attention_heads * config.head_dim
    latent = (getattr(config, "q_lora_rank", None) or 0) + getattr(config, "kv_lora_rank", 0)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    attention = config.hidden_size + latent + config.head_dim + length
    mlp = 2 * config.hidden_size + width  # the router, gate and up, down
    norms = 2 * config.hidden_size
    sums = config.num_hidden_layers * (attention + head + mlp + norms) + 2 * config.hidden_size
    logits = 4 * config.initializer_range * sqrt(config.hidden_size)
    return UNIT_ROUNDOFF * sqrt(sums) * logits * 2 / temperature
