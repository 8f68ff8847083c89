"""Patch localization: a text with a box against the patches, those inside the box being right.

    s_p   = v_p · t      I = log Σ_{p in box} e^{a s_p}      O = log Σ_{p elsewhere} e^{a s_p}
    loss  = −log( Σ_{p in box} e^{a s_p} / Σ_all e^{a s_p} ) = softplus(O − I)
    G_p   = σ(O − I) · (e^{a s_p − O} outside, −e^{a s_p − I} inside)
    dv_p  = a Σ_t G_p t      dt = a Σ_p G_p v_p      da = Σ G_p s_p

"Elsewhere" is the rest of the text's own image and, if asked for, the patches of the other local images. `boxes.py`
says which patches are in a box, as a rectangle of whole patches. Kept between forward and backward: I and O, two
numbers a text. Recomputed: the scores. Deterministic.

`tiles.py` (plain PyTorch, the specification) stores, within a call, the B·P·T scores with the own image; those with
other images are walked in tiles. `triton.py` has the same functions: its scores stay in registers, and of the gradients
only those of the own images, or of a piece of the others, are in memory at a time.
"""
