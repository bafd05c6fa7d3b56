"""The exact benchmark: bias and variance of every policy loss, by enumeration. See `study`."""
