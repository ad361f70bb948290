"""Fixtures that these tests share with other rooms."""

from tests.helpers.checkpoint_fixtures import ctrl_c  # noqa: F401
