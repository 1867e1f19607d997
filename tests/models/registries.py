"""Every type of transformers' registries of models, by name, and how to build a tiny model of it.

A key is the name of a type, or that name with a variant of its settings: ``falcon:alibi``. ``TYPE:equal`` has as many
blocks in its vision or audio tower as in its text model. `_SETTINGS` holds the fields that a tiny config needs beside
those that every config has.
"""

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from tests.models.shrunk import enlivened, shrunk

_AUDIO_LANGUAGE = [
    "audioflamingo3",
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "moss_transcribe_diarize",
    "musicflamingo",
    "nemo_speechlm",
    "qwen2_audio",
    "qwen3_asr",
    "vibevoice_asr",
    "voxtral",
    "voxtral_realtime",
]
_WITH_TEXT = {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
_CONDITIONAL = "ForConditionalGeneration"

_Names = dict[str, str | tuple[str, ...]]

REGISTRIES: dict[str, _Names] = {
    "causal": {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES},
    "masked": {**auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES},
    "seq2seq": {
        name: made
        for name, made in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items()
        if name not in _AUDIO_LANGUAGE
    },
    "vision": {
        **{n: made for n, made in auto.MODEL_FOR_IMAGE_MAPPING_NAMES.items() if n not in _WITH_TEXT},
        "imagegpt": "ImageGPTForCausalImageModeling",
        "clip": "CLIPModel",
        "siglip": "SiglipModel",
        "siglip2": "Siglip2Model",
        "clip_vision_model": "CLIPVisionModel",
    },
    "audio": {
        **auto.MODEL_FOR_CTC_MAPPING_NAMES,
        **auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "whisper": f"Whisper{_CONDITIONAL}",
        "speech_to_text": f"Speech2Text{_CONDITIONAL}",
        "moonshine": f"Moonshine{_CONDITIONAL}",
    },
    "vision-language": {
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        "audioflamingo3": f"AudioFlamingo3{_CONDITIONAL}",
        "musicflamingo": f"MusicFlamingo{_CONDITIONAL}",
    },
}
"""Registry, type, and the names of its classes in transformers; the first is built."""

_FOUR = {"num_hidden_layers": 4}
_LATENT = {"num_key_value_heads": 4}  # latent attention gives each query head a key of its own
_LATENT_8 = {**_LATENT, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_HYBRID = {**_FOUR, "layer_types": ["linear_attention", "full_attention"] * 2}
_CONV = {**_FOUR, "layer_types": ["conv", "full_attention"] * 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SLIDING_4 = {**_FOUR, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA_4 = {**_SLIDING_4, "global_head_dim": 32}
_GEMMA_3N = {**_SLIDING_4, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
_QWEN_4 = {
    **_FOUR,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_COHERE = {"rope_parameters": {"full_attention": _ROPE}}
_LLAMA_4 = {**_FOUR, "attention_chunk_size": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
_REFORMER = {
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [32, 32],
    "attn_layers": ["local", "lsh", "local"],
    "attention_head_size": 16,
    "num_buckets": 4,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
}
_ZAMBA = {**_FOUR, **_LATENT, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_HALF = {"residual_multiplier": 0.5}

_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu"), _LATENT_8),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "minicpm3", "mistral4"), _LATENT),
    "longcat_flash": {"num_layers": 2, "moe_topk": 2, "zero_expert_num": 2, "head_dim": 8},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "bailing_hybrid": {**_HYBRID, **_LATENT, "num_mtp_layers": 0},
    "bamba": {**_FOUR, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_FOUR, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {**_FOUR, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_HYBRID, **_LATENT, "linear_num_heads": 4, "linear_head_dim": 16},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "minimax"), _HYBRID),
    "qwen4_exp_text": _QWEN_4,
    "lfm2": _CONV,
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "recurrent_gemma": {**_FOUR, "block_types": ["recurrent", "attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1},
    "zamba": {**_ZAMBA, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "xlstm": {"chunk_size": 16, "embedding_dim": 64, "autocast_kernel_dtype": "float32"},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    **{key: {"head_dim": 16, "rope_parameters": _ROPE} for key in ("hunyuan_v1_dense", "ministral")},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "rope_parameters": _ROPE},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "dots1": {
        **_LATENT,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "max_window_layers": 2,
    },
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "dots3_note_text": {
        **_LATENT,
        "head_dim": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "use_sliding_window": True,
    },
    **dict.fromkeys(("gemma3_text", "gemma2", "vaultgemma", "gpt_oss", "cohere2", "olmo3", "exaone4"), _SLIDING),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA_4),
    "gemma4_text:kvshared": {**_GEMMA_4, "num_kv_shared_layers": 2},
    "gemma4_text:moe": {
        **_GEMMA_4,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
    },
    "gemma3n_text": _GEMMA_3N,
    "gemma3n_text:kvshared": {**_GEMMA_3N, "num_kv_shared_layers": 2},
    "llama4_text": _LLAMA_4,
    "cohere_compass_text": _COHERE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "reformer": {**_REFORMER, "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    **{key: {"is_decoder": True} for key in ("bert", "electra", "roberta")},
    "blt": {
        **{name: {"vocab_size": 97} for name in ("patcher_config", "encoder_config", "decoder_config")},
        "encoder_hash_byte_group_vocab": 50,
        "patch_size": 4,
    },
    "gpt_bigcode": {"multi_query": True},
    "falcon:new": {"new_decoder_architecture": True},
    "falcon:alibi": {"alibi": True, "parallel_attn": False},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "opt:postnorm": {"do_layer_norm_before": False},
    "gpt_neox:seq": {"use_parallel_residual": False},
    "stablelm:parallel": {"use_parallel_residual": True},
    "qwen2:slide": {"use_sliding_window": True, "max_window_layers": 1},
    "granite": {**_HALF, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granite_swa", "granitemoe_swa"), _HALF),
    "phi3:longrope": {},
    **{f"masked/{name}": {} for name in ("bert", "electra", "roberta")},
    "marian": {"decoder_start_token_id": 0},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    **{
        key: {"decoder": {"is_decoder": True, "add_cross_attention": True}}
        for key in ("encoder-decoder", "vision-encoder-decoder")
    },
    "masked/reformer": _REFORMER,
    "masked/esm": {"vocab_size": 97, "pad_token_id": 0, "mask_token_id": 3},
    "masked/esmc": _LATENT,
    "masked/perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2},
    "masked/luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    **{f"vision/{name}": {"image_size": [32, 32]} for name in ("yolos",)},
    "vision/swin": {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "vision/timesformer": {"num_frames": 4},
    "vision/videomae": {"num_frames": 4, "tubelet_size": 2},
    "vision/vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "vision/vit_mae": {"mask_ratio": 0.0},
    "vision/videoprism_vision_model": {"num_frames": 4, "tubelet_size": [1, 8, 8]},
    "audio/granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "audio/wav2vec2-bert": {"feature_projection_input_dim": 160},
    "audio/whisper": {"max_source_positions": 24},
}

_TEXT_SETTINGS: dict[str, dict[str, Any]] = {
    **{key: {"rope_parameters": _MROPE} for key in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v")},
    **{
        key: {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
        for key in ("glmga", "glm_ocr", "glm4v_moe")
    },
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _HYBRID),
    "qwen4_exp": _QWEN_4,
    "dots3_note": _SETTINGS["dots3_note_text"],
    "glm5_next": {
        **_HYBRID,
        **_LATENT,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "muse_spark": {"moe_hidden_size": 64},
    **dict.fromkeys(("gemma4", "gemma4_unified"), _GEMMA_4),
    "cohere_compass": {**_FOUR, **_COHERE},
    "kimi_k25": _LATENT_8,
    "mistral_large4": _LATENT,
    "unlimited_ocr": _LATENT,
    "step3p7": {"sliding_window": 8},
    "hunyuan_vl": {"head_dim": 16, "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2},
    "qwen2_5_omni_thinker": {"rope_parameters": _MROPE},
    "llama4": _LLAMA_4,
    "gemma3": _SLIDING,
    "mllama": {"cross_attention_layers": [1]},
    "lfm2_vl": _CONV,
    "cosmos3_edge": {"rope_parameters": _MROPE},
    "nemotron_h_omni": _SETTINGS["nemotron_h"],
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "moss_transcribe_diarize"), _FOUR),
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), _FOUR),
}
"""Fields of the text model in models that also see or hear."""

_WHOLE_SETTINGS: dict[str, dict[str, Any]] = {
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "2/4"},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "gemma4": {"vision_config": {"pooling_kernel_size": 2, "use_clipped_linears": False}},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    **{key: {"vision_start_token_id": 5} for key in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    **{key: {"encoder_config": {"num_layers": 2}} for key in ("granite_speech", "granite_speech_plus")},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "nemotron_h_omni": {"image_token_id": 5, "vision_config": {"video_temporal_patch_size": 2}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "projection_dim": 64,
        }
    },
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 64, "post_conv_out_channels": 64}},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}},
        "word_timestamp_config": {"blank_token_id": 96},
    },
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": None,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_output_size": 64},
    },
    "glm5_next": {"vision_config": {"out_hidden_size": 64, "projection_intermediate_size": 48}},
    "muse_spark": {
        "audio_config": {"hidden_sizes": [16, 16], "depths": [1, 1], "patch_sizes": [16, 120], "out_hidden_size": 64},
    },
    **{key: {"image_token_index": 5} for key in ("blip-2", "instructblip")},
}
NOT_RUN = {
    "diffusion_gemma": "each call draws the tokens that it begins from at random, so no two calls compare",
    **dict.fromkeys(
        ("fast_vlm", "gemma3n", "perception_lm"),
        "its vision tower is a model of the package timm, which is not installed",
    ),
    "instructblipvideo": "it takes films, and Residua reads none",
    "kyutai_speech_to_text": "each position has a token of text and one of each codebook; a dataset has one token each",
    "pi0": "it takes the state of a robot beside text and images, and gives actions",
    **dict.fromkeys(
        ("qwen2_5_omni", "qwen3_omni_moe"), "the whole has no forward call; its thinker is a type of its own"
    ),
}
"""Types that the sweep does not run, and why."""
_EQUAL = [
    "qwen2_audio",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "gemma3",
    "internvl",
    "idefics3",
    "voxtral",
    "got_ocr2",
    "granite_speech",
    "deepseek_vl",
    "llama4",
    "paligemma",
    "mllama",
]
_KEPT = {
    "longcat_flash": ("num_hidden_layers", "num_key_value_heads"),
    "kimi_linear": ("q_lora_rank",),
    "xlstm": ("hidden_dim",),
    "zamba2": ("attention_hidden_size", "attention_head_dim", "mamba_headdim", "head_dim"),
    "vision/yolos": ("image_size",),
    "audio/audio-spectrogram-transformer": ("patch_size",),
}
"""Fields that stay as the class has them."""

_PLAIN = frozenset(
    [
        "swin",
        "swinv2",
        "swin2sr",
        "segformer",
        "pvt",
        "glpn",
        "dinat",
        "levit",
        "hiera",
        "efficientnet",
        "convnext",
        "convnextv2",
        "mobilevitv2",
        "mobilevit",
        "mobilenet_v1",
        "mobilenet_v2",
        "resnet",
        "regnet",
        "bit",
        "poolformer",
        "focalnet",
        "swiftformer",
        "dinov3_convnext",
    ]
)
"""Vision models with stages of several widths, which no single number makes small."""


def keys_of(registry: str) -> list[str]:
    """Return the types of a registry, and the variants of them, in a fixed order."""
    types = REGISTRIES[registry]
    variants = [key for key in _SETTINGS if ":" in key and key.partition(":")[0] in types]
    equal = [f"{name}:equal" for name in _EQUAL if name in types]
    return [*types, *(variants if registry == "causal" else ()), *equal]


def model_class(registry: str, key: str) -> type[PreTrainedModel]:
    """Return the class of a type."""
    names = REGISTRIES[registry][key.partition(":")[0]]
    found: type[PreTrainedModel] = getattr(hf, names if isinstance(names, str) else names[0])
    return found


def build(registry: str, key: str) -> PreTrainedModel:
    """Build a tiny model of one type, in evaluation mode and float32, with seeded weights."""
    kind = model_class(registry, key)
    config_class: Any = kind.config_class
    name, _, variant = key.partition(":")
    names = (f"{registry}/{key}", key, f"{registry}/{name}", name, config_class.model_type)
    if "text_config" in (config_class.sub_configs or {}):
        fields = dict(_WHOLE_SETTINGS.get(name, {}))
        if name in _TEXT_SETTINGS:
            fields["text_config"] = _TEXT_SETTINGS[name]
    else:
        fields = next((_SETTINGS[each] for each in names if each in _SETTINGS), {})
    config = shrunk(
        config_class,
        fields,
        keep=next((_KEPT[each] for each in names if each in _KEPT), ()),
        plain=registry == "vision" and name in _PLAIN,
        tower_depth=3 if variant == "equal" else 2,
    )
    torch.manual_seed(0)
    model = kind(config)
    model.train(False)
    return enlivened(model)
