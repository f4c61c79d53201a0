"""Make `torchvision` and `torchaudio` importable beside a CPU build of torch.

Their packages for Linux carry extensions built against CUDA. Beside the CPU build of torch those fail to load and take
the whole import down, although nothing we use lives in them: transforms, timm and kaldi features are plain Python.
Import this module before either library. Where they import by themselves it changes nothing.
"""

import importlib
import sys
import types

import torch

_kept_alive: list[torch.library.Library] = []


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        _forget("torchvision")
        importlib.import_module("torchvision")


def _import_torchaudio() -> None:
    try:
        importlib.import_module("torchaudio")
    except OSError as error:
        if "_torchaudio" not in str(error):
            raise
        _forget("torchaudio")
        extension = types.ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension.fail_if_no_align = _no_alignment
        sys.modules[extension.__name__] = extension
        importlib.import_module("torchaudio")


def _no_alignment(function):
    def refuse(*_args, **_kwargs):
        raise RuntimeError(f"torchaudio's {function.__name__} needs its compiled extension, which does not load here")

    return refuse


def _forget(package: str) -> None:
    """Drop the half-initialised modules that a failed import leaves behind."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


_import_torchvision()
_import_torchaudio()
