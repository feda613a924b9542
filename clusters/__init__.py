"""Runs sweeps on clusters: up, run, follow, bring home, down."""
