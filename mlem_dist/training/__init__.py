"""Train a ladder from an image dataset."""
