"""The GPU campaign: build, probe, test, time and fit, in stages small enough for a borrowed GPU."""
