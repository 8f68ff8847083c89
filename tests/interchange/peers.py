"""Small random models of OpenCLIP and transformers: what they compute, and what they make of our files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from cllip_fast.models import CllipModel, create_model
from tests.openclip_peer import openclip_trainer

VOCABULARY, LENGTH, SIZE = 50, 9, 24
EOT = VOCABULARY - 1
# Two heads of 8 in each tower, so that a head count taken from the width (one of 64) would show.
OURS = {
    "image_size": SIZE,
    "patch_size": 8,
    "vocab_size": VOCABULARY,
    "text_length": LENGTH,
    "embed_dim": 12,
    "vision_width": 16,
    "vision_depth": 2,
    "vision_heads": 2,
    "text_width": 8,
    "text_depth": 3,
    "text_heads": 2,
}
OPENCLIP = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": SIZE},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 8, "heads": 2, "layers": 3},
}
HF_VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": SIZE, "patch_size": 8}  # fmt: skip
HF_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3,
           "num_attention_heads": 2, "max_position_embeddings": LENGTH, "eos_token_id": EOT}  # fmt: skip

Outputs = dict[str, Tensor]


def small_model(name: str = "ViT-B-32", **options: object) -> CllipModel:
    """A fresh `CllipModel` of the peers' sizes."""
    return create_model(name, **(OURS | options))


def inputs(size: int = SIZE, length: int = LENGTH, end_id: int = EOT) -> tuple[Tensor, Tensor]:
    """Images [4, 3, size, size] and texts [4, length] of 3, 4, 5 and 6 tokens that end in `end_id`, padded with 0."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, size, size, generator=generator)
    text = torch.randint(2, EOT, (4, length), generator=generator)
    end = torch.tensor([[2], [3], [4], [5]])
    text = text.scatter(1, end, end_id) * (torch.arange(length) <= end)
    return images, text


def randomize(model: nn.Module) -> None:
    """Random numbers in every parameter, norms and biases too: a tensor in the wrong place then shows."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() == 0:
                parameter.fill_(2.3)
            else:
                parameter.copy_(0.3 * noise + float(parameter.dim() == 1))


@torch.no_grad()
def outputs_of(encode_image: Callable, encode_text: Callable, scale: Tensor, images: Tensor, text: Tensor) -> Outputs:
    """Features, and the logits [images, texts]."""
    image, words = encode_image(images), encode_text(text)
    logits = scale.exp() * nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(words, dim=-1).T
    return {"image": image, "text": words, "logits": logits}


def our_outputs(model: CllipModel, end_id: int = EOT) -> Outputs:
    """Ours, on `inputs` of the model's own sizes."""
    given = inputs(model.config.image_size, model.config.text_length, end_id)
    return outputs_of(model.encode_image, model.encode_text, model.logit_scale, *given)


def openclip_outputs(model: nn.Module, end_id: int = EOT) -> Outputs:
    """OpenCLIP's, on `inputs` of the model's own sizes."""
    given = inputs(model.visual.image_size[0], model.context_length, end_id)
    outputs = outputs_of(model.encode_image, model.encode_text, model.logit_scale, *given)
    torch.testing.assert_close(model.get_logits(*given)[0].detach(), outputs["logits"])
    return outputs


def open_clip_package() -> ModuleType:
    """The package `open_clip`; in a process of its own, see `openclip_trainer`."""
    sys.modules["transformers"] = None  # which open_clip can do without, and which a stand-in of torchvision confuses
    openclip_trainer()
    return importlib.import_module("open_clip")


def openclip_cases(rank: int, world_size: int, folder: str) -> dict[str, Outputs]:
    """Files of OpenCLIP's models in `folder`, by case, and what the models compute; runs in a process of its own."""
    open_clip, model_module = open_clip_package(), importlib.import_module("open_clip.model")
    root, outputs = Path(folder), {}

    def build(quick_gelu: bool = False, kind: type = model_module.CLIP) -> nn.Module:
        model = kind(**OPENCLIP, quick_gelu=quick_gelu)
        randomize(model)
        return model

    model = build()
    outputs["plain"] = openclip_outputs(model)
    torch.save(model.state_dict(), root / "plain.pt")
    torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
               root / "trained.pt")  # fmt: skip
    importlib.import_module("safetensors.torch").save_file(model.state_dict(), root / "plain.safetensors")
    torch.save({k: v.half() for k, v in model.state_dict().items()}, root / "half.pt")
    outputs["half"] = openclip_outputs(model.half().float())

    quick = build(quick_gelu=True)
    outputs["quick"] = openclip_outputs(quick)
    (root / "quick").mkdir()
    torch.save(quick.state_dict(), root / "quick" / "open_clip_pytorch_model.bin")
    (root / "quick" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPENCLIP | {"quick_gelu": True}}))

    custom = build(kind=model_module.CustomTextCLIP)
    torch.save(custom.state_dict(), root / "custom.pt")
    custom.context_length = custom.text.context_length
    outputs["custom"] = openclip_outputs(custom)

    for name, image_size, length in (("larger", 40, 12), ("smaller", 16, LENGTH)):
        config = OPENCLIP | {
            "vision_cfg": OPENCLIP["vision_cfg"] | {"image_size": image_size},
            "text_cfg": OPENCLIP["text_cfg"] | {"context_length": length},
        }
        resized = model_module.CLIP(**config)
        open_clip.load_checkpoint(resized, str(root / "plain.pt"))
        outputs[name] = openclip_outputs(resized)
    return outputs


def openclip_b32(rank: int, world_size: int, path: str) -> Outputs:
    """OpenCLIP's own ViT-B-32, random, written to `path`, and what it computes."""
    torch.manual_seed(4)
    model = open_clip_package().create_model("ViT-B-32")
    torch.save(model.state_dict(), path)
    return openclip_outputs(model)


def openclip_reads(rank: int, world_size: int, folders: dict[str, int]) -> list[Outputs]:
    """What OpenCLIP computes with our exported models: {folder: id of the token that ends its texts}."""
    open_clip = open_clip_package()
    return [openclip_outputs(open_clip.create_model(f"local-dir:{folder}"), eot) for folder, eot in folders.items()]
