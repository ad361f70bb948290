"""The memory of a training on each device, from the model's config alone: bytes by kind, and the largest batch."""

from __future__ import annotations

from spp.planning.memory import Memory, Plan, plan
from spp.planning.shape import ModelShape, shape_of

__all__ = ["Memory", "ModelShape", "Plan", "plan", "shape_of"]
