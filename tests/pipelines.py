"""Tiny pipelines of diffusers with random weights, in the folders that `save_pretrained` writes."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

SCHEDULERS: dict[str, dict[str, Any]] = {
    # As they come: DiT with linear betas, Stable Diffusion with a spacing and an offset of its own, SANA with a flow.
    "pixels": {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "dit": {"clip_sample": False},
    "sd": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "sana": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}
SCHEDULERS["sdxl"] = SCHEDULERS["sd"]
SCHEDULERS["pixart-alpha"] = SCHEDULERS["pixart-sigma"] = SCHEDULERS["dit"]
FLOWS = {
    "sd3": {"shift": 3.0},
    "sd3-clip": {"shift": 3.0},
    "flux-dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
    "flux-schnell": {"shift": 1.0},
    "chroma": {"shift": 3.0},
}
SCHEDULERS |= FLOWS

IMAGE_SIZES = {
    "chroma": (16, 24),
    "flux-dev": (16, 24),
    "flux-schnell": (16, 16),
    "pixart-alpha": (16, 24),
    "sana": (32, 32),
}
"""Height and width of images for pipelines whose models say that they were trained for others, or nothing."""


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with a vocabulary of single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = [c for c in string.printable if not c.isspace()]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_encoder(tokens: int, width: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        eos_token_id=tokens - 1,
        bos_token_id=tokens - 2,
        pad_token_id=tokens - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int) -> tuple[Any, Any]:
    """T5's tokenizer with a vocabulary of single characters, and its encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokens = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *string.ascii_letters, *string.digits]
    vocabulary = [(token, -float(i > 2)) for i, token in enumerate(tokens)]
    config = T5Config(vocab_size=len(tokens), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5Tokenizer(vocabulary, extra_ids=0), T5EncoderModel(config).eval()


def vae(**further: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **{"latent_channels": 4, "scaling_factor": 0.3, **further},
    ).eval()


def conditional_unet(width: int, text: int, **further: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=4,
        norm_num_groups=4,
        **further,
    ).eval()


def pixart(width: int, text: int, sample_size: int) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=width,
        sample_size=sample_size,
        caption_channels=text,
    ).eval()


def gemma(width: int) -> tuple[Any, Any]:
    """Gemma's tokenizer with a vocabulary of single characters, and the model without its head."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\N{LOWER ONE EIGHTH BLOCK}", *string.printable.strip()]
    config = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return GemmaTokenizer({token: i for i, token in enumerate(tokens)}), Gemma2Model(config).eval()


def dc_vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    ).eval()


def sana(width: int, text: int) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=width // 2,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=width // 2,
        cross_attention_dim=width,
        caption_channels=text,
        sample_size=8,
        timestep_scale=0.5,
    ).eval()


def listen(model: Any) -> Any:
    """Make a model with random weights depend on text, time and sizes, to which it would hardly listen otherwise."""
    for name, parameter in model.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data *= 14
        if "add_embedding" in name:
            parameter.data *= 6
        if "resolution_embedder" in name:
            parameter.data *= 4
        if "time_embed" in name:
            parameter.data *= 2
        if "aspect_ratio_embedder" in name:
            parameter.data *= 20
    return model


def attend(transformer: Any, text: Any) -> None:
    """Make a transformer with random weights depend on its text, as `listen` does, and T5's tokens on each other."""
    factors = {"text_embedder": 8, "guidance_embedder": 8, "add_v_proj": 8, "attn.to_out": 4, "norm_added_k": 5}
    factors |= {"SelfAttention.q": 4, "SelfAttention.k": 4, "SelfAttention.o": 3}
    for name, parameter in (*transformer.named_parameters(), *text.named_parameters()):
        for part, factor in factors.items():
            if part in name:
                parameter.data *= factor


def flow_pipeline(kind: str, folder: Path, size: int, around: FlowMatchEulerDiscreteScheduler) -> Any:
    """A pipeline of Stable Diffusion 3, FLUX or Chroma, of a kind of `FLOWS`."""
    tokens = tokenizer(folder / "tokens")
    decoder = vae(latent_channels=16, scaling_factor=0.4, shift_factor=0.2, use_quant_conv=False)
    long_tokens, long_text = t5(48)
    blocks = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": size, "joint_attention_dim": 48}
    if kind == "chroma":
        approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
        transformer = ChromaTransformer2DModel(num_single_layers=1, axes_dims_rope=(4, 6, 6), **approximator, **blocks)
        attend(transformer, long_text)
        return ChromaPipeline(around, decoder, long_text, long_tokens, transformer)
    text = text_encoder(len(tokens), 16, kind.startswith("sd3"))
    if kind.startswith("flux"):
        transformer = FluxTransformer2DModel(
            num_single_layers=1,
            pooled_projection_dim=16,
            guidance_embeds=kind == "flux-dev",
            axes_dims_rope=(4, 6, 6),
            **blocks,
        )
        attend(transformer, long_text)
        return FluxPipeline(around, decoder, text, tokens, long_text, long_tokens, transformer)
    transformer = SD3Transformer2DModel(
        sample_size=8, caption_projection_dim=16 * size, pooled_projection_dim=40, pos_embed_max_size=12, **blocks
    )
    attend(transformer, long_text)
    second = text_encoder(len(tokens), 24, True)
    third = (None, None) if kind == "sd3-clip" else (long_text, long_tokens)
    return StableDiffusion3Pipeline(transformer, around, decoder, text, tokens, second, tokens, *third)


def make_pipeline(kind: str, folder: Path, size: int = 1, **scheduler: Any) -> Path:
    """Save a tiny pipeline of a kind of `SCHEDULERS`; `size` sets the width of its model, and the rest is the same."""
    torch.manual_seed(0)
    flow = FlowMatchEulerDiscreteScheduler if kind in FLOWS else DDIMScheduler
    around = (DPMSolverMultistepScheduler if kind == "sana" else flow)(**SCHEDULERS[kind] | scheduler)
    pipeline: Any
    if kind == "pixels":
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8 * size, 16 * size),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        pipeline = DDPMPipeline(unet, around)
    elif kind == "dit":
        decoder = vae()
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8 * size,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            norm_num_groups=4,
        )
        # Both the modulation and the last layer of a new one are near zero.
        for parameter in transformer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        pipeline = DiTPipeline(transformer, decoder, around)
    elif kind.startswith("pixart"):
        (tokens, text), decoder = t5(16), vae()
        # PixArt-alpha takes sizes if its images are of 1024 pixels.
        alpha = kind == "pixart-alpha"
        transformer = listen(pixart(24 * size, 16, 128 if alpha else 8))
        pipeline = (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(tokens, text, decoder, transformer, around)
    elif kind == "sana":
        tokens, text = gemma(16)
        pipeline = SanaPipeline(tokens, text, dc_vae(), listen(sana(16 * size, 16)), around)
    elif kind in FLOWS:
        pipeline = flow_pipeline(kind, folder, size, around)
    else:
        tokens = tokenizer(folder / "tokens")
        decoder, text = vae(), text_encoder(len(tokens), 16, False)
        if kind == "sd":
            unet = listen(conditional_unet(8 * size, 16))
            pipeline = StableDiffusionPipeline(
                decoder, text, tokens, unet, around, None, None, requires_safety_checker=False
            )
        else:
            second = text_encoder(len(tokens), 24, True)
            sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
            unet = listen(conditional_unet(8 * size, 40, projection_class_embeddings_input_dim=24 + 24, **sizes))
            pipeline = StableDiffusionXLPipeline(decoder, text, second, tokens, tokens, unet, around)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
