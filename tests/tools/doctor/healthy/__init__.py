"""Healthy set-ups, one a file: a module defines `HEALTHY` (see tests/tools/doctor/faults/__init__.py)."""
