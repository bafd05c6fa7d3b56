# SPDX-License-Identifier: Apache-2.0
"""`moe-upgrpo compare`: arms × seeds, written down before they run, run to the end, reported.

`plan` is written down first, `run` carries it out, `data` keeps a Parquet file of each run,
`measures` makes figures from them, `report` a page. The page needs only the kept data.
"""
