"""The four services, and what they share in services.common."""
