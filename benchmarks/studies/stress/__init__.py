"""Whether training breaks where it is pushed: learning rates, verifiers, data, staleness."""
