"""Helpers of the tests: an independent reference, small models, runs, processes, clusters."""
