"""A score of how well an image fits its prompt: the cosine of their CLIP embeddings, in the column `clip_similarity`.

mlem-dist generate --ladder my-sd --prompts prompts.parquet --nfe 20 --out out/mine \
    --score clip_similarity:ClipSimilarity

Run it in the folder of this file, or install the file as a module. The model is that of CLIP_MODEL, an id on the hub or
a folder. The class can be given to `map_batches` of Ray Data as well.
"""

import os

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor


class ClipSimilarity:
    """Scores batches with the columns `image`, uint8 (B, H, W, C), and `prompt`."""

    def __init__(self) -> None:
        name = os.environ.get("CLIP_MODEL", "openai/clip-vit-base-patch32")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = CLIPModel.from_pretrained(name).to(self.device).eval()
        self.processor = CLIPProcessor.from_pretrained(name)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The column `clip_similarity`, from -1 to 1."""
        images = [Image.fromarray(image.squeeze()).convert("RGB") for image in batch["image"]]
        given = self.processor(
            text=[str(text) for text in batch["prompt"]],
            images=images,
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        out = self.model(**given.to(self.device))
        return {"clip_similarity": (out.text_embeds * out.image_embeds).sum(1).cpu().numpy()}
