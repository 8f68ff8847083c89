"""Packaging: `kernels/` and `train/` are installed as `cllip_fast.kernels` and `cllip_fast.train`.

At the top level they would shadow other projects' packages of the same names. CMake builds `kernels/csrc` into
`cllip_fast/kernels/libcllip_native.so`; where it cannot, the package is installed without and runs on plain PyTorch.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Runs CMake, which needs neither Python's nor PyTorch's headers; its library takes the extension's place."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # one of older sources would be worse than none
        try:
            build_native(target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"cllip-fast: native kernels not built, CPU losses will run on plain PyTorch: {reason(error)}")

    def copy_extensions_to_source(self) -> None:
        Path("kernels", "libcllip_native.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


def build_native(target: Path) -> None:
    # The tools may lie beside this Python, which need not be on the path.
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake, ninja = (shutil.which(tool, path=places) for tool in ("cmake", "ninja"))
    if cmake is None:
        raise FileNotFoundError("cmake not found")
    # A fresh folder each time: CMake's cache would remember the tools of an isolated build, which are gone by then.
    with tempfile.TemporaryDirectory() as folder:
        configure = [cmake, "-S", str(Path(__file__).resolve().parent), "-B", folder, f"-DCLLIP_OUTPUT={folder}/out"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", folder, "--config", "Release"]):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        shutil.copy(Path(folder, "out", target.name), target)


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """One line: the beginning of the first error that CMake or the compiler printed."""
    output = error.output or "" if isinstance(error, subprocess.CalledProcessError) else ""
    found = re.search(r"(CMake Error|error:).*", output, flags=re.DOTALL)
    return " ".join(found.group().split())[:200] if found else str(error)


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
    ext_modules=[
        Extension(
            "cllip_fast.kernels.libcllip_native",
            sources=sorted(glob("kernels/csrc/*.cpp")),
            depends=["CMakeLists.txt", *sorted(glob("kernels/csrc/*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    install_requires=["torch>=2.11", "numpy", "pillow", "tokenizers", "safetensors", "tqdm"],
    extras_require={
        "triton": ["triton>=3.6"],
        "dali": ["nvidia-dali-cuda130"],
        "dali-cuda120": ["nvidia-dali-cuda120"],
        "flash-attn": ["flash-attn"],
        "xformers": ["xformers"],
        "open-clip": ["open_clip_torch>=3.3"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "plots": ["matplotlib"],
        "clip": ["ftfy"],
        "sentencepiece": ["sentencepiece"],
        "parquet": ["pyarrow"],
        "simplejpeg": ["simplejpeg"],
        "onnx": ["onnx", "onnxscript"],
        "hf": ["transformers"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "psutil",
            "onnxruntime",
            "regex",
        ],
    },
    entry_points={"console_scripts": ["cllip-fast = cllip_fast.cli:main"]},
)
