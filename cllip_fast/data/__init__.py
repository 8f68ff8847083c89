"""Data: samples in tar shards, region-aware cropping, loaders, converters and the generated data set."""

from cllip_fast.data.batch import Batch
from cllip_fast.data.dali import create_dali_loader
from cllip_fast.data.folders import DatasetInfo, read_dataset_info
from cllip_fast.data.index import expand_shards
from cllip_fast.data.loader import Loader, create_loader
from cllip_fast.data.scenes import make_scenes
from cllip_fast.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Batch",
    "DatasetInfo",
    "Loader",
    "Tokenizer",
    "create_dali_loader",
    "create_loader",
    "expand_shards",
    "load_tokenizer",
    "make_scenes",
    "read_dataset_info",
    "train_bpe",
]
