"""Differential attention by its definition in float64, and the inputs that the kernel tests compare on.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.
"""

import dataclasses
import itertools

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    variant: str = "v1"  # "v1": one key a map; "v2": shared keys, lambda per row; "one_map": plain attention
    B: int = 1
    H: int = 2
    K: int = 1
    T: int = 65
    S: int = 65
    d: int = 16
    is_causal: bool = True
    sliding_window: int | None = None
    key_start: tuple[int, ...] | None = None
    key_length: tuple[int, ...] | int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    boundaries: tuple[tuple[int, ...], ...] | None = None  # as cu_seqlens, a row each, up to the last token
    norm: bool = False
    diff_lambda: float = 0.6
    trained: bool = False  # scores as a trained LLaMA's: about 50, and a sink; normal ones otherwise
    dtype: torch.dtype = torch.float32

    @property
    def maps(self):
        return 1 if self.variant == "one_map" else 2

    def tolerance(self, by_dtype):
        """Float32 rounds scores of 57 in 16 times larger steps; in 16 bits, what keys share cancels in sums of dS."""
        larger = 10 if self.dtype == torch.float32 else 2
        return by_dtype[self.dtype] * (larger if self.trained else 1)

    def options(self, device="cpu"):
        """Keyword arguments of the kernel, without norm_weight."""
        options = {"scaling": self.d**-0.5, "is_causal": self.is_causal, "sliding_window": self.sliding_window}
        for name in ("key_start", "key_length", "cu_seqlens"):
            given = getattr(self, name)
            options[name] = None if given is None else torch.tensor(given, dtype=torch.int32, device=device)
        if self.boundaries is not None:
            rows = [
                [(begin, end) for begin, end in itertools.pairwise(row) for _ in range(begin, end)]
                for row in self.boundaries
            ]
            options["key_ranges"] = torch.tensor(rows, dtype=torch.int32, device=device)
        return options | {"norm_eps": 1e-5, "norm_scale": 0.7}

    def tensors(self, device="cpu"):
        """Leaves by name, laid out as in a model: query (B, T, 2H, d) transposed, value part of a longer cache."""
        generator = torch.Generator().manual_seed(self.T * 1000 + self.S)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        D = 2 * self.d if self.variant == "v1" else self.d
        tensors = {
            "query": normal(self.B, self.T, self.maps * self.H, self.d).transpose(1, 2),
            "key": normal(self.B, self.S, self.K, D).transpose(1, 2),
            "value": normal(self.B, self.K, self.S + 3, D)[:, :, : self.S],
        }
        if self.trained:
            shared = (50 * self.d**0.5) ** 0.5
            tensors["query"][..., 0] = shared
            tensors["key"][..., :: self.d] = shared
            tensors["key"][:, :, 0, :: self.d] *= 1.08
        if self.variant == "v1":
            tensors["diff_lambda"] = torch.tensor(self.diff_lambda, device=device)
        elif self.variant == "v2":
            tensors["diff_lambda"] = torch.rand(self.B, self.T, self.H, generator=generator).to(device)
        if self.norm:
            tensors["norm_weight"] = normal(D)
        return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def gradient(self, device="cpu"):
        D = 2 * self.d if self.variant == "v1" else self.d
        shape = (self.B, self.T, self.H, D)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, self.dtype)

    def visible(self):
        """(B, T, S) mask, pair by pair from the words of the contract."""
        mask = torch.zeros(self.B, self.T, self.S, dtype=torch.bool)
        for b in range(self.B):
            length = self.key_length[b] if isinstance(self.key_length, tuple) else self.key_length
            length = self.S if length is None else length
            start = 0 if self.key_start is None else self.key_start[b]
            t = torch.arange(self.T)[:, None]
            s = torch.arange(self.S)[None, :]
            position = t + length - self.T
            seen = ((s >= start) & (s < length)).expand(self.T, self.S).clone()
            if self.is_causal:
                seen &= s <= position
            if self.sliding_window is not None:
                seen &= s > position - self.sliding_window
            boundaries = self.cu_seqlens if self.boundaries is None else self.boundaries[b]
            if boundaries is not None:
                segment = torch.full((self.S,), -1)
                for number, (begin, end) in enumerate(itertools.pairwise(boundaries)):
                    segment[begin:end] = number
                seen &= (segment[:, None] == segment[None, :]) & (segment[:, None] >= 0)
            mask[b] = seen
        return mask


def attention64(case, query, key, value, diff_lambda=None, norm_weight=None):
    """The definition in the tensors' dtype, float64 as reference: (B, T, H, D); rows that see nothing are 0."""
    mask = case.visible().to(query.device)[:, None]
    key, value = (tensor.repeat_interleave(case.H // case.K, dim=1) for tensor in (key, value))

    def map_output(query, key):
        scores = (query @ key.transpose(-1, -2) * case.d**-0.5).masked_fill(~mask, -1e30)
        return (scores.softmax(-1) * mask) @ value

    output = map_output(query[:, 0 :: case.maps], key[..., : case.d]).transpose(1, 2)
    if case.maps == 2:
        second = map_output(query[:, 1::2], key[..., -case.d :]).transpose(1, 2)
        output = output - diff_lambda[..., None] * second
    if norm_weight is not None:
        output = output * (output.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm_weight * 0.7
    return output


def expected(case, tensors, gradient):
    """Output and gradients by name, and the size that each one's error is measured against.

    That size is the tensor's norm, or a tenth of the incoming gradient's where that is more (a row with one visible
    key has gradient 0); for the one lambda of V1 the sum of what its rows contribute, without signs: they cancel.
    """
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    inputs = dict(leaves)
    if case.variant == "v1":
        rows = leaves["diff_lambda"].detach().expand(case.B, case.T, case.H).clone().requires_grad_()
        inputs["diff_lambda"] = rows
    output = attention64(case, **inputs)
    output.backward(gradient.double())
    found = {"output": output.detach()} | {name: inputs[name].grad for name in inputs}
    floor = 0.1 * gradient.double().norm()
    sizes = {name: torch.maximum(tensor.norm(), floor) for name, tensor in found.items()}
    if case.variant == "v1":
        sizes["diff_lambda"] = torch.maximum(found["diff_lambda"].abs().sum(), floor)
        found["diff_lambda"] = found["diff_lambda"].sum()
    return found, sizes


def errors(case, attention, device="cpu", poison=False):
    """Relative error of `attention`'s output and of each gradient, by tensor name.

    With `poison`, keys and values that no query sees are NaN for `attention`, and only for it.
    """
    tensors = case.tensors(device)
    gradient = case.gradient(device)
    want, sizes = expected(case, tensors, gradient)
    given = dict(tensors)
    if poison:
        unseen = ~case.visible().any(1)[:, None, :, None].to(device)
        for name in ("key", "value"):
            given[name] = tensors[name].detach().masked_fill(unseen, float("nan")).requires_grad_()
    weight, diff_lambda = given.get("norm_weight"), given.get("diff_lambda")
    output = attention(
        given["query"], given["key"], given["value"], diff_lambda, norm_weight=weight, **case.options(device)
    )
    output.backward(gradient)
    found = {"output": output.detach()} | {name: tensor.grad for name, tensor in given.items()}
    assert output.dtype == case.dtype and all(found[name].dtype == given[name].dtype for name in given)
    return {name: ((found[name].double() - want[name]).norm() / sizes[name]).item() for name in want}
