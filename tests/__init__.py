"""The tests. As every way into the package does, they pin the kernels before torch computes: here,
because all of them import this first, and so does the fork server of tests/ranks.py."""

from moe_upgrpo import kernels

kernels.pin()
