"""Faults planted in real runs: kills, full disks, damage, other numbers of processes. See `__main__`."""
