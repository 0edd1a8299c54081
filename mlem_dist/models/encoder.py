"""The encoder: from prompts to conditions, by the text encoders of a pipeline of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlem_dist.errors import UsageError
from mlem_dist.extras import require
from mlem_dist.files import read_object
from mlem_dist.models.imports import quiet_diffusers
from mlem_dist.models.weights import SAFE, VARIANT, chosen_weights
from mlem_dist.solver.condition import MASK, NEGATIVE, POOLED, RESOLUTION, SIZES, TEXT, Condition

BATCH = 16
"""Number of texts that are encoded together."""

Text = str | None
"""A prompt or a negative prompt; None for none, which pipelines may encode otherwise than an empty text."""

Encode = Callable[[Any, Sequence[Text]], dict[str, Tensor]]
"""Function from a pipeline and texts to tensors with a row for each text."""


def encode_clip(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Texts as `StableDiffusionPipeline` encodes them, without a difference between prompts and negative prompts."""
    return {TEXT: pipeline.encode_prompt([text or "" for text in texts], pipeline.text_encoder.device, 1, False)[0]}


def encode_clips(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Texts as `StableDiffusionXLPipeline` encodes them; no text may be a tensor of zeros."""
    device = pipeline.text_encoder_2.device
    embedded, _, pooled, _ = pipeline.encode_prompt([text or "" for text in texts], None, device, 1, False)
    if pipeline.config.force_zeros_for_empty_prompt:
        absent = torch.tensor([text is None for text in texts], device=device)
        embedded = embedded.masked_fill(absent[:, None, None], 0)
        pooled = pooled.masked_fill(absent[:, None], 0)
    return {TEXT: embedded, POOLED: pooled}


def encode_masked(pipeline: Any, texts: Sequence[Text], **further: Any) -> dict[str, Tensor]:
    """Texts as pipelines encode them by default that give models a mask; no text is an empty one.

    Cleaning of captions, which is the default of some, needs the packages bs4 and ftfy; without them it is left out.
    """
    device, clean = pipeline.text_encoder.device, _default(pipeline, "clean_caption")
    texts = [text or "" for text in texts]
    embedded, mask, _, _ = pipeline.encode_prompt(texts, False, device=device, clean_caption=clean, **further)
    return {TEXT: embedded, MASK: mask}


def encode_t5(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """As `encode_masked`, for the pipelines of PixArt: text encoders see the padding of the longest text only.

    Their tokens attend to no padding, and the mask hides it from the model, so that the rest of it may be zeros.
    """
    length, clean = _default(pipeline, "max_sequence_length"), _default(pipeline, "clean_caption")
    cleaned = pipeline._text_preprocessing([text or "" for text in texts], clean_caption=clean)
    longest = max(map(len, pipeline.tokenizer(cleaned, truncation=True, max_length=length).input_ids))
    encoded = encode_masked(pipeline, texts, max_sequence_length=longest)
    return {
        TEXT: nn.functional.pad(encoded[TEXT], (0, 0, 0, length - longest)),
        MASK: nn.functional.pad(encoded[MASK], (0, length - longest)),
    }


def encode_instructed(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Prompts as `SanaPipeline` encodes them: after its instruction to the text encoder, which is a language model."""
    instruction = _default(pipeline, "complex_human_instruction")
    return encode_masked(pipeline, texts, complex_human_instruction=instruction)


def _default(pipeline: Any, name: str) -> Any:
    """The default of an argument of a pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def encode_joint(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Texts as `StableDiffusion3Pipeline` encodes them, but without the zeros that stand for T5 where there is none."""
    device, texts = pipeline.text_encoder.device, [text or "" for text in texts]
    if pipeline.text_encoder_3 is not None:
        embedded, _, pooled, _ = pipeline.encode_prompt(texts, None, None, device, 1, False)
        return {TEXT: embedded, POOLED: pooled}
    # The pipeline would ask its transformer for the width of the zeros.
    clips = [pipeline._get_clip_prompt_embeds(texts, 1, device, clip_model_index=index) for index in (0, 1)]
    embedded, pooled = (torch.cat(parts, -1) for parts in zip(*clips, strict=True))
    return {TEXT: embedded, POOLED: pooled}


def encode_pooled(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Texts as `FluxPipeline` encodes them."""
    embedded, pooled, _ = pipeline.encode_prompt([text or "" for text in texts], device=pipeline.text_encoder.device)
    return {TEXT: embedded, POOLED: pooled}


def encode_padded(pipeline: Any, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Texts as `ChromaPipeline` encodes them, whose mask keeps the first token of padding."""
    texts, device = [text or "" for text in texts], pipeline.text_encoder.device
    embedded, _, mask, *_ = pipeline.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
    return {TEXT: embedded, MASK: mask}


ENCODERS: Mapping[str, Encode] = {
    "ChromaPipeline": encode_padded,
    "FluxPipeline": encode_pooled,
    "PixArtAlphaPipeline": encode_t5,
    "PixArtSigmaPipeline": encode_t5,
    "SanaPipeline": encode_instructed,
    "StableDiffusion3Pipeline": encode_joint,
    "StableDiffusionPipeline": encode_clip,
    "StableDiffusionXLPipeline": encode_clips,
}
"""The function for each class of pipelines that are conditioned on prompts."""

NEGATIVE_ENCODERS: Mapping[str, Encode] = {"SanaPipeline": encode_masked}
"""The function for negative prompts, where it is another one."""

SIZED = ("StableDiffusionXLPipeline",)
"""Classes of pipelines whose models are conditioned on sizes."""

RESOLVED = ("PixArtAlphaPipeline",)
"""Classes of pipelines whose models may be conditioned on the image's height and width."""

BINNED = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline")
"""Classes of pipelines that make images of the nearest of their sizes and resize them, unless they are told not to."""

MASKED = (*BINNED, "ChromaPipeline")
"""Classes of pipelines whose models take a mask of the prompt's tokens."""


class Encoder:
    """The text encoders of a pipeline.

    Args:
        pipeline: the pipeline, without its other models.
        kind: its class.
        size: height and width of the images, in pixels.
        negative: whether conditions have negative prompts, which levels without unconditional evaluations do not need.
    """

    def __init__(self, pipeline: Any, kind: str, size: tuple[int, int], negative: bool) -> None:
        self._pipeline = pipeline
        self._encode = {"": ENCODERS[kind], NEGATIVE: NEGATIVE_ENCODERS.get(kind, ENCODERS[kind])}
        self._sizes: dict[str, list[float]] = {SIZES: [*size, 0, 0, *size]} if kind in SIZED else {}
        if kind in RESOLVED:
            self._sizes[RESOLUTION] = [*size, size[0] / size[1]]
        self._negative = negative

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], negative_prompts: Sequence[Text]) -> Condition:
        """The condition of B samples, on the device of the text encoders; equal texts are encoded once."""
        condition: dict[str, Tensor] = {}
        for prefix, texts in (("", prompts), (NEGATIVE, negative_prompts))[: 1 + self._negative]:
            distinct = list(dict.fromkeys(texts))
            parts = [distinct[start : start + BATCH] for start in range(0, len(distinct), BATCH)]
            with quiet_diffusers():
                encoded = [self._encode[prefix](self._pipeline, part) for part in parts]
            rows = torch.tensor([distinct.index(text) for text in texts])
            for name in encoded[0]:
                every = torch.cat([part[name] for part in encoded])
                condition[prefix + name] = every[rows.to(every.device)]
        for name, sizes in self._sizes.items():
            row = torch.tensor([sizes], dtype=torch.float32, device=condition[TEXT].device)
            condition[name] = row.expand(len(prompts), -1)
        return condition


def encoder_parts(folder: Path) -> list[str]:
    """The names of the text encoders and tokenizers in a pipeline's folder, each a folder of its own."""
    index = read_object(folder / "model_index.json", "pipeline")
    return sorted(
        name
        for name, value in index.items()
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(value, list) and value[1] is not None
    )


def encoder_files(folder: Path) -> list[str]:
    """The paths of the files that an encoder is loaded from, relative to the pipeline's folder.

    Raises:
        UsageError: if a text encoder has no weights in safetensors files.
    """
    names = ["model_index.json"]
    for part in encoder_parts(folder):
        files = sorted(file.name for file in (folder / part).iterdir() if file.is_file())
        weights = [name for name in files if name.endswith(".safetensors")]
        if part.startswith("text_encoder") and not weights:
            raise UsageError(
                f"{folder / part} has no weights in safetensors files; load the pipeline by diffusers and save it "
                "again by `save_pretrained`"
            )
        others = [name for name in files if name.endswith((".json", ".txt", ".model"))]
        names += [f"{part}/{name}" for name in (*chosen_weights(weights), *others)]
    return names


def _variant(folder: Path) -> str | None:
    """The variant of the text encoders' weights; None if one of them has weights of no variant."""
    variants: set[str | None] = set()
    for part in encoder_parts(folder):
        if part.startswith("text_encoder"):
            chosen = chosen_weights([file.name for file in (folder / part).glob("*.safetensors")])
            variants |= {match[1] if (match := VARIANT.search(name)) else None for name in chosen}
    return variants.pop() if len(variants) == 1 else None


def encoder_shapes(folder: Path, kind: str) -> dict[str, tuple[int | None, ...]]:
    """The shapes, without the batch, of the tensors that an encoder makes, as for `Family.inputs`."""
    configs = [
        read_object(folder / part / "config.json", "text encoder's configuration")
        for part in encoder_parts(folder)
        if part.startswith("text_encoder")
    ]
    # T5 has its own name of the width.
    widths = [int(config.get("hidden_size") or config["d_model"]) for config in configs]
    shapes: dict[str, tuple[int | None, ...]] = {TEXT: (None, sum(widths))}
    if kind in SIZED:
        shapes |= {POOLED: (int(configs[-1]["projection_dim"]),), SIZES: (6,)}
    if kind in MASKED:
        shapes[MASK] = (None,)
    if kind in RESOLVED:
        shapes[RESOLUTION] = (3,)
    if kind == "StableDiffusion3Pipeline":
        # Texts of the CLIPs alone get the model's width.
        clips = [config for config in configs if "projection_dim" in config]
        shapes = {TEXT: (None, widths[-1] if len(configs) > len(clips) else None)}
        shapes[POOLED] = (sum(int(config["projection_dim"]) for config in clips),)
    if kind == "FluxPipeline":
        shapes = {POOLED: (widths[0],), TEXT: (None, widths[-1])}
    return shapes


def load_encoder(
    folder: Path, kind: str, size: tuple[int, int], negative: bool, device: torch.device | str, precision: str
) -> Encoder:
    """The encoder of the pipeline of class `kind` in a folder as `save_pretrained` writes it.

    `size` and `negative` are as for `Encoder`.

    Raises:
        UsageError: if the package transformers is not installed.
    """
    require("transformers", "prompts", "text")
    import diffusers

    index = read_object(folder / "model_index.json", "pipeline")
    parts = {name for name, value in index.items() if isinstance(value, list)} - {*encoder_parts(folder)}
    with quiet_diffusers():
        pipeline = getattr(diffusers, kind).from_pretrained(
            folder,
            torch_dtype=getattr(torch, precision),
            variant=_variant(folder),
            **SAFE,
            **dict.fromkeys(parts),
        )
    return Encoder(pipeline.to(device), kind, size, negative)
