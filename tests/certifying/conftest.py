"""Fixtures that these tests share with other rooms."""

from tests.helpers.checkpoint_fixtures import base, made  # noqa: F401
