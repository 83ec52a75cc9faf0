"""Builds the images of deploy/docker and runs them, on a machine without a container engine's daemon."""
