"""The Ray engine: pools of actors, coordinators that drive them, cells, and the driver of a run."""
