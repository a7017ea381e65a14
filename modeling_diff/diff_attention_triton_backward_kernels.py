"""
Triton kernels of differential attention: backward, one source for V1 and V2.

Both maps run through one loop over the keys, and dP = dO v^T is computed once, because dS1 = P1 (dP - D1),
dS2 = lambda P2 (D2 - dP), dV = (P1 - lambda P2)^T dO with D2 = dO . O2, D1 = dO . O + lambda D2, dlambda = -sum D2.

Sizes and key ranges as in `diff_attention_triton_kernels`.
"""

# mypy: ignore-errors
# (a kernel's names are triton's, not Python's)

from .diff_attention_triton_kernels import jit, key_phases, key_range, load_tile, store_tile, tl


@jit(any_value=("T", "N_ROWS"))
def bwd_pre_kernel(
    grad_ptr, o_ptr, o2_ptr, lam_ptr, weight_ptr, rstd_ptr, do_ptr, delta1_ptr, delta2_ptr, dweight_ptr,
    H, T, N_ROWS, norm_scale,
    MAPS: tl.constexpr, LAM_ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Computes do (norm backward), D1 = dO . O1, D2 = dO . O2 and a share of dweight, over B * T * H rows."""
    cols = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_M)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for i in range(TILES):
        row0 = (tl.program_id(0) * TILES + i) * BLOCK_M
        rows = row0 + offsets  # int32: 2^31 of them would not fit into a GPU, and int64 divides many times slower
        valid = rows < N_ROWS
        stat = (rows // (H * T) * H + rows % H) * T + rows // H % T  # (B, T, H) -> (B, H, T)
        row0 = row0.to(tl.int64)
        do = load_tile(grad_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
        o = load_tile(o_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32) * norm_scale
            rstd = tl.load(rstd_ptr + stat, mask=valid, other=0.0)[:, None]
            normed = o * rstd
            dweight += tl.sum(do * normed, 0) * norm_scale
            do = do * weight[None, :]
            do = rstd * (do - normed * (tl.sum(do * normed, 1) / D)[:, None])
            # D1 and D2 come from dO as the matmuls will see it, rounded, so that each row of dS still sums to 0.
            do = do.to(do_ptr.dtype.element_ty).to(tl.float32)
            store_tile(do_ptr + row0 * D, D, offsets, valid, do, D, BLOCK_D)
        delta1 = tl.sum(do * o, 1)
        if MAPS == 2:
            o2 = load_tile(o2_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
            delta2 = tl.sum(do * o2, 1)
            if LAM_ROW:
                delta1 += tl.load(lam_ptr + rows, mask=valid, other=0.0) * delta2
            else:
                delta1 += tl.load(lam_ptr) * delta2
            tl.store(delta2_ptr + stat, delta2, mask=valid)
        tl.store(delta1_ptr + stat, delta1, mask=valid)
    if weight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, dweight, mask=cols < D)


@jit
def _dkdv_rows(
    dk1, dk2, dv, k1, k2, v, keys, q_ptr, do_ptr, lam_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, ranges_ptr, window, b, stride_qh, stride_qt, begin, end, H, T, S, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the rows [begin, end) of one head to dk and dv of the tile `keys`; scores are (keys, rows)."""
    offsets = tl.arange(0, BLOCK_M)
    q_ptr += begin.to(tl.int64) * stride_qt
    do_ptr += begin.to(tl.int64) * (H * D)
    for row0 in range(begin, end, BLOCK_M):
        rows = row0 + offsets
        valid = rows < T
        q1 = load_tile(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)  # (BLOCK_M, BLOCK_d)
        do = load_tile(do_ptr, H * D, offsets, valid, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
        # Rows past T have dO = 0 and lse = +inf, so they add nothing without a mask.
        lse1 = tl.load(lse1_ptr + rows, mask=valid, other=float("inf"))
        p = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        if MAPS == 2:
            q2 = load_tile(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
            lse2 = tl.load(lse2_ptr + rows, mask=valid, other=float("inf"))
            p2 = tl.dot(k2, tl.trans(q2), input_precision=PRECISION)
        if DK:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M), the same for both maps
        p = tl.exp2(p * scale - lse1[None, :])
        if MASKED:
            lo, hi = key_range(tl.minimum(rows, T - 1), b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL)
            seen = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
            p = tl.where(seen, p, 0.0)
        if DK:
            delta1 = tl.load(delta1_ptr + rows, mask=valid, other=0.0)
            # Score gradients and probabilities are rounded to the operands' dtype; the sums stay fp32.
            ds = p * (dp - delta1[None, :])
            dk1 = tl.dot(ds.to(q1.dtype), q1, dk1, input_precision=PRECISION)
        if MAPS == 2:
            lam = tl.load(lam_ptr + rows * H, mask=valid, other=0.0)[None, :] if LAM_ROW else tl.load(lam_ptr)
            p2 = lam * tl.exp2(p2 * scale - lse2[None, :])
            if MASKED:
                p2 = tl.where(seen, p2, 0.0)
            p -= p2
            if DK:
                delta2 = tl.load(delta2_ptr + rows, mask=valid, other=0.0)
                ds = p2 * (delta2[None, :] - dp)
                if SHARE_K:
                    dk1 = tl.dot(ds.to(q2.dtype), q2, dk1, input_precision=PRECISION)
                else:
                    dk2 = tl.dot(ds.to(q2.dtype), q2, dk2, input_precision=PRECISION)
        if DV:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qt
        do_ptr += BLOCK_M * (H * D)
    return dk1, dk2, dv


@jit(any_value=("B", "S"))
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, do_ptr, dk_ptr, dv_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, ranges_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, B, H, G, T, S, scale, scaling,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Computes dk, dv or both of one tile of keys of one KV head; its G query heads are summed here: no atomics."""
    K = H // G
    bk = tl.program_id(0) % (B * K)
    key0 = tl.program_id(0) // (B * K) * BLOCK_N  # early keys, which causal rows see most, start first
    b = (bk // K).to(tl.int64)
    kv_head = (bk % K).to(tl.int64)
    offsets = tl.arange(0, BLOCK_N)
    keys = key0 + offsets
    length = S
    if length_ptr is not None:
        length = tl.load(length_ptr + b)
    key_end = tl.minimum(length, S)
    begin = key0 * 0  # rows [begin, end) see any key of the tile
    end = key0 * 0 + T
    if ranges_ptr is not None:
        end_ptr = ranges_ptr + b * T * 2 + 1
        begin = tl.load(end_ptr + key0 * 2 - 1)
        end = tl.load(end_ptr + (tl.minimum(key0 + BLOCK_N, T) - 1) * 2)
        key_end = tl.load(end_ptr + (T - 1) * 2)
    if CAUSAL:
        begin = tl.maximum(begin, key0 - (length - T))
    if window is not None:
        end = tl.minimum(end, key0 + BLOCK_N + window - 1 - (length - T))
    valid = keys < key_end
    if start_ptr is not None:
        valid = valid & (keys >= tl.load(start_ptr + b))
    begin = tl.maximum(begin, 0) // BLOCK_M * BLOCK_M
    end = tl.where(key0 < key_end, end, begin)
    masked_end = end
    if not LOWER:  # rows past the diagonal see the whole tile, unless it reaches past the last valid key
        full_begin = begin
        if CAUSAL:
            full_begin = tl.maximum(key0 + BLOCK_N - 1 - (length - T), 0)
        full_begin = begin + tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK_M) * BLOCK_M
        masked_end = tl.where(key0 + BLOCK_N <= key_end, tl.minimum(full_begin, end), end)

    k_ptr += b * stride_kb + kv_head * stride_kh + key0.to(tl.int64) * stride_ks
    v_ptr += b * stride_vb + kv_head * stride_vh + key0.to(tl.int64) * stride_vs
    k1 = load_tile(k_ptr, stride_ks, offsets, valid, d, BLOCK_d, True)  # (BLOCK_N, BLOCK_d)
    v = load_tile(v_ptr, stride_vs, offsets, valid, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
    k2 = k1
    if MAPS == 2 and not SHARE_K:
        k2 = load_tile(k_ptr + d, stride_ks, offsets, valid, d, BLOCK_d, True)
    dk1 = tl.zeros([BLOCK_N, BLOCK_d], tl.float32)
    dk2 = dk1
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(G):
        h = kv_head * G + g
        stat = (b * H + h) * T
        q_head = q_ptr + b * stride_qb + h * MAPS * stride_qh
        do_head = do_ptr + (b * T * H + h) * D
        lam_head = lam_ptr
        if LAM_ROW:
            lam_head += b * T * H + h
        dk1, dk2, dv = _dkdv_rows(
            dk1, dk2, dv, k1, k2, v, keys, q_head, do_head, lam_head, lse1_ptr + stat, lse2_ptr + stat,
            delta1_ptr + stat, delta2_ptr + stat, start_ptr, length_ptr, ranges_ptr, window, b,
            stride_qh, stride_qt, begin, masked_end, H, T, S, scale, MAPS, SHARE_K, LAM_ROW, CAUSAL, d, D, BLOCK_d,
            BLOCK_D, BLOCK_M, DK, DV, True, PRECISION,
        )  # fmt: skip
        if not LOWER:
            dk1, dk2, dv = _dkdv_rows(
                dk1, dk2, dv, k1, k2, v, keys, q_head, do_head, lam_head, lse1_ptr + stat, lse2_ptr + stat,
                delta1_ptr + stat, delta2_ptr + stat, start_ptr, length_ptr, ranges_ptr, window, b,
                stride_qh, stride_qt, masked_end, end, H, T, S, scale, MAPS, SHARE_K, LAM_ROW, CAUSAL, d, D, BLOCK_d,
                BLOCK_D, BLOCK_M, DK, DV, False, PRECISION,
            )  # fmt: skip
    inside = keys < S
    dk_ptr += b * stride_dkb + kv_head * stride_dkh + key0.to(tl.int64) * stride_dks
    dv_ptr += b * stride_dvb + kv_head * stride_dvh + key0.to(tl.int64) * stride_dvs
    if DK:
        store_tile(dk_ptr, stride_dks, offsets, inside, dk1 * scaling, d, BLOCK_d)
        if MAPS == 2 and not SHARE_K:
            store_tile(dk_ptr + d, stride_dks, offsets, inside, dk2 * scaling, d, BLOCK_d)
    if DV:
        store_tile(dv_ptr, stride_dvs, offsets, inside, dv, D, BLOCK_D)


@jit
def _dq_keys(
    dq1, dq2, q1, q2, do, lse1, lse2, delta1, delta2, lam, k_ptr, v_ptr, stride_k, stride_v, begin, end, lo, hi,
    first, last, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to dq1 and dq2."""
    # As in `_attend`: the exponentials run during dp, the second map's arithmetic during the product of the first.
    EARLY: tl.constexpr = BLOCK_N * BLOCK_d <= 4096
    offsets = tl.arange(0, BLOCK_N)
    k_ptr += begin.to(tl.int64) * stride_k
    v_ptr += begin.to(tl.int64) * stride_v
    for tile_start in range(begin, end, BLOCK_N):
        keys = tile_start + offsets
        valid = (keys >= first) & (keys < last)
        k1 = load_tile(k_ptr, stride_k, offsets, valid, d, BLOCK_d, MASKED)
        v = load_tile(v_ptr, stride_v, offsets, valid, D, BLOCK_D, MASKED)
        p1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if MAPS == 2:
            k2 = k1 if SHARE_K else load_tile(k_ptr + d, stride_k, offsets, valid, d, BLOCK_d, MASKED)
            if EARLY:
                p2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N), the same for both maps
        p1 = tl.exp2(p1 * scale - lse1[:, None])
        if MASKED:
            seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            p1 = tl.where(seen, p1, 0.0)
        ds = p1 * (dp - delta1[:, None])
        dq1 = tl.dot(ds.to(k1.dtype), k1, dq1, input_precision=PRECISION)
        if MAPS == 2:
            if not EARLY:
                p2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
            p2 = tl.exp2(p2 * scale - lse2[:, None])
            if MASKED:
                p2 = tl.where(seen, p2, 0.0)
            ds = lam * p2 * (delta2[:, None] - dp)
            dq2 = tl.dot(ds.to(k2.dtype), k2, dq2, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return dq1, dq2


@jit(any_value=("B", "T", "S"))
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, do_ptr, dq_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, ranges_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dqb, stride_dqh, stride_dqt, B, H, G, T, S, scale, scaling,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes dq1 and dq2 of one block of query rows of one head, in the same order of keys as `fwd_kernel`."""
    bh = tl.program_id(0) % (B * H)
    row0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // (B * H)) * BLOCK_M
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    rows = row0 + offsets
    valid = rows < T
    lo, hi, first, last, ends = key_phases(
        row0, b, T, S, start_ptr, length_ptr, ranges_ptr, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    q_ptr += b * stride_qb + h * MAPS * stride_qh + row0.to(tl.int64) * stride_qt
    k_ptr += b * stride_kb + (h // G) * stride_kh
    v_ptr += b * stride_vb + (h // G) * stride_vh
    tile = (b * T + row0) * H + h
    stat = bh.to(tl.int64) * T + rows
    q1 = load_tile(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)
    do = load_tile(do_ptr + tile * D, H * D, offsets, valid, D, BLOCK_D, True)
    lse1 = tl.load(lse1_ptr + stat, mask=valid, other=float("inf"))
    delta1 = tl.load(delta1_ptr + stat, mask=valid, other=0.0)
    q2 = q1
    lse2 = lse1
    delta2 = delta1
    lam = 1.0
    if MAPS == 2:
        q2 = load_tile(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
        lse2 = tl.load(lse2_ptr + stat, mask=valid, other=float("inf"))
        delta2 = tl.load(delta2_ptr + stat, mask=valid, other=0.0)
        lam = tl.load(lam_ptr + tile + offsets * H, mask=valid, other=0.0)[:, None] if LAM_ROW else tl.load(lam_ptr)
    dq1 = tl.zeros([BLOCK_M, BLOCK_d], tl.float32)
    dq2 = dq1
    for PHASE in tl.static_range(1 - LOWER, 3):
        dq1, dq2 = _dq_keys(
            dq1, dq2, q1, q2, do, lse1, lse2, delta1, delta2, lam, k_ptr, v_ptr, stride_ks, stride_vs, ends[PHASE],
            ends[PHASE + 1], lo, hi, first, last, scale, MAPS, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N, PHASE != 1,
            PRECISION,
        )  # fmt: skip
    dq_ptr += b * stride_dqb + h * MAPS * stride_dqh + row0.to(tl.int64) * stride_dqt
    store_tile(dq_ptr, stride_dqt, offsets, valid, dq1 * scaling, d, BLOCK_d)
    if MAPS == 2:
        store_tile(dq_ptr + stride_dqh, stride_dqt, offsets, valid, dq2 * scaling, d, BLOCK_d)
