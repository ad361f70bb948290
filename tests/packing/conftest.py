"""Fixtures that these tests share with other rooms."""

from tests.helpers.checkpoint_fixtures import adapter, base, made, only_new_objects  # noqa: F401
