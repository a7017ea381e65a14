"""Every kernel and every gradient in triton's interpreter against float64, without a GPU.

TRITON_INTERPRET is read when kernels are decorated, so the tests run in a process of their own: collected without it,
this file holds one test that starts that process.
"""

import pytest
import torch
from interpreter import INTERPRETED, assert_passes_interpreted


pytest.importorskip("triton", reason="triton is not installed, so there are no kernels to interpret")

if not INTERPRETED:
    __test__ = True

    def test_kernels_pass_in_an_interpreter_process():
        assert_passes_interpreted(__file__)

else:
    from attention_float64 import Case, attention64, errors, expected

    from modeling_diff import diff_attention_triton_launches as launches
    from modeling_diff.diff_attention_triton import _forward_op, diff_attention_triton
    from modeling_diff.diff_attention_triton_tiles import TILES

    # Relative, per tensor; fp16 rounds operands, probabilities and outputs to 11 bits. bf16 is left to the GPU tests:
    # the interpreter of triton 3.9 multiplies it wrongly.
    TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
    SMALL = {"fwd": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1), "dq": (32, 16, 4, 1), "decode": (16, 4, 1)}

    @pytest.fixture(autouse=True)
    def poisoned_memory(monkeypatch):
        """Fresh memory is NaN, so that whatever a kernel leaves unwritten shows."""
        new_empty = torch.Tensor.new_empty
        empty_like = torch.empty_like

        def poison(tensor):
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
        monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))

    @pytest.fixture
    def small_tiles(monkeypatch):
        """Many tiles in small tensors: every phase of every loop runs more than once."""
        monkeypatch.setattr(launches, "choose_tiles", lambda *_, **__: (SMALL, False))

    def assert_close(case, poison=False):
        found = errors(case, diff_attention_triton, poison=poison)
        bad = {name: error for name, error in found.items() if not error <= case.tolerance(TOLERANCE)}
        if bad and case.trained and case.dtype == torch.float32:
            # On a CPU with AVX2 alone the definition itself is off by 3.1e-5 in float32, the kernels by 3.3e-5.
            itself = errors(case, lambda *given, norm_weight, **_: attention64(case, *given, norm_weight))
            bad = {name: error for name, error in bad.items() if not error <= 1.5 * itself[name]}
        assert not bad, f"{case}: {bad}"

    CASES = {
        "v1 causal": Case(B=2, H=4, K=2, norm=True),
        "v1 full": Case(T=33, S=65, is_causal=False),
        "v1 float16": Case(norm=True, dtype=torch.float16),
        "v2 causal": Case("v2", H=4, K=2, S=70),
        "v2 full": Case("v2", B=2, T=63, S=40, is_causal=False, norm=True),
        "v2 float16": Case("v2", dtype=torch.float16),
        "v1 trained": Case(H=4, K=2, d=32, norm=True, trained=True),
        "v1 trained float16": Case(H=4, K=2, d=32, norm=True, trained=True, dtype=torch.float16),
        "v2 trained": Case("v2", B=2, H=4, d=32, trained=True),
        "v2 trained float16": Case("v2", B=2, H=4, d=32, trained=True, dtype=torch.float16),
        "one map": Case("one_map", T=40),
        "lambda 0": Case(diff_lambda=0.0, T=33, S=33, norm=True),
        "more queries than keys": Case(T=63, S=20),
        "one query": Case(B=2, H=4, T=1, S=65, norm=True),
        "one key": Case("v2", T=1, S=1),
        "padded width": Case(d=24, T=33, S=33, norm=True),
        "left padding": Case(B=2, key_start=(0, 19), T=40, S=40, norm=True),
        "left padding full": Case("v2", B=2, key_start=(5, 33), T=20, S=40, is_causal=False),
        "key length": Case(B=2, key_length=(40, 63), T=33, S=80),
        "one key length": Case("v2", B=2, key_length=37, T=33, S=65, norm=True),
        "key length full": Case(B=2, key_length=(7, 65), T=20, S=65, is_causal=False),
        "padding and length": Case(B=2, key_start=(3, 20), key_length=50, T=24, S=64),
        "window": Case(sliding_window=20, T=65, S=70),
        "window of one": Case("v2", sliding_window=1, T=33, S=33),
        "packed": Case(cu_seqlens=(0, 1, 30, 47, 65), norm=True),
        "packed full": Case("v2", cu_seqlens=(0, 20, 65), is_causal=False),
        "packed with tail": Case(cu_seqlens=(0, 17, 40), T=65),
        "packed full with tail": Case(cu_seqlens=(0, 17, 40), is_causal=False),
        "packed window": Case("v2", cu_seqlens=(0, 40, 65), sliding_window=9),
        "packed rows": Case(B=2, H=4, K=2, boundaries=((0, 1, 30, 65), (0, 47, 64, 65)), norm=True),
        "packed rows full": Case("v2", B=2, T=40, S=40, boundaries=((0, 40), (0, 17, 40)), is_causal=False),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_output_and_every_gradient_match_float64(name, small_tiles):
        assert_close(CASES[name])

    @pytest.mark.parametrize("case", [CASES[name] for name in CASES if "length" in name or "tail" in name])
    def test_keys_that_nobody_sees_are_never_read(case, small_tiles):
        assert_close(case, poison=True)

    @pytest.mark.parametrize("variant", ["v1", "v2"])
    def test_one_accumulator_form_matches_float64(variant, monkeypatch):
        monkeypatch.setattr(launches, "choose_tiles", lambda *_, **__: (SMALL, True))
        assert_close(Case(variant, B=2, H=2, S=70, norm=True))
        assert_close(Case(variant, B=2, T=40, S=40, key_start=(0, 9)))

    @pytest.mark.parametrize("length", [1, 63, 65, 127])
    def test_shipped_tiles_match_float64_at_odd_lengths(length):
        # One row's norm makes lambda's gradient 0: what is left of it is fp16's rounding.
        assert_close(Case(T=length, S=length, H=1, d=32, norm=length > 1, dtype=torch.float16))
        assert_close(Case("v2", T=length, S=length, H=1, d=32, dtype=torch.float16))

    @pytest.mark.parametrize("is_sm_90", [True, False], ids=["sm_90", "others"])
    @pytest.mark.parametrize(("variant", "map_dim"), TILES)
    def test_shipped_tiles_of_every_width_match_float64(variant, map_dim, is_sm_90, monkeypatch):
        monkeypatch.setattr(launches, "_is_sm_90", lambda device: is_sm_90)
        assert_close(Case(variant, T=70, S=70, H=1, d=map_dim, norm=variant == "v1", dtype=torch.float16))

    DECODE = {
        "v1": Case(B=2, H=4, K=2, T=1, S=130, norm=True),
        "v2": Case("v2", H=4, T=1, S=127),
        "v1 trained": Case(H=4, T=2, S=130, d=32, norm=True, trained=True),
        "v2 trained": Case("v2", H=4, T=1, S=127, d=32, trained=True),
        "one map": Case("one_map", H=4, T=1, S=65),
        "several queries": Case(B=2, T=3, S=100, norm=True),
        "several queries full": Case("v2", T=5, S=33, is_causal=False),
        "more queries than keys": Case(T=5, S=3, norm=True),
        "static cache": Case(B=2, T=2, S=160, key_length=(1, 97)),
        "left padding": Case("v2", B=2, T=1, S=90, key_start=(3, 80)),
        "nothing to see": Case(B=2, T=1, S=20, key_start=(20, 0), norm=True),
        "window": Case(T=3, S=100, sliding_window=17, key_length=80),
    }

    @pytest.mark.parametrize("name", DECODE)
    def test_decode_matches_float64(name, small_tiles, monkeypatch):
        case = DECODE[name]
        tensors = case.tensors()
        want, sizes = expected(case, tensors, case.gradient())
        unseen = ~case.visible().any(1)[:, None, :, None]
        for cache in ("key", "value"):
            tensors[cache] = tensors[cache].detach().masked_fill(unseen, float("nan"))
        splits = []
        decode = launches.decode_splits
        monkeypatch.setattr(
            launches, "decode_splits", lambda *args, **kwargs: splits.append(decode(*args, **kwargs)) or splits[-1]
        )
        with torch.no_grad():
            output = diff_attention_triton(
                tensors["query"],
                tensors["key"],
                tensors["value"],
                tensors.get("diff_lambda"),
                norm_weight=tensors.get("norm_weight"),
                **case.options(),
            )
        assert len(splits) == 1
        assert (output.double() - want["output"]).norm() <= case.tolerance(TOLERANCE) * sizes["output"]

    def test_rows_without_a_visible_key_are_zero_and_so_are_their_gradients(small_tiles):
        case = Case(B=2, key_start=(0, 19), T=33, S=33, norm=True)
        tensors = case.tensors()
        output = diff_attention_triton(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            tensors["diff_lambda"],
            norm_weight=tensors["norm_weight"],
            **case.options() | {"norm_eps": 0.0},
        )
        output.backward(case.gradient())
        assert output[1, :19].eq(0).all() and tensors["query"].grad[1, :, :19].eq(0).all()
        assert tensors["key"].grad[1, :, :19].eq(0).all() and tensors["value"].grad[1, :, :19].eq(0).all()
        assert all(tensor.grad.isfinite().all() for tensor in tensors.values())

    def test_weight_of_the_norm_may_be_a_slice(small_tiles):
        case = Case(T=9, S=9, norm=True)
        tensors = case.tensors()
        weight = tensors["norm_weight"].detach()
        strided = torch.stack((weight, torch.full_like(weight, 7.0)), dim=1)[:, 0]
        states = [tensors[name].detach() for name in ("query", "key", "value", "diff_lambda")]
        outputs = [diff_attention_triton(*states, norm_weight=w, **case.options()) for w in (weight, strided)]
        assert not strided.is_contiguous() and torch.equal(*outputs)

    def test_empty_batch_gives_an_empty_output(small_tiles):
        states = [torch.empty(0, heads, length, 16) for heads, length in ((4, 1), (1, 5), (1, 5))]
        assert diff_attention_triton(*states, torch.tensor(0.5), scaling=0.25).shape == (0, 1, 2, 16)

    def test_lambda_zero_is_plain_attention(small_tiles):
        case = Case("v2", T=33, S=33)
        query, key, value, _ = (tensor.detach() for tensor in case.tensors().values())
        lambdas = torch.zeros(1, 33, 2)
        torch.testing.assert_close(
            diff_attention_triton(query, key, value, lambdas, scaling=0.25),
            diff_attention_triton(query[:, 0::2], key, value, None, scaling=0.25),
        )

    @pytest.mark.filterwarnings("ignore")
    def test_full_graph_compiles_and_operators_are_registered_soundly(small_tiles):
        case = Case(T=20, S=20, norm=True)
        compiled = torch.compile(diff_attention_triton, backend="aot_eager", fullgraph=True)
        found = errors(case, compiled)
        assert max(found.values()) <= TOLERANCE[case.dtype], found
        tensors = [tensor.detach() for tensor in case.tensors().values()]
        options = (None, None, None, 0.25, True, None, 1e-5, 0.7, True)
        for tensor in tensors:
            tensor.requires_grad_()
        torch.library.opcheck(
            _forward_op, (*tensors, *options), test_utils=("test_schema", "test_faketensor"), atol=0, rtol=0
        )

    @pytest.mark.parametrize(
        ("case", "change", "message"),
        [
            (Case(d=160, T=4, S=4), {}, "map_dim=160"),
            (Case("v2", d=260, T=4, S=4), {}, "map_dim=260"),
            (Case(H=3, K=2, T=4, S=4), {}, "multiple of 2 heads"),
            (Case(T=4, S=4, dtype=torch.float64), {}, "share one of"),
            (Case(T=4, S=4), {"scaling": 0.0}, "scaling=0.0"),
            (Case(T=4, S=4, is_causal=False), {"sliding_window": 2}, "sliding_window=2"),
            (Case(B=2, T=4, S=4, cu_seqlens=(0, 4)), {}, "batch size 1"),
            (Case(T=4, S=4, cu_seqlens=(0, 4)), {"key_start": torch.tensor([0])}, "key_start"),
            (Case(T=4, S=4, cu_seqlens=(0, 4), boundaries=((0, 4),)), {}, "not both"),
            (Case(T=4, S=5, boundaries=((0, 4),)), {}, "as many keys as queries"),
            (Case(B=2, T=4, S=4), {"key_start": torch.tensor([0])}, r"key_start must be \(2,\), is \(1,\)"),
            (Case(T=4, S=4), {"diff_lambda": torch.ones(1)}, r"diff_lambda must be \(\) or \(1, 4, 2\), is \(1,\)"),
            (Case(B=2, T=4, S=4, boundaries=((0, 4),)), {}, r"key_ranges must be \(2, 4, 2\), is \(1, 4, 2\)"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(case, change, message):
        tensors = case.tensors()
        with pytest.raises(ValueError, match=message):
            states = (tensors[name] for name in ("query", "key", "value"))
            diff_attention_triton(*states, **{"diff_lambda": tensors["diff_lambda"]} | case.options() | change)
