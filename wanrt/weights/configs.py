"""The config.json files that lie beside the weights of a Wan model, in both layouts that have them.

Source: config.json of Wan-AI/Wan2.1-*, Wan2.2-* and of their -Diffusers twins (spec 6.1, 6.3).
"""

from wanrt.config import ClipSpec, DitSpec, Umt5Spec, VaeSpec, WanSpec
from wanrt.weights.load import latent_statistics
from wanrt.weights.specs import Spec
from wanrt.weights.titles import dit_task

Json = dict[str, object]


def original_dit(spec: DitSpec, model_type: str) -> Json:
    """config.json beside the transformer in the original layout; the other parts have none."""
    config: Json = {
        "_class_name": "VaceWanModel" if spec.vace_layers else "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": spec.dim,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.freq_dim,
        "in_dim": spec.in_dim,
        "model_type": model_type,
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "out_dim": spec.out_dim,
        "text_len": spec.text_len,
    }
    if spec.vace_layers:
        config |= {"vace_layers": list(spec.vace_layers), "vace_in_dim": spec.vace_in_dim}
    return config


def model_type(model: WanSpec) -> str:
    """The original's word for the task; the 5B does text and image with one model."""
    return "ti2v" if model.vae.residual else dit_task(model.dit)


def diffusers(spec: Spec) -> Json:
    """config.json of one component's folder in the Diffusers layout."""
    match spec:
        case DitSpec():
            return _dit(spec)
        case VaeSpec():
            return _vae(spec)
        case Umt5Spec():
            return _umt5(spec)
        case ClipSpec():
            return _clip(spec)


def model_index(model: WanSpec, parts: list[str]) -> Json:
    """model_index.json for the component folders in `parts`."""
    vace = bool(model.dit.vace_layers)
    image = model.dit.in_dim > model.dit.out_dim and not vace
    pipeline = "WanVACEPipeline" if vace else "WanImageToVideoPipeline" if image else "WanPipeline"
    classes = {
        "transformer": ["diffusers", _dit_class(model.dit)],
        "transformer_2": ["diffusers", _dit_class(model.dit)],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
    }
    index: Json = {"_class_name": pipeline, "_diffusers_version": "0.35.0"}
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    index |= {part: classes[part] for part in parts}
    if model.boundary is not None:
        index["boundary_ratio"] = model.boundary
    if model.vae.residual:
        index["expand_timesteps"] = True
    return index


def scheduler(model: WanSpec) -> Json:
    """scheduler/scheduler_config.json."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "flow_shift": model.defaults.flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def _dit_class(spec: DitSpec) -> str:
    return "WanVACETransformer3DModel" if spec.vace_layers else "WanTransformer3DModel"


def _dit(spec: DitSpec) -> Json:
    config: Json = {
        "_class_name": _dit_class(spec),
        "added_kv_proj_dim": spec.dim if spec.image_dim else None,
        "attention_head_dim": spec.head_dim,
        "cross_attn_norm": True,
        "eps": spec.eps,
        "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.freq_dim,
        "image_dim": spec.image_dim,
        "in_channels": spec.in_dim,
        "num_attention_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "out_channels": spec.out_dim,
        "patch_size": list(spec.patch_size),
        "pos_embed_seq_len": spec.image_pos_tokens,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": spec.text_dim,
    }
    if spec.vace_layers:
        config |= {"vace_layers": list(spec.vace_layers), "vace_in_channels": spec.vace_in_dim}
    return config


def _vae(spec: VaeSpec) -> Json:
    mean, std = latent_statistics(spec.z_dim)
    config: Json = {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": spec.base_dim,
        "dim_mult": list(spec.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(mean),
        "latents_std": list(std),
        "num_res_blocks": spec.num_res_blocks,
        "temperal_downsample": list(spec.temporal_downsample),
        "z_dim": spec.z_dim,
    }
    if spec.decoder_base_dim != spec.base_dim:
        config["decoder_base_dim"] = spec.decoder_base_dim
    if spec.residual:
        channels = 3 * spec.patch**2
        config |= {"is_residual": True, "patch_size": spec.patch}
        config |= {"in_channels": channels, "out_channels": channels}
        config |= {"scale_factor_spatial": spec.spatial_stride, "scale_factor_temporal": 4}
    return config


def _umt5(spec: Umt5Spec) -> Json:
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": spec.ffn_dim,
        "d_kv": spec.attn_dim // spec.num_heads,
        "d_model": spec.dim,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": spec.eps,
        "model_type": "umt5",
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "relative_attention_max_distance": spec.max_distance,
        "relative_attention_num_buckets": spec.num_buckets,
        "vocab_size": spec.vocab_size,
    }


def _clip(spec: ClipSpec) -> Json:
    return {
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": spec.dim,
        "image_size": spec.image_size,
        "intermediate_size": spec.mlp_dim,
        "layer_norm_eps": spec.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "patch_size": spec.patch_size,
    }
