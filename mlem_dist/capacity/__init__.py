"""Placement, planning and simulation, and the numbers that they share with the coordinator."""
