"""The tests. As every way into the package does, they pin the kernels before torch computes: here,
because all of them import this first, and so does the fork server of tests/ranks.py."""

import locale
import os

from moe_upgrpo import kernels

kernels.pin()

# The tests compare texts with signs that ASCII lacks: where the locale is ASCII, their own files
# and pipes are UTF-8 all the same. tests/train/test_ascii_locale.py is about such a locale.
if locale.getencoding().upper() != "UTF-8":
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    os.environ["PYTHONIOENCODING"] = "utf-8"
