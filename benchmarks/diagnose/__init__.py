"""Injected faults and clean pairs: how often `moe-upgrpo diagnose` names the right cause."""
