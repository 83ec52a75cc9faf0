"""Measures exported graphs and builds engines on the device that it runs on. No torch."""
