"""Models: how they are made, loaded and cut into stages."""

from ..config import PromptConfig
from .dual_path import DualPathOutput, DualPathTeacher
from .prompt import PromptFusion
from .stages import Stages, split_stages
from .zoo import create_model

__all__ = [
    "DualPathOutput",
    "DualPathTeacher",
    "PromptConfig",
    "PromptFusion",
    "Stages",
    "create_model",
    "split_stages",
]
