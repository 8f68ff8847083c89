"""A trained model in other people's code: images, texts and pixel boxes in; unit features, boxes and maps out.

Images go through the decoder, crop and normalisation of the trainer's evaluation, so that the numbers are those which
the run's metrics were computed from. Boxes are always xyxy in pixels of the image as it is looked at: what the crop
does to them, and undoing it, happens here.
"""

from __future__ import annotations

import io
import math
import operator
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from cllip_fast.data import Tokenizer, load_tokenizer, read_dataset_info
from cllip_fast.data.crop import Box, Window, choose_window, map_box
from cllip_fast.data.decode import Decoder, ImageError
from cllip_fast.data.folders import TOKENIZER_FILE
from cllip_fast.data.normalise import Normalise
from cllip_fast.errors import InputError, check_tensor
from cllip_fast.evaluate.features import prompted, unit
from cllip_fast.evaluate.texts import TextBook
from cllip_fast.interchange import load_clip
from cllip_fast.interchange.files import find_weights
from cllip_fast.interchange.preprocessing import CLIP, Preprocessing, read_preprocessing
from cllip_fast.models import CllipModel, ModelConfig
from cllip_fast.train import checkpoint, sharded_checkpoint
from cllip_fast.train.config import Config

Picture = str | Path | Image.Image | np.ndarray

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PNG_MODES = ("1", "L", "LA", "I;16", "I;16B", "P", "RGB", "RGBA")


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
    attention: str | None = None,
    batch_size: int = 32,
    model: str = "",
    exif: bool = True,
) -> TrainedModel:
    """Load a model that `train/main.py` trained, or CLIP weights of OpenCLIP or Hugging Face.

    CLIP is shown the centre of an image, as its authors evaluate it, normalised as the configuration beside the weights
    says, and reads regions by RoIAlign of its last patch
    tokens, for which it was never trained; it cannot ground.

    Args:
        path: a run's folder (its newest checkpoint is taken) or one checkpoint; or CLIP weights, as for the trainer's
            --pretrained.
        device: where to compute; default: a GPU where there is one.
        dtype: float32, as the trainer evaluates; bfloat16 or float16 compute under autocast. Results are float32.
        tokenizer: as for `load_tokenizer`; default: `tokenizer.json` in the run's folder, else the one that the run
            used, where it lay then (relative paths start in the present folder, as they did for the trainer).
        attention: back end, where the run's is not to be had here, such as "sdpa" for "flash"; default: the run's.
        batch_size: images encoded at a time.
        model: preset of CLIP weights that do not tell it; a run knows its own.
        exif: turn image files as their EXIF orientation says. False: pixels as stored, which is what training and the
            annotations of public data sets refer to, and OpenCLIP's evaluations see.

    Raises:
        InputError: no checkpoint there, a damaged one, no tokenizer to be found or one of another vocabulary, or a
            device, type or back end that cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
    for name, value in (("path", path), ("tokenizer", "" if tokenizer is None else tokenizer)):
        if not isinstance(value, (str, Path)):
            raise InputError(f"{name} is {value!r} of type {type(value).__name__}, expected a path")
    if not Path(path).exists():
        raise InputError(f"{path} does not exist, expected a run's folder, one of its checkpoints, or CLIP weights")
    device = _check_device(device)
    if not _is_run(Path(path)):
        clip = load_clip(path, model, attention=attention)
        length = clip.config.text_length
        return TrainedModel(
            clip.to(device),
            _check_vocabulary(tokenizer or "clip", clip.config, path),
            crop="center",
            text_length=length,
            region_length=length,
            preprocessing=read_preprocessing(path),
            dtype=dtype,
            batch_size=batch_size,
            exif=exif,
        )
    if model:
        raise InputError(f"model is {model!r}, expected none for {path}, a run of the trainer, which knows its own")
    file = _find_checkpoint(Path(path))
    state = checkpoint.read(file)
    run, config = state["config"], ModelConfig.from_dict(state["model_config"])
    texts = _check_vocabulary(tokenizer or _find_tokenizer(file, run), config, file)
    # The norm's back end was the training machine's; torch's is the same function of the same weights.
    trained = CllipModel(replace(config, attention=attention or config.attention, norm="torch"))
    trained.load_state_dict(state["model"])
    return TrainedModel(
        trained.to(device),
        texts,
        crop="pad" if run["crop"] == "random" else run["crop"],  # as the trainer evaluates
        text_length=run["text_length"],
        region_length=run["region_length"],
        losses=None if run.get("pretrained") else Config(losses=run["losses"]).parts,  # there may be earlier ones
        dtype=dtype,
        batch_size=batch_size,
        exif=exif,
    )


class TrainedModel:
    """A `CllipModel` with its tokenizer and preprocessing, in evaluation mode; made by `load`.

    Where a method takes images, each is a path, a Pillow image or a uint8 array [height, width, 3] (or [height, width],
    grey), and one image may stand for a list of one; one string may stand for a list of texts. A file is turned as its
    EXIF orientation says, so that boxes and maps lie on the picture as people see it; a Pillow image is taken as it is.
    Of an animation the first frame counts, transparency is dropped. Results are float32 on `device`, without graph;
    features have unit length.

    A path gives exactly the pixels that training sees in a shard, which are never turned. A large JPEG that is turned,
    or handed over decoded, differs by rounding, as training decodes it no larger than it needs to.

    Attributes:
        model: the model itself, for everything else (`model.image_tokens(preprocess(image)[None])`).
        device: where it is.
        tokenizer, text_length, region_length, crop, preprocessing: how it was trained to see texts and images.
        grounds: whether its Prompter was trained to predict boxes.
    """

    def __init__(
        self,
        model: CllipModel,
        tokenizer: Tokenizer,
        *,
        crop: str = "pad",
        text_length: int,
        region_length: int,
        losses: Sequence[str] | None = None,
        preprocessing: Preprocessing = CLIP,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        exif: bool = True,
    ) -> None:
        """As `load`; `crop` is "pad" or "center"; lengths in tokens are those of captions and of phrases.

        `losses` are those that trained the Prompter; None where that is not known.
        """
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.tokenizer, self.text_length, self.region_length = tokenizer, text_length, region_length
        self.crop, self._side, self._decoder = crop, model.config.image_size, Decoder()
        self._dtype, self._batch_size, self._exif = dtype, batch_size, exif
        self.preprocessing = preprocessing
        self._normalise = Normalise(*preprocessing)
        self._losses = losses
        self.grounds = model.prompter is not None and self._trained("grounding")

    def preprocess(self, image: Picture) -> Tensor:
        """One image to what the model takes: [3, S, S] float32, cropped or padded and normalised, on the CPU."""
        return self._see(image).pixels

    def encode_image(self, images: Picture | Sequence[Picture]) -> Tensor:
        """n images to features [n, E]."""
        with self.computing():
            return torch.cat([unit(self.model.pool_image(tokens)) for tokens, _ in self._encode(_as_list(images))])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Images [n, 3, S, S] from `preprocess` or a loader to features [n, E]."""
        check_tensor("pixels", pixels, ("n", 3, self._side, self._side), floating=True)
        with self.computing():
            return unit(self.model.pool_image(self.model.image_tokens(pixels.to(self.device, torch.float32))))

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """n texts, empty ones too, to features [n, E]; what exceeds the run's caption length is cut, as in training."""
        return self._encode_texts(_check_texts("texts", texts), self.text_length)

    def encode_phrases(self, phrases: str | Sequence[str]) -> Tensor:
        """n texts of regions to features [n, E], cut at the run's (shorter) region length: to compare with regions."""
        phrases = _check_texts("phrases", phrases)
        for k, phrase in enumerate(phrases):
            if not phrase.strip():
                raise InputError(f"phrases: phrase {k} is {phrase!r}, expected words")
        return self._encode_texts(phrases, self.region_length)

    def encode_regions(self, images: Picture | Sequence[Picture], boxes: Tensor | np.ndarray | Sequence) -> Tensor:
        """Regions of n images to features [R, E], image by image in the order of their boxes.

        Args:
            images: n images.
            boxes: n of [M_i, 4], or [M, 4] for one image; xyxy in pixels, clipped to what the model sees of the image.
                R is the sum of the M_i, any of which may be 0.

        Raises:
            InputError: another number of images and of boxes, or a box that is empty, lies wholly outside what the
                model sees, which with crop="center" is less than the image, or seems to be in shares of the image; or
                a Prompter that was not trained with the region loss.
        """
        if self.model.prompter is not None and not self._trained("region"):
            raise InputError(f"the run's losses are {', '.join(self._losses)}, expected region among them for features")
        if not _is_list(images):
            images, boxes = [images], [boxes]
        images = _as_list(images)
        if not isinstance(boxes, (Tensor, np.ndarray, Sequence)):
            raise InputError(f"boxes are of type {type(boxes).__name__}, expected [M, 4] for each of the images")
        if len(boxes) != len(images):
            raise InputError(f"boxes are for {len(boxes)} images, expected {len(images)}")
        features, first = [torch.empty(0, self.model.config.embed_dim, device=self.device)], 0
        with self.computing():
            for tokens, seen in self._encode(images):
                shares = [self._to_square(view, boxes[first + i], first + i) for i, view in enumerate(seen)]
                padded = torch.zeros(len(seen), max(map(len, shares)), 4)
                mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
                for i, own in enumerate(shares):
                    mask[i, : len(own)] = True
                    padded[i, : len(own)] = torch.tensor(own).reshape(-1, 4)
                if mask.any():
                    given = padded.to(self.device), mask.to(self.device)
                    features.append(unit(prompted(self.model.encode_regions, tokens, *given)))
                first += len(seen)
        return torch.cat(features)

    def ground(self, image: Picture, phrases: str | Sequence[str]) -> Tensor:
        """Where each of K phrases is in one image: boxes [K, 4], xyxy in pixels, clipped to what the model sees.

        Raises:
            InputError: the model was trained with --region roi_align, which has no grounding head, or without the
                grounding loss.
        """
        if self.model.prompter is not None and not self.grounds:
            raise InputError(f"the run's losses are {', '.join(self._losses)}, expected grounding among them for boxes")
        texts = self.encode_phrases(phrases)
        with self.computing():
            tokens, (seen,) = next(self._encode([image]))
            every = torch.ones(1, len(texts), dtype=torch.bool, device=self.device)
            shares = prompted(self.model.ground, tokens, texts[None], every)
        return to_pixels(shares, seen.window, self._side)

    def similarity_map(
        self, image: Picture, phrases: str | Sequence[str] | Tensor, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Cosine of each of K phrases with each patch of one image: [K, h, w], over the square that the model sees.

        Args:
            image: one image.
            phrases: K texts, or their features [K, E], of unit length.
            size: width and height, such as the image's own: the maps are then [K, height, width], laid over the whole
                image without the padding, bilinear between the patches' centres; NaN where the model does not look.
        """
        if isinstance(phrases, Tensor):
            check_tensor("phrases", phrases, ("K", self.model.config.embed_dim), floating=True)
            texts = phrases.to(self.device, torch.float32)
        else:
            texts = self.encode_phrases(phrases)
        size = None if size is None else _check_size(size)
        with self.computing():
            tokens, (seen,) = next(self._encode([image]))
            patches = unit(self.model.encode_patches(tokens))[0]
        with torch.autocast(self.device.type, enabled=False):
            maps = (texts @ patches.T).unflatten(1, self.model.config.patch_grid)
        return maps if size is None else self.lay_over(maps, seen.size, size)

    def lay_over(self, maps: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Maps [K, h, w] over the square that the model sees of an image to [K, height, width] over the whole image.

        Args:
            maps: from `similarity_map` without a size.
            image_size: width and height of the image.
            size: width and height of the result; as there.
        """
        return lay_over_image(maps, self._window(image_size), self._side, image_size, size)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """No graph, and autocast to the model's type: to use `model` itself in."""
        # Not inference_mode: its tensors could not enter a graph, such as that of a head trained on the features.
        reduced = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self._dtype if reduced else None, enabled=reduced):
            yield

    # Insides

    def _trained(self, loss: str) -> bool:
        return self._losses is None or loss in self._losses

    def _window(self, size: tuple[int, int]) -> Window:
        """What the model sees of an image of this width and height."""
        return choose_window(self.crop, *size, self._side, seed=0, epoch=0, key="")

    def _see(self, image: Picture) -> _Seen:
        data, size = read_picture(image, exif=self._exif)
        window = self._window(size)
        squares = np.empty((1, self._side, self._side, 3), dtype=np.uint8)
        try:
            self._decoder.fill(data, size, window, self._normalise.padding, squares[0])
        except ImageError as error:
            raise InputError(f"{_name(image)} cannot be used ({error.kind}): {error}") from error
        return _Seen(self._normalise(squares)[0], window, size)

    def _encode(self, images: Sequence[Picture]) -> Iterator[tuple[Tensor, list[_Seen]]]:
        """Image tokens [b, T, W] and what was seen, `batch_size` images at a time."""
        for start in range(0, len(images), self._batch_size):
            seen = [self._see(image) for image in images[start : start + self._batch_size]]
            yield self.model.image_tokens(torch.stack([view.pixels for view in seen]).to(self.device)), seen

    def _encode_texts(self, texts: list[str], length: int) -> Tensor:
        with self.computing():
            book = TextBook(self.model, self.tokenizer, length, self.device)
            numbers = book.number(texts)
            return book.features()[numbers.to(self.device)]

    def _to_square(self, seen: _Seen, boxes: Tensor | np.ndarray | Sequence, number: int) -> list[Box]:
        """Boxes in pixels of image `number` as shares of the square, clipped to it."""
        shares = []
        for k, box in enumerate(_check_boxes(boxes, number)):
            share = map_box(tuple(box), seen.window, self._side, min_kept_area=0)
            if share is None:
                x0, y0, x1, y1 = seen.window.source
                raise InputError(
                    f"boxes: box {k} of image {number}, {box}, lies outside what the model sees of the image of "
                    f"{seen.size[0]}×{seen.size[1]} pixels: x {x0} to {x1}, y {y0} to {y1} (crop {self.crop!r})"
                )
            if box[2] <= 1 and box[3] <= 1 and min(seen.size) > 1:
                raise InputError(
                    f"boxes: box {k} of image {number}, {box}, is within the first of {seen.size[0]}×{seen.size[1]} "
                    "pixels, expected pixels, not shares of the image"
                )
            shares.append(share)
        return shares


class _Seen(NamedTuple):
    """One image as the model sees it: pixels [3, S, S], what they show of it, and its width and height."""

    pixels: Tensor
    window: Window
    size: tuple[int, int]


def to_pixels(boxes: Tensor, window: Window, side: int) -> Tensor:
    """Boxes [..., 4] as shares of the square to pixels of the image, clipped to the window: undoes `map_box`."""
    (x0, y0, x1, y1), (left, top, right, bottom) = window
    x_scale, y_scale = (x1 - x0) / (right - left), (y1 - y0) / (bottom - top)
    exact = {"dtype": torch.float64, "device": boxes.device}
    corner, scale = torch.tensor([left, top] * 2, **exact), torch.tensor([x_scale, y_scale] * 2, **exact)
    low, high = torch.tensor([x0, y0] * 2, **exact), torch.tensor([x1, y1] * 2, **exact)
    return ((boxes.double() * side - corner) * scale + low).clamp(low, high).float()


def lay_over_image(
    maps: Tensor, window: Window, side: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Maps [K, h, w] over the square to [K, height, width] over the whole image, NaN outside the window.

    Args:
        maps: one value a patch.
        window: what the square shows of the image.
        side: of the square, in pixels.
        image_size, size: width and height of the image and of the result.
    """
    (x0, y0, x1, y1), (left, top, right, bottom) = window
    places, inside = [], []
    for length, pixels, low, high, start, end in (
        (size[0], image_size[0], x0, x1, left, right),
        (size[1], image_size[1], y0, y1, top, bottom),
    ):
        centres = (torch.arange(length, device=maps.device) + 0.5) * (pixels / length)
        inside.append((centres > low) & (centres < high))
        in_square = start + (centres - low) * ((end - start) / (high - low))
        places.append(2 * in_square / side - 1)  # -1 to 1, edge to edge
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1)
    laid = F.grid_sample(maps[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
    return laid.masked_fill(~(inside[1][:, None] & inside[0]), math.nan)


def _is_run(path: Path) -> bool:
    """Whether this is a folder or a checkpoint of the trainer's, not somebody's weights."""
    if path.is_dir():
        return find_weights(path) is None
    if path.suffix == ".safetensors":
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # missing, damaged or not by torch: the reader of either kind says what is wrong with it
        return path.parent.name == "checkpoints"
    return isinstance(state, dict) and "model_config" in state


def _check_vocabulary(name: str | Path, config: ModelConfig, file: str | Path) -> Tokenizer:
    """The tokenizer `name`, which must have as many ids as the model."""
    texts = load_tokenizer(name)
    if texts.vocab_size != config.vocab_size:
        raise InputError(
            f"tokenizer {name} has {texts.vocab_size} ids, expected {config.vocab_size} as the model in {file}"
        )
    return texts


def _find_checkpoint(path: Path) -> Path:
    if not path.is_dir() or sharded_checkpoint.is_folder(path):
        return path
    found = checkpoint.stored(path / "checkpoints")
    if not found:
        raise InputError(f"{path} has no checkpoints/step_*, expected the folder of a run or a checkpoint")
    return found[-1]


def _find_tokenizer(file: Path, run: dict[str, object]) -> str | Path:
    """The tokenizer of the run with these options, whose checkpoint is `file`."""
    own = file.absolute().parent.parent / TOKENIZER_FILE
    if own.is_file():
        return own
    if run["tokenizer"]:
        return run["tokenizer"]
    data = run["scenes_dir"] if run["train_data"] == "scenes" else run["train_data"]
    try:
        found = read_dataset_info(data).tokenizer_path
    except InputError as error:
        raise InputError(f"the tokenizer of {file} is not found, name it with tokenizer: {error}") from error
    if found is None:
        raise InputError(f"the tokenizer of {file} is not found, name it with tokenizer: none lies beside {data}")
    return found


def _check_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}, expected such as cpu, cuda or cuda:1") from error
    if known.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {str(device)!r}, but PyTorch sees no GPU here")
    return known


def _is_list(images: Picture | Sequence[Picture]) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes))


def _as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    images = list(images) if _is_list(images) else [images]
    if not images:
        raise InputError("images is empty, expected at least one image")
    return images


def _check_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    if isinstance(texts, (Tensor, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"{name} is {_brief(texts)} of type {type(texts).__name__}, expected strings")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise InputError(f"{name} is empty, expected at least one text")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{name} holds {_brief(text)} of type {type(text).__name__}, expected strings")
        if any("\ud800" <= character <= "\udfff" for character in text):  # what is no UTF-8 on a command line
            raise InputError(f"{name} holds {text!r}, expected what can be written as UTF-8")
    return texts


def _brief(value: object) -> str:
    """A value for a message of one line: of an array its shape."""
    return f"{list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else reprlib.repr(value)


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        width, height = map(operator.index, size)
    except (TypeError, ValueError):
        width = height = 0
    if width < 1 or height < 1:
        raise InputError(f"size is {size!r}, expected width and height in whole pixels, such as (640, 480)")
    return width, height


def _check_boxes(boxes: Tensor | np.ndarray | Sequence, number: int) -> list[list[float]]:
    """The boxes of image `number` as plain numbers."""
    if isinstance(boxes, Tensor):
        boxes = boxes.detach().double().cpu()  # numpy knows no bfloat16
    try:
        values = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"boxes of image {number} are not numbers: {error}") from error
    if values.size == 0:
        return []
    if values.ndim != 2 or values.shape[1] != 4:
        raise InputError(f"boxes of image {number} have shape {list(values.shape)}, expected [M, 4]")
    for k, (x0, y0, x1, y1) in enumerate(values.tolist()):
        if not (x0 < x1 and y0 < y1 and math.isfinite(x1 - x0) and math.isfinite(y1 - y0)):
            raise InputError(
                f"boxes: box {k} of image {number} is {[x0, y0, x1, y1]}, expected finite x0 < x1, y0 < y1"
            )
    return values.tolist()


def read_picture(image: Picture, *, exif: bool = True) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a JPEG or PNG file, which is what the trainer's decoder takes, and the width and height in it.

    With `exif` a file is turned as its orientation says.

    Raises:
        InputError: a path that cannot be read, an array that is no uint8 image, or something else than an image.
    """
    try:
        if isinstance(image, (str, Path)):
            data = Path(image).read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the decoder's limit is lower
                picture = Image.open(io.BytesIO(data))
            with picture:
                if exif and picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    turned = ImageOps.exif_transpose(picture)
                    return _to_png(turned), turned.size
                if isinstance(picture, (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile)):
                    return data, picture.size
                return _to_png(picture), picture.size
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
                shape = list(image.shape)
                raise InputError(f"the image is {image.dtype} {shape}, expected uint8 [height, width, 3]")
            image = Image.fromarray(np.ascontiguousarray(image))
        if not isinstance(image, Image.Image):
            raise InputError(
                f"the image is of type {type(image).__name__}, expected a path, a Pillow image or a uint8 array"
            )
        if 0 in image.size:
            raise InputError(f"the image has size {image.width}×{image.height}, expected at least one pixel")
        return _to_png(image), image.size
    except InputError:
        raise
    except UnidentifiedImageError as error:  # its message names the buffer
        raise InputError(f"{_name(image)} cannot be read: it is no image") from error
    # SyntaxError: Pillow's for broken PNGs; ValueError: for closed images, and Python's for impossible paths
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{_name(image)} cannot be read: {reason}, expected an image file") from error


def _name(image: Picture) -> str:
    return f"image {str(image)!r}" if isinstance(image, (str, Path)) else f"the image ({type(image).__name__})"


def _to_png(picture: Image.Image) -> bytes:
    """Pixels as a file, uncompressed, so that all images take the decoder's one way to RGB and to the square."""
    if picture.mode in ("I", "F"):  # 32 bits, of a range that nobody knows
        raise InputError(f"the image has mode {picture.mode!r}, expected 8 or 16 bits a channel")
    file = io.BytesIO()
    picture = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
    picture.save(file, "PNG", compress_level=0)
    return file.getvalue()
