"""Drills: small real sweeps whose processes are killed, compared with ones that were left alone."""
