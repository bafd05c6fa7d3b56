# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo compare`: arms × seeds, written down before they run, run to the end, reported.

`plan` is what is written down, `run` does it, `data` keeps a Parquet file of each run, `measures`
makes figures of them, `report` a page. The page is made of the kept data alone.
"""
