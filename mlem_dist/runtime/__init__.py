"""Pools of Ray actors, the coordinator that drives them, and the in-process engine."""
