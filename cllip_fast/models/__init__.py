"""ViT, text tower, Prompter and RoIAlign: `create_model` builds them, `CllipModel` has the public verbs."""

from cllip_fast.models.cllip import CllipModel
from cllip_fast.models.config import PRESETS, ModelConfig
from cllip_fast.models.create import create_model
from cllip_fast.models.execution import set_execution
from cllip_fast.models.groups import layers_above, parameter_groups

__all__ = ["PRESETS", "CllipModel", "ModelConfig", "create_model", "layers_above", "parameter_groups", "set_execution"]
