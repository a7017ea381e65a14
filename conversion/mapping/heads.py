"""Which heads a LLaMA has, and which of them make up one differential head."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadPairing:
    """Which LLaMA heads make up the differential heads of one layer.

    Attributes:
        query_heads: `query_heads[2 i + m]` is the LLaMA head that becomes map m of head i. Numbers are those of
            `padded_counts`; heads that LLaMA does not have are idle.
        kv_heads: `kv_heads[2 g + m]` is the LLaMA KV head whose keys become those of map m, and whose values become
            half m of the value, of KV head g.

    Raises:
        ValueError: A head is not listed exactly once, or a query head does not read the KV head at its position.
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
        for position, head in enumerate(self.query_heads):
            expected = self.kv_heads[2 * (position // 2 // group) + position % 2]
            if head // group != expected:
                raise ValueError(
                    f"query head {head} at position {position} reads KV head {head // group}, not {expected}"
                )

    @property
    def num_heads(self) -> int:
        """Returns the number of differential heads."""
        return len(self.query_heads) // 2

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Returns the differential heads that share each KV head."""
        num_kv_heads = len(self.kv_heads) // 2
        size = self.num_heads // num_kv_heads
        return [tuple(range(start, start + size)) for start in range(0, self.num_heads, size)]

    @classmethod
    def adjacent(cls, num_heads: int, num_kv_heads: int) -> "HeadPairing":
        """Pairs KV heads 2g and 2g + 1, and their query heads in order: the default without calibration."""
        group = num_heads // num_kv_heads
        heads = ((2 * (i // group) + m) * group + i % group for i in range(num_heads // 2) for m in (0, 1))
        return cls(tuple(heads), tuple(range(num_kv_heads)))

    @classmethod
    def halves(cls, num_heads: int, num_kv_heads: int) -> "HeadPairing":
        """Pairs map h with map h + H / 2, KV heads likewise: the order of transformers' own `diffllama`."""
        query_heads = (i + m * num_heads // 2 for i in range(num_heads // 2) for m in (0, 1))
        kv_heads = (g + m * num_kv_heads // 2 for g in range(num_kv_heads // 2) for m in (0, 1))
        return cls(tuple(query_heads), tuple(kv_heads))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model from which `TENSORS` follows; numbers of heads are LLaMA's (twice ours in V1).

    Attributes:
        vocab_size: Size of the vocabulary.
        hidden_size: Hidden size.
        intermediate_size: Width of the MLP.
        num_layers: Number of layers.
        num_heads: LLaMA's heads.
        num_kv_heads: LLaMA's KV heads.
        map_dim: Width of a LLaMA head.
        lm_head: Whether there is a tensor for the head: not if it is tied to the embedding, or there is none.
        attention_bias: Whether queries, keys and values have biases.
        attention_out_bias: Whether `o_proj` has a bias.
        mlp_bias: Whether the MLP has biases.
        qk_norm: Whether queries and keys have norms.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    map_dim: int
    lm_head: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Any], *, num_heads: int, num_kv_heads: int, map_dim: int, lm_head: bool = True
    ) -> "Sizes":
        """Returns the sizes that a config means.

        Args:
            fields: Fields of the config, by our names.
            num_heads: LLaMA's heads.
            num_kv_heads: LLaMA's KV heads.
            map_dim: Width of a LLaMA head.
            lm_head: Whether there is a tensor for the head.
        """
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
        """Returns the shape that an entry of `TENSORS` spells in letters."""
        width = {
            "V": self.vocab_size,
            "C": self.hidden_size,
            "I": self.intermediate_size,
            "Q": self.num_heads * self.map_dim,
            "K": self.num_kv_heads * self.map_dim,
            "D": self.map_dim,
        }
        return tuple(width[letter] for letter in letters)


def heads_in_words(heads: Sequence[Collection[int]], num_heads: int) -> str:
    """Returns how many heads are differential, and where: "8 of 20: all of layer 1; 2 of 4 in layers 0, 3".

    Args:
        heads: The differential heads of each layer.
        num_heads: Number of heads per layer.
    """
    count = sum(map(len, heads))
    total = len(heads) * num_heads
    if count in (0, total):
        return f"all {total}" if count else f"none of {total}"
    layers: dict[int, list[int]] = {}
    for layer, chosen in enumerate(heads):
        layers.setdefault(len(chosen), []).append(layer)
    parts = []
    for size in sorted(layers.keys() - {0}, reverse=True):
        where = f"{'layer' if len(layers[size]) == 1 else 'layers'} {ranges(layers[size])}"
        parts.append(f"all of {where}" if size == num_heads else f"{size} of {num_heads} in {where}")
    return f"{count} of {total}: {'; '.join(parts)}"


def ranges(numbers: Iterable[int]) -> str:
    """Returns ascending numbers as they are typed for `--layers`: "0, 4-7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
