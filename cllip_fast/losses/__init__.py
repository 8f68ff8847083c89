"""The losses: `nn.Module`s with OpenCLIP's signatures, and CLLIP's own. Each imports its arithmetic from the engine."""

from cllip_fast.losses.clip import ClipLoss
from cllip_fast.losses.cllip import CllipLoss
from cllip_fast.losses.coca import CoCaLoss
from cllip_fast.losses.distill import DistillClipLoss
from cllip_fast.losses.grounding import GroundingLoss
from cllip_fast.losses.localization import PatchLocalizationLoss
from cllip_fast.losses.patch_text import PatchTextLoss
from cllip_fast.losses.region_text import RegionTextLoss
from cllip_fast.losses.siglip import SigLipLoss

__all__ = [
    "ClipLoss",
    "CllipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GroundingLoss",
    "PatchLocalizationLoss",
    "PatchTextLoss",
    "RegionTextLoss",
    "SigLipLoss",
]
