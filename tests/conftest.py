"""For all tests: hypothesis draws the same examples every time, and slow machines are no failure."""

from hypothesis import settings

settings.register_profile("vlafit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vlafit")
