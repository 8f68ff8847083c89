"""Packaging: `kernels/` and `train/` are installed as `cllip_fast.kernels` and `cllip_fast.train`.

At the top level they would shadow other projects' packages of the same names.
"""

from setuptools import find_packages, setup


def under(folder: str) -> list[str]:
    return [f"cllip_fast.{folder}"] + [f"cllip_fast.{folder}.{name}" for name in find_packages(folder)]


setup(
    name="cllip-fast",
    version="0.1.0",
    description="Contrastive localized language-image pre-training, open and fast",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["cllip_fast", "cllip_fast.*"]) + under("kernels") + under("train"),
    package_dir={"cllip_fast.kernels": "kernels", "cllip_fast.train": "train"},
    package_data={"cllip_fast.data": ["*.json"]},
    install_requires=["torch>=2.11", "numpy", "pillow", "tokenizers", "safetensors", "tqdm"],
    extras_require={
        "triton": ["triton>=3.6"],
        "dali": ["nvidia-dali-cuda130"],
        "flash-attn": ["flash-attn"],
        "xformers": ["xformers"],
        "open-clip": ["open_clip_torch>=3.3"],
        "tensorboard": ["tensorboard"],
        "plots": ["matplotlib"],
        "dev": ["pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "ruff", "psutil"],
    },
    entry_points={"console_scripts": ["cllip-fast = cllip_fast.cli:main"]},
)
