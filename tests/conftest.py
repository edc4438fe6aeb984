"""Settings for all tests."""

from hypothesis import settings

# No example is timed: how fast a machine is says nothing about whether the code is right.
settings.register_profile("trioproto", deadline=None)
settings.load_profile("trioproto")
