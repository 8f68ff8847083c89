"""What the study compares: its variants, which is set against which, the paper's orderings, the metrics looked at."""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.train.orderings import Claim


@dataclass(frozen=True)
class Variant:
    """A run of the study: its name in folders, its name for people, its losses and the trainer's other options."""

    name: str
    title: str
    losses: str
    options: str = ""

    @property
    def flags(self) -> str:
        return f"--losses {self.losses} {self.options}".strip()

    @property
    def reads_regions(self) -> bool:
        """Whether its region features mean anything: those of a Prompter without region loss are noise."""
        return "roi_align" in self.options or "region" in self.losses or self.losses == "all"


# Without a region loss regions are read by RoIAlign, which has nothing to train. The most telling variants come first.
ROI = "--region roi_align"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("clip", "CLIP only", "clip", ROI),
        Variant("all", "everything", "all"),
        Variant("no_grounding", "everything but grounding", "clip,region,patch,localization"),
        Variant("all_roi_align", "everything but grounding, RoIAlign", "clip,region,patch,localization", ROI),
        Variant("region", "CLIP + region", "clip,region"),
        Variant("patch_alone", "CLIP + patch", "clip,patch", ROI),
        Variant("localization_alone", "CLIP + localization", "clip,localization", ROI),
        Variant("filter", "everything, filter", "all", "--filter-threshold 0.9"),
        Variant("cloc", "CLIP + region + grounding, filter", "clip,region,grounding", "--filter-threshold 0.9"),
        Variant("m2", "everything, M = 2", "all", "--max-regions 2"),
        Variant("grounding", "CLIP + region + grounding", "clip,region,grounding"),
        Variant("grounding_alone", "CLIP + grounding", "clip,grounding"),
        Variant("patch_softmax", "everything, patch by softmax", "all", "--patch-pool softmax"),
        Variant("roi_align", "CLIP + region, RoIAlign", "clip,region", ROI),
        Variant("m1", "everything, M = 1", "all", "--max-regions 1"),
        Variant("patch", "CLIP + region + grounding + patch", "clip,region,grounding,patch"),
        Variant("localization", "CLIP + region + grounding + localization", "clip,region,grounding,localization"),
    )
}
SHORT = ("clip", "all", "region", "roi_align", "grounding_alone", "patch_alone", "localization_alone")
SINGLE = ("region", "grounding_alone", "patch_alone", "localization_alone")

# What is changed, with it, without it.
PAIRS = (
    ("region loss", "region", "clip"),
    ("grounding loss", "grounding_alone", "clip"),
    ("patch loss", "patch_alone", "clip"),
    ("localization loss", "localization_alone", "clip"),
    ("all of them", "all", "clip"),
    ("grounding loss", "grounding", "region"),
    ("grounding loss", "all", "no_grounding"),
    ("patch loss", "patch", "grounding"),
    ("localization loss", "localization", "grounding"),
    ("conflict filter", "cloc", "grounding"),
    ("conflict filter", "filter", "all"),
    ("Prompter for RoIAlign", "region", "roi_align"),
    ("Prompter for RoIAlign", "no_grounding", "all_roi_align"),
    ("M = 4 for 2", "all", "m2"),
    ("M = 4 for 1", "all", "m1"),
    ("softmax for max", "patch_softmax", "all"),
)
PROMPTER = "Prompter more than 10 points above RoIAlign"
CLAIMS = (
    Claim(PROMPTER, "region", "roi_align", "t2r_r10", 10, "+42.9 (65.9 / 23.0)"),
    Claim(PROMPTER, "no_grounding", "all_roi_align", "t2r_r10", 10, "+42.9 (65.9 / 23.0)"),
    # R@10 of these two has little room left on scenes.
    Claim(PROMPTER, "no_grounding", "all_roi_align", "t2r_r1", 10, "–"),
    Claim("region losses cost image → text at most a point", "cloc", "clip", "i2t_r1", -1, "+2.9 (69.2 / 66.3)"),
    Claim("region losses cost text → image at most a point", "cloc", "clip", "t2i_r1", -1, "+4.2 (49.3 / 45.1)"),
    Claim("the conflict filter helps", "filter", "all", "region_average", 0, "+1.0"),
    Claim("grounding helps", "all", "no_grounding", "region_average", 0, "+0.4"),
    Claim("M = 4 above M = 2", "all", "m2", "region_average", 0, "+0.3"),
)

# Means of several metrics: name for people, metrics.
COMPOSED = {
    "retrieval": ("image ↔ text R@1", ("i2t_r1", "t2i_r1")),
    "region_average": ("regions, average", ("recognition_top1", "r2t_r10", "t2r_r10")),
}
ATTRIBUTES = ("recognition_size", "recognition_colour", "recognition_texture", "recognition_shape")
TABLE = ("i2t_r1", "t2i_r1", "recognition_top1", *ATTRIBUTES, "r2t_r10", "t2r_r1", "t2r_r10", "grounding_acc50",
         "pointing")  # fmt: skip
# Held-out combinations make 68 phrases, with 16 regions each: of the ten nearest to a text one is nearly always right.
LEFT_OUT = {"unseen": ("t2r_r10",)}
EFFECTS = ("retrieval", "region_average", "grounding_acc50", "pointing")
DOTS = ("retrieval", "region_average", "t2r_r10", "grounding_acc50", "pointing")
CURVES = ("retrieval", "recognition_top1", "recognition_texture", "pointing")
PLATEAU = ("retrieval", "recognition_top1", "recognition_texture", "pointing")
GROUPS = {
    "one loss added to CLIP": ("clip", "all", *SINGLE),
    "added in turn": ("clip", "all", "region", "grounding", "cloc", "patch", "localization"),
    "one change to everything": ("clip", "all", "no_grounding", "all_roi_align", "filter", "m1", "m2", "patch_softmax"),
}
