"""A Hugging Face model as a `Subject`: the one module here that needs torch and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from transformers import DynamicCache

from kvd.client.calibration.subject import Floats, Tokens
from kvd.client.connectors.transformers_model import extend, layout_of
from kvd.codecs.base import Span
from kvd.codecs.profile import Rope
from kvd.codecs.rope import rotation, unrotate
from kvd.errors import InvalidRequest, Unsupported
from kvd.layout import CHUNK_TOKENS

# In which the weights may be loaded later; a digest of them differs.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Keys of layer 0 depend on the token alone once the rotation is taken out: to this part of their
# norm, in float32.
ROPE_ERROR_MAX = 1e-3
_ROPE_TOKENS = 64


class HuggingFaceSubject:
    """A causal LM and its tokenizer. The model is converted to float32 and keeps no gradients.

    Raises `Unsupported` for a model that the connector would refuse, or whose rotation cannot be
    taken out of its keys.
    """

    def __init__(self, model: Any, tokenizer: Any, *, revision: str | None = None) -> None:
        self._tokenizer = tokenizer
        model.eval()
        self.layout = layout_of(model, chunk_tokens=CHUNK_TOKENS, salt="", revision=revision)
        self.weights = (f"revision={revision}",) if revision else _weights(model)
        # Past the model's own `float`, which refuses what came out of a GGUF file.
        self._model = torch.nn.Module.float(model).requires_grad_(False)
        # Modules have no types for what they carry.
        self._config: Any = model.config
        self.rope = self._find_rope()

    def encode(self, text: str) -> Tokens:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return np.asarray(ids, np.int64)

    def kv_of(self, ids: Tokens) -> Floats:
        with torch.no_grad():
            kv: Floats = _stack(self._cache_of(ids)).bfloat16().float().numpy()
        return kv

    def log_probs(self, kv: Floats, ids: Tokens) -> Floats:
        with torch.no_grad():
            found: Floats = self._continue(torch.from_numpy(kv), ids).numpy()
        return found

    def gradients(self, kv: Floats, ids: Tokens, *, seed: int) -> Floats:
        leaf = torch.from_numpy(kv).clone().requires_grad_(True)
        log_probs = self._continue(leaf, ids)
        dice = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=dice)
        (found,) = torch.autograd.grad(log_probs.gather(1, drawn).sum(), leaf)
        gradients: Floats = found.numpy()
        return gradients

    def _continue(self, kv: torch.Tensor, ids: Tokens) -> torch.Tensor:
        """Log probabilities float32 [tokens, vocabulary]."""
        cache = DynamicCache(config=self._config)
        for layer, planes in enumerate(kv):
            keys, values = (plane.transpose(0, 1)[None] for plane in planes)
            cache.update(keys, values, layer)
        start = kv.shape[2]
        positions = torch.arange(start, start + len(ids))[None]
        output = self._model(
            input_ids=torch.from_numpy(ids)[None],
            past_key_values=cache,
            use_cache=True,
            position_ids=positions,
        )
        log_probs: torch.Tensor = output.logits[0].float().log_softmax(-1)
        return log_probs

    def _cache_of(self, ids: Tokens) -> Any:
        cache = DynamicCache(config=self._config)
        extend(self._model, cache, torch.from_numpy(ids)[None])
        return cache

    def _find_rope(self) -> Rope:
        """The model is asked: of the ways to pair dims, the one that makes keys of one token alike
        at all positions.
        """
        frequencies = _frequencies(self._model)
        if frequencies is None:
            return Rope()
        ids = np.full(_ROPE_TOKENS, 7 % self._config.vocab_size, np.int64)
        with torch.no_grad():
            keys = _stack(self._cache_of(ids))[0, 0].numpy()
        span = Span(start=0, num_tokens=_ROPE_TOKENS)
        for rope in (
            Rope(frequencies=frequencies, style="half"),
            Rope(frequencies=frequencies, style="pairs"),
        ):
            plain = unrotate(keys, rotation(rope, span))
            if np.linalg.norm(plain - plain[:1]) <= ROPE_ERROR_MAX * np.linalg.norm(plain):
                return rope
        raise Unsupported("the rotation of the model's keys is none that kvd can take out")


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


def load_subject(name: str, *, revision: str | None = None) -> HuggingFaceSubject:
    """The model in a folder, also one with a single GGUF file, or of that name on the hub."""
    options: dict[str, Any] = {"dtype": "auto"}
    files = sorted(Path(name).glob("*.gguf")) if Path(name).is_dir() else []
    if len(files) == 1 and not (Path(name) / "config.json").exists():
        # Float32, so that what rounds to another dtype is what the file means.
        options = {"gguf_file": files[0].name, "dtype": torch.float32}
    try:
        with _quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
            options.pop("dtype")
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InvalidRequest(f"model {name!r} cannot be loaded: {error}") from error
    return HuggingFaceSubject(model, tokenizer, revision=revision)


def _stack(cache: Any) -> torch.Tensor:
    """`[layers, 2, tokens, kv_heads, head_dim]` of a cache with one sequence."""
    planes = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(planes).transpose(2, 3).contiguous()


def _frequencies(model: Any) -> Any:
    """float64 [pairs], or None for a model without RoPE."""
    found = [
        buffer.detach().cpu().double().numpy()
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] == "inv_freq"
    ]
    if not found:
        return None
    if any(not np.array_equal(other, found[0]) for other in found):
        raise Unsupported("the model's layers have several kinds of RoPE")
    return found[0]


def _weights(model: Any) -> tuple[str, ...]:
    """What the connector calls these weights, had they been loaded in each of `DTYPES`: parameters
    are converted, buffers stay.
    """
    names = {name for name, _ in model.named_parameters()}
    tensors = sorted([*model.named_parameters(), *model.named_buffers()])
    digests = [
        _digest((name, _as(tensor, dtype, name in names)) for name, tensor in tensors)
        for dtype in DTYPES
    ]
    return tuple(f"weights={digest}" for digest in digests)


def _as(tensor: Any, dtype: torch.dtype, is_weight: bool) -> Any:
    return tensor.detach().to(dtype) if is_weight and tensor.is_floating_point() else tensor


def _digest(tensors: Iterator[tuple[str, Any]]) -> str:
    # As `weights_digest` of the connector; a test holds the two together.
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(xxhash.xxh3_128_digest(raw))
    return digest.hexdigest()
