"""Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1) on a block of scores l_ij = a · x_i · y_j + b.

    loss = Σ_ij softplus(−z_ij l_ij)        z_ij = 1 for the positive (i = j), else −1
    G_ij = −z_ij σ(−z_ij l_ij)
    dx_i = a Σ_j G_ij y_j      dy_j = a Σ_i G_ij x_i      da = Σ_i x_i · (Σ_j G_ij y_j)      db = Σ_ij G_ij

One product forward, three backward; nothing saved but the input. Deterministic.
"""
