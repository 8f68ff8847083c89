"""Patch–text contrast: a text finds its image through its best patches; the patch scores are never stored whole.

    s_ijp = v_ip · t_j        S_ij = max_p s_ijp        or        S_ij = Σ_p w_ijp s_ijp,  w_ij = softmax_p(s_ijp / τ)
    N_j   = log Σ_i e^{a S_ij}   over the images i ≠ b(j) that are negatives of text j
    M_i   = log Σ_j e^{a S_ij}   over the texts j of other images that are negatives of image i
    loss  = mean over texts j of ½ [softplus(N_j − a S_bj) + softplus(M_b − a S_bj)],   b = b(j), the image of text j

which is −log softmax over the images, and −log softmax over text j and the texts of other images. Other texts of the
same image stand in neither.

    G_ij = c σ(N_j − a S_bj) e^{a S_ij − N_j} + [Σ_{j' of i} c σ(M_i − a S_ij')] e^{a S_ij − M_i}     negatives, c = ½/n
    G_bj = −c [σ(N_j − a S_bj) + σ(M_b − a S_bj)]                                                     positives
    max:      dv_ip = a Σ_{j: p best} G_ij t_j                  dt_j = a Σ_i G_ij v_i,best(i,j)
    softmax:  ds_ijp = a G_ij w_ijp (1 + (s_ijp − S_ij) / τ),   then two products

`tiling.py` cuts images × texts into tiles of bounded size, `tiles.py` pools and un-pools them, `contrast.py` has the
sums over S and its gradient (plain PyTorch, the specification); `native.py` is the CPU's, an image × some texts at a
time (`csrc/patch_walk.h`, `csrc/patch_text.h`); `triton.py` the GPU's, sums and exclusions in the kernel that pools;
`exclusions.py` finds the pairs that are no negatives. Kept between forward and backward: S_ij and one number beside it
(which patch, or the pooling's log-sum-exp), a P-th of the scores. Recomputed: the scores, for softmax only. Products:
one forward; backward none for max (gathers of the best patches), three for softmax. Deterministic: no atomics; gathers
are summed in the order of texts and images.
"""
