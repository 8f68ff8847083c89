"""Symmetric InfoNCE on a block of scores s_ij = a · x_i · y_j (local rows i, gathered columns j), never stored whole.

    row_lse_i = log Σ_j e^{s_ij}        col_lse_j = log Σ_i e^{s_ij}            (excluded pairs left out of both)
    loss      = Σ_i r_i (row_lse_i − s_ii) + Σ_j c_j (col_lse_j − s_jj)
    G_ij      = r_i e^{s_ij − row_lse_i} + c_j e^{s_ij − col_lse_j} − [i = j] (r_i + c_j)
    dx_i = a Σ_j G_ij y_j      dy_j = a Σ_i G_ij x_i      da = Σ_ij G_ij x_i · y_j = Σ_i x_i · (Σ_j G_ij y_j)

Forward, one product: every tile updates a running (maximum, sum) of its rows and of its columns. Exact for finite
input, whatever the scale. Backward, three products: scores again, then G · y and Gᵀ · x. Saved: two numbers a row.
`tiles.py` is plain PyTorch; deterministic.
"""
