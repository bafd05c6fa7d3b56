"""Whether training breaks under stress: learning rates, verifiers, data, staleness."""
