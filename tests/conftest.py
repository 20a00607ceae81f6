"""What holds for the tests of every part."""

import signal

from hypothesis import HealthCheck, settings

# A machine may stand still for seconds in the middle of an example.
settings.register_profile(
    "patient", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

# A shell's job in the background ignores Ctrl-C, and hands that on to the processes which tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
