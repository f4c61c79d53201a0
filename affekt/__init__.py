"""affekt: self-supervised audio-visual learning of what people express.

    import affekt
    model = affekt.load("runs/demo/export")
    model.embed("clip.mp4")

The names below load torch on first use, so that `import affekt` is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("affekt")

_HOMES = {
    "load": "affekt.model",
    "Model": "affekt.model",
    "create_model": "affekt.pretrain.registry",
    "list_models": "affekt.pretrain.registry",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'affekt' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
