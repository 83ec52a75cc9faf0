"""Coordinator: takes pipelines from users and drives them through the workers, durably."""
