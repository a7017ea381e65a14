"""Which heads a LLaMA has, and which of them make up one differential head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def padded_counts(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Returns how many heads and KV heads there are once they pair: an odd count gets one more, idle KV head.

    Heads per KV head stay as they are, so an idle KV head brings that many idle heads. Theirs are the last numbers.
    """
    kv_heads = num_kv_heads + num_kv_heads % 2
    return num_heads // num_kv_heads * kv_heads, kv_heads


def paired_fields(num_heads: int, num_kv_heads: int, map_dim: int) -> dict[str, int]:
    """Returns the config fields of a V1 that so many heads make: two of LLaMA's are one of ours, twice as wide."""
    return {
        "num_attention_heads": num_heads // 2,
        "num_key_value_heads": num_kv_heads // 2,
        "head_dim": 2 * map_dim,
    }


@dataclass(frozen=True)
class HeadPairing:
    """Which LLaMA heads make up the differential heads of one layer.

    `query_heads[2 i + m]` is the LLaMA head that becomes map m of head i, `kv_heads[2 g + m]` the KV head whose keys
    become map m's keys of KV head g and whose values become half m of its value. `query_heads` must read the KV
    heads that `kv_heads` puts at their place. ValueError otherwise. Counts are those of `padded_counts`: heads that
    LLaMA does not have are idle.
    """

    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, heads in (("query_heads", self.query_heads), ("kv_heads", self.kv_heads)):
            if len(heads) % 2 or not heads or sorted(heads) != list(range(len(heads))):
                raise ValueError(f"{name} must list an even number of heads, each once, got {heads}")
        if len(self.query_heads) % len(self.kv_heads):
            raise ValueError(f"{len(self.query_heads)} query heads cannot share {len(self.kv_heads)} KV heads evenly")
        group = len(self.query_heads) // len(self.kv_heads)
        for place, head in enumerate(self.query_heads):
            expected = self.kv_heads[2 * (place // 2 // group) + place % 2]
            if head // group != expected:
                raise ValueError(f"query head {head} at place {place} reads KV head {head // group}, not {expected}")

    @classmethod
    def adjacent(cls, num_heads: int, num_kv_heads: int) -> "HeadPairing":
        """The default without calibration: KV heads 2g and 2g + 1, their query heads j with one another."""
        group = num_heads // num_kv_heads
        places = range(num_heads // 2)
        heads = ((2 * (i // group) + m) * group + i % group for i in places for m in (0, 1))
        return cls(tuple(heads), tuple(range(num_kv_heads)))

    @classmethod
    def halves(cls, num_heads: int, num_kv_heads: int) -> "HeadPairing":
        """The order of transformers' own `diffllama`: map h pairs with map h + H / 2, KV heads likewise."""
        query_heads = (i + m * num_heads // 2 for i in range(num_heads // 2) for m in (0, 1))
        kv_heads = (g + m * num_kv_heads // 2 for g in range(num_kv_heads // 2) for m in (0, 1))
        return cls(tuple(query_heads), tuple(kv_heads))


@dataclass(frozen=True)
class Sizes:
    """What the table needs to know of a model; head counts are LLaMA's (twice ours in V1)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    map_dim: int
    lm_head: bool = True  # False: tied to the embedding, or a model without a head
    attention_bias: bool = False  # of queries, keys and values
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Any], *, num_heads: int, num_kv_heads: int, map_dim: int, lm_head: bool = True
    ) -> "Sizes":
        """Returns the sizes that config fields by our names mean; heads are counted by the caller, as LLaMA's."""
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            map_dim=map_dim,
            lm_head=lm_head,
            attention_bias=fields["attention_bias"],
            attention_out_bias=fields.get("attention_out_bias", fields["attention_bias"]),
            mlp_bias=fields.get("mlp_bias", False),
            qk_norm=fields.get("use_qk_norm", False),
        )

    def shape(self, letters: str) -> tuple[int, ...]:
        """The shape that a row of `TENSORS` spells."""
        width = {
            "V": self.vocab_size,
            "C": self.hidden_size,
            "I": self.intermediate_size,
            "Q": self.num_heads * self.map_dim,
            "K": self.num_kv_heads * self.map_dim,
            "D": self.map_dim,
        }
        return tuple(width[letter] for letter in letters)
