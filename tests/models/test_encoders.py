"""Encoders beside the functions of the pipelines that they take the place of."""

import diffusers
import pytest
import torch
from pipelines import make_pipeline

from mlem_dist.models.encoder import load_encoder
from mlem_dist.solver.condition import MASK, TEXT


@pytest.mark.parametrize(
    ("kind", "name"), [("pixart-alpha", "PixArtAlphaPipeline"), ("pixart-sigma", "PixArtSigmaPipeline")]
)
def test_texts_without_their_padding_are_encoded_as_pipelines_do(kind, name, tmp_path):
    folder = make_pipeline(kind, tmp_path)
    texts = ["a red bag", "A blue sneaker below a green coat", "", "bag " * 400]
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    encoder = load_encoder(folder, name, (64, 64), False, "cpu", "float32")
    for part in (texts[:1], texts[:3], texts):
        embedded, mask, _, _ = pipeline.encode_prompt(part, False)
        condition = encoder(part, [None] * len(part))
        assert condition[TEXT].shape == embedded.shape
        assert torch.equal(condition[MASK], mask)
        kept = mask.bool()
        torch.testing.assert_close(condition[TEXT][kept], embedded[kept], rtol=0, atol=1e-5)
        assert embedded[kept].std() > 0.1
        # Padding after the longest text, which the mask hides, is not encoded.
        assert not condition[TEXT][:, int(kept.sum(1).max()) :].any()
