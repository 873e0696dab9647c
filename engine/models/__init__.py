"""Models: how they are made, loaded and cut into stages."""

from .stages import Stages, split_stages
from .zoo import create_model

__all__ = ["Stages", "create_model", "split_stages"]
