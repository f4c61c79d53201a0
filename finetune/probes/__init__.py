"""What a simple model can read from frozen features: probes, their menus, splits and plain baselines."""
