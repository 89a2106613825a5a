"""What a decoder-only transformer is made of: the choices that published models make."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

GATED_ACTIVATIONS = ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer. Sizes that are None follow from the others."""

    vocab_size: int = 8192
    layers: int = 4
    width: int = 256
    """D, the size of the residual stream."""
    embeddings: Literal["tied", "untied"] = "tied"
    """Whether the output projection is the embedding table or a matrix of its own."""

    heads: int = 4
    kv_heads: int | None = None
    """Fewer than heads: grouped-query attention; 1: multi-query. None: as many as heads."""
    head_dim: int | None = None
    """None: width / heads."""
    windows: tuple[int, ...] = ()
    """Repeating pattern over layers: how many tokens back a layer sees, itself included; 0 sees all.
    `(1024, 1024, 0)` is two local layers, then a global one, and so on. Empty: all layers are global."""
    qk_norm: Literal["none", "per_head", "all_heads"] = "none"
    """Norm of queries and keys before positions are applied: over each head (Qwen 3, Gemma 3) or over all
    heads together (OLMo 2)."""
    attention_softcap: float | None = None
    """Scores become cap * tanh(score / cap) (Gemma 2)."""
    output_softcap: float | None = None
    """The same for the logits."""

    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "squared_relu"] = "swiglu"
    hidden: int | None = None
    """F, the size of the feed-forward layer. None: 4 * width, or for gated activations 8/3 * width rounded up
    to a multiple of 64 (as many parameters)."""

    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    """pre: x + f(norm(x)); post: norm(x + f(x)) (the first transformers); sandwich: x + norm(f(norm(x)))
    (Gemma 2); output: x + norm(f(x)) (OLMo 2)."""
    norm_parameters: Literal["none", "scale", "scale_and_bias"] = "scale"
    norm_epsilon: float = 1e-5
    bias: Literal["none", "qkv", "all"] = "none"
    """Biases of the linear layers: none, those that make queries, keys and values (Qwen 2), or all (GPT-2)."""

    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    rope_theta: float = 10_000.0
    context: int = 1024
    """Rows of the table of learned positions: the longest sequence that such a model can read."""

    dropout: float = 0.0
    """On the embeddings and on what each attention and feed-forward layer adds."""
    init: Literal["gpt2", "lecun", "small"] = "gpt2"
    """Scheme of initialisation, see lm/model/initialization.py."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the products are computed in; parameters are float32. auto: bfloat16, but float32 on CPU."""

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return -(-self.width * 8 // (3 * 64)) * 64 if self.gated else 4 * self.width

    @property
    def pattern(self) -> tuple[int, ...]:
        """Windows of the layers that repeat; (0,) when all are alike."""
        return self.windows or (0,)

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("vocab_size", "layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        for name in ("kv_heads", "head_dim", "hidden"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield name, f"must be at least 1, or none; got {getattr(self, name)}"
        if self.heads >= 1 and self.width >= 1 and self.head_dim is None and self.width % self.heads:
            yield (
                "heads",
                f"{self.heads} does not divide model.width = {self.width}; nearest that do: "
                f"{_nearest_divisors(self.width, self.heads)}. Or set model.head_dim",
            )
        elif self.positions == "rotary" and self.heads >= 1 and self.head_width % 2:
            yield (
                "head_dim",
                f"rotary positions turn pairs: the head width must be even, got {self.head_width}",
            )
        if self.heads >= 1 and self.key_value_heads >= 1 and self.heads % self.key_value_heads:
            yield (
                "kv_heads",
                f"{self.kv_heads} does not divide model.heads = {self.heads}; nearest that do: "
                f"{_nearest_divisors(self.heads, self.key_value_heads)}",
            )
        if any(window < 0 for window in self.windows):
            yield "windows", f"a window is a number of tokens, or 0 for all; got {self.windows}"
        if len(self.windows) > max(self.layers, 1):
            yield "windows", f"a pattern of {len(self.windows)} layers, but model.layers = {self.layers}"
        for name in ("attention_softcap", "output_softcap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                yield name, f"must be above 0, or none for no cap; got {cap}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"must be at least 0 and below 1, got {self.dropout}"
        for name in ("norm_epsilon", "rope_theta"):
            if not getattr(self, name) > 0:
                yield name, f"must be above 0, got {getattr(self, name)}"
        if self.norm == "rms" and self.norm_parameters == "scale_and_bias":
            yield "norm_parameters", "scale_and_bias is for model.norm = 'layer'; RMSNorm has scale or none"


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:3])
    return ", ".join(map(str, nearest))
