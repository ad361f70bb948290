"""Fixtures that these tests share with other rooms."""

from tests.helpers.checkpoint_fixtures import adapter, base, ctrl_c, made  # noqa: F401
