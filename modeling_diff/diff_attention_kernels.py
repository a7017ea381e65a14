"""Triton kernels of differential attention: forward, backward and split-KV decode, one source for V1 and V2.

O_i = softmax(s q1 k1^T) v - lambda softmax(s q2 k2^T) v            (arXiv:2410.05258, eq. 1)
y_i = norm_scale * RMSNorm(O_i) * norm_weight                       (V1 only, eq. 3)

Both maps run through one loop over the keys: v is read once, and the backward needs dP = dO v^T once, because
dS1 = P1 (dP - D1), dS2 = lambda P2 (D2 - dP), dV = (P1 - lambda P2)^T dO with D2 = dO . O2, D1 = dO . O + lambda D2,
dlambda = -sum D2.

Every mask (causal, left padding, static cache, packing, window) is one interval [lo, hi) of visible keys a row, and
neither end ever falls as the row grows; tiles inside every row's interval skip the comparison.

Sizes: B batch, T queries, S keys, H heads, K KV heads, G = H // K, D head_dim, d map_dim. BLOCK_d and BLOCK_D are d
and D rounded up to powers of two. Offsets inside a tile are int32; everything that moves a tile is int64.
"""

# mypy: ignore-errors
# (a kernel's names are triton's, not Python's)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # the name that the kernels' annotations need; without triton they are never run
        constexpr = None


def _jit(kernel=None, *, any_value=()):
    """triton.jit; sizes in `any_value` change from call to call, so nothing is compiled for 1 or multiples of 16."""
    if kernel is None:
        return lambda kernel: _jit(kernel, any_value=any_value)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=any_value)


@_jit
def _visible(rows, batch, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL: tl.constexpr):
    """Interval [lo, hi) of the keys that `rows` (a scalar or a vector, each < T) see."""
    length = S
    if length_ptr is not None:
        length = tl.load(length_ptr + batch)
    position = rows + (length - T)  # bottom-right alignment: the last query stands on the last valid key
    lo = rows * 0
    hi = rows * 0 + length
    if start_ptr is not None:
        lo += tl.load(start_ptr + batch)
    if bounds_ptr is not None:
        bounds_ptr += (batch * T + rows) * 2
        lo = tl.load(bounds_ptr)
        hi = tl.load(bounds_ptr + 1)
    if window is not None:
        lo = tl.maximum(lo, position - (window - 1))
    if CAUSAL:
        hi = tl.minimum(hi, position + 1)
    return lo, tl.maximum(hi, 0)


@_jit
def _walk(
    row0, b, T, S, start_ptr, length_ptr, bounds_ptr, window,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Intervals of a block of rows, their union [first, last), and the ends of its three phases of key tiles.

    Phase 1 holds the tiles that every row sees whole; the tiles of phases 0 and 2 need the comparison.
    """
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_M), T - 1)
    lo, hi = _visible(rows, b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL)
    first, full_end = _visible(row0, b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL)
    row = tl.minimum(row0 + BLOCK_M, T) - 1
    full_begin, last = _visible(row, b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL)
    begin = first // BLOCK_N * BLOCK_N
    full_begin = tl.cdiv(tl.minimum(full_begin, last), BLOCK_N) * BLOCK_N
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
    return lo, hi, first, last, (begin, full_begin, full_end, last)


@_jit
def _load(ptr, stride, rows, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(rows, BLOCK) tile; columns past WIDTH and, with CHECK, rows that are not `valid` read 0 (never stale NaN)."""
    cols = tl.arange(0, BLOCK)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if CHECK:
        return tl.load(ptrs, mask=valid[:, None] & (cols[None, :] < WIDTH), other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(ptrs, mask=cols[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(ptrs)


@_jit
def _store(ptr, stride, rows, valid, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = valid[:, None] & (cols[None, :] < WIDTH)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@_jit
def _softmax_step(scores, m, z, acc, v, scale, PRECISION: tl.constexpr):
    """One step of the online softmax in base 2; m, z and acc are fp32, the probabilities are rounded to v's dtype.

    m starts at a finite -1e30: exp2(-inf - (-1e30)) is 0 where exp2(-inf - (-inf)) would be NaN.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    z = z * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, z, acc


@_jit
def _attend(
    q1, q2, m1, l1, acc1, m2, l2, acc2, k_ptr, v_ptr, stride_k, stride_v, begin, end, lo, hi, first, last, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both online softmaxes over the keys [begin, end); [first, last) is the union of the rows' intervals."""
    # The second scores before the first softmax: then it runs during their product, and the second during p1 v. Wide
    # tiles leave no registers for both.
    EARLY: tl.constexpr = BLOCK_N * BLOCK_d <= 4096
    offsets = tl.arange(0, BLOCK_N)
    k_ptr += begin.to(tl.int64) * stride_k
    v_ptr += begin.to(tl.int64) * stride_v
    for tile_start in range(begin, end, BLOCK_N):
        keys = tile_start + offsets
        valid = (keys >= first) & (keys < last)
        k1 = _load(k_ptr, stride_k, offsets, valid, d, BLOCK_d, MASKED)  # (BLOCK_N, BLOCK_d)
        v = _load(v_ptr, stride_v, offsets, valid, D, BLOCK_D, MASKED)  # (BLOCK_N, BLOCK_D)
        s1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MAPS == 2:
            k2 = k1 if SHARE_K else _load(k_ptr + d, stride_k, offsets, valid, d, BLOCK_d, MASKED)
            if EARLY:
                s2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        if MASKED:
            seen = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            s1 = tl.where(seen, s1, float("-inf"))
        m1, l1, acc1 = _softmax_step(s1, m1, l1, acc1, v, scale, PRECISION)
        if MAPS == 2:
            if not EARLY:
                s2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
            if MASKED:
                s2 = tl.where(seen, s2, float("-inf"))
            m2, l2, acc2 = _softmax_step(s2, m2, l2, acc2, v, scale, PRECISION)
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return m1, l1, acc1, m2, l2, acc2


@_jit(any_value=("B", "T", "S"))
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, weight_ptr, out_ptr, o_ptr, o2_ptr, lse1_ptr, lse2_ptr, rstd_ptr, scratch_ptr,
    start_ptr, length_ptr, bounds_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    B, H, G, T, S, scale, eps, norm_scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TWO_PASS: tl.constexpr,
):  # fmt: skip
    """One block of query rows of one head. o (before the norm), o2, lse and rstd are kept where their pointers are."""
    bh = tl.program_id(0) % (B * H)
    row0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // (B * H)) * BLOCK_M  # the longest rows start first
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    rows = row0 + offsets
    valid = rows < T
    lo, hi, first, last, ends = _walk(
        row0, b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    q_ptr += b * stride_qb + h * MAPS * stride_qh + row0.to(tl.int64) * stride_qt
    k_ptr += b * stride_kb + (h // G) * stride_kh
    v_ptr += b * stride_vb + (h // G) * stride_vh
    q1 = _load(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)  # (BLOCK_M, BLOCK_d)
    q2 = q1
    m1 = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l1 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m2, l2, acc2 = m1, l1, acc1
    if MAPS == 2:
        q2 = _load(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
    for PHASE in tl.static_range(1 - LOWER, 3):
        m1, l1, acc1, m2, l2, acc2 = _attend(
            q1, q2, m1, l1, acc1, m2, l2, acc2, k_ptr, v_ptr, stride_ks, stride_vs, ends[PHASE], ends[PHASE + 1],
            lo, hi, first, last, scale, 1 if TWO_PASS else MAPS, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N,
            PHASE != 1, PRECISION,
        )  # fmt: skip
    tile = (b * T + row0) * H + h  # (B, T, H, D) is contiguous in out, o and o2
    if TWO_PASS:  # where registers hold one accumulator only, the first waits in memory (in L2, mostly), as fp32
        _store(scratch_ptr + tile * D, H * D, offsets, valid, acc1, D, BLOCK_D)
        for PHASE in tl.static_range(1 - LOWER, 3):
            m2, l2, acc2, _m, _l, _acc = _attend(
                q2, q2, m2, l2, acc2, m2, l2, acc2, k_ptr if SHARE_K else k_ptr + d, v_ptr, stride_ks, stride_vs,
                ends[PHASE], ends[PHASE + 1], lo, hi, first, last, scale, 1, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N,
                PHASE != 1, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the load may be laid out over other threads than the store was
        acc1 = _load(scratch_ptr + tile * D, H * D, offsets, valid, D, BLOCK_D, True)

    # fp32 up to the only rounding, the store: lambda, norm and weight see the unrounded difference.
    o = acc1 / tl.where(l1 == 0, 1.0, l1)[:, None]  # a row that sees no key has l = 0 and gives 0
    stat = bh.to(tl.int64) * T + rows
    if MAPS == 2:
        o2 = acc2 / tl.where(l2 == 0, 1.0, l2)[:, None]
        lam = tl.load(lam_ptr + tile + offsets * H, mask=valid, other=0.0)[:, None] if LAM_ROW else tl.load(lam_ptr)
        o -= lam * o2
        if o2_ptr is not None:
            _store(o2_ptr + tile * D, H * D, offsets, valid, o2, D, BLOCK_D)
            # +inf where no key is seen: the backward's exp2(s - lse) is then 0
            tl.store(lse2_ptr + stat, tl.where(l2 == 0, float("inf"), m2 + tl.log2(l2)), mask=valid)
    if lse1_ptr is not None:
        tl.store(lse1_ptr + stat, tl.where(l1 == 0, float("inf"), m1 + tl.log2(l1)), mask=valid)
    if weight_ptr is not None:
        if o_ptr is not None:
            _store(o_ptr + tile * D, H * D, offsets, valid, o, D, BLOCK_D)
        o, rstd = _norm(o, weight_ptr, eps, norm_scale, D, BLOCK_D)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + stat, rstd, mask=valid)
    _store(out_ptr + tile * D, H * D, offsets, valid, o, D, BLOCK_D)


@_jit
def _norm(o, weight_ptr, eps, norm_scale, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """norm_scale * RMSNorm(o) * weight in fp32, and 1 / rms; a row of zeros with eps = 0 stays 0."""
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    variance = tl.sum(o * o, 1) / D + eps
    rstd = tl.where(variance > 0, 1.0 / tl.sqrt(variance), 0.0)
    return o * rstd[:, None] * (weight * norm_scale)[None, :], rstd


@_jit(any_value=("T", "N_ROWS"))
def bwd_pre_kernel(
    grad_ptr, o_ptr, o2_ptr, lam_ptr, weight_ptr, rstd_ptr, do_ptr, delta1_ptr, delta2_ptr, dweight_ptr,
    H, T, N_ROWS, norm_scale,
    MAPS: tl.constexpr, LAM_ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Norm backward (do), D1 = dO . O1, D2 = dO . O2 and this program's share of dweight, over B * T * H rows."""
    cols = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_M)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    for i in range(TILES):
        row0 = (tl.program_id(0) * TILES + i) * BLOCK_M
        rows = row0 + offsets  # int32: 2^31 of them would not fit into a GPU, and int64 divides many times slower
        valid = rows < N_ROWS
        stat = (rows // (H * T) * H + rows % H) * T + rows // H % T  # (B, T, H) -> (B, H, T)
        row0 = row0.to(tl.int64)
        do = _load(grad_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
        o = _load(o_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32) * norm_scale
            rstd = tl.load(rstd_ptr + stat, mask=valid, other=0.0)[:, None]
            normed = o * rstd
            dweight += tl.sum(do * normed, 0) * norm_scale
            do = do * weight[None, :]
            do = rstd * (do - normed * (tl.sum(do * normed, 1) / D)[:, None])
            # D1 and D2 come from dO as the matmuls will see it, rounded, so that each row of dS still sums to 0.
            do = do.to(do_ptr.dtype.element_ty).to(tl.float32)
            _store(do_ptr + row0 * D, D, offsets, valid, do, D, BLOCK_D)
        delta1 = tl.sum(do * o, 1)
        if MAPS == 2:
            o2 = _load(o2_ptr + row0 * D, D, offsets, valid, D, BLOCK_D, True).to(tl.float32)
            delta2 = tl.sum(do * o2, 1)
            if LAM_ROW:
                delta1 += tl.load(lam_ptr + rows, mask=valid, other=0.0) * delta2
            else:
                delta1 += tl.load(lam_ptr) * delta2
            tl.store(delta2_ptr + stat, delta2, mask=valid)
        tl.store(delta1_ptr + stat, delta1, mask=valid)
    if weight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, dweight, mask=cols < D)


@_jit
def _dkdv_rows(
    dk1, dk2, dv, k1, k2, v, keys, q_ptr, do_ptr, lam_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, bounds_ptr, window, b, stride_qh, stride_qt, begin, end, H, T, S, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the rows [begin, end) of one head to dk and dv of the tile `keys`; scores stand as (keys, rows)."""
    offsets = tl.arange(0, BLOCK_M)
    q_ptr += begin.to(tl.int64) * stride_qt
    do_ptr += begin.to(tl.int64) * (H * D)
    for row0 in range(begin, end, BLOCK_M):
        rows = row0 + offsets
        valid = rows < T
        q1 = _load(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)  # (BLOCK_M, BLOCK_d)
        do = _load(do_ptr, H * D, offsets, valid, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
        # Rows past T have dO = 0 and lse = +inf, so they add nothing without a mask.
        lse1 = tl.load(lse1_ptr + rows, mask=valid, other=float("inf"))
        p = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        if MAPS == 2:
            q2 = _load(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
            lse2 = tl.load(lse2_ptr + rows, mask=valid, other=float("inf"))
            p2 = tl.dot(k2, tl.trans(q2), input_precision=PRECISION)
        if DK:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M), the same for both maps
        p = tl.exp2(p * scale - lse1[None, :])
        if MASKED:
            lo, hi = _visible(tl.minimum(rows, T - 1), b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL)
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


@_jit(any_value=("B", "S"))
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, do_ptr, dk_ptr, dv_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, bounds_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, B, H, G, T, S, scale, scaling,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk, dv or both of one tile of keys of one KV head; its G query heads are summed here: no atomics."""
    K = H // G
    bk = tl.program_id(0) % (B * K)
    key0 = tl.program_id(0) // (B * K) * BLOCK_N  # early keys, which causal rows see most, start first
    b, kv_head = (bk // K).to(tl.int64), (bk % K).to(tl.int64)
    offsets = tl.arange(0, BLOCK_N)
    keys = key0 + offsets
    length = S
    if length_ptr is not None:
        length = tl.load(length_ptr + b)
    key_end = tl.minimum(length, S)
    begin, end = key0 * 0, key0 * 0 + T  # rows that see any key of the tile
    if bounds_ptr is not None:
        end_ptr = bounds_ptr + b * T * 2 + 1
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
    k1 = _load(k_ptr, stride_ks, offsets, valid, d, BLOCK_d, True)  # (BLOCK_N, BLOCK_d)
    v = _load(v_ptr, stride_vs, offsets, valid, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
    k2 = k1
    if MAPS == 2 and not SHARE_K:
        k2 = _load(k_ptr + d, stride_ks, offsets, valid, d, BLOCK_d, True)
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
            delta1_ptr + stat, delta2_ptr + stat, start_ptr, length_ptr, bounds_ptr, window, b,
            stride_qh, stride_qt, begin, masked_end, H, T, S, scale, MAPS, SHARE_K, LAM_ROW, CAUSAL, d, D, BLOCK_d,
            BLOCK_D, BLOCK_M, DK, DV, True, PRECISION,
        )  # fmt: skip
        if not LOWER:
            dk1, dk2, dv = _dkdv_rows(
                dk1, dk2, dv, k1, k2, v, keys, q_head, do_head, lam_head, lse1_ptr + stat, lse2_ptr + stat,
                delta1_ptr + stat, delta2_ptr + stat, start_ptr, length_ptr, bounds_ptr, window, b,
                stride_qh, stride_qt, masked_end, end, H, T, S, scale, MAPS, SHARE_K, LAM_ROW, CAUSAL, d, D, BLOCK_d,
                BLOCK_D, BLOCK_M, DK, DV, False, PRECISION,
            )  # fmt: skip
    inside = keys < S
    dk_ptr += b * stride_dkb + kv_head * stride_dkh + key0.to(tl.int64) * stride_dks
    dv_ptr += b * stride_dvb + kv_head * stride_dvh + key0.to(tl.int64) * stride_dvs
    if DK:
        _store(dk_ptr, stride_dks, offsets, inside, dk1 * scaling, d, BLOCK_d)
        if MAPS == 2 and not SHARE_K:
            _store(dk_ptr + d, stride_dks, offsets, inside, dk2 * scaling, d, BLOCK_d)
    if DV:
        _store(dv_ptr, stride_dvs, offsets, inside, dv, D, BLOCK_D)


@_jit
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
        k1 = _load(k_ptr, stride_k, offsets, valid, d, BLOCK_d, MASKED)
        v = _load(v_ptr, stride_v, offsets, valid, D, BLOCK_D, MASKED)
        p1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if MAPS == 2:
            k2 = k1 if SHARE_K else _load(k_ptr + d, stride_k, offsets, valid, d, BLOCK_d, MASKED)
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


@_jit(any_value=("B", "T", "S"))
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, lam_ptr, do_ptr, dq_ptr, lse1_ptr, lse2_ptr, delta1_ptr, delta2_ptr,
    start_ptr, length_ptr, bounds_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dqb, stride_dqh, stride_dqt, B, H, G, T, S, scale, scaling,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, LAM_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOWER: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq1 and dq2 of one block of query rows of one head; the same walk over the keys as in `fwd_kernel`."""
    bh = tl.program_id(0) % (B * H)
    row0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // (B * H)) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    rows = row0 + offsets
    valid = rows < T
    lo, hi, first, last, ends = _walk(
        row0, b, T, S, start_ptr, length_ptr, bounds_ptr, window, CAUSAL, BLOCK_M, BLOCK_N
    )
    q_ptr += b * stride_qb + h * MAPS * stride_qh + row0.to(tl.int64) * stride_qt
    k_ptr += b * stride_kb + (h // G) * stride_kh
    v_ptr += b * stride_vb + (h // G) * stride_vh
    tile = (b * T + row0) * H + h
    stat = bh.to(tl.int64) * T + rows
    q1 = _load(q_ptr, stride_qt, offsets, valid, d, BLOCK_d, True)
    do = _load(do_ptr + tile * D, H * D, offsets, valid, D, BLOCK_D, True)
    lse1 = tl.load(lse1_ptr + stat, mask=valid, other=float("inf"))
    delta1 = tl.load(delta1_ptr + stat, mask=valid, other=0.0)
    q2, lse2, delta2, lam = q1, lse1, delta1, 1.0
    if MAPS == 2:
        q2 = _load(q_ptr + stride_qh, stride_qt, offsets, valid, d, BLOCK_d, True)
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
    _store(dq_ptr, stride_dqt, offsets, valid, dq1 * scaling, d, BLOCK_d)
    if MAPS == 2:
        _store(dq_ptr + stride_dqh, stride_dqt, offsets, valid, dq2 * scaling, d, BLOCK_d)


@_jit(any_value=("S", "SPLITS"))
def decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, start_ptr, length_ptr, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    K, G, T, S, SPLITS, scale,
    MAPS: tl.constexpr, SHARE_K: tl.constexpr, CAUSAL: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    BLOCK_d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys for all G * T query rows of one KV head, so that K and V are read once.

    Writes each map's normalised fp32 output and base-2 lse; row r is query head r // T of the group, query r % T.
    """
    bk = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    b, kv_head = (bk // K).to(tl.int64), (bk % K).to(tl.int64)
    offsets = tl.arange(0, BLOCK_M)
    valid = offsets < G * T
    query = tl.minimum(offsets, G * T - 1) % T
    lo, hi = _visible(query, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    first, _ = _visible(split * 0, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    _, last = _visible(split * 0 + T - 1, b, T, S, start_ptr, length_ptr, None, window, CAUSAL)
    # The splits share the keys that are there, not the buffer that could hold them.
    per_split = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), SPLITS) * BLOCK_N
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)

    q_ptr += b * stride_qb + kv_head * G * MAPS * stride_qh
    q_ptrs = q_ptr + (offsets // T) * MAPS * stride_qh + (offsets % T) * stride_qt
    cols = tl.arange(0, BLOCK_d)
    mask = valid[:, None] & (cols[None, :] < d)
    q1 = tl.load(q_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_d)
    q2 = q1
    if MAPS == 2:
        q2 = tl.load(q_ptrs[:, None] + stride_qh + cols[None, :], mask=mask, other=0.0)
    m1 = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l1 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m1, l1, acc1, m2, l2, acc2 = _attend(
        q1, q2, m1, l1, acc1, m1, l1, acc1, k_ptr + b * stride_kb + kv_head * stride_kh,
        v_ptr + b * stride_vb + kv_head * stride_vh, stride_ks, stride_vs, begin, end, lo, hi, begin, end, scale,
        MAPS, SHARE_K, d, D, BLOCK_d, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    part = tl.program_id(0).to(tl.int64) * MAPS * G * T  # (B, K, SPLITS, MAPS, G * T, D)
    _store(part_ptr + part * D, D, offsets, valid, acc1 / tl.where(l1 == 0, 1.0, l1)[:, None], D, BLOCK_D)
    tl.store(lse_ptr + part + offsets, tl.where(l1 == 0, float("-inf"), m1 + tl.log2(l1)), mask=valid)
    if MAPS == 2:
        part += G * T
        _store(part_ptr + part * D, D, offsets, valid, acc2 / tl.where(l2 == 0, 1.0, l2)[:, None], D, BLOCK_D)
        tl.store(lse_ptr + part + offsets, tl.where(l2 == 0, float("-inf"), m2 + tl.log2(l2)), mask=valid)


@_jit
def _merge(part_ptr, lse_ptr, stride, SPLITS, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """One map's output of one row from its splits: sum 2^(lse_j - max) o_j / sum 2^(lse_j - max)."""
    cols = tl.arange(0, BLOCK_D)
    m = tl.max(tl.full([BLOCK_S], -1.0e30, tl.float32), 0)
    z = m * 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split0 in range(0, SPLITS, BLOCK_S):
        splits = split0 + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + splits * stride, mask=splits < SPLITS, other=float("-inf"))
        mask = (splits < SPLITS)[:, None] & (cols < D)[None, :]
        part = tl.load(part_ptr + splits.to(tl.int64)[:, None] * stride * D + cols[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new)
        alpha = tl.exp2(m - m_new)
        z = z * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m = m_new
    return acc / tl.where(z == 0, 1.0, z)


@_jit(any_value=("SPLITS",))
def combine_kernel(
    part_ptr, lse_ptr, lam_ptr, weight_ptr, out_ptr, H, G, T, SPLITS, eps, norm_scale,
    MAPS: tl.constexpr, LAM_ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row of one head, then lambda and the norm, in fp32; rows are (B, T, H)."""
    row = tl.program_id(0).to(tl.int64)
    b, t, h = row // (T * H), row // H % T, row % H
    stride = MAPS * G * T  # from one split to the next
    part = (b * (H // G) + h // G) * SPLITS * stride + h % G * T + t
    o = _merge(part_ptr + part * D, lse_ptr + part, stride, SPLITS, D, BLOCK_D, BLOCK_S)
    if MAPS == 2:
        part += G * T
        lam = tl.load(lam_ptr + (row if LAM_ROW else 0))
        o -= lam * _merge(part_ptr + part * D, lse_ptr + part, stride, SPLITS, D, BLOCK_D, BLOCK_S)
    o = o[None, :]
    if weight_ptr is not None:
        o, _ = _norm(o, weight_ptr, eps, norm_scale, D, BLOCK_D)
    cols = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_ptr + row * D + cols, o.to(out_ptr.dtype.element_ty), mask=cols < D)
