"""What holds for the tests of every part."""

from hypothesis import HealthCheck, settings

# A machine may stand still for seconds in the middle of an example.
settings.register_profile(
    "patient", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
