"""Measure a ladder, and decide from the measurements how to use it."""
