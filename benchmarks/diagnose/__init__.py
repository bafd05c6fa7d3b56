"""Measurements of `moe-upgrpo diagnose`: its calibration table, what it names of planted faults."""
