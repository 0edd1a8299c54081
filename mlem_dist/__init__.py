"""Distributed Multilevel Euler-Maruyama sampling of diffusion models on Ray."""

__version__ = "0.3.0"
