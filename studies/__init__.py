"""Trainings that measure RWR attention, from a checkout: `python -m studies.ablation --help`."""
