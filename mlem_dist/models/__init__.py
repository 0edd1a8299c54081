"""Networks and Gaussians as drifts."""
